//! The dependency table of ARCHITECTURE.md holds, and the cores know no runtime.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::Value;
use towline_tidy::dependencies::{FORBIDDEN_IN_SANS_IO, SANS_IO, TABLE};
use towline_tidy::workspace_root;

fn metadata() -> Value {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--locked"])
        .current_dir(workspace_root())
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("cargo metadata prints JSON")
}

fn packages(metadata: &Value) -> impl Iterator<Item = &Value> {
    metadata["packages"].as_array().expect("packages").iter()
}

fn name(value: &Value) -> &str {
    value["name"].as_str().expect("a name")
}

#[test]
fn each_crate_knows_only_whom_it_may() {
    let metadata = metadata();
    let mut seen = BTreeSet::new();
    for package in packages(&metadata).filter(|p| p["source"].is_null()) {
        let row = TABLE.iter().find(|row| row.0 == name(package));
        let Some((crate_name, folder, allowed)) = row else {
            panic!("{} is not in the dependency table", name(package));
        };
        seen.insert(*crate_name);
        let manifest = package["manifest_path"].as_str().expect("a path");
        assert!(manifest.ends_with(&format!("/{folder}/Cargo.toml")), "{crate_name}: {manifest}");
        for dependency in package["dependencies"].as_array().expect("dependencies") {
            let other = name(dependency);
            let ours = other.starts_with("towline-") && dependency["kind"].is_null();
            if ours && !allowed.contains(&"*") {
                assert!(allowed.contains(&other), "{crate_name} may not depend on {other}");
            }
        }
    }
    let table: BTreeSet<_> = TABLE.iter().map(|row| row.0).collect();
    assert_eq!(seen, table, "the table names crates that do not exist");
}

#[test]
fn what_decides_knows_no_runtime() {
    let metadata = metadata();
    let names: BTreeMap<&str, &str> =
        packages(&metadata).map(|p| (p["id"].as_str().expect("an id"), name(p))).collect();
    let mut edges: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for node in metadata["resolve"]["nodes"].as_array().expect("nodes") {
        let normal = node["deps"].as_array().expect("deps").iter().filter(|dep| {
            dep["dep_kinds"].as_array().expect("kinds").iter().any(|kind| kind["kind"].is_null())
        });
        let to = normal.map(|dep| dep["pkg"].as_str().expect("an id")).collect();
        edges.insert(node["id"].as_str().expect("an id"), to);
    }
    for core in SANS_IO {
        let start = names.iter().find(|(_, n)| *n == core).expect("the crate exists").0;
        let (mut known, mut queue) = (BTreeSet::new(), vec![*start]);
        while let Some(id) = queue.pop() {
            if known.insert(names[id]) {
                queue.extend(&edges[id]);
            }
        }
        for forbidden in FORBIDDEN_IN_SANS_IO {
            assert!(!known.contains(forbidden), "{core} reaches {forbidden}");
        }
    }
}

#[test]
fn every_dependency_is_pinned_in_the_workspace_with_its_features_off() {
    let text = std::fs::read_to_string(workspace_root().join("Cargo.toml")).expect("Cargo.toml");
    let section = text.split("[workspace.dependencies]").nth(1).expect("the section");
    let section = section.split("\n[").next().expect("its end");
    for line in section.lines().filter(|line| line.contains(" = ") && !line.starts_with("towline-"))
    {
        assert!(line.contains("default-features = false"), "features are off by default: {line}");
    }
    let metadata = metadata();
    for package in packages(&metadata).filter(|p| p["source"].is_null()) {
        assert_eq!(package["license"], "Apache-2.0", "{}", name(package));
        let path = package["manifest_path"].as_str().expect("a path");
        let manifest = std::fs::read_to_string(path).expect("a manifest");
        assert!(manifest.contains("[lints]\nworkspace = true"), "{path} does not take our lints");
        let versions = manifest.lines().filter(|l| l.contains("version = \"")).collect::<Vec<_>>();
        assert!(versions.is_empty(), "{path}: versions belong into the workspace: {versions:?}");
    }
}
