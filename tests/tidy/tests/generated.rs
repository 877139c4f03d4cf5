//! The committed code is what the schema generates.

use std::path::Path;

use towline_tidy::{MESSAGES_DIR, SERVICES_DIR, generate, workspace_root};

#[test]
fn generated_code_is_current() {
    let root = workspace_root();
    let scratch = Path::new(env!("CARGO_TARGET_TMPDIR")).join("generated");
    let (messages, services) = (scratch.join("messages"), scratch.join("services"));
    generate(&root, &messages, &services).expect("the schema compiles");
    for (fresh, committed) in [(messages, MESSAGES_DIR), (services, SERVICES_DIR)] {
        let file = "towline.v1.rs";
        let fresh = std::fs::read_to_string(fresh.join(file)).expect("generated");
        let committed =
            std::fs::read_to_string(root.join(committed).join(file)).expect("committed");
        assert!(
            fresh == committed,
            "the schema changed: run `cargo run -p towline-tidy --bin generate` and commit"
        );
    }
}
