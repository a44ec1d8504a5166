//! Sealing of credentials, and rotation of its keys.

use std::error::Error;

use aes_gcm::Aes256Gcm;
use aes_gcm::aead::{Aead, KeyInit, Payload};
use bruhmcp_db::crypto::{KeyError, KeyRing, KeyUnwrap, OpenError, SealError, SecretColumn};
use bruhmcp_db::enums::OauthStatus;
use bruhmcp_db::ids::{CredentialId, InstanceId};
use bruhmcp_db::models::{
    CredentialError, InstanceError, InstanceFilter, McpCredential, McpInstance, NewMcpCredential,
    NewMcpInstance, OauthTokens, Resealed,
};
use bruhmcp_db::schema::mcp_credentials;
use bruhmcp_db::zeroize::Zeroizing;
use bruhmcp_db::{ConstraintViolation, NotSealed, Page, Sealed, SecretText};
use chacha20poly1305::XChaCha20Poly1305;
use chrono::Utc;
use diesel::prelude::*;
use diesel::result::Error::DatabaseError;
use hmac::{Hmac, Mac};
use proptest::prelude::*;
use sha2::Sha256;
use uuid::Uuid;

use crate::fixtures::{RING, completed, pro_user, service, text, with_api_key};
use crate::support::{at_once, database, example};

/// A key of 32 bytes for each id, derived from `seed`.
fn ring(seed: u8, ids: &[u8]) -> KeyRing {
    let keys: Vec<_> = ids.iter().map(|&id| (id, [seed ^ id; 32])).collect();
    KeyRing::new(keys.iter().map(|(id, key)| (*id, &key[..]))).unwrap()
}

fn any_column() -> impl Strategy<Value = SecretColumn> {
    proptest::sample::select(SecretColumn::ALL.to_vec())
}

/// Texts of every length that can be sealed, the shortest and the longest among them.
fn any_secret() -> impl Strategy<Value = String> {
    let lengths = prop_oneof![
        Just(0),
        1..200_usize,
        200..KeyRing::MAX_LEN,
        Just(KeyRing::MAX_LEN)
    ];
    (".{1,50}", lengths).prop_map(|(part, length)| {
        let mut secret = String::with_capacity(length);
        for char in part.chars().cycle() {
            if secret.len() + char.len_utf8() > length {
                break;
            }
            secret.push(char);
        }
        let rest = length - secret.len();
        secret + &"x".repeat(rest)
    })
}

fn any_instance() -> impl Strategy<Value = InstanceId> {
    any::<u128>().prop_map(|id| InstanceId(Uuid::from_u128(id)))
}

