//! `tow cp`: files between this machine and a running sandbox, as `docker cp` has it.

use std::ffi::{OsStr, OsString};
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};

use anyhow::Context as _;
use clap::Args;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use towline_filesync::copy::{Base, Totals, pack, source_name, unpack};
use towline_proto::v1::{self, CopyDirection, CopyOpen, Phase};

use crate::cluster::{Cluster, Start};
use crate::commands::Env;
use crate::error::{Exit, Failure, Outcome};
use crate::output::{Progress, human};
use crate::tunnel::copy::{from_sandbox, to_sandbox};
use crate::tunnel::guest::Guest;
use crate::{sandbox, user};

/// Arguments of `tow cp`.
#[derive(Debug, Args)]
pub struct CpArgs {
    /// User whose rights count in the sandbox, instead of the sandbox's: root, UID or UID:GID
    #[arg(short, long, value_name = "USER", value_parser = user::parse_typed)]
    pub user: Option<v1::User>,
    /// What is copied: a path, NAME:PATH, or - for a tar archive on standard input
    #[arg(value_name = "FROM")]
    pub from: OsString,
    /// Where to: a path, NAME:PATH, or - for a tar archive on standard output
    #[arg(value_name = "TO")]
    pub to: OsString,
}

/// One side of a copy.
#[derive(Debug, PartialEq, Eq)]
enum Side {
    Here(Vec<u8>),
    There {
        name: String,
        path: Vec<u8>,
    },
    /// Standard input or output.
    Stdio,
}

/// Reads a side. A colon after a slash, or after `.`, belongs to a path of this machine.
fn side(text: &OsStr) -> Side {
    let bytes = text.as_bytes();
    if bytes == b"-" {
        return Side::Stdio;
    }
    let colon = bytes.iter().position(|&b| b == b':').filter(|&at| at > 0);
    let name = colon.and_then(|at| std::str::from_utf8(&bytes[..at]).ok());
    match (name, colon) {
        (Some(name), Some(at)) if !name.contains('/') && !name.starts_with('.') => {
            let path = bytes[at + 1..].to_vec();
            // As docker: nothing after the colon is the root.
            let path = if path.is_empty() { b"/".to_vec() } else { path };
            Side::There { name: name.to_owned(), path }
        }
        _ => Side::Here(bytes.to_vec()),
    }
}

pub(super) async fn run(args: CpArgs, env: &Env) -> Outcome {
    let (from, to) = (side(&args.from), side(&args.to));
    let name = match (&from, &to) {
        (Side::There { .. }, Side::There { .. }) => {
            let text = "one side of a copy is on this machine: copy here first, then there";
            return Err(Failure::usage(text).into());
        }
        (Side::There { name, .. }, _) | (_, Side::There { name, .. }) => name.clone(),
        _ => {
            let text = "one side of a copy is in a sandbox: NAME:PATH";
            return Err(Failure::usage(text).hint("`tow cp web:/tmp/file .`").into());
        }
    };
    let cluster = Cluster::open(env, Start::UnlessDown).await?;
    let found = sandbox::find(&cluster, &name).await?;
    if sandbox::phase(&found) != Phase::Running {
        let text = format!(
            "sandbox {name} does not run: files are copied to and from running sandboxes only"
        );
        return Err(Failure::new(text).hint(format!("`tow start {name}`")).into());
    }
    let guest = Guest::of(env, cluster, &found)?;
    let shown = env.printer.progress("copying");
    let totals = match (from, to) {
        (Side::There { path, .. }, to) => bring(&guest, path, to, args.user, &shown).await?,
        (from, Side::There { path, .. }) => send(&guest, from, path, args.user, &shown).await?,
        _ => unreachable!("one side is in the sandbox"),
    };
    drop(shown);
    if totals.skipped > 0 {
        let text = format!("{} devices, sockets or pipes were left out", totals.skipped);
        env.printer.warning(text);
    }
    env.printer.hint(format!("copied {} files, {}", totals.files, human::bytes(totals.bytes)));
    Ok(Exit::OK)
}

/// From the sandbox.
async fn bring(
    guest: &Guest<'_>,
    path: Vec<u8>,
    to: Side,
    user: Option<v1::User>,
    shown: &Progress,
) -> anyhow::Result<Totals> {
    let name = source_name(&path).map(<[u8]>::to_vec);
    let direction = CopyDirection::FromSandbox.into();
    let open = CopyOpen { direction, path, user, ..Default::default() };
    let Side::Here(to) = to else {
        return from_sandbox(guest, open, |archive| Ok(to_stdout(archive)?), shown).await;
    };
    // Looked at before anything is sent: a wrong destination costs nothing.
    let place = base()?.place(&to, name.as_deref(), true);
    let place = place.map_err(|error| cannot("write to", &to, error))?;
    from_sandbox(guest, open, move |archive| Ok(unpack(archive, &place, None)?), shown).await
}

/// To the sandbox.
async fn send(
    guest: &Guest<'_>,
    from: Side,
    path: Vec<u8>,
    user: Option<v1::User>,
    shown: &Progress,
) -> anyhow::Result<Totals> {
    let direction = CopyDirection::ToSandbox.into();
    let open = CopyOpen { direction, path, user, ..Default::default() };
    let Side::Here(from) = from else {
        let open = CopyOpen { must_exist: true, ..open };
        let from_stdin = |archive: &mut towline_streams::ArchiveWriter| {
            io::copy(&mut io::stdin().lock(), archive).context("reading standard input")?;
            Ok(Totals::default())
        };
        return to_sandbox(guest, open, from_stdin, shown).await;
    };
    let source = base()?.source(&from).map_err(|error| cannot("read", &from, error))?;
    let name = source.name.clone().unwrap_or_default();
    let open = CopyOpen { name, ..open };
    to_sandbox(guest, open, move |archive| Ok(pack(&source, archive)?), shown).await
}

fn to_stdout(archive: &mut towline_streams::ArchiveReader) -> io::Result<Totals> {
    let mut out = io::stdout().lock();
    io::copy(archive, &mut out)?;
    out.flush()?;
    Ok(Totals::default())
}

/// Paths of this machine are the user's: they begin where `tow` was typed and lead anywhere.
fn base() -> anyhow::Result<Base> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory: OwnedFd =
        rustix::fs::open(".", flags, Mode::empty()).context("opening the working directory")?;
    Ok(Base { directory, resolve: ResolveFlags::empty() })
}

fn cannot(what: &str, path: &[u8], error: io::Error) -> anyhow::Error {
    let path = OsString::from_vec(path.to_vec());
    Failure::new(format!("cannot {what} `{}`", path.display())).because(error).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_are_told_apart_as_docker_tells_them() {
        let there = |name: &str, path: &str| Side::There { name: name.into(), path: path.into() };
        let here = |path: &str| Side::Here(path.into());
        let cases = [
            ("web:/tmp/x", there("web", "/tmp/x")),
            ("web:rel/x:y", there("web", "rel/x:y")),
            ("web:", there("web", "/")),
            ("-", Side::Stdio),
            ("./a:b", here("./a:b")),
            ("/a:b", here("/a:b")),
            ("dir/a:b", here("dir/a:b")),
            (":x", here(":x")),
            ("file", here("file")),
        ];
        for (text, wanted) in cases {
            assert_eq!(side(OsStr::new(text)), wanted, "{text}");
        }
    }
}
