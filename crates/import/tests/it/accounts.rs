//! Users, plans, services, instances and credentials.

use crate::support::{Old, SHAPES, id, keys};

/// A user with the number as key.
fn user(number: u32, email: &str) -> String {
    format!(
        "INSERT INTO users (id, first_name, last_name, email) VALUES ('{}', 'Ada', '', '{email}');",
        id(number)
    )
}

#[test]
fn an_empty_system_is_imported() {
    for shape in SHAPES {
        let (_, report) = Old::imported(shape, "");
        assert!(report.is_complete());
        assert!(report.tables.iter().all(|table| table.rows == 0));
    }
}

#[test]
fn an_ordinary_user_is_carried_over_as_it_is() {
    let (mut old, report) = Old::imported(SHAPES[0], &user(1, "ada@example.org"));
    assert_eq!(report.tables[0].as_they_are, 1);
    assert_eq!(old.text("SELECT email FROM users"), "ada@example.org");
    assert_eq!(
        keys(&report, "user_plans", "plan_default").len(),
        1,
        "{report:?}"
    );
    assert_eq!(old.text("SELECT count(*) FROM user_plans"), "1");
}