proptest! {
    #[test]
    fn a_sealed_value_opens_in_its_place_only(
        secret in any_secret(),
        row in any_instance(),
        bit in 0..128_u32,
        column in any_column(),
        other_column in any_column(),
    ) {
        let ring = ring(7, &[3, 2]);
        let sealed = ring.seal(&SecretText::from(secret.as_str()), row, column).unwrap();
        prop_assert_eq!(sealed.as_ciphertext().len(), secret.len() + 42);
        let opened = ring.open(&sealed, row, column).unwrap();
        prop_assert_eq!(opened.expose(), &secret);

        let near = InstanceId(Uuid::from_u128(row.0.as_u128() ^ (1 << bit)));
        prop_assert_eq!(ring.open(&sealed, near, column).unwrap_err(), OpenError::Altered);
        if column != other_column {
            for row in [row, near] {
                let error = ring.open(&sealed, row, other_column).unwrap_err();
                prop_assert_eq!(error, OpenError::Altered);
            }
        }
        // A ring with other keys of the same ids, and one without the id.
        let other = self::ring(8, &[3, 2]);
        prop_assert_eq!(other.open(&sealed, row, column).unwrap_err(), OpenError::Altered);
        let without = self::ring(7, &[2]);
        let unknown = OpenError::UnknownKey { key_id: 3 };
        prop_assert_eq!(without.open(&sealed, row, column).unwrap_err(), unknown);

        // The ring after a rotation. Nonces differ.
        let rotated = self::ring(7, &[4, 3]);
        let opened = rotated.open(&sealed, row, column).unwrap();
        prop_assert_eq!(opened.expose(), &secret);
        let again = ring.seal(&SecretText::from(secret), row, column).unwrap();
        prop_assert_ne!(&again.as_ciphertext()[2..26], &sealed.as_ciphertext()[2..26]);
    }

    #[test]
    fn an_altered_value_does_not_open(
        secret in ".{0,50}",
        row in any_instance(),
        column in any_column(),
        bit in any::<proptest::sample::Index>(),
        more in any::<u8>(),
    ) {
        let ring = ring(7, &[3, 2]);
        let sealed = ring.seal(&SecretText::from(secret), row, column).unwrap();
        let sealed = sealed.as_ciphertext();
        let open = |bytes: Vec<u8>| {
            let sealed = Sealed::from_ciphertext(bytes);
            sealed.map(|sealed| ring.open(&sealed, row, column).unwrap_err())
        };

        let bit = bit.index(sealed.len() * 8);
        let mut flipped = sealed.to_vec();
        flipped[bit / 8] ^= 1 << (bit % 8);
        let expected = match (bit / 8, flipped[1]) {
            (0, _) => Err(NotSealed),
            // The ring has this key, but the value was sealed with another.
            (1, 2) => Ok(OpenError::Altered),
            (1, key_id) => Ok(OpenError::UnknownKey { key_id }),
            _ => Ok(OpenError::Altered),
        };
        prop_assert_eq!(open(flipped), expected);

        for length in 0..sealed.len() {
            let expected = if length < 42 { Err(NotSealed) } else { Ok(OpenError::Altered) };
            prop_assert_eq!(open(sealed[..length].to_vec()), expected);
        }
        prop_assert_eq!(open([sealed, &[more]].concat()), Ok(OpenError::Altered));
    }

    #[test]
    fn nothing_shows_a_secret(secret in "[a-z]{12,40}", row in any_instance(), column in any_column()) {
        let ring = ring(7, &[3]);
        let sealed = ring.seal(&SecretText::from(secret.as_str()), row, column).unwrap();
        let mut parts = sealed.as_ciphertext().windows(secret.len());
        prop_assert!(!parts.any(|part| part == secret.as_bytes()));
        let opened = ring.open(&sealed, row, column).unwrap();
        let tokens = OauthTokens::seal(&ring, row, &opened, Some(&opened), None, None).unwrap();
        let shown = format!("{ring:?} {sealed:?} {opened:?} {tokens:?}");
        prop_assert!(!shown.contains(&secret), "{}", shown);
        prop_assert!(!shown.contains(&format!("{:?}", sealed.as_ciphertext())), "{}", shown);
    }
}

/// Reads this process's memory where a secret was. A block of this size stays with its thread after
/// it is freed, so no other test writes there.
#[cfg(target_os = "linux")]
#[test]
fn a_dropped_secret_is_wiped_from_memory() {
    use std::os::unix::fs::FileExt;

    const PART: &str = "whisper.";
    let memory = std::fs::File::open("/proc/self/mem").unwrap();
    // Allocated before the drop: later it could be the very block that is looked at.
    let mut seen = vec![0; 100 * PART.len()];
    let mut parts_at = |address: u64| {
        memory.read_exact_at(&mut seen, address).unwrap();
        let parts = seen.windows(PART.len());
        parts.filter(|part| *part == PART.as_bytes()).count()
    };

    let (ring, instance) = (rotated(), InstanceId::new());
    let secret = SecretText::from(PART.repeat(100));
    let sealed = ring.seal(&secret, instance, SecretColumn::ApiKey).unwrap();
    let opened = ring.open(&sealed, instance, SecretColumn::ApiKey).unwrap();
    let kept = secret.clone();
    let address = |secret: &SecretText| secret.expose().as_ptr().addr() as u64;
    for secret in [secret, opened] {
        let address = address(&secret);
        assert_eq!(parts_at(address), 100);
        drop(secret);
        assert_eq!(parts_at(address), 0);
    }
    assert_eq!(parts_at(address(&kept)), 100);
}

