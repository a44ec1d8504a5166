-- Billing address and saved cards. A card is a gateway token with the details that may be shown.
-- Card numbers and security codes must never be stored here (PCI DSS 3.3, 3.5).

SET LOCAL lock_timeout = '5s';

-- A CHECK can't aggregate, and a path expression that compares each card with each other takes
-- seconds. Not STRICT, and with a body that is parsed here: it means the same in every search_path.
CREATE FUNCTION card_ids_differ(cards jsonb) RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN (SELECT count(*) = count(DISTINCT id) FROM jsonb_path_query(cards, '$[*].id') AS id);
COMMENT ON FUNCTION card_ids_differ(jsonb) IS 'Whether no two cards have the same id.';

CREATE TABLE user_billing_details (
    billing_id      uuid        NOT NULL DEFAULT gen_random_uuid(),
    user_id         uuid        NOT NULL,
    address_line1   text        NOT NULL,
    address_line2   text,
    city            text        NOT NULL,
    state           text        NOT NULL,
    country         text        NOT NULL,
    zip_code        text        NOT NULL,
    cards           jsonb       NOT NULL DEFAULT '[]',
    default_card_id text,
    created_at      timestamptz NOT NULL DEFAULT now(),
    updated_at      timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT user_billing_details_pkey PRIMARY KEY (billing_id),
    CONSTRAINT user_billing_details_timestamps_check CHECK (
        GREATEST(created_at, updated_at) AT TIME ZONE 'UTC' < '10000-01-01'
        AND LEAST(created_at, updated_at) AT TIME ZONE 'UTC' >= '0001-01-01'
    ),
    CONSTRAINT user_billing_details_user_id_fkey
        FOREIGN KEY (user_id) REFERENCES users (id) ON DELETE CASCADE,
    CONSTRAINT unique_user_billing UNIQUE (user_id),
    CONSTRAINT user_billing_details_address_line1_check
        CHECK (char_length(address_line1) BETWEEN 1 AND 255),
    CONSTRAINT user_billing_details_address_line2_check
        CHECK (char_length(address_line2) <= 255),
    CONSTRAINT user_billing_details_city_check CHECK (char_length(city) BETWEEN 1 AND 100),
    CONSTRAINT user_billing_details_state_check CHECK (char_length(state) BETWEEN 1 AND 100),
    CONSTRAINT user_billing_details_country_check CHECK (char_length(country) BETWEEN 1 AND 100),
    CONSTRAINT user_billing_details_zip_code_check
        CHECK (char_length(zip_code) BETWEEN 1 AND 20),
    CONSTRAINT user_billing_details_cards_check CHECK (jsonb_typeof(cards) = 'array'),
    -- The cards that have exactly these keys, with values of these shapes, are all cards; and their
    -- numbers have no fraction, which only the text tells (1.0). No value looks like a card number:
    -- 001 says how one looks.
    CONSTRAINT user_billing_details_no_card_secrets CHECK (
        cards = jsonb_path_query_array(
            cards,
            'strict $[*] ? (@.id like_regex "\\S" && @.token like_regex "\\S"'
            ' && @.brand like_regex "\\S" && @.last4 like_regex "^[0-9]{4}$"'
            ' && @.exp_month >= 1 && @.exp_month <= 12'
            ' && @.exp_year >= 1000 && @.exp_year <= 9999'
            ' && !exists(@.keyvalue() ? (!(@.key like_regex'
            ' "^(id|token|brand|last4|exp_month|exp_year)$"))))',
            silent => true
        )
        AND cards::text !~ '"exp_(month|year)": [0-9]+\.'
        AND cards::text
            !~ '(^|[^0-9.])[2-68][0-9]{12,18}([^0-9]|$)|[" ][2-68]([ -]?[0-9]){12,18}[" ]'
    ),
    CONSTRAINT user_billing_details_default_card CHECK (
        default_card_id IS NULL
        OR cards @> jsonb_build_array(jsonb_build_object('id', default_card_id))
    ),
    CONSTRAINT user_billing_details_unique_card_ids CHECK (card_ids_differ(cards))
);
CREATE TRIGGER user_billing_details_update_updated_at
    BEFORE UPDATE ON user_billing_details
    FOR EACH ROW WHEN (OLD.* IS DISTINCT FROM NEW.*)
    EXECUTE FUNCTION update_updated_at_column();

COMMENT ON TABLE user_billing_details IS 'Billing address and saved cards of a user.';
COMMENT ON COLUMN user_billing_details.cards IS
    'JSON array of gateway tokens with the card details that may be shown; '
    'never a card number or security code.';
COMMENT ON COLUMN user_billing_details.default_card_id IS 'Id of the default card in cards.';
