//! `tow up`: starts the embedded cluster, in front of the user or behind.

use clap::Args;

use crate::commands::Env;
use crate::embedded::{self, Holder, Layout, Reporter};
use crate::error::{Exit, Failure, Outcome};

/// Arguments of `tow up`.
#[derive(Debug, Args)]
pub struct UpArgs {
    /// Return when the cluster is ready and leave it running
    #[arg(short, long)]
    pub detach: bool,
    /// Be the background process of `--detach`.
    #[arg(long, hide = true)]
    pub supervise: bool,
}

pub(super) async fn run(args: UpArgs, env: &Env) -> Outcome {
    let layout = Layout::new()?;
    if args.supervise {
        return background(&layout).await;
    }
    if args.detach {
        let started = match Holder::find(&layout.lock())? {
            Some(_) => embedded::ensure_started(&layout, &env.printer).await?,
            None => {
                embedded::start_detached(&layout, &env.printer).await?;
                true
            }
        };
        env.printer.answer(match started {
            true => "the embedded cluster is up",
            false => "the embedded cluster was up already",
        })?;
        return Ok(Exit::OK);
    }
    foreground(&layout, env).await
}

async fn foreground(layout: &Layout, env: &Env) -> Outcome {
    let progress =
        std::cell::Cell::new(Some(env.printer.progress("starting the embedded cluster")));
    let ready = || {
        drop(progress.take());
        let _ = env.printer.answer("the embedded cluster is up; Ctrl-C stops it");
    };
    let reporter = Reporter { to_stdout: false };
    let ran = embedded::supervise(layout, &reporter, env.printer.verbose(), ready).await?;
    drop(progress.take());
    match ran {
        true => Ok(Exit::OK),
        false => Err(Failure::new("the embedded cluster is up already")
            .hint("`tow status` says how it is, `tow down` stops it")
            .into()),
    }
}

/// The supervisor behind `--detach`: what happens to it before it is ready is told on stdout.
async fn background(layout: &Layout) -> Outcome {
    embedded::own_session()?;
    let reporter = Reporter { to_stdout: true };
    match embedded::supervise(layout, &reporter, false, || ()).await {
        Ok(true) => Ok(Exit::OK),
        Ok(false) => {
            reporter.other();
            Ok(Exit::OK)
        }
        Err(error) => {
            reporter.failed(&error);
            Err(error)
        }
    }
}