/// Values that were made without the crate, by the documented formats.
#[test]
fn the_formats_are_as_documented() {
    let instance = InstanceId(Uuid::from_u128(5));
    let ring = KeyRing::new([(9, &[7; 32][..])]).unwrap();
    for format in [1, 2] {
        let open = |text| {
            let sealed = sealed_by_hand(format, instance, "refresh_token", text);
            ring.open(&sealed, instance, SecretColumn::RefreshToken)
        };
        assert_eq!(open(b"1//abc").unwrap().expose(), "1//abc");
        assert_eq!(open(b"\xff\xfe").unwrap_err(), OpenError::NotText);
    }
    let sealed = ring
        .seal(&"1//abc".into(), instance, SecretColumn::RefreshToken)
        .unwrap();
    assert_eq!(sealed.as_ciphertext()[..2], [2, 9]);
}

/// Stored values must stay readable. These were made by Python's `cryptography`, PyNaCl and `hmac`.
#[test]
fn stored_values_of_both_formats_still_open() {
    let key: Vec<u8> = (0..32).collect();
    let ring = KeyRing::new([(9, &key[..])]).unwrap();
    let instance = InstanceId(Uuid::from_u128(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff));
    for hex in [
        "01096465666768696a6b6c6d6e6f7934f1071b8a501a39809ab8d2037b5f833a45985e3f",
        "02096465666768696a6b6c6d6e6f707172737475767778797a7b84831b1edf4258d0b8f8af09625ec1e51428\
         c1e160af",
    ] {
        let bytes = (0..hex.len()).step_by(2);
        let bytes = bytes.map(|n| u8::from_str_radix(&hex[n..n + 2], 16).unwrap());
        let sealed = Sealed::from_ciphertext(bytes.collect()).unwrap();
        let opened = ring.open(&sealed, instance, SecretColumn::RefreshToken);
        assert_eq!(opened.unwrap().expose(), "1//abc");
    }
}

/// What the database's checks accept of a known format's length, the type accepts, and no more.
#[test]
fn what_is_not_sealed_is_refused_before_the_server_sees_it() {
    let value = |format: u8, length: usize| {
        let mut bytes = vec![7; length];
        bytes[0] = format;
        Sealed::from_ciphertext(bytes).map(drop)
    };
    for (format, shortest) in [(1, 30), (2, 42)] {
        assert_eq!(value(format, shortest - 1), Err(NotSealed));
        assert_eq!(value(format, shortest), Ok(()));
        assert_eq!(value(format, 16_384), Ok(()));
        assert_eq!(value(format, 16_385), Err(NotSealed));
    }
    for format in [0, 3, b'f', 255] {
        assert_eq!(value(format, 100), Err(NotSealed));
    }
    for text in ["", "figd_0123456789012345678901234567890123456789"] {
        let error = Sealed::from_ciphertext(text.into()).unwrap_err();
        assert_eq!(format!("{error} {error:?}"), "not a sealed value NotSealed");
    }
}

/// A service that wraps by adding one to each byte.
struct PlusOne;

impl KeyUnwrap for PlusOne {
    type Error = std::io::Error;

    fn unwrap_key(&self, key_id: u8, wrapped: &[u8]) -> std::io::Result<Zeroizing<Vec<u8>>> {
        if key_id == 13 {
            return Err(std::io::Error::other("refused"));
        }
        Ok(Zeroizing::new(
            wrapped.iter().map(|byte| byte - 1).collect(),
        ))
    }
}

#[test]
fn a_ring_of_wrapped_keys_is_that_of_the_keys() {
    let ring = KeyRing::from_wrapped(&PlusOne, [(2, &[3; 32][..]), (1, &[2; 32][..])]).unwrap();
    let (plain, instance) = (rotated(), InstanceId::new());
    let sealed = ring.seal(&"one".into(), instance, SecretColumn::ApiKey);
    let opened = plain.open(&sealed.unwrap(), instance, SecretColumn::ApiKey);
    assert_eq!(opened.unwrap().expose(), "one");

    let refused = |keys: &[(u8, &[u8])]| {
        let keys = keys.iter().copied();
        let error = KeyRing::from_wrapped(&PlusOne, keys).unwrap_err();
        format!("{error}; {:?}", error.source().map(ToString::to_string))
    };
    assert_eq!(
        refused(&[(1, &[2; 32]), (13, &[2; 32])]),
        "key 13 of the key ring can't be unwrapped; Some(\"refused\")"
    );
    assert_eq!(
        refused(&[(1, &[2; 31])]),
        "key 1 of the key ring does not have 32 bytes; None"
    );
    assert_eq!(refused(&[]), "the key ring has no key; None");
}

