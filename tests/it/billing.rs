//! Billing details: an address, and cards that don't get lost or shown.

use std::collections::BTreeSet;
use std::sync::mpsc;

use bruhmcp_db::ids::UserId;
use bruhmcp_db::models::*;
use bruhmcp_db::{ConstraintViolation, SecretText};
use diesel::connection::InstrumentationEvent;
use diesel::pg::PgConnection;
use diesel::prelude::*;

use crate::fixtures::{self, user};
use crate::support::{at_once, database};

fn address(user_id: UserId, city: &str) -> NewUserBillingDetails<'_> {
    NewUserBillingDetails {
        city,
        ..fixtures::address(user_id)
    }
}

fn card(id: &str) -> Card {
    Card {
        id: id.to_owned(),
        token: SecretText::new(format!("token_whisper_{id}")),
        brand: "visa".to_owned(),
        last4: "4242".to_owned(),
        exp_month: 12,
        exp_year: 2030,
    }
}

/// A user with an address.
fn billed(conn: &mut PgConnection) -> UserId {
    let user = user(conn);
    UserBillingDetails::upsert(conn, &address(user, "Bengaluru")).unwrap();
    user
}

fn ids(details: &UserBillingDetails) -> Vec<&str> {
    details.cards.iter().map(|card| card.id.as_str()).collect()
}

#[test]
fn an_address_is_set_and_set_again() {
    let database = database();
    let conn = &mut database.connect();
    let user = user(conn);
    let first = UserBillingDetails::upsert(conn, &address(user, "Bengaluru")).unwrap();
    assert_eq!((&first.cards, &first.default_card_id), (&vec![], &None));
    UserBillingDetails::add_card(conn, user, &card("one")).unwrap();
    let second = UserBillingDetails::upsert(
        conn,
        &NewUserBillingDetails {
            address_line2: Some("2nd floor"),
            ..address(user, "Mysuru")
        },
    )
    .unwrap();
    assert_eq!(second.billing_id, first.billing_id);
    assert_eq!(second.city, "Mysuru");
    assert_eq!(second.address_line2.as_deref(), Some("2nd floor"));
    assert_eq!(second.cards, [card("one")]);
    let third = UserBillingDetails::upsert(conn, &address(user, "Mysuru")).unwrap();
    assert_eq!(third.address_line2, None);

    for city in ["", "\0", &"x".repeat(101)] {
        let refused = UserBillingDetails::upsert(conn, &address(user, city)).unwrap_err();
        assert!(
            matches!(refused, BillingError::InvalidField("city")),
            "{refused:?}"
        );
    }
    at_once(&database, 32, |_, conn| {
        UserBillingDetails::upsert(conn, &address(user, "Hubballi")).unwrap()
    });

    User::anonymise(conn, user).unwrap();
    for nobody in [user, UserId::new()] {
        let refused = UserBillingDetails::upsert(conn, &address(nobody, "Hubballi")).unwrap_err();
        assert!(matches!(refused, BillingError::NoUser), "{refused:?}");
    }
}

#[test]
fn instrumentation_sees_no_card_token() {
    let database = database();
    let conn = &mut database.connect();
    let user = billed(conn);
    let (sender, statements) = mpsc::channel();
    conn.set_instrumentation(move |event: InstrumentationEvent<'_>| {
        sender.send(format!("{event:?}")).unwrap();
    });
    UserBillingDetails::add_card(conn, user, &card("one")).unwrap();
    let seen: String = statements.try_iter().collect();
    assert!(seen.contains("jsonb_path_query_array"), "{seen}");
    assert!(!seen.contains("whisper"), "{seen}");
}

#[test]
pub(crate) fn cards_come_and_go() {
    let database = database();
    let conn = &mut database.connect();
    let user = billed(conn);
    let details = UserBillingDetails::add_card(conn, user, &card("one")).unwrap();
    assert_eq!(details.default_card_id.as_deref(), Some("one"));
    UserBillingDetails::add_card(conn, user, &card("two")).unwrap();
    let details = UserBillingDetails::add_card(conn, user, &card("three")).unwrap();
    assert_eq!(ids(&details), ["one", "two", "three"]);
    assert_eq!(details.default_card_id.as_deref(), Some("one"));

    let renewed = Card {
        exp_year: 2035,
        ..card("one")
    };
    let details = UserBillingDetails::add_card(conn, user, &renewed).unwrap();
    assert_eq!(details.cards, [card("two"), card("three"), renewed]);
    assert_eq!(details.default_card_id.as_deref(), Some("one"));

    let details = UserBillingDetails::set_default_card(conn, user, "two").unwrap();
    assert_eq!(details.default_card_id.as_deref(), Some("two"));
    let details = UserBillingDetails::remove_card(conn, user, "one").unwrap();
    assert_eq!(ids(&details), ["two", "three"]);
    assert_eq!(details.default_card_id.as_deref(), Some("two"));
    let details = UserBillingDetails::remove_card(conn, user, "two").unwrap();
    assert_eq!(
        (ids(&details), &details.default_card_id),
        (vec!["three"], &None)
    );
    let details = UserBillingDetails::add_card(conn, user, &card("four")).unwrap();
    assert_eq!(details.default_card_id, None);
    let found = UserBillingDetails::find_by_user(conn, user).unwrap();
    assert_eq!(found, Some(details));
}

