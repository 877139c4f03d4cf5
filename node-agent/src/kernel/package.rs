//! Fetches and unpacks the Debian package of the guest kernel with the system's own tools, as any
//! user: nothing is installed.
//!
//! Where apt's lists are missing or too old, fresh ones are fetched to a directory of our own.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::{KernelError, failed};

/// Always depends on the current cloud kernel.
const META_PACKAGE: &str = "linux-image-cloud-amd64";
const QUERY_MAX: Duration = Duration::from_secs(60);
const DOWNLOAD_MAX: Duration = Duration::from_secs(600);
const UNPACK_MAX: Duration = Duration::from_secs(300);
const POLL: Duration = Duration::from_millis(20);
/// How much of a failed tool's output is shown.
const OUTPUT_SHOWN: usize = 600;

/// Downloads the package into `work`; returns its file.
pub(super) fn download(work: &Path, progress: &dyn Fn(&str)) -> Result<PathBuf, KernelError> {
    progress("downloading the guest kernel (once per machine)");
    download_with(work, &[]).or_else(|_| {
        progress("fetching package lists to find the guest kernel");
        let options = private_lists(work)?;
        let mut update = apt("apt-get", &options);
        update.arg("update");
        run("fetching package lists", update, work, DOWNLOAD_MAX)?;
        progress("downloading the guest kernel (once per machine)");
        download_with(work, &options)
    })
}

/// Unpacks the package's files into a directory.
pub(super) fn unpack(deb: &Path, into: &Path) -> Result<(), KernelError> {
    fs::create_dir_all(into).map_err(failed("create", into))?;
    let mut command = Command::new("dpkg-deb");
    command.arg("-x").arg(deb).arg(into);
    run("unpacking the guest kernel", command, into, UNPACK_MAX).map(|_| ())
}

fn download_with(work: &Path, options: &[String]) -> Result<PathBuf, KernelError> {
    let mut query = apt("apt-cache", options);
    query.args(["depends", META_PACKAGE]);
    let output = run("looking for the guest kernel's package", query, work, QUERY_MAX)?;
    let package = output
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with("linux-image-"))
        .ok_or_else(|| KernelError::Package {
            package: META_PACKAGE.into(),
            problem: "it depends on no kernel image".into(),
        })?;
    let mut get = apt("apt-get", options);
    get.args(["download", package]).current_dir(work);
    run("downloading the guest kernel", get, work, DOWNLOAD_MAX)?;
    let mut files = fs::read_dir(work).map_err(failed("read", work))?.flatten();
    let deb = files.find(|entry| entry.path().extension().is_some_and(|ext| ext == "deb"));
    deb.map(|entry| entry.path()).ok_or_else(|| KernelError::Package {
        package: package.into(),
        problem: "apt-get downloaded no file of it".into(),
    })
}

fn apt(program: &str, options: &[String]) -> Command {
    let mut command = Command::new(program);
    command.args(["-q", "-o", "Acquire::Retries=2", "-o", "Acquire::http::Timeout=30"]);
    command.args(options);
    command.env("LC_ALL", "C").env("DEBIAN_FRONTEND", "noninteractive");
    command
}

fn private_lists(work: &Path) -> Result<Vec<String>, KernelError> {
    let mut options = Vec::new();
    for (key, name) in [("Dir::State::lists", "lists/"), ("Dir::Cache", "cache/")] {
        let dir = work.join(name);
        let partial = dir.join("partial");
        fs::create_dir_all(&partial).map_err(failed("create", &partial))?;
        options.extend(["-o".to_owned(), format!("{key}={}", dir.display())]);
    }
    Ok(options)
}

/// Runs a tool to its end, within a bound; returns its standard output.
pub(super) fn run(
    doing: &'static str,
    mut command: Command,
    work: &Path,
    bound: Duration,
) -> Result<String, KernelError> {
    let line = format!("{command:?}");
    let line = line.replace('"', "");
    let error = |problem: String| KernelError::Tool { doing, command: line.clone(), problem };
    let output_path = work.with_extension("output");
    let output = File::create(&output_path).map_err(failed("create", &output_path))?;
    let errors = output.try_clone().map_err(failed("open", &output_path))?;
    command.stdin(Stdio::null()).stdout(output).stderr(errors);
    let mut child = command.spawn().map_err(|cause| {
        error(format!("could not be started ({cause}): is this a Debian system with apt?"))
    })?;
    let start = Instant::now();
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if start.elapsed() > bound => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(error(format!("did not end within {} s", bound.as_secs())));
            }
            Ok(None) => std::thread::sleep(POLL),
            Err(cause) => return Err(error(format!("was lost: {cause}"))),
        }
    };
    let text = fs::read(&output_path).map_err(failed("read", &output_path))?;
    let text = String::from_utf8_lossy(&text).into_owned();
    let _ = fs::remove_file(&output_path);
    if !status.success() {
        let from = text.len().saturating_sub(OUTPUT_SHOWN);
        let from = (from..=text.len()).find(|&at| text.is_char_boundary(at)).unwrap_or(0);
        return Err(error(format!("failed ({status}): {}", text[from..].trim())));
    }
    Ok(text)
}
