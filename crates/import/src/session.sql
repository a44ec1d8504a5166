-- What the conversions of one session share. All of it is gone with the session.

-- Compiling a conversion takes longer than it saves.
SET jit = off;

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

-- The JSON that a text is, or its stand-in; NULL for a blank text.
CREATE FUNCTION pg_temp.document_of(source text) RETURNS jsonb
LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    IF source !~ '\S' THEN
        RETURN NULL;
    END IF;
    IF pg_temp.is_readable(source::jsonb) THEN
        RETURN source::jsonb;
    END IF;
    RETURN pg_temp.wrapped(source);
EXCEPTION
    -- Not JSON, or with a zero character, which jsonb can't hold.
    WHEN data_exception OR program_limit_exceeded THEN
        RETURN pg_temp.wrapped(source);
END
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

-- The same of a text that isn't JSON: stricter, for no key or quote tells where a value begins.
CREATE FUNCTION pg_temp.text_has_card_secret(source text) RETURNS boolean
LANGUAGE sql IMMUTABLE AS $$
    SELECT source ~ '(^|[^0-9.])[2-68]([ -]?[0-9]){12,18}([^0-9]|$)'
        OR source ~* '(number|pan|cvv2?|cvc2?|csc|cvn|(security|verification)[ _-]?(code|value))'
            '["'']?\s*[:=]\s*["'']?[0-9]';
$$;

-- Without those keys, and with a word for each value that looks like a card number.
CREATE FUNCTION pg_temp.without_card_secrets(document jsonb) RETURNS jsonb
LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    RETURN CASE jsonb_typeof(document)
        WHEN 'object' THEN (
            SELECT coalesce(jsonb_object_agg(key, pg_temp.without_card_secrets(value)), '{}')
              FROM jsonb_each(document)
             WHERE NOT pg_temp.has_card_secret(jsonb_build_object(key, NULL))
        )
        WHEN 'array' THEN (
            SELECT coalesce(jsonb_agg(pg_temp.without_card_secrets(value) ORDER BY position), '[]')
              FROM jsonb_array_elements(document) WITH ORDINALITY AS element (value, position)
        )
        ELSE CASE WHEN pg_temp.has_card_secret(document) THEN '"removed"' ELSE document END
    END;
END
$$;
