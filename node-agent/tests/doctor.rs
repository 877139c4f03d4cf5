//! `towline-node-agent doctor`, as an operator runs it.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// Exit code and objects.
fn doctor(config: Option<&Path>) -> (Option<i32>, Vec<Value>) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_towline-node-agent"));
    command.args(["doctor", "--json"]);
    if let Some(config) = config {
        command.arg("--config").arg(config);
    }
    let output = command.output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let checks = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    (output.status.code(), checks)
}

fn grade<'a>(checks: &'a [Value], name: &str) -> &'a str {
    let check = checks.iter().find(|check| check["name"] == name);
    check.unwrap_or_else(|| panic!("no {name} in {checks:?}"))["grade"].as_str().unwrap()
}

#[test]
fn without_a_configuration_it_says_what_it_did_not_look_at() {
    let (code, checks) = doctor(None);
    assert_eq!(grade(&checks, "configuration"), "note");
    let missing = checks.iter().any(|check| check["grade"] == "missing");
    assert_eq!(code, Some(i32::from(missing)), "{checks:?}");
    for check in &checks {
        let todo = check["todo"].as_str().unwrap();
        assert_eq!(
            check["grade"] == "ok",
            todo.is_empty(),
            "what is not right says what to do: {check}"
        );
    }
}

#[test]
fn a_configuration_that_cannot_work_is_told_before_a_start() {
    let dir = tempfile::tempdir().unwrap();
    let (path, data) = (dir.path().join("node-agent.toml"), dir.path().join("data"));
    let text = format!(
        "name = \"n\"\ncontrol_plane = [\"127.0.0.1:1\"]\ndata_dir = {data:?}\n\
         vmm = \"cloud-hypervisor\"\ncloud_hypervisor = \"/bin/true\"\nguest_agent = \"/nonexistent\"\n"
    );
    std::fs::write(&path, text).unwrap();
    let (code, checks) = doctor(Some(&path));
    assert_eq!(code, Some(1));
    for name in ["cloud-hypervisor", "guest agent", "driver"] {
        assert_eq!(grade(&checks, name), "missing", "{checks:?}");
    }
    assert_ne!(grade(&checks, "data_dir"), "missing");
    assert!(!data.exists(), "it changes nothing");
}
