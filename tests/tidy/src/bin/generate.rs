//! Regenerates the committed code: `cargo run -p towline-tidy --bin generate`.

fn main() -> anyhow::Result<()> {
    let root = towline_tidy::workspace_root();
    towline_tidy::generate(
        &root,
        &root.join(towline_tidy::MESSAGES_DIR),
        &root.join(towline_tidy::SERVICES_DIR),
    )
}
