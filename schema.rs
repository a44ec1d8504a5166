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

    /// Money the platform owes a user.
    account_credits (id) {
        id -> Uuid,
        user_id -> Uuid,
        /// Minor units of currency (paise); negative is a debit.
        amount -> Int8,
        currency -> Text,
        description -> Nullable<Text>,
        source_type -> Nullable<CreditSource>,
        /// What the credit is for, in the words of its source. A refund or downgrade is credited once.
        source_id -> Nullable<Text>,
        is_used -> Bool,
        used_at -> Nullable<Timestamptz>,
        /// NULL: never.
        expires_at -> Nullable<Timestamptz>,
        created_at -> Timestamptz,
        updated_at -> Timestamptz,
    }
}

diesel::table! {
    use diesel::sql_types::*;
    use super::sql_types::AuthTokenType;

    /// One-time codes, links and refresh tokens, as digests.
    auth_tokens (id) {
        id -> Uuid,
        user_id -> Uuid,
        /// Keyed digest of the secret, 32 octets; never the secret itself.
        token -> Bytea,
        #[sql_name = "type"]
        type_ -> AuthTokenType,
        expires_at -> Timestamptz,
        /// Consumed, replaced or revoked.
        is_used -> Bool,
        /// Wrong guesses so far.
        attempts -> Int2,
        created_at -> Timestamptz,
        updated_at -> Timestamptz,
    }
}

diesel::table! {
    use diesel::sql_types::*;
    use super::sql_types::McpOauthStatus;

    /// The credentials of an instance: an API key, or an OAuth client and its tokens.
    mcp_credentials (credential_id) {
        credential_id -> Uuid,
        instance_id -> Uuid,
        /// Ciphertext.
        api_key -> Nullable<Bytea>,
        client_id -> Nullable<Text>,
        /// Ciphertext.
        client_secret -> Nullable<Bytea>,
        /// Ciphertext.
        access_token -> Nullable<Bytea>,
        /// Ciphertext.
        refresh_token -> Nullable<Bytea>,
        /// When access_token ends; NULL: unknown or never.
        token_expires_at -> Nullable<Timestamptz>,
        /// Scopes granted, separated by spaces (RFC 6749, 3.3).
        token_scope -> Nullable<Text>,
        /// The truth; mcp_service_table has a copy. An API key is completed at once.
        oauth_status -> McpOauthStatus,
        /// When oauth_status left pending.
        oauth_completed_at -> Nullable<Timestamptz>,
        /// Where the user grants access; secret while pending, as it holds the state.
        oauth_authorization_url -> Nullable<Text>,
        /// The state parameter of the pending authorisation (RFC 6749, 10.12); consumed once.
        oauth_state -> Nullable<Text>,
        created_at -> Timestamptz,
        updated_at -> Timestamptz,
        /// Goes up by one with each change; never set by hand.
        version -> Int4,
        /// When version went up last.
        last_modified -> Timestamptz,
    }
}

diesel::table! {
    use diesel::sql_types::*;
    use super::sql_types::McpOauthStatus;
    use super::sql_types::McpInstanceStatus;

    /// Instances: users' connections to MCP services.
    mcp_service_table (instance_id) {
        /// Stands in the instance's public URL, and is random for that reason.
        instance_id -> Uuid,
        user_id -> Uuid,
        mcp_service_id -> Uuid,
        /// Copy of mcp_credentials.oauth_status, kept by a trigger.
        oauth_status -> McpOauthStatus,
        status -> McpInstanceStatus,
        /// NULL: never.
        expires_at -> Nullable<Timestamptz>,
        last_used_at -> Nullable<Timestamptz>,
        /// Calls through this instance.
        usage_count -> Int8,
        /// The user's own name for it.
        custom_name -> Nullable<Text>,
        renewed_count -> Int4,
        last_renewed_at -> Nullable<Timestamptz>,
        credentials_updated_at -> Nullable<Timestamptz>,
        created_at -> Timestamptz,
        updated_at -> Timestamptz,
        /// Goes up by one with each change but the counting of calls; never set by hand.
        version -> Int4,
        /// When version went up last.
        last_modified -> Timestamptz,
    }
}

