//! What a backend builds for this crate.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Result;
use crate::report::{Range, Section};

const DIESEL: &str = r#"[dependencies.diesel]
version = "2.3"
default-features = false
features = ["32-column-tables", "chrono", "numeric", "postgres", "serde_json", "uuid"]"#;

/// A crate with nothing but dependencies, built from nothing, for each case.
pub(crate) fn build_cost() -> Result<Section> {
    let this = env!("CARGO_MANIFEST_DIR");
    let with = |features: &str| {
        format!(
            "[dependencies.bruhmcp-db]\npath = {this:?}\ndefault-features = false\nfeatures = [{features}]"
        )
    };
    let cases = [
        ("Diesel alone", DIESEL.to_owned()),
        ("no features", with("")),
        ("default features", with(r#""default""#)),
        ("and the runner", with(r#""default", "migrator""#)),
    ];
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("build-cost");
    let mut rows = Vec::new();
    for (name, dependencies) in cases {
        let (crates, seconds) = build(&folder, &dependencies)?;
        rows.push((format!("{name} ({crates} crates)"), Range::exactly(seconds)));
    }
    Ok(Section {
        name: "build-cost",
        title: "Build of a backend",
        text: "CPU of the compiler for a crate that only has this dependency, built once and from \
               nothing in the dev profile, and the number of crates, which is the same on each \
               machine. Diesel has the features that this crate needs."
            .into(),
        unit: "seconds of CPU",
        rows,
    })
}

/// Returns the number of crates and the seconds of CPU.
fn build(folder: &Path, dependencies: &str) -> Result<(usize, f64)> {
    let manifest = format!(
        "[package]\nname = \"backend\"\nedition = \"2024\"\n\n[workspace]\n\n{dependencies}\n"
    );
    if folder.exists() {
        fs::remove_dir_all(folder)?;
    }
    fs::create_dir_all(folder.join("src"))?;
    fs::write(folder.join("src/lib.rs"), "")?;
    fs::write(folder.join("Cargo.toml"), manifest)?;
    // The same versions, which are downloaded already.
    let lock = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.lock");
    fs::copy(lock, folder.join("Cargo.lock"))?;
    let before = cpu_of_children()?;
    let output = Command::new(env!("CARGO"))
        .args(["build", "--offline", "--message-format=json"])
        .arg("--target-dir")
        .arg(folder.join("target"))
        .current_dir(folder)
        .output()?;
    let seconds = cpu_of_children()? - before;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into());
    }
    fs::remove_dir_all(folder)?;
    let messages = String::from_utf8(output.stdout)?;
    let built = messages
        .lines()
        .map(serde_json::from_str)
        .collect::<std::result::Result<Vec<serde_json::Value>, _>>()?;
    let artifacts = built.iter().filter(|message| {
        // A build script is an artifact of its own.
        message["reason"] == "compiler-artifact" && message["target"]["kind"][0] != "custom-build"
    });
    // Without the crate itself.
    Ok((artifacts.count() - 1, seconds))
}

/// Seconds of CPU of the processes that this one has waited for, and of theirs.
fn cpu_of_children() -> Result<f64> {
    /// On every architecture that Rust and PostgreSQL run on.
    const TICKS: f64 = 100.0;
    let stat = fs::read_to_string("/proc/self/stat")?;
    let (_, after_name) = stat.rsplit_once(')').ok_or("no name")?;
    let fields: Vec<&str> = after_name.split_whitespace().collect();
    // cutime and cstime: fields 16 and 17, the name being the second.
    let ticks = fields[13].parse::<f64>()? + fields[14].parse::<f64>()?;
    Ok(ticks / TICKS)
}
