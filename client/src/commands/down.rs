//! `tow down`: stops the embedded cluster and says what became of its sandboxes.

use clap::Args;

use crate::commands::Env;
use crate::embedded::{self, Layout, Stopped};
use crate::error::{Exit, Outcome};

/// Arguments of `tow down`.
#[derive(Debug, Args)]
pub struct DownArgs {}

pub(super) async fn run(_: DownArgs, env: &Env) -> Outcome {
    let text = match embedded::stop(&Layout::new()?, &env.printer).await? {
        Stopped::WasDown => "the embedded cluster was down already".to_owned(),
        Stopped::Now(0) => "the embedded cluster is down".to_owned(),
        Stopped::Now(1) => {
            "the embedded cluster is down; 1 sandbox was stopped, its disk is kept".to_owned()
        }
        Stopped::Now(n) => {
            format!(
                "the embedded cluster is down; {n} sandboxes were stopped, their disks are kept"
            )
        }
    };
    env.printer.answer(text)?;
    Ok(Exit::OK)
}
