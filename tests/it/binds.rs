//! What Diesel's instrumentation shows of the values that a statement carries: no secret.

use std::sync::{Arc, Mutex};

use bruhmcp_db::SecretText;
use bruhmcp_db::models::{NewUser, User};
use bruhmcp_db::schema::{auth_tokens, users};
use diesel::connection::InstrumentationEvent;
use diesel::pg::PgConnection;
use diesel::prelude::*;

use crate::locks::each_operation;
use crate::support::database;
use crate::users::HASH;

/// Collects all that an instrumentation can print.
fn watch(conn: &mut PgConnection) -> Arc<Mutex<String>> {
    let shown = Arc::new(Mutex::new(String::new()));
    let all = Arc::clone(&shown);
    conn.set_instrumentation(move |event: InstrumentationEvent<'_>| {
        let mut all = all.lock().unwrap();
        *all += &format!("{event:?}\n");
        if let InstrumentationEvent::StartQuery { query, .. }
        | InstrumentationEvent::FinishQuery { query, .. } = event
        {
            *all += &format!("{query} {query:?}\n");
        }
    });
    shown
}

/// Sixteen bytes in a row, as a list or in hexadecimal; a UUID is shorter between its dashes.
fn bytes(text: &str) -> Option<&str> {
    let list = text.split(['[', ']']).find(|part| {
        let mut numbers = part.split(", ").filter(|part| part.parse::<u8>().is_ok());
        numbers.nth(15).is_some()
    });
    let is_hex = |digits: &&str| digits.len() >= 32;
    list.or_else(|| {
        text.split(|char: char| !char.is_ascii_hexdigit())
            .find(is_hex)
    })
}

#[test]
fn no_operation_shows_a_secret() {
    each_operation(|operation, conn| {
        let shown = watch(conn);
        operation.succeed(conn);
        let shown = shown.lock().unwrap();
        assert!(!shown.is_empty(), "{}", operation.name);
        assert_eq!(bytes(&shown), None, "{}: {shown}", operation.name);
        for secret in [HASH, "token_1", "token_2"] {
            assert!(!shown.contains(secret), "{}: {shown}", operation.name);
        }
    });
}

/// The same values past the types that hide them are seen, so that the test above can fail.
#[test]
fn a_secret_past_its_type_is_shown() {
    let database = database();
    let conn = &mut database.connect();
    let hash = SecretText::from(HASH);
    let new = NewUser {
        password: Some(&hash),
        ..NewUser::new("Asha", "", "asha@example.in")
    };
    let shown = watch(conn);
    let id = User::sign_up(conn, &new).unwrap().id;
    assert!(!shown.lock().unwrap().contains(HASH));
    let as_text = users::table.filter(users::first_name.eq(HASH));
    as_text.count().get_result::<i64>(conn).unwrap();
    assert!(shown.lock().unwrap().contains(HASH));
    assert_eq!(bytes(&shown.lock().unwrap()), None);
    let as_bytes = diesel::update(auth_tokens::table.filter(auth_tokens::user_id.eq(id)))
        .set(auth_tokens::token.eq(vec![7; 32]));
    as_bytes.execute(conn).unwrap();
    assert!(bytes(&shown.lock().unwrap()).is_some());
}
