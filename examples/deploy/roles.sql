-- Runs once, when the database is created. The service logs in as app_user; `bruhmcp-db grant` gives
-- the roles their rights.
\set password `cat /run/secrets/app_password`
CREATE ROLE app_user LOGIN PASSWORD :'password';
-- The operator: GRANT app_admin TO a person's role.
CREATE ROLE app_admin NOLOGIN;
ALTER ROLE app_user SET statement_timeout = '30s';
ALTER ROLE app_user SET idle_in_transaction_session_timeout = '60s';
