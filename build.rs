//! `embed_migrations!` does not see a new folder, a new `down.sql` or `metadata.toml` by itself.
fn main() {
    println!("cargo::rerun-if-changed=migrations");
}
