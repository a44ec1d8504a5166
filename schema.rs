// @generated automatically by Diesel CLI.

pub mod sql_types {
    #[derive(diesel::query_builder::QueryId, diesel::sql_types::SqlType)]
    #[diesel(postgres_type(name = "auth_token_type"))]
    pub struct AuthTokenType;

    #[derive(diesel::query_builder::QueryId, diesel::sql_types::SqlType)]
    #[diesel(postgres_type(name = "billing_cycle"))]
    pub struct BillingCycle;

    #[derive(diesel::query_builder::QueryId, diesel::sql_types::SqlType)]
    #[diesel(postgres_type(name = "credit_source"))]
    pub struct CreditSource;

    #[derive(diesel::query_builder::QueryId, diesel::sql_types::SqlType)]
    #[diesel(postgres_type(name = "mcp_auth_type"))]
    pub struct McpAuthType;

    #[derive(diesel::query_builder::QueryId, diesel::sql_types::SqlType)]
    #[diesel(postgres_type(name = "mcp_instance_status"))]
    pub struct McpInstanceStatus;

    #[derive(diesel::query_builder::QueryId, diesel::sql_types::SqlType)]
    #[diesel(postgres_type(name = "mcp_oauth_status"))]
    pub struct McpOauthStatus;

    #[derive(diesel::query_builder::QueryId, diesel::sql_types::SqlType)]
    #[diesel(postgres_type(name = "payment_gateway"))]
    pub struct PaymentGateway;

    #[derive(diesel::query_builder::QueryId, diesel::sql_types::SqlType)]
    #[diesel(postgres_type(name = "plan_payment_status"))]
    pub struct PlanPaymentStatus;

    #[derive(diesel::query_builder::QueryId, diesel::sql_types::SqlType)]
    #[diesel(postgres_type(name = "plan_type"))]
    pub struct PlanType;

    #[derive(diesel::query_builder::QueryId, diesel::sql_types::SqlType)]
    #[diesel(postgres_type(name = "subscription_plan"))]
    pub struct SubscriptionPlan;

    #[derive(diesel::query_builder::QueryId, diesel::sql_types::SqlType)]
    #[diesel(postgres_type(name = "subscription_status"))]
    pub struct SubscriptionStatus;

    #[derive(diesel::query_builder::QueryId, diesel::sql_types::SqlType)]
    #[diesel(postgres_type(name = "token_audit_status"))]
    pub struct TokenAuditStatus;

    #[derive(diesel::query_builder::QueryId, diesel::sql_types::SqlType)]
    #[diesel(postgres_type(name = "transaction_status"))]
    pub struct TransactionStatus;

    #[derive(diesel::query_builder::QueryId, diesel::sql_types::SqlType)]
    #[diesel(postgres_type(name = "transaction_type"))]
    pub struct TransactionType;

    #[derive(diesel::query_builder::QueryId, diesel::sql_types::SqlType)]
    #[diesel(postgres_type(name = "webhook_status"))]
    pub struct WebhookStatus;
}

diesel::table! {
    use diesel::sql_types::*;
    use super::sql_types::CreditSource;

    /// Money that the platform owes a user.
    account_credits (id) {
        id -> Uuid,
        user_id -> Uuid,
        /// In minor units of currency (paise for INR); negative is a debit.
        amount -> Int8,
        currency -> Text,
        description -> Nullable<Text>,
        source_type -> Nullable<CreditSource>,
        /// Id of what the credit is for, such as a refund. A refund or downgrade is credited only once.
        source_id -> Nullable<Text>,
        is_used -> Bool,
        used_at -> Nullable<Timestamptz>,
        /// NULL: never expires.
        expires_at -> Nullable<Timestamptz>,
        created_at -> Timestamptz,
        updated_at -> Timestamptz,
    }
}

diesel::table! {
    use diesel::sql_types::*;
    use super::sql_types::AuthTokenType;

    /// One-time codes, links and refresh tokens, stored as digests.
    auth_tokens (id) {
        id -> Uuid,
        user_id -> Uuid,
        /// Keyed digest of the secret, 32 bytes; never the secret itself.
        token -> Bytea,
        #[sql_name = "type"]
        type_ -> AuthTokenType,
        expires_at -> Timestamptz,
        /// True once the token is consumed, replaced or revoked.
        is_used -> Bool,
        /// Number of wrong guesses so far.
        attempts -> Int2,
        created_at -> Timestamptz,
        updated_at -> Timestamptz,
        /// When it was consumed, replaced or revoked.
        used_at -> Nullable<Timestamptz>,
        /// The session of a refresh token: the tokens that descend from one sign-in.
        family_id -> Nullable<Uuid>,
        /// When the session ends, however often its token is replaced; at most 365 days after sign-in.
        session_expires_at -> Nullable<Timestamptz>,
    }
}

