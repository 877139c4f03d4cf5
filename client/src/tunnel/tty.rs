//! The flags about terminals that `run`, `exec`, `shell` and `attach` share.

use clap::Args;
use towline_proto::v1;

use super::exec::Io;
use super::terminal;
use crate::env_vars;
use crate::parse;

/// The flags.
#[derive(Debug, Clone, Default, Args)]
pub struct TtyArgs {
    /// Give the command a terminal
    #[arg(short, long, overrides_with = "no_tty")]
    pub tty: bool,
    /// Give the command no terminal
    #[arg(short = 'T', long)]
    pub no_tty: bool,
    /// Accepted for habit's sake: standard input is attached anyway.
    #[arg(short, long, hide = true)]
    pub interactive: bool,
    /// Keys that leave without ending the command
    #[arg(long, value_name = "K", default_value = "ctrl-p,ctrl-q", value_parser = keys)]
    pub detach_keys: DetachKeys,
}

/// Parsed detach keys.
#[derive(Debug, Clone, Default)]
pub struct DetachKeys(pub Vec<u8>);

fn keys(text: &str) -> Result<DetachKeys, String> {
    parse::detach_keys(text).map(DetachKeys)
}

impl TtyArgs {
    /// Whether the command gets a terminal: as said, else when all of ours are ones.
    pub fn wanted(&self) -> bool {
        !self.no_tty && (self.tty || terminal::all_three())
    }

    /// The terminal that the command gets.
    pub fn terminal(&self) -> Option<v1::Terminal> {
        self.wanted().then(|| {
            let (rows, columns) = terminal::size();
            let term = env_vars::get("TERM").map(|term| term.to_string_lossy().into_owned());
            v1::Terminal { rows, columns, term: term.unwrap_or_else(|| "xterm-256color".into()) }
        })
    }

    /// Our side of a command that we wait for.
    pub fn io(&self, terminal: bool) -> Io {
        Io {
            stdin: true,
            terminal,
            forward_signals: !terminal,
            detach_keys: self.detach_keys.0.clone(),
            only_start: false,
        }
    }
}

/// Our side of a command that we only start.
pub fn detached() -> Io {
    Io {
        stdin: false,
        terminal: false,
        forward_signals: false,
        detach_keys: Vec::new(),
        only_start: true,
    }
}