/// The example keeps its keys in a folder that only their owner reads, and wrapped only.
#[cfg(unix)]
#[test]
fn the_example_of_wrapped_keys_runs_twice_in_one_folder() {
    use std::os::unix::fs::PermissionsExt;

    let folder = std::env::temp_dir().join(format!("bruhmcp-wrapped-{}", std::process::id()));
    let run = || {
        let mut command = std::process::Command::new(example("wrapped_key"));
        let output = command.arg(&folder).output().unwrap();
        let printed = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{printed}");
        assert!(
            printed.contains("opened after the rotation: true"),
            "{printed}"
        );
        assert!(printed.contains("in the place of key 2: the key was wrapped by another"));
        assert!(!printed.contains("figd_a_secret"), "{printed}");
    };
    run();
    let files = || {
        let mut files: Vec<_> = std::fs::read_dir(&folder)
            .unwrap()
            .map(|entry| {
                let path = entry.unwrap().path();
                let mode = path.metadata().unwrap().permissions().mode() & 0o777;
                (
                    path.file_name().unwrap().to_owned(),
                    mode,
                    std::fs::read(&path).unwrap(),
                )
            })
            .collect();
        files.sort();
        files
    };
    let before = files();
    let shown: Vec<_> = before
        .iter()
        .map(|(name, mode, bytes)| (name.to_str(), *mode, bytes.len()))
        .collect();
    assert_eq!(
        shown,
        [
            (Some("key-1.wrapped"), 0o600, 72),
            (Some("key-2.wrapped"), 0o600, 72),
            (Some("master.key"), 0o600, 32),
        ]
    );
    run();
    assert_eq!(files(), before);
    std::fs::remove_dir_all(folder).unwrap();
}

/// Sealed under the key `[7; 32]` with the id 9.
fn sealed_by_hand(format: u8, instance: InstanceId, column: &str, text: &[u8]) -> Sealed {
    let header = [format, 9];
    let place = format!("mcp_credentials.{column}");
    let aad = [&header[..], instance.0.as_bytes(), place.as_bytes()].concat();
    let (msg, aad) = (text, &aad[..]);
    let nonce = [4; 24];
    let (nonce, encrypted) = if format == 1 {
        let nonce: [u8; 12] = nonce[..12].try_into().unwrap();
        let cipher = Aes256Gcm::new(&[7; 32].into());
        let encrypted = cipher.encrypt(&nonce.into(), Payload { msg, aad });
        (nonce.to_vec(), encrypted.unwrap())
    } else {
        let mut derived = <Hmac<Sha256> as hmac::KeyInit>::new_from_slice(&[7; 32]).unwrap();
        derived.update(b"bruhmcp-db: sealed values, format 2");
        let derived: [u8; 32] = derived.finalize().into_bytes().into();
        let cipher = XChaCha20Poly1305::new(&derived.into());
        let encrypted = cipher.encrypt(&nonce.into(), Payload { msg, aad });
        (nonce.to_vec(), encrypted.unwrap())
    };
    Sealed::from_ciphertext([&header[..], &nonce, &encrypted].concat()).unwrap()
}

/// Values of format 1 under the newest key become format 2, and values of neither are refused.
#[test]
fn format_1_is_resealed_as_format_2() {
    let database = database();
    let conn = &mut database.connect();
    let (user_id, service_id) = (pro_user(conn), service(conn, "gmail", 4001));
    let new = NewMcpInstance::new(user_id, service_id);
    let old = sealed_by_hand(1, new.instance_id, "api_key", b"figd_old");
    let credential = NewMcpCredential::sealed_api_key(new.instance_id, old);
    let (_, row) = McpInstance::create(conn, &new, &credential).unwrap();

    let ring = KeyRing::new([(9, &[7; 32][..])]).unwrap();
    assert_eq!(McpCredential::count_to_reseal(conn, &ring).unwrap(), 1);
    let batch = McpCredential::reseal(conn, &ring, None, 10).unwrap();
    assert_eq!((batch.resealed, &batch.unopened[..]), (1, &[][..]));
    assert_eq!(McpCredential::count_to_reseal(conn, &ring).unwrap(), 0);
    let row = McpCredential::find(conn, row.credential_id)
        .unwrap()
        .unwrap();
    assert_eq!(row.api_key.as_ref().unwrap().as_ciphertext()[0], 2);
    let opened = row.open(&ring, SecretColumn::ApiKey).unwrap().unwrap();
    assert_eq!(opened.expose(), "figd_old");

    for column in ["api_key", "oauth_authorization_url", "oauth_code_verifier"] {
        for value in ["'figd_0123456789012345678901234567890'", "'\\x0102'", "''"] {
            let error = diesel::sql_query(format!("UPDATE mcp_credentials SET {column} = {value}"))
                .execute(conn)
                .unwrap_err();
            let violation = ConstraintViolation::of(&error).unwrap();
            assert_eq!(
                violation.constraint,
                format!("mcp_credentials_{column}_check")
            );
        }
    }
}