diesel::table! {
    use diesel::sql_types::*;
    use super::sql_types::McpOauthStatus;

    /// Credentials of an instance: an API key, or an OAuth client with its tokens.
    mcp_credentials (credential_id) {
        credential_id -> Uuid,
        instance_id -> Uuid,
        /// Sealed by the application.
        api_key -> Nullable<Bytea>,
        client_id -> Nullable<Text>,
        /// Sealed by the application.
        client_secret -> Nullable<Bytea>,
        /// Sealed by the application.
        access_token -> Nullable<Bytea>,
        /// Sealed by the application.
        refresh_token -> Nullable<Bytea>,
        /// When access_token expires; NULL: unknown or never.
        token_expires_at -> Nullable<Timestamptz>,
        /// Granted scopes, separated by spaces (RFC 6749, 3.3).
        token_scope -> Nullable<Text>,
        /// Authoritative; mcp_service_table has a copy. An API key is completed from the start.
        oauth_status -> McpOauthStatus,
        /// When oauth_status left pending, whatever the outcome; NULL exactly while pending.
        oauth_completed_at -> Nullable<Timestamptz>,
        /// URL where the user grants access, sealed by the application: it contains the state.
        oauth_authorization_url -> Nullable<Bytea>,
        /// Keyed digest of the state of the pending authorization (RFC 6749, 10.12). Consumed once.
        oauth_state -> Nullable<Bytea>,
        /// When the state can no longer be consumed.
        oauth_state_expires_at -> Nullable<Timestamptz>,
        /// PKCE verifier of the pending authorization (RFC 7636), sealed by the application.
        oauth_code_verifier -> Nullable<Bytea>,
        /// Until then a worker refreshes the tokens, or nobody does after a failure; NULL: nobody does.
        refresh_leased_until -> Nullable<Timestamptz>,
        created_at -> Timestamptz,
        updated_at -> Timestamptz,
        /// Increased by a trigger with every change, except of a lease.
        version -> Int4,
        /// When version was last increased.
        last_modified -> Timestamptz,
    }
}

diesel::table! {
    use diesel::sql_types::*;
    use super::sql_types::McpOauthStatus;
    use super::sql_types::McpInstanceStatus;

    /// Instances: connections of users to MCP services. The services are in mcp_table.
    mcp_service_table (instance_id) {
        /// Part of the instance's public URL, and therefore random.
        instance_id -> Uuid,
        user_id -> Uuid,
        mcp_service_id -> Uuid,
        /// Copy of mcp_credentials.oauth_status, maintained by a trigger.
        oauth_status -> McpOauthStatus,
        status -> McpInstanceStatus,
        /// NULL: never expires.
        expires_at -> Nullable<Timestamptz>,
        last_used_at -> Nullable<Timestamptz>,
        /// Number of calls through this instance.
        usage_count -> Int8,
        /// Name that the user gave the instance.
        custom_name -> Nullable<Text>,
        /// How often expires_at was extended.
        renewed_count -> Int4,
        last_renewed_at -> Nullable<Timestamptz>,
        credentials_updated_at -> Nullable<Timestamptz>,
        created_at -> Timestamptz,
        updated_at -> Timestamptz,
        /// Increased by a trigger with every change, except when a call is recorded.
        version -> Int4,
        /// When version was last increased.
        last_modified -> Timestamptz,
    }
}

diesel::table! {
    use diesel::sql_types::*;
    use super::sql_types::McpAuthType;

    /// Registry of MCP services. Their instances are in mcp_service_table.
    mcp_table (mcp_service_id) {
        mcp_service_id -> Uuid,
        mcp_service_name -> Text,
        display_name -> Text,
        description -> Nullable<Text>,
        icon_url_path -> Nullable<Text>,
        /// TCP port on which the service listens.
        port -> Int4,
        /// How instances of this service authenticate.
        #[sql_name = "type"]
        type_ -> McpAuthType,
        /// False: no new instances, and the existing ones can't be called.
        is_active -> Bool,
        /// Number of instances ever created. Maintained by triggers at commit.
        total_instances_created -> Int8,
        /// Number of instances that are active and completed. Maintained by triggers at commit.
        active_instances_count -> Int8,
        created_at -> Timestamptz,
        /// Not changed when a counter changes.
        updated_at -> Timestamptz,
    }
}

