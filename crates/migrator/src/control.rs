//! Finds statements that begin or end a transaction.
//!
//! A parser of SQL would refuse statements that it does not know. This one only knows where the
//! server sees no statement: in comments, literals, quoted names, parentheses and `BEGIN ATOMIC`
//! bodies.

/// Returns the first such statement and its line, from 1. Savepoints are none. Those in a string,
/// such as a `DO` block, are the server's to refuse.
pub(crate) fn transaction_control(sql: &str) -> Option<(&'static str, usize)> {
    let mut parentheses = 0_usize;
    // Open BEGIN ATOMIC and CASE.
    let mut blocks = 0_usize;
    // The first words of the statement, and where it begins.
    let mut words: Vec<String> = Vec::new();
    let mut begin = 0;
    let mut previous = String::new();
    // The last statement needs no semicolon.
    for (position, token) in tokens(sql).chain([(sql.len(), ";")]) {
        let word = token.to_ascii_lowercase();
        match &*word {
            "(" => parentheses += 1,
            ")" => parentheses = parentheses.saturating_sub(1),
            "atomic" if previous == "begin" => blocks += 1,
            "case" if blocks > 0 => blocks += 1,
            "end" if blocks > 0 => blocks -= 1,
            _ => {}
        }
        if word == ";" && parentheses == 0 && blocks == 0 {
            if let Some(statement) = control(&words) {
                return Some((statement, sql[..begin].matches('\n').count() + 1));
            }
            words.clear();
        } else if words.len() < 3 {
            if words.is_empty() {
                begin = position;
            }
            words.push(word.clone());
        }
        previous = word;
    }
    None
}

fn control(words: &[String]) -> Option<&'static str> {
    let mut words = words.iter().map(String::as_str);
    Some(match words.next()? {
        "begin" => "BEGIN",
        "start" => "START TRANSACTION",
        "commit" => "COMMIT",
        "end" => "END",
        "abort" => "ABORT",
        "prepare" if words.next() == Some("transaction") => "PREPARE TRANSACTION",
        "rollback" if !words.any(|word| word == "to") => "ROLLBACK",
        _ => return None,
    })
}

/// Returns the words and signs with their positions. A comment is none; a literal or quoted name is
/// the sign that begins it.
fn tokens(sql: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut end = 0;
    // Whether the last token was a string with escapes. One that follows continues it.
    let mut escapes = false;
    std::iter::from_fn(move || {
        loop {
            let begin = end;
            let rest = &sql[begin..];
            let first = rest.chars().next()?;
            let is_escaped = rest.starts_with("E'") || rest.starts_with("e'");
            if first.is_ascii_whitespace() || first == '\u{b}' {
                end += 1;
                continue;
            }
            if rest.starts_with("--") {
                end += rest.find(['\n', '\r']).unwrap_or(rest.len());
                continue;
            }
            if rest.starts_with("/*") {
                end += comment(rest);
                continue;
            }
            escapes = is_escaped || (escapes && first == '\'');
            if is_escaped || first == '\'' || first == '"' {
                end += quoted(rest, usize::from(is_escaped), escapes);
            } else if let Some(length) = dollar_quoted(rest) {
                end += length;
            } else if is_word(first) && !first.is_ascii_digit() && first != '$' {
                end += rest.find(|letter| !is_word(letter)).unwrap_or(rest.len());
                return Some((begin, &sql[begin..end]));
            } else {
                end += first.len_utf8();
            }
            return Some((begin, &sql[begin..begin + first.len_utf8()]));
        }
    })
}

fn is_word(letter: char) -> bool {
    letter.is_ascii_alphanumeric() || "_$".contains(letter) || !letter.is_ascii()
}

/// Returns the length of the comment that `sql` begins with.
fn comment(sql: &str) -> usize {
    let mut depth = 0_usize;
    let mut end = 0;
    loop {
        match sql.as_bytes().get(end..end + 2) {
            Some(b"/*") => (depth, end) = (depth + 1, end + 2),
            Some(b"*/") => (depth, end) = (depth - 1, end + 2),
            Some(_) => end += 1,
            None => return sql.len(),
        }
        if depth == 0 {
            return end;
        }
    }
}

/// Returns the length up to the end of the quote at `begin`. A doubled quote is two quoted parts.
fn quoted(sql: &str, begin: usize, escapes: bool) -> usize {
    let mut letters = sql.char_indices().skip(begin);
    let quote = letters.next().map(|(_, quote)| quote);
    while let Some((position, letter)) = letters.next() {
        if letter == '\\' && escapes {
            letters.next();
        } else if Some(letter) == quote {
            return position + 1;
        }
    }
    sql.len()
}