/// Credentials that an attacker moves to another instance neither move nor open.
#[test]
fn credentials_keep_their_instance() {
    let database = database();
    let conn = &mut database.connect();
    let (user_id, service_id) = (pro_user(conn), service(conn, "gmail", 4001));
    let row = with_api_key(conn, user_id, service_id, "victim's");
    let other = with_api_key(conn, user_id, service_id, "attacker's").instance_id;
    diesel::delete(mcp_credentials::table.filter(mcp_credentials::instance_id.eq(other)))
        .execute(conn)
        .unwrap();
    let error = diesel::update(&row)
        .set(mcp_credentials::instance_id.eq(other))
        .execute(conn)
        .unwrap_err();
    let violation = ConstraintViolation::of(&error).unwrap();
    assert_eq!(violation.constraint, "mcp_credentials_fixed");

    let moved = McpCredential {
        instance_id: other,
        ..row.clone()
    };
    let opened = moved.open(&RING, SecretColumn::ApiKey);
    assert_eq!(opened.unwrap_err(), OpenError::Altered);

    let new = NewMcpInstance::new(user_id, service_id);
    let credential = NewMcpCredential::api_key(&RING, other, &"key".into()).unwrap();
    let error = McpInstance::create(conn, &new, &credential).unwrap_err();
    assert!(matches!(error, InstanceError::OtherCredential), "{error:?}");
}

#[test]
fn a_ring_needs_keys_of_32_bytes_with_different_ids() {
    let ring = |keys: &[(u8, usize)]| {
        let key = |&(id, length): &(u8, usize)| (id, &[0; 40][..length]);
        KeyRing::new(keys.iter().map(key)).unwrap_err()
    };
    assert_eq!(ring(&[]), KeyError::Empty);
    assert_eq!(ring(&[(1, 32), (2, 31)]), KeyError::Length { key_id: 2 });
    assert_eq!(ring(&[(1, 33)]), KeyError::Length { key_id: 1 });
    assert_eq!(
        ring(&[(1, 32), (2, 32), (1, 32)]),
        KeyError::Duplicate { key_id: 1 }
    );
}

#[test]
fn the_longest_and_the_shortest_secret_fit_the_database() {
    let database = database();
    let conn = &mut database.connect();
    let (user_id, service_id) = (pro_user(conn), service(conn, "gmail", 4001));
    for length in [0, KeyRing::MAX_LEN] {
        let row = with_api_key(conn, user_id, service_id, &"k".repeat(length));
        assert_eq!(text(&row, SecretColumn::ApiKey).len(), length);
        assert_eq!(row.oauth_status, OauthStatus::Completed);
        let instance = McpInstance::find(conn, row.instance_id).unwrap().unwrap();
        assert_eq!(instance.oauth_status, OauthStatus::Completed);
    }
    let too_long = SecretText::from("k".repeat(KeyRing::MAX_LEN + 1));
    let id = InstanceId::new();
    assert_eq!(
        RING.seal(&too_long, id, SecretColumn::ApiKey).unwrap_err(),
        SealError::TooLong
    );
    let new = NewMcpCredential::oauth(&RING, id, "client", &too_long);
    assert_eq!(new.unwrap_err(), SealError::TooLong);
}