diesel::table! {
    use diesel::sql_types::*;
    use super::sql_types::TransactionType;
    use super::sql_types::TransactionStatus;

    /// Payments, refunds, fees and adjustments.
    subscription_transactions (id) {
        id -> Uuid,
        user_id -> Uuid,
        subscription_id -> Nullable<Uuid>,
        /// Payment id at Razorpay. Unique: a payment that is reported twice is stored once.
        razorpay_payment_id -> Nullable<Text>,
        razorpay_order_id -> Nullable<Text>,
        transaction_type -> TransactionType,
        /// Gross amount in minor units of currency (paise for INR); negative only for a refund.
        amount -> Int8,
        /// In minor units of currency.
        tax_amount -> Int8,
        /// In minor units of currency.
        discount_amount -> Int8,
        /// Fee of the gateway, in minor units of currency.
        fee_amount -> Int8,
        /// Amount that remains after tax, discount and fee, in minor units of currency.
        net_amount -> Int8,
        /// ISO 4217 code, in capitals.
        currency -> Text,
        /// Rupees per unit of currency.
        exchange_rate -> Numeric,
        status -> TransactionStatus,
        gateway_status -> Nullable<Text>,
        method -> Nullable<Text>,
        /// What may be shown of the means of payment; never a card number or security code.
        method_details_json -> Nullable<Jsonb>,
        gateway_response_json -> Nullable<Jsonb>,
        description -> Nullable<Text>,
        receipt_number -> Nullable<Text>,
        invoice_id -> Nullable<Text>,
        failure_reason -> Nullable<Text>,
        failure_code -> Nullable<Text>,
        retry_count -> Int4,
        /// The payment to which this refund or adjustment belongs.
        parent_transaction_id -> Nullable<Uuid>,
        processed_at -> Nullable<Timestamptz>,
        settled_at -> Nullable<Timestamptz>,
        refunded_at -> Nullable<Timestamptz>,
        created_at -> Timestamptz,
        updated_at -> Timestamptz,
    }
}

diesel::table! {
    use diesel::sql_types::*;
    use super::sql_types::TokenAuditStatus;

    /// Log of operations on tokens and credentials. Append-only; rows can be deleted after 90 days. Partitioned by month (UTC): maintain_token_audit_log() makes and drops the partitions.
    token_audit_log (instance_id, created_at, audit_id) {
        audit_id -> Int8,
        /// Not a foreign key: the instance may have been deleted.
        instance_id -> Uuid,
        /// Not a foreign key: the user may have been deleted. NULL: done by the system.
        user_id -> Nullable<Uuid>,
        /// What was done, such as token_refresh.
        operation -> Text,
        status -> TokenAuditStatus,
        /// How it was done, such as oauth or api_key.
        method -> Nullable<Text>,
        error_type -> Nullable<Text>,
        error_message -> Nullable<Text>,
        /// Must not contain a secret.
        metadata -> Nullable<Jsonb>,
        /// Set by the database. Only the owner can insert an older row; none is from the future.
        created_at -> Timestamptz,
    }
}

diesel::table! {
    /// Billing address and saved cards of a user.
    user_billing_details (billing_id) {
        billing_id -> Uuid,
        user_id -> Uuid,
        address_line1 -> Text,
        address_line2 -> Nullable<Text>,
        city -> Text,
        state -> Text,
        country -> Text,
        zip_code -> Text,
        /// JSON array of gateway tokens with the card details that may be shown; never a card number or security code.
        cards -> Jsonb,
        /// Id of the default card in cards.
        default_card_id -> Nullable<Text>,
        created_at -> Timestamptz,
        updated_at -> Timestamptz,
    }
}

diesel::table! {
    use diesel::sql_types::*;
    use super::sql_types::PlanType;
    use super::sql_types::PlanPaymentStatus;

    /// What each user may do. One row per user; a trigger gives every new user the free plan.
    user_plans (plan_id) {
        plan_id -> Uuid,
        user_id -> Uuid,
        plan_type -> PlanType,
        /// How many instances may be active and completed at once; NULL: any number. If it falls below the current number, all of the user's active instances are deactivated.
        max_instances -> Nullable<Int4>,
        /// Features enabled for this user, a JSON object.
        features -> Jsonb,
        /// From this time on no instance can be activated; NULL: the plan does not end.
        expires_at -> Nullable<Timestamptz>,
        created_at -> Timestamptz,
        updated_at -> Timestamptz,
        /// Subscription id at the gateway that pays for the plan (Stripe or Razorpay).
        subscription_id -> Nullable<Text>,
        /// Customer id at the gateway that pays for the plan. Unique, because saved cards are looked up by it.
        customer_id -> Nullable<Text>,
        /// none: nobody pays for this plan.
        payment_status -> PlanPaymentStatus,
    }
}