diesel::table! {
    use diesel::sql_types::*;
    use super::sql_types::McpAuthType;

    /// The registry of MCP services.
    mcp_table (mcp_service_id) {
        mcp_service_id -> Uuid,
        mcp_service_name -> Text,
        display_name -> Text,
        description -> Nullable<Text>,
        icon_url_path -> Nullable<Text>,
        /// TCP port on which the service listens.
        port -> Int4,
        #[sql_name = "type"]
        type_ -> McpAuthType,
        /// False: no new instances; those that exist go on.
        is_active -> Bool,
        /// Instances ever created. Kept by triggers, when a transaction commits.
        total_instances_created -> Int8,
        /// Instances that are active and completed. Kept by triggers, when a transaction commits.
        active_instances_count -> Int8,
        created_at -> Timestamptz,
        /// Not touched by the counters.
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
        /// Unique: a payment that is reported twice is one row.
        razorpay_payment_id -> Nullable<Text>,
        razorpay_order_id -> Nullable<Text>,
        transaction_type -> TransactionType,
        /// Gross, in minor units of currency (paise); negative only for a refund.
        amount -> Int8,
        /// Minor units of currency.
        tax_amount -> Int8,
        /// Minor units of currency.
        discount_amount -> Int8,
        /// The gateway's fee, in minor units of currency.
        fee_amount -> Int8,
        /// What is left after tax, discount and fee, in minor units of currency.
        net_amount -> Int8,
        /// ISO 4217 code.
        currency -> Text,
        /// Rupees for one unit of currency.
        exchange_rate -> Numeric,
        status -> TransactionStatus,
        gateway_status -> Nullable<Text>,
        method -> Nullable<Text>,
        method_details_json -> Nullable<Jsonb>,
        gateway_response_json -> Nullable<Jsonb>,
        description -> Nullable<Text>,
        receipt_number -> Nullable<Text>,
        invoice_id -> Nullable<Text>,
        failure_reason -> Nullable<Text>,
        failure_code -> Nullable<Text>,
        retry_count -> Int4,
        /// The payment that a refund or adjustment belongs to.
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

    /// What was done with tokens and credentials. Append-only for 90 days.
    token_audit_log (audit_id) {
        audit_id -> Int8,
        /// No foreign key: the instance may be gone.
        instance_id -> Uuid,
        /// No foreign key: the user may be gone. NULL: done by the system.
        user_id -> Nullable<Uuid>,
        /// What was done, such as token_refresh.
        operation -> Text,
        status -> TokenAuditStatus,
        /// How, such as oauth or api_key.
        method -> Nullable<Text>,
        error_type -> Nullable<Text>,
        error_message -> Nullable<Text>,
        /// Never a secret.
        metadata -> Nullable<Jsonb>,
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
        /// Gateway tokens and what may be shown of a card; never its number or security code.
        cards -> Jsonb,
        /// The id of one of cards.
        default_card_id -> Nullable<Text>,
        created_at -> Timestamptz,
        updated_at -> Timestamptz,
    }
}

diesel::table! {
    use diesel::sql_types::*;
    use super::sql_types::PlanType;
    use super::sql_types::PlanPaymentStatus;

    /// The plan of each user. Every user has one from the first moment on.
    user_plans (plan_id) {
        plan_id -> Uuid,
        user_id -> Uuid,
        plan_type -> PlanType,
        /// How many instances may be active and completed at a time; NULL: any number. When it falls below what is active, those are switched off.
        max_instances -> Nullable<Int4>,
        /// Features that are switched on for this user, an object.
        features -> Jsonb,
        /// From then on no instance can be activated; NULL: never.
        expires_at -> Nullable<Timestamptz>,
        created_at -> Timestamptz,
        updated_at -> Timestamptz,
        /// Subscription at the payment gateway.
        subscription_id -> Nullable<Text>,
        /// Customer at the payment gateway. Unique, because saved cards are read by it.
        customer_id -> Nullable<Text>,
        /// None: nobody pays for this plan.
        payment_status -> PlanPaymentStatus,
    }
}

diesel::table! {
    use diesel::sql_types::*;
    use super::sql_types::SubscriptionPlan;
    use super::sql_types::SubscriptionStatus;
    use super::sql_types::BillingCycle;

    /// Subscriptions of users at the payment gateway, past and present.
    user_subscriptions (id) {
        id -> Uuid,
        user_id -> Uuid,
        plan_code -> SubscriptionPlan,
        razorpay_subscription_id -> Nullable<Text>,
        razorpay_customer_id -> Nullable<Text>,
        /// At most one of active, past_due and paused per user.
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
        /// Paise; negative: in the user's favour.
        proration_amount -> Int8,
        /// Paise.
        discount_amount -> Int8,
        /// Paise.
        tax_amount -> Int8,
        /// Paise.
        total_amount -> Int8,
        auto_renewal -> Bool,
        /// Days past due before the subscription is halted.
        grace_period_days -> Int4,
        failed_payment_count -> Int4,
        last_payment_attempt -> Nullable<Timestamptz>,
        created_at -> Timestamptz,
        updated_at -> Timestamptz,
    }
}

diesel::table! {
    /// People with an account. Never deleted while they have financial rows: anonymised instead.
    users (id) {
        id -> Uuid,
        first_name -> Text,
        /// May be empty: not everybody has one.
        last_name -> Text,
        /// Canonical: lower case, without white space, one @.
        email -> Text,
        /// Password hash in PHC or crypt form ($…), never the password. NULL: signs in by other means.
        password -> Nullable<Text>,
        email_verified -> Bool,
        /// Customer at Razorpay. Unique, because saved cards are read by it.
        razorpay_customer_id -> Nullable<Text>,
        created_at -> Timestamptz,
        updated_at -> Timestamptz,
        last_login_at -> Nullable<Timestamptz>,
        /// False: deactivated, can't sign in.
        is_active -> Bool,
    }
}

diesel::table! {
    use diesel::sql_types::*;
    use super::sql_types::PaymentGateway;
    use super::sql_types::WebhookStatus;

    /// Webhooks of the payment gateways: recorded first, processed after.
    webhook_events (event_id) {
        event_id -> Uuid,
        /// The gateway's id of the event; unique together with the gateway.
        external_event_id -> Text,
        event_type -> Text,
        payment_gateway -> PaymentGateway,
        /// When it was processed, skipped or failed last; NULL exactly while pending.
        processed_at -> Nullable<Timestamptz>,
        payload -> Jsonb,
        processing_status -> WebhookStatus,
        /// Why it failed.
        error_message -> Nullable<Text>,
        created_at -> Timestamptz,
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
