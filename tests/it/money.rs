//! What the tests of subscriptions, payments, credits, webhooks and billing share.

use std::sync::Barrier;
use std::thread;

use bruhmcp_db::ids::UserId;
use bruhmcp_db::models::{NewUser, User};
use diesel::pg::PgConnection;

use crate::support::TestDatabase;

/// A user of the test's own.
pub(crate) fn user(conn: &mut PgConnection) -> UserId {
    let id = UserId::new();
    let new = NewUser {
        id: Some(id),
        first_name: "Asha",
        last_name: "",
        email: &format!("{id}@example.in"),
        password: None,
        email_verified: None,
        razorpay_customer_id: None,
        is_active: None,
    };
    User::insert(conn, &new).unwrap().id
}

/// What `work` returns in `threads` threads that begin together, each with its number and a connection of its own.
pub(crate) fn at_once<T: Send>(
    database: &TestDatabase,
    threads: usize,
    work: impl Fn(usize, &mut PgConnection) -> T + Sync,
) -> Vec<T> {
    let start = Barrier::new(threads);
    // All connected before any thread waits for the others.
    let connections: Vec<_> = (0..threads).map(|_| database.connect()).collect();
    thread::scope(|scope| {
        let (start, work) = (&start, &work);
        let running: Vec<_> = connections
            .into_iter()
            .enumerate()
            .map(|(number, mut conn)| {
                scope.spawn(move || {
                    start.wait();
                    work(number, &mut conn)
                })
            })
            .collect();
        running
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    })
}