#[test]
fn details_and_card_must_exist() {
    let database = database();
    let conn = &mut database.connect();
    let (none, some) = (user(conn), billed(conn));
    let result = UserBillingDetails::add_card(conn, none, &card("one"));
    assert!(matches!(result, Err(BillingError::NotFound)));
    for operation in [
        UserBillingDetails::remove_card,
        UserBillingDetails::set_default_card,
    ] {
        let result = operation(conn, none, "one");
        assert!(matches!(result, Err(BillingError::NotFound)));
        let result = operation(conn, some, "one");
        assert!(matches!(result, Err(BillingError::CardNotFound)));
    }
}

#[test]
fn an_invalid_card_is_refused() {
    let database = database();
    let conn = &mut database.connect();
    let user = billed(conn);
    let right = card("one");
    let with_last4 = |last4: &str| Card {
        last4: last4.to_owned(),
        ..right.clone()
    };
    let with_token = |token: &str| Card {
        token: SecretText::new(token),
        ..right.clone()
    };
    for (field, wrong) in [
        ("id", card(" ")),
        ("id", card("4242424242424242")),
        ("token", with_token("")),
        ("token", with_token("4242 4242 4242 4242")),
        ("token", with_token("3782-822463-10005")),
        (
            "brand",
            Card {
                brand: String::new(),
                ..right.clone()
            },
        ),
        ("last4", with_last4("424")),
        ("last4", with_last4("42424")),
        ("last4", with_last4("42a4")),
        ("last4", with_last4("٤٢")),
        (
            "exp_month",
            Card {
                exp_month: 0,
                ..right.clone()
            },
        ),
        (
            "exp_month",
            Card {
                exp_month: 13,
                ..right.clone()
            },
        ),
        (
            "exp_year",
            Card {
                exp_year: 30,
                ..right.clone()
            },
        ),
    ] {
        match UserBillingDetails::add_card(conn, user, &wrong) {
            Err(BillingError::InvalidCard(named)) => assert_eq!(named, field),
            other => panic!("{field}: {other:?}"),
        }
    }
    let details = UserBillingDetails::find_by_user(conn, user)
        .unwrap()
        .unwrap();
    assert_eq!(details.cards, []);
}

#[test]
fn the_database_refuses_a_cards_number() {
    let database = database();
    let conn = &mut database.connect();
    billed(conn);
    for key in ["number", "cvv", "cvc", "CVV"] {
        let sql = format!(
            r#"UPDATE user_billing_details SET cards = '[{{"id": "one", "card": {{"{key}": "1"}}}}]'"#
        );
        let error = diesel::sql_query(sql).execute(conn).unwrap_err();
        assert!(
            ConstraintViolation::of(&error)
                .unwrap()
                .is("user_billing_details_no_card_secrets")
        );
    }
}

#[test]
fn a_token_is_not_shown() {
    let database = database();
    let conn = &mut database.connect();
    let user = billed(conn);
    let details = UserBillingDetails::add_card(conn, user, &card("one")).unwrap();
    assert_eq!(details.cards[0].token.expose(), "token_whisper_one");
    assert!(!format!("{details:?}").contains("whisper"));
    let json = serde_json::to_value(&details).unwrap();
    assert!(!json.to_string().contains("whisper"));
    assert_eq!(json["cards"][0]["last4"], "4242");

    // The error about an invalid row does not show it either.
    database
        .psql(
            r#"ALTER TABLE user_billing_details
                    DROP CONSTRAINT user_billing_details_no_card_secrets,
                    DROP CONSTRAINT user_billing_details_default_card;
               UPDATE user_billing_details SET cards = '[{"id": "one", "exp_month": "whisper"}]'"#,
        )
        .unwrap();
    let error = UserBillingDetails::find_by_user(conn, user).unwrap_err();
    assert!(matches!(
        error,
        diesel::result::Error::DeserializationError(_)
    ));
    assert!(!format!("{error:?} {error}").contains("whisper"));
}

#[test]
pub(crate) fn concurrent_changes_of_cards_are_not_lost() {
    let database = database();
    let conn = &mut database.connect();
    let user = billed(conn);
    at_once(&database, 32, |number, conn| {
        UserBillingDetails::add_card(conn, user, &card(&format!("card_{number}"))).unwrap();
    });
    let details = UserBillingDetails::find_by_user(conn, user)
        .unwrap()
        .unwrap();
    let expected: BTreeSet<_> = (0..32)
        .map(|number| card(&format!("card_{number}")).id)
        .collect();
    assert_eq!(details.cards.len(), 32);
    assert_eq!(
        details
            .cards
            .into_iter()
            .map(|card| card.id)
            .collect::<BTreeSet<_>>(),
        expected
    );
    assert!(expected.contains(&details.default_card_id.unwrap()));

    // Half are removed while others are added.
    at_once(&database, 32, |number, conn| {
        if number % 2 == 0 {
            UserBillingDetails::remove_card(conn, user, &format!("card_{number}")).unwrap();
        } else {
            UserBillingDetails::add_card(conn, user, &card(&format!("more_{number}"))).unwrap();
        }
    });
    let details = UserBillingDetails::find_by_user(conn, user)
        .unwrap()
        .unwrap();
    let expected: BTreeSet<_> = (1..32)
        .step_by(2)
        .flat_map(|number| [format!("card_{number}"), format!("more_{number}")])
        .collect();
    assert_eq!(
        details
            .cards
            .into_iter()
            .map(|card| card.id)
            .collect::<BTreeSet<_>>(),
        expected
    );
}
