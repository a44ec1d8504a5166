-- What the conversions of one session share. All of it is gone with the session.

-- Compiling a conversion takes longer than it saves.
SET jit = off;

CREATE FUNCTION pg_temp.try_jsonb(document text) RETURNS jsonb
LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    RETURN document::jsonb;
EXCEPTION
    -- Not JSON, or with a zero character, which jsonb can't hold.
    WHEN data_exception OR program_limit_exceeded THEN
        RETURN NULL;
END
$$;

-- What the new tables accept: at most 100 levels, and no number beyond double precision.
CREATE FUNCTION pg_temp.is_readable(document jsonb) RETURNS boolean
LANGUAGE sql IMMUTABLE AS $$
    SELECT coalesce(
        NOT jsonb_path_exists(document, 'strict $.**{100 to last}')
        AND NOT jsonb_path_exists(
            document, 'strict $.** ? (@ > "1e308".double() || @ < "-1e308".double())'
        ),
        true
    );
$$;

-- A stand-in for a document that the new tables don't accept: its text.
CREATE FUNCTION pg_temp.wrapped(document text) RETURNS jsonb
LANGUAGE sql IMMUTABLE AS $$
    SELECT jsonb_build_object('unreadable', document);
$$;

CREATE TEMP TABLE emails (
    id    uuid PRIMARY KEY,
    email text
);

-- PCI DSS 3.3: what 001 and 007 refuse in the details of a payment and in cards.
CREATE FUNCTION pg_temp.has_card_secret(document jsonb) RETURNS boolean
LANGUAGE sql IMMUTABLE AS $$
    SELECT coalesce(
        jsonb_path_exists(
            document,
            'strict $.** ? (@.type() == "object").keyvalue() ? (@.key like_regex'
            ' "^(card[ _-]?)?(number|pan|cvv2?|cvc2?|csc|cvn|security[ _-]?code'
            '|verification[ _-]?(code|value))$" flag "i")'
        )
        OR document::text
            ~ '(^|[^0-9.])[2-68][0-9]{12,18}([^0-9]|$)|[" ][2-68]([ -]?[0-9]){12,18}[" ]',
        false
    );
$$;
