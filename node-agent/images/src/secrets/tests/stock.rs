//! The scan over files that are no secrets: those of this machine's Debian packages.

#![expect(clippy::print_stdout, reason = "a skipped test says why, and a scan what it saw")]

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use super::super::{FileScan, Finding};

/// Bytes that are scanned in an ordinary run.
const BYTES_MAX: u64 = 160 << 20;
/// False alarms that a stock system may give.
const ALARMS_MAX: usize = 3;

struct Scanned {
    files: u64,
    bytes: u64,
    /// In the scan alone, reading aside.
    took: Duration,
    found: Vec<Finding>,
}

#[test]
fn a_stock_system_has_next_to_no_secrets() {
    let Some(files) = package_files(|priority| priority != "optional" && priority != "extra")
    else {
        println!("SKIPPED: this machine has no dpkg, whose packages are the stock system");
        return;
    };
    let scanned = scan_all(&files, BYTES_MAX);
    say(&scanned);
    assert!(scanned.bytes > 10 << 20, "a system is more than {} bytes", scanned.bytes);
    assert!(scanned.found.len() <= ALARMS_MAX, "{:#?}", told(&scanned.found));
}

/// Run by hand, with `--run-ignored all`: what the scan says of everything that is installed.
#[test]
#[ignore = "reads every file of every package"]
fn all_packages_of_this_machine() {
    let Some(files) = package_files(|_| true) else {
        println!("SKIPPED: this machine has no dpkg, whose packages are the stock system");
        return;
    };
    let scanned = scan_all(&files, u64::MAX);
    say(&scanned);
    println!("{:#?}", told(&scanned.found));
}

fn told(found: &[Finding]) -> Vec<String> {
    let tell = |f: &Finding| format!("{}:{} {}", String::from_utf8_lossy(&f.path), f.line, f.rule);
    found.iter().map(tell).collect()
}

fn say(scanned: &Scanned) {
    let Scanned { files, bytes, took, found } = scanned;
    let rate = *bytes as f64 / 1e6 / took.as_secs_f64();
    println!("{files} files, {bytes} bytes, {} findings, {rate:.0} MB/s", found.len());
}

/// The regular files of the packages with such a priority, in a fixed order.
fn package_files(wanted: impl Fn(&str) -> bool) -> Option<BTreeSet<PathBuf>> {
    let format = "-f=${binary:Package} ${Package} ${Priority}\n";
    let said = Command::new("dpkg-query").args(["-W", format]).output().ok()?;
    let mut files = BTreeSet::new();
    for line in String::from_utf8_lossy(&said.stdout).lines() {
        let [qualified, package, priority] = line.split(' ').collect::<Vec<_>>()[..] else {
            continue;
        };
        if !wanted(priority) {
            continue;
        }
        let list = |name: &str| fs::read_to_string(format!("/var/lib/dpkg/info/{name}.list"));
        let Ok(list) = list(qualified).or_else(|_| list(package)) else { continue };
        files.extend(list.lines().map(PathBuf::from));
    }
    (!files.is_empty()).then_some(files)
}

fn scan_all(files: &BTreeSet<PathBuf>, most: u64) -> Scanned {
    let mut scanned = Scanned { files: 0, bytes: 0, took: Duration::ZERO, found: Vec::new() };
    for path in files {
        let regular = fs::symlink_metadata(path).is_ok_and(|meta| meta.is_file());
        if regular && scanned.bytes < most {
            // One that only root may read is none of a package's own.
            let _ = scan_one(path, &mut scanned);
        }
    }
    scanned
}

fn scan_one(path: &Path, scanned: &mut Scanned) -> std::io::Result<()> {
    let mut file = File::open(path)?;
    let mut scan = FileScan::new(path.as_os_str().as_encoded_bytes());
    let mut buffer = vec![0; 1 << 20];
    loop {
        let length = file.read(&mut buffer)?;
        let started = Instant::now();
        if length == 0 {
            scanned.files += 1;
            scanned.found.extend(scan.finish());
            scanned.took += started.elapsed();
            return Ok(());
        }
        scan.data(&buffer[..length]);
        scanned.took += started.elapsed();
        scanned.bytes += length as u64;
    }
}