#[test]
fn a_value_copied_in_the_database_does_not_open() {
    let database = database();
    let conn = &mut database.connect();
    let (user_id, service_id) = (pro_user(conn), service(conn, "gmail", 4001));
    let oauth = completed(conn, user_id, service_id, Utc::now());
    let [from, to] = ["one", "other"].map(|key| with_api_key(conn, user_id, service_id, key));
    let to: McpCredential = diesel::update(&to)
        .set(mcp_credentials::api_key.eq(&from.api_key))
        .get_result(conn)
        .unwrap();
    let opened = to.open(&RING, SecretColumn::ApiKey);
    assert_eq!(opened.unwrap_err(), OpenError::Altered);
    assert!(to.open(&RING, SecretColumn::AccessToken).unwrap().is_none());

    let oauth: McpCredential = diesel::update(&oauth)
        .set(mcp_credentials::access_token.eq(&oauth.refresh_token))
        .get_result(conn)
        .unwrap();
    let opened = oauth.open(&RING, SecretColumn::AccessToken);
    assert_eq!(opened.unwrap_err(), OpenError::Altered);
    assert_eq!(text(&oauth, SecretColumn::RefreshToken), "refresh first");
}

/// All batches of a pass.
fn reseal_all(conn: &mut PgConnection, ring: &KeyRing, limit: u16) -> Vec<Resealed> {
    let mut batches: Vec<Resealed> = Vec::new();
    loop {
        let after = batches.last().and_then(|batch| batch.next);
        let batch = McpCredential::reseal(conn, ring, after, limit).unwrap();
        let last = batch.next.is_none();
        batches.push(batch);
        if last {
            return batches;
        }
    }
}

/// [`RING`]'s key 1 behind a new key 2.
fn rotated() -> KeyRing {
    KeyRing::new([(2, &[2; 32][..]), (1, &[1; 32][..])]).unwrap()
}

/// The ring without key 1.
fn retired() -> KeyRing {
    KeyRing::new([(2, &[2; 32][..])]).unwrap()
}

#[test]
fn a_rotation_leaves_nothing_under_the_old_key() {
    let database = database();
    let conn = &mut database.connect();
    let (user_id, service_id) = (pro_user(conn), service(conn, "gmail", 4001));
    for number in 0..7 {
        with_api_key(conn, user_id, service_id, &format!("key {number}"));
    }
    let oauth = completed(conn, user_id, service_id, Utc::now());
    let broken = {
        let new = NewMcpInstance::new(user_id, service_id);
        let sealed = Sealed::from_ciphertext([&[2][..], &[1; 41]].concat()).unwrap();
        let key = NewMcpCredential::sealed_api_key(new.instance_id, sealed);
        let (_, row) = McpInstance::create(conn, &new, &key).unwrap();
        // The smallest key, so that it would block all others.
        let id = CredentialId(Uuid::from_u128(1));
        diesel::update(&row)
            .set(mcp_credentials::credential_id.eq(id))
            .execute(conn)
            .unwrap();
        id
    };
    let ring = rotated();
    assert_eq!(McpCredential::count_to_reseal(conn, &RING).unwrap(), 0);
    assert_eq!(McpCredential::count_to_reseal(conn, &ring).unwrap(), 9);

    // Another transaction changes one of them.
    let (id, version) = (oauth.credential_id, oauth.version);
    let fresh = RING
        .seal(
            &"fresh".into(),
            oauth.instance_id,
            SecretColumn::ClientSecret,
        )
        .unwrap();
    let at_work = |other: &mut PgConnection| {
        McpCredential::replace_client(other, id, version, "client", &fresh)?;
        let batches = reseal_all(conn, &ring, 3);
        // The third batch is full, so a fourth one looks for more.
        assert_eq!(batches.len(), 4);
        let resealed: usize = batches.iter().map(|batch| batch.resealed).sum();
        assert_eq!(resealed, 7);
        assert_eq!(batches[0].unopened, [broken]);
        assert_eq!(McpCredential::count_to_reseal(conn, &ring).unwrap(), 2);
        Ok::<_, CredentialError>(())
    };
    database.connect().transaction(at_work).unwrap();
    let batches = reseal_all(conn, &ring, 3);
    let resealed: usize = batches.iter().map(|batch| batch.resealed).sum();
    assert_eq!(resealed, 1);
    assert_eq!(McpCredential::count_to_reseal(conn, &ring).unwrap(), 1);
    diesel::delete(mcp_credentials::table.find(broken))
        .execute(conn)
        .unwrap();
    assert_eq!(McpCredential::count_to_reseal(conn, &ring).unwrap(), 0);

    // Everything opens without the old key.
    let ring = retired();
    let oauth = McpCredential::find(conn, oauth.credential_id)
        .unwrap()
        .unwrap();
    let open = |row: &McpCredential, column| {
        let secret = row.open(&ring, column).unwrap();
        secret.map(|secret| secret.expose().to_owned())
    };
    assert_eq!(
        SecretColumn::ALL.map(|column| open(&oauth, column)),
        [
            None,
            Some("fresh".to_owned()),
            Some("access first".to_owned()),
            Some("refresh first".to_owned()),
            None,
            None
        ]
    );
    let instances =
        McpInstance::list_by_user(conn, user_id, InstanceFilter::default(), Page::first(100))
            .unwrap();
    let mut keys: Vec<_> = instances
        .iter()
        .filter_map(|details| {
            let row = McpCredential::find_by_instance(conn, details.instance.instance_id).unwrap();
            open(&row?, SecretColumn::ApiKey)
        })
        .collect();
    keys.sort();
    assert_eq!(
        keys,
        [0, 1, 2, 3, 4, 5, 6].map(|number| format!("key {number}"))
    );
}