/// Returns the length of the `$tag$…$tag$` that `sql` begins with.
fn dollar_quoted(sql: &str) -> Option<usize> {
    let end = sql.strip_prefix('$')?.find('$')? + 1;
    let tag = &sql[1..end];
    if tag.starts_with(|first: char| first.is_ascii_digit()) || !tag.chars().all(is_word) {
        return None;
    }
    let (delimiter, body) = sql.split_at(end + 1);
    let length = body.find(delimiter).map(|length| length + delimiter.len());
    Some(delimiter.len() + length.unwrap_or(body.len()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::transaction_control;

    #[test]
    fn finds_each() {
        for (sql, found) in [
            ("BEGIN", "BEGIN"),
            ("SELECT 1;\n\n start transaction", "START TRANSACTION"),
            ("COMMIT AND CHAIN;", "COMMIT"),
            ("COMMIT PREPARED 'a'", "COMMIT"),
            (";;END", "END"),
            ("ABORT;", "ABORT"),
            ("PREPARE TRANSACTION 'a'", "PREPARE TRANSACTION"),
            ("ROLLBACK WORK", "ROLLBACK"),
            ("SELECT 'a\\'; COMMIT; --'", "COMMIT"),
            ("SELECT E'a'\n'b\\''; COMMIT", "COMMIT"),
            ("SELECT E'a\\\\'; COMMIT", "COMMIT"),
            ("SELECT a$b$; COMMIT; -- $b$", "COMMIT"),
            ("SELECT $1$; COMMIT; --$1$", "COMMIT"),
            ("SELECT 1$a$ $a$; COMMIT", "COMMIT"),
            ("/* /* */ COMMIT; */ COMMIT", "COMMIT"),
            ("/*/ */COMMIT", "COMMIT"),
            (
                "CREATE FUNCTION f() BEGIN ATOMIC SELECT CASE WHEN true THEN 1 END; END; END",
                "END",
            ),
            ("SELECT CASE WHEN true THEN 1 END; COMMIT", "COMMIT"),
            ("SELECT 'ä'; COMMIT", "COMMIT"),
        ] {
            let control = transaction_control(sql);
            assert_eq!(control.map(|(word, _)| word), Some(found), "{sql}");
        }
        let sql = "SELECT 1; -- COMMIT\n/* \n */ COMMIT\n;";
        assert_eq!(transaction_control(sql), Some(("COMMIT", 3)));
    }

    #[test]
    fn invents_none() {
        for sql in [
            "",
            "SAVEPOINT a; ROLLBACK TO a; ROLLBACK WORK TO SAVEPOINT a; RELEASE a",
            "PREPARE a AS SELECT 1; EXECUTE a",
            "DO $$BEGIN COMMIT; END$$; DO $a$BEGIN; $$; COMMIT; END$a$",
            "SELECT E'\\'; COMMIT; --'; SELECT E'''; COMMIT; --'; SELECT E'a''\\'; COMMIT; --'",
            "SELECT E'a'\n'\\'; COMMIT; --'",
            "SELECT \"; COMMIT; \", U&'; COMMIT; '",
            "SELECT CASE WHEN true THEN 1 END",
            "CREATE RULE r AS ON DELETE TO a DO (SELECT 1; COMMIT)",
            "CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT CASE WHEN true THEN 1 END; END",
            "CREATE PROCEDURE f() BEGIN ATOMIC INSERT INTO a VALUES (1); SELECT 1; END; SELECT 1",
            "-- COMMIT;\nSELECT 1 /* ; COMMIT; /* ; */ ; COMMIT */",
            "CREATE TABLE begin (commit int); ALTER TABLE a RENAME b TO end",
        ] {
            assert_eq!(transaction_control(sql), None, "{sql}");
        }
    }

    /// A piece of SQL in which the server sees no end of a statement.
    fn literal() -> impl Strategy<Value = String> {
        let text = "[;'\"$/*\\\\ \nCa-]{0,8}( COMMIT; )?";
        (0..6, text).prop_map(|(kind, text)| match kind {
            0 => format!("'{}'", text.replace('\'', "''")),
            1 => format!(" E'{}' ", text.replace('\\', "\\\\").replace('\'', "\\'")),
            2 => format!("\"{}\"", text.replace('"', "\"\"")),
            3 => format!(" $t${text}$t$ "),
            4 => format!("--{}\n", text.replace('\n', " ")),
            _ => format!("/*{}*/", text.replace(['/', '*'], " /**/ ")),
        })
    }

    proptest! {
        #[test]
        fn literals_neither_hide_nor_invent(
            before in prop::collection::vec(literal(), 0..6),
            after in prop::collection::vec(literal(), 0..6),
        ) {
            // A sign in between: adjacent quotes would be one literal.
            let (before, after) = (before.join(","), after.join(","));
            let without = format!("SELECT {before};SELECT {after}");
            prop_assert_eq!(transaction_control(&without), None);
            let with = format!("SELECT {before};COMMIT;SELECT {after}");
            let line = before.matches('\n').count() + 1;
            prop_assert_eq!(transaction_control(&with), Some(("COMMIT", line)));
        }
    }
}
