//! Why rows are converted or left behind.

/// A reason code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReasonCode {
    /// The code.
    pub code: &'static str,
    /// The column concerned; empty where it is more than one.
    pub column: &'static str,
    /// What was found, and what became of it.
    pub meaning: &'static str,
}

const fn reason(code: &'static str, column: &'static str, meaning: &'static str) -> ReasonCode {
    ReasonCode {
        code,
        column,
        meaning,
    }
}

/// All reason codes. `refused:` and the name of a constraint is the reason of a row that the new
/// table refuses for none of these.
pub const REASONS: &[ReasonCode] = &[
    // Every table
    reason(
        "null_default",
        "",
        "NULL in a column that has a default: the default, or for a time that of the row's other time, or of the import.",
    ),
    reason(
        "time_out_of_range",
        "",
        "Infinite, or before the year 1 or after 9999: as NULL.",
    ),
    reason(
        "negative_count",
        "",
        "A negative count: 0, or for a version 1.",
    ),
    reason("gateway_id_empty", "", "An empty id of the gateway: NULL."),
    reason(
        "gateway_id_shared",
        "",
        "A gateway's customer or subscription of several rows: the oldest row keeps it, the others have NULL.",
    ),
    reason(
        "gateway_text_wrapped",
        "",
        "Text that isn't JSON, has a zero character or is beyond what parsers read: an object with the text in `unreadable`.",
    ),
    reason(
        "gateway_text_empty",
        "",
        "An empty text where JSON is expected: NULL.",
    ),
    reason("text_cut", "", "Longer than the new column: cut."),
    reason(
        "name_empty",
        "",
        "An empty name: the part of the address before the @, or the service's name.",
    ),
    reason(
        "parent_left_behind",
        "",
        "The user, service, instance or payment of the row is left behind: left behind.",
    ),
    // users
    reason(
        "email_canonical",
        "email",
        "Not in canonical form: converted.",
    ),
    reason(
        "email_invalid",
        "email",
        "Not an email address: left behind.",
    ),
    reason(
        "email_duplicate",
        "email",
        "An older account has the address in another spelling: left behind.",
    ),
    reason(
        "email_suffixed",
        "email",
        "An older account has the address in another spelling: this one gets a suffix.",
    ),
    reason(
        "password_not_phc",
        "password",
        "Not a hash in PHC or crypt form: NULL. The user resets the password.",
    ),
    // auth_tokens
    reason(
        "signs_in_again",
        "",
        "A code, link or refresh token: left behind. The user signs in again.",
    ),
    reason(
        "address_change_lost",
        "",
        "A change of address that was not confirmed: left behind. The user asks for it again.",
    ),
    // mcp_table
    reason(
        "service_name_canonical",
        "mcp_service_name",
        "Capitals, blanks or other characters in the name: in lowercase, with _ for them.",
    ),
    reason(
        "service_name_invalid",
        "mcp_service_name",
        "No name can be made of it: left behind.",
    ),
    reason(
        "service_name_taken",
        "mcp_service_name",
        "An older service has the name in another spelling: left behind.",
    ),
    reason(
        "service_type_unknown",
        "type",
        "Neither api_key nor oauth: left behind.",
    ),
    reason("port_invalid", "port", "Not a TCP port: left behind."),
    // user_plans
    reason(
        "plan_default",
        "",
        "A user without a plan: the free plan is added.",
    ),
    reason(
        "plan_from_subscription",
        "",
        "A user without a plan who has paid: the plan of the subscription is added.",
    ),
    reason(
        "plan_type_unknown",
        "plan_type",
        "Neither free nor pro: pro if it has no limit, otherwise free.",
    ),
    reason(
        "plan_limit_reset",
        "max_instances",
        "Not the limit of the plan's type: that limit.",
    ),
    reason(
        "plan_features_reset",
        "features",
        "NULL, not a JSON object, or beyond what parsers read: {}.",
    ),
    reason(
        "payment_status_unknown",
        "payment_status",
        "Not a known status: none.",
    ),
    // user_subscriptions
    reason(
        "subscription_merged",
        "",
        "The one of several live subscriptions that stays: its period is that of all of them.",
    ),
    reason(
        "subscription_replaced",
        "status",
        "Another one of several live subscriptions: replaced.",
    ),
    reason(
        "subscription_unknown",
        "status",
        "An unknown plan or status: left behind.",
    ),
    reason(
        "period_reset",
        "current_period_end",
        "A period that ends before it starts: 30 days.",
    ),
    reason(
        "period_endless",
        "current_period_end",
        "Without end, or beyond what the new column holds: until the year 9000.",
    ),
    reason(
        "trial_without_start",
        "trial_start",
        "The end of a trial without a start: the row's creation.",
    ),
    reason(
        "trial_dropped",
        "trial_end",
        "The end of a trial before any start: no trial.",
    ),
    reason(
        "cancelled_at_missing",
        "cancelled_at",
        "Cancelled without a time: that of the last change.",
    ),
    reason(
        "billing_cycle_unknown",
        "billing_cycle",
        "Not a known cycle: monthly.",
    ),
    reason(
        "quote_negative",
        "",
        "A negative tax, discount or total: 0.",
    ),
    // subscription_transactions
    reason("refund_negated", "amount", "A positive refund: negated."),
    reason("refund_of_nothing", "amount", "A refund of 0: left behind."),
    reason(
        "refund_without_payment",
        "parent_transaction_id",
        "A refund without a payment of the same user in the same currency: left behind.",
    ),
    reason(
        "refund_of_unpaid",
        "parent_transaction_id",
        "A refund of a payment that was not captured: left behind.",
    ),
    reason(
        "refund_exceeds",
        "amount",
        "The refunds of a payment, oldest first, exceed it from this one on: left behind.",
    ),
    reason(
        "transaction_unknown",
        "status",
        "An unknown type or status: left behind.",
    ),
    reason(
        "amount_negative",
        "amount",
        "A negative amount of what is no refund: left behind.",
    ),
    reason(
        "net_exceeds_amount",
        "net_amount",
        "A net amount above the gross one: left behind.",
    ),
    reason(
        "currency_upper",
        "currency",
        "A currency in lowercase: in capitals.",
    ),
    reason(
        "currency_unknown",
        "currency",
        "Not three letters: left behind.",
    ),
    reason(
        "exchange_rate_reset",
        "exchange_rate",
        "Not a number, for rupees: 1.",
    ),
    reason(
        "exchange_rate_invalid",
        "exchange_rate",
        "Not a positive number below 10,000,000,000: left behind.",
    ),
    reason(
        "parent_unlinked",
        "parent_transaction_id",
        "The parent is left behind, is the row itself or in a circle: NULL.",
    ),
    reason(
        "subscription_unlinked",
        "subscription_id",
        "The subscription is left behind: NULL.",
    ),
    reason(
        "card_number_stripped",
        "",
        "A card number or security code: removed.",
    ),
    // account_credits
    reason("amount_zero", "amount", "A credit of 0: left behind."),
    reason(
        "credit_source_unknown",
        "source_type",
        "An unknown source: left behind.",
    ),
    reason(
        "credit_source_missing",
        "source_id",
        "A refund or downgrade without a source: an id that names the import.",
    ),
    reason(
        "credit_source_repeated",
        "source_id",
        "A refund or downgrade that is credited again: its id is added to the source.",
    ),
    reason(
        "credit_split",
        "amount",
        "Spent in part: a used credit and one with the rest.",
    ),
    reason(
        "credit_history_dropped",
        "",
        "A subscription beside the transaction, or a number of uses: no column is for it. It stays in the archive.",
    ),
    reason(
        "credit_inactive_rest",
        "expires_at",
        "A rest of a credit that was switched off: expired with the last change.",
    ),
    reason(
        "used_without_date",
        "used_at",
        "Used without a time: that of the last change.",
    ),
    reason(
        "used_at_of_unused",
        "used_at",
        "A time of use, but not used: NULL.",
    ),
    // user_billing_details
    reason(
        "address_part_empty",
        "",
        "An empty part of the address: a hyphen.",
    ),
    reason(
        "card_dropped",
        "cards",
        "A card without token, last four digits or expiry, or twice: dropped.",
    ),
    reason(
        "card_rewritten",
        "cards",
        "A card with other details than the new column allows, or in another form: without them, or in its form.",
    ),
    reason(
        "default_card_unknown",
        "default_card_id",
        "Not the id of a card that is kept: NULL.",
    ),
    // mcp_service_table
    reason(
        "over_plan_limit",
        "status",
        "More active instances than the plan allows: all but the last used one are inactive.",
    ),
    reason(
        "plan_expired",
        "status",
        "Active on a plan that is over: inactive.",
    ),
    reason(
        "oauth_status_of_credentials",
        "oauth_status",
        "Not the status of the credentials: theirs, or pending without any.",
    ),
    reason(
        "instance_status_unknown",
        "status",
        "Not a known status: inactive.",
    ),
    // mcp_credentials
    reason(
        "authorization_dropped",
        "oauth_state",
        "A pending authorization: not taken over. The user starts it again.",
    ),
    reason(
        "completed_at_of_pending",
        "oauth_completed_at",
        "A time of completion while pending: NULL.",
    ),
    reason(
        "completed_at_missing",
        "oauth_completed_at",
        "No time of completion: that of the last change.",
    ),
    reason(
        "oauth_status_unknown",
        "oauth_status",
        "Not a known status: completed with a time of completion, otherwise pending.",
    ),
    reason("token_empty", "", "An empty token: NULL."),
    reason(
        "token_scope_dropped",
        "token_scope",
        "More than 16,384 characters: NULL.",
    ),
    reason(
        "credentials_incomplete",
        "",
        "Neither an API key alone nor a client's id and secret: left behind.",
    ),
    reason(
        "credentials_empty",
        "",
        "An empty key, client id or secret: left behind.",
    ),
    reason(
        "credentials_repeated",
        "instance_id",
        "Second credentials of an instance: left behind.",
    ),
    reason(
        "secret_too_long",
        "",
        "A secret or client id longer than the new columns: left behind.",
    ),
    // webhook_events
    reason(
        "event_id_empty",
        "external_event_id",
        "No id of the gateway: one that names the import.",
    ),
    reason(
        "event_id_of_payload",
        "external_event_id",
        "Not the id that the payload of Stripe has: that one.",
    ),
    reason(
        "event_id_of_another",
        "external_event_id",
        "The id of a payment or the like, not of Razorpay's event: as it is. The event is new when it is delivered again.",
    ),
    reason(
        "event_status_unknown",
        "processing_status",
        "Not a known status: pending.",
    ),
    reason(
        "event_processed_at",
        "processed_at",
        "Set while pending, or not set after it: NULL, or the row's creation.",
    ),
    reason(
        "event_given_up",
        "attempts",
        "Failed: kept as given up, so that no worker tries it again.",
    ),
    reason(
        "gateway_unknown",
        "payment_gateway",
        "Neither stripe nor razorpay: left behind.",
    ),
    // token_audit_log
    reason(
        "audit_status_unknown",
        "status",
        "failed is failure; another word is a warning with the word in metadata.",
    ),
    reason(
        "operation_empty",
        "operation",
        "An empty operation: unknown.",
    ),
    reason(
        "time_in_future",
        "created_at",
        "Later than the import: the time of the import.",
    ),
];
