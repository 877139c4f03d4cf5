//! Generates the code that is committed from `proto/schema`, for the `generate` binary and for the
//! test that it is current. Needs no protoc: protox compiles the schema.

pub mod dependencies;
pub mod links;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use prost_types::FileDescriptorSet;

/// The workspace's root.
pub fn workspace_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Where the committed code lies, relative to the root.
pub const MESSAGES_DIR: &str = "proto/src/generated";
/// Where the committed services lie.
pub const SERVICES_DIR: &str = "proto/link/src/generated";

/// Messages that must not be printed; `proto/src/secret.rs` has their `Debug`.
const SECRET: [&str; 1] = [".towline.v1.RegistryCredentials"];

/// Writes messages and services below `out`.
pub fn generate(root: &Path, messages: &Path, services: &Path) -> Result<()> {
    let schema = root.join("proto/schema");
    let mut files: Vec<PathBuf> = std::fs::read_dir(schema.join("towline/v1"))
        .context("reading the schema folder")?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    files.sort();
    let descriptors = protox::compile(&files, [&schema]).context("compiling the schema")?;
    std::fs::create_dir_all(messages)?;
    std::fs::create_dir_all(services)?;
    prost_build::Config::new()
        .out_dir(messages)
        .bytes([".towline.v1.LogEntry"])
        .btree_map(["."])
        .skip_debug(SECRET)
        .compile_fds(without_services(descriptors.clone()))
        .context("generating messages")?;
    tonic_prost_build::configure()
        .out_dir(services)
        .extern_path(".towline.v1", "::towline_proto::v1")
        .compile_fds(descriptors)
        .context("generating services")
}

fn without_services(mut descriptors: FileDescriptorSet) -> FileDescriptorSet {
    descriptors.file.iter_mut().for_each(|file| file.service.clear());
    descriptors
}
