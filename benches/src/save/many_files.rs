//! Few changed files on an image of very many: what the image's size costs a save.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use towline_end_to_end::Cluster;
use towline_end_to_end::cluster::BOOT;

use crate::Row;
use crate::stats::{median, ms};

/// In directories of so many.
const FILES: usize = 300_000;
const IN_ONE: usize = 1000;
/// One in each of as many directories.
const CHANGED: usize = 10;
const GOAL: Duration = Duration::from_secs(1);

/// Measures both, alternating, in a microVM each.
pub(super) fn measure(cluster: &Cluster, runs: usize) -> anyhow::Result<Row> {
    let sizes = [("many", FILES / IN_ONE, IN_ONE), ("few", CHANGED, 1)];
    for (name, folders, in_one) in sizes {
        let layout = cluster.root().join(name);
        let files = (0..folders).flat_map(|folder| {
            (0..in_one).map(move |file| (format!("data/{folder}/{file}"), b"was\n".to_vec()))
        });
        super::image(&layout, files)?;
        let (layout, image) = (layout.to_str().context("a path")?, format!("{name}:1"));
        cluster.tow(["image", "import", layout, &image]).finish(BOOT).ok();
        cluster.tow(["create", "--no-sync", "--image", &image, "--name", name]).finish(BOOT).ok();
        let change = format!("for i in $(seq 0 {}); do echo is > /data/$i/0; done", CHANGED - 1);
        cluster.tow(["exec", "-u", "root", name, "--", "sh", "-c", &change]).finish(BOOT).ok();
    }
    let mut took = [const { Vec::new() }; 2];
    for run in 0..runs {
        for ((name, ..), took) in sizes.iter().zip(&mut took) {
            let start = Instant::now();
            cluster.tow(["save", name, &format!("{name}:saved-{run}")]).finish(BOOT).ok();
            took.push(start.elapsed());
        }
    }
    let [many, few] = took.map(|took| median(&took));
    let more = many.saturating_sub(few);
    Ok(Row {
        what: "`tow save` of 10 changed files in a microVM: on an image of 300,000 files, beyond the \
               same on an image of those 10",
        goal: "≤ 1 s more",
        measured: format!("{} more ({} against {}, {runs} runs)", ms(more), ms(many), ms(few)),
        met: more <= GOAL,
    })
}
