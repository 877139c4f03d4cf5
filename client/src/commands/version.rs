//! `tow version`.

use clap::Args;
use serde_json::json;

use crate::commands::Env;
use crate::error::{Exit, Outcome};

/// Arguments of `tow version`.
#[derive(Debug, Args)]
pub struct VersionArgs {
    /// Print an object
    #[arg(long)]
    pub json: bool,
}

pub(super) fn run(_: &VersionArgs, env: &Env) -> Outcome {
    let version = env!("CARGO_PKG_VERSION");
    match env.printer.json() {
        true => env.printer.object(&json!({ "schema": "towline.version/1", "tow": version }))?,
        false => env.printer.answer(format!("tow {version}"))?,
    }
    Ok(Exit::OK)
}
