//! Seeds: many with faults, each of which must end well; the same one twice, which must be the same;
//! and planted bugs, each of which must be caught. `TOWLINE_SIM_SEEDS` asks for more seeds,
//! `TOWLINE_SIM_SEED` replays one.

use towline_simulator::{Bug, Setup, run};

fn seeds(usual: u64) -> u64 {
    std::env::var("TOWLINE_SIM_SEEDS").ok().and_then(|n| n.parse().ok()).unwrap_or(usual)
}

fn play(members: usize, count: u64) {
    let (mut events, mut crashes) = (0, 0);
    for seed in 1..=count {
        match run(Setup::new(seed, members)) {
            Ok(report) => {
                assert!(report.acknowledged > 0, "seed {seed:#x}: nothing was done");
                events += report.events;
                crashes += report.crashes;
            }
            Err(failure) => panic!("{members} members: {failure}"),
        }
    }
    assert!(crashes > count, "faults happened: {crashes} in {count} runs");
    assert!(events > 1000);
}

#[test]
fn one_member_keeps_what_it_acknowledged() {
    play(1, seeds(12));
}

#[test]
fn three_members_agree_and_keep_what_they_acknowledged() {
    play(3, seeds(12));
}

#[test]
fn without_faults_everything_is_answered() {
    let setup = Setup { faults: false, ..Setup::new(7, 3) };
    run(setup).unwrap_or_else(|failure| panic!("{failure}"));
}

#[test]
fn the_same_seed_gives_the_same_trace() {
    for members in [1, 3] {
        let first = run(Setup::new(42, members)).unwrap_or_else(|failure| panic!("{failure}"));
        let second = run(Setup::new(42, members)).unwrap_or_else(|failure| panic!("{failure}"));
        let other = run(Setup::new(43, members)).unwrap_or_else(|failure| panic!("{failure}"));
        assert_eq!(first, second);
        assert_ne!(first.trace, other.trace);
    }
}

/// Some of a bounded number of seeds shows the bug, and for one of its reasons.
fn caught(bug: Bug, members: usize, within: u64, reasons: &[&str]) {
    let failure = (1..=within).find_map(|seed| {
        let setup = Setup { bug, ..Setup::new(seed, members) };
        run(setup).err()
    });
    let Some(failure) = failure else {
        panic!("{bug:?} was not caught in {within} seeds of {members} members");
    };
    let right = reasons.iter().any(|reason| failure.what.contains(reason));
    assert!(right, "{bug:?} was caught by accident: {failure}");
}

#[test]
fn planted_bugs_are_caught() {
    let lost = ["do not agree", "acknowledged", "is lost"];
    caught(Bug::AckBeforePersist, 1, 20, &lost);
    caught(Bug::TailDropped, 1, 20, &lost);
    caught(Bug::FitsSkipped, 1, 20, &["oversold"]);
    caught(Bug::ExpirySkipped, 1, 20, &["not stopped by its timeout"]);
    caught(Bug::ResizeUnguarded, 1, 20, &["reserved"]);
    caught(
        Bug::DedupSkipped,
        1,
        20,
        &["made twice", "is taken", "acknowledged", "nobody was told"],
    );
}

#[test]
#[expect(clippy::print_stdout, reason = "a replay is read by people")]
fn replay() {
    let Ok(text) = std::env::var("TOWLINE_SIM_SEED") else {
        println!("SKIPPED: TOWLINE_SIM_SEED names no seed to replay");
        return;
    };
    let seed =
        text.strip_prefix("0x").map_or_else(|| text.parse(), |hex| u64::from_str_radix(hex, 16));
    let seed = seed.expect("TOWLINE_SIM_SEED is a number");
    for members in [1, 3] {
        match run(Setup::new(seed, members)) {
            Ok(report) => println!("{members} members: {report:?}"),
            Err(failure) => panic!("{members} members: {failure}"),
        }
    }
}