/// Four threads increment sealed numbers with the new ring, while two others reseal.
#[test]
fn resealing_loses_no_change() {
    const ROWS: usize = 10;
    const WRITERS: usize = 4;
    let database = database();
    let conn = &mut database.connect();
    let (user_id, service_id) = (pro_user(conn), service(conn, "gmail", 4001));
    let rows: Vec<_> = (0..ROWS)
        .map(|_| with_api_key(conn, user_id, service_id, "0"))
        .collect();

    let ring = rotated();
    at_once(&database, WRITERS + 2, |number, conn| {
        if number >= WRITERS {
            reseal_all(conn, &ring, 2);
            return;
        }
        for row in &rows {
            let (id, mut row) = (row.credential_id, row.clone());
            loop {
                let count = row.open(&ring, SecretColumn::ApiKey).unwrap().unwrap();
                let count: usize = count.expose().parse().unwrap();
                let next = SecretText::from((count + 1).to_string());
                let next = ring
                    .seal(&next, row.instance_id, SecretColumn::ApiKey)
                    .unwrap();
                match McpCredential::replace_api_key(conn, id, row.version, &next) {
                    Ok(_) => break,
                    Err(CredentialError::Conflict(current)) => row = *current,
                    Err(error) => panic!("{error:?}"),
                }
            }
        }
    });
    assert_eq!(McpCredential::count_to_reseal(conn, &ring).unwrap(), 0);
    for row in rows {
        let row = McpCredential::find(conn, row.credential_id)
            .unwrap()
            .unwrap();
        let count = row.open(&retired(), SecretColumn::ApiKey).unwrap().unwrap();
        assert_eq!(count.expose(), WRITERS.to_string());
    }
}

/// The server's DETAIL prints the whole row.
#[test]
fn a_violated_constraint_shows_nothing_of_the_row() {
    let database = database();
    let conn = &mut database.connect();
    let (user_id, service_id) = (pro_user(conn), service(conn, "gmail", 4001));
    let row = completed(conn, user_id, service_id, Utc::now());
    let hex = |bytes: &[u8]| -> String { bytes.iter().map(|b| format!("{b:02x}")).collect() };
    let sealed = row.refresh_token.as_ref().unwrap().as_ciphertext();
    let secrets = [hex(b"whisper"), hex(&sealed[..16])];
    // Past the operations, which take sealed values only.
    let error = diesel::update(&row)
        .set(mcp_credentials::access_token.eq(b"whisper".to_vec()))
        .execute(conn)
        .unwrap_err();
    let error = CredentialError::from(error);
    let CredentialError::Database(cause @ DatabaseError(_, info)) = &error else {
        panic!("{error:?}");
    };
    for secret in &secrets {
        assert!(info.details().unwrap().contains(secret));
    }
    let violation = ConstraintViolation::of(cause).unwrap();
    assert!(
        violation.is("mcp_credentials_access_token_check"),
        "{violation}"
    );
    let mut shown = format!("{error:?} {violation:?} {violation}");
    let mut cause: Option<&dyn Error> = Some(&error);
    while let Some(error) = cause {
        shown += &format!(" {error}");
        cause = error.source();
    }
    assert!(shown.contains("mcp_credentials_access_token_check"));
    for secret in secrets {
        assert!(!shown.contains(&secret), "{shown}");
    }
}
