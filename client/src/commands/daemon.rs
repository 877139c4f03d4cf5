//! `tow daemon`: the background process that holds links. Started by `tow` itself.

use clap::Args;

use crate::commands::Env;
use crate::error::{Exit, Outcome};

/// Arguments of `tow daemon`.
#[derive(Debug, Args)]
pub struct DaemonArgs {}

pub(super) async fn run(_: DaemonArgs, _: &Env) -> Outcome {
    crate::daemon::run().await?;
    Ok(Exit::OK)
}