diesel::table! {
    use diesel::sql_types::*;
    use super::sql_types::SubscriptionPlan;
    use super::sql_types::SubscriptionStatus;
    use super::sql_types::BillingCycle;

    /// Subscriptions sold to users, past and present, with their state at Razorpay. user_plans decides what a user may do.
    user_subscriptions (id) {
        id -> Uuid,
        user_id -> Uuid,
        plan_code -> SubscriptionPlan,
        razorpay_subscription_id -> Nullable<Text>,
        /// Customer id of this subscription at Razorpay; users.razorpay_customer_id is the current one.
        razorpay_customer_id -> Nullable<Text>,
        /// A user has at most one subscription that is active, past_due or paused.
        status -> SubscriptionStatus,
        billing_cycle -> BillingCycle,
        current_period_start -> Timestamptz,
        current_period_end -> Timestamptz,
        trial_start -> Nullable<Timestamptz>,
        trial_end -> Nullable<Timestamptz>,
        cancel_at_period_end -> Bool,
        cancelled_at -> Nullable<Timestamptz>,
        cancellation_reason -> Nullable<Text>,
        cancellation_feedback -> Nullable<Text>,
        pause_count -> Int4,
        paused_at -> Nullable<Timestamptz>,
        resume_at -> Nullable<Timestamptz>,
        next_billing_date -> Nullable<Timestamptz>,
        /// In paise; negative in the user's favour.
        proration_amount -> Int8,
        /// In paise.
        discount_amount -> Int8,
        /// In paise.
        tax_amount -> Int8,
        /// In paise.
        total_amount -> Int8,
        auto_renewal -> Bool,
        /// How many days the subscription may be past due before it is halted.
        grace_period_days -> Int4,
        failed_payment_count -> Int4,
        last_payment_attempt -> Nullable<Timestamptz>,
        /// When the gateway made the status what it is; NULL: no event has. An older event changes no status.
        status_event_at -> Nullable<Timestamptz>,
        created_at -> Timestamptz,
        updated_at -> Timestamptz,
    }
}

diesel::table! {
    /// User accounts. A user with financial rows can't be deleted, only anonymised, for good.
    users (id) {
        id -> Uuid,
        first_name -> Text,
        /// May be empty: not everyone has a last name.
        last_name -> Text,
        /// Canonical form: lowercase, exactly one @, no white space or control character, the domain in ASCII.
        email -> Text,
        /// Password hash in PHC or crypt form ($id$…$hash, at most 512 characters), never the password itself. NULL: the user signs in another way.
        password -> Nullable<Text>,
        /// True once the user has proved that mail arrives at email.
        email_verified -> Bool,
        /// Customer id at Razorpay. Unique, because saved cards are looked up by it.
        razorpay_customer_id -> Nullable<Text>,
        created_at -> Timestamptz,
        updated_at -> Timestamptz,
        last_login_at -> Nullable<Timestamptz>,
        /// False: deactivated; the user can't sign in.
        is_active -> Bool,
    }
}

diesel::table! {
    use diesel::sql_types::*;
    use super::sql_types::PaymentGateway;
    use super::sql_types::WebhookStatus;

    /// Webhooks of the payment gateways: recorded on arrival, then processed.
    webhook_events (event_id) {
        event_id -> Uuid,
        /// Event id at the gateway; unique together with payment_gateway.
        external_event_id -> Text,
        event_type -> Text,
        payment_gateway -> PaymentGateway,
        /// When the event was processed, skipped or last failed; NULL exactly while pending.
        processed_at -> Nullable<Timestamptz>,
        /// What the gateway sent; {} once it is erased.
        payload -> Jsonb,
        processing_status -> WebhookStatus,
        /// Why processing failed.
        error_message -> Nullable<Text>,
        created_at -> Timestamptz,
        /// Whom the event is about. Set when it is processed; the payload of a linked event is erased with the user.
        user_id -> Nullable<Uuid>,
        /// Number of times that a worker has claimed the event.
        attempts -> Int4,
        /// Not claimed before: the end of a lease, or of the pause after a failure.
        available_at -> Timestamptz,
    }
}

diesel::joinable!(account_credits -> users (user_id));
diesel::joinable!(auth_tokens -> users (user_id));
diesel::joinable!(mcp_credentials -> mcp_service_table (instance_id));
diesel::joinable!(mcp_service_table -> mcp_table (mcp_service_id));
diesel::joinable!(mcp_service_table -> users (user_id));
diesel::joinable!(subscription_transactions -> user_subscriptions (subscription_id));
diesel::joinable!(subscription_transactions -> users (user_id));
diesel::joinable!(user_billing_details -> users (user_id));
diesel::joinable!(user_plans -> users (user_id));
diesel::joinable!(user_subscriptions -> users (user_id));
diesel::joinable!(webhook_events -> users (user_id));

diesel::allow_tables_to_appear_in_same_query!(
    account_credits,
    auth_tokens,
    mcp_credentials,
    mcp_service_table,
    mcp_table,
    subscription_transactions,
    token_audit_log,
    user_billing_details,
    user_plans,
    user_subscriptions,
    users,
    webhook_events,
);
