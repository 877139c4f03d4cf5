//! The scan against what it must find, what it must leave alone, and how its input may be cut.

mod lookalikes;
mod planted;
mod random;
mod stock;

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::names::kind_of;
use super::{FINDINGS_MAX, FileScan, Finding, rules, scan_text};
use planted::{Planted, planted};
use random::Random;

/// What is found in a file that comes in one piece.
fn scan(path: &str, content: &[u8]) -> Vec<Finding> {
    let mut scan = FileScan::new(path.as_bytes());
    scan.data(content);
    scan.finish()
}

fn finds(found: &[Finding], planted: &Planted, line: u64) -> bool {
    let line = if planted.whole { 0 } else { line };
    found
        .iter()
        .any(|f| f.rule == planted.rule && f.line == line && f.path == planted.path.as_bytes())
}

#[test]
fn every_planted_secret_is_found_in_its_line() {
    let all = planted();
    assert!(all.len() >= 90, "{}", all.len());
    let is_missed = |secret: &&Planted| {
        let content = format!("first line\n\n{}\nlast line\n", secret.text);
        !finds(&scan(secret.path, content.as_bytes()), secret, 3)
    };
    let missed: Vec<&Planted> = all.iter().filter(is_missed).collect();
    assert!(missed.is_empty(), "{missed:#?}");
}

#[test]
fn every_rule_finds_something() {
    let planted: BTreeSet<&str> = planted().iter().map(|secret| secret.rule).collect();
    let rules: BTreeSet<&str> = rules().map(|rule| rule.id).collect();
    assert_eq!(planted, rules);
    assert_eq!(rules.len(), super::rules().count(), "an id is used twice");
}

#[test]
fn a_planted_secret_is_found_among_binary_data() {
    let mut random = Random::new(7);
    for secret in planted().iter().filter(|secret| !secret.lines) {
        let mut content = random.bytes(5000);
        content.retain(|b| *b != b'\n');
        content.extend([b"\n\0".as_slice(), secret.text.as_bytes(), b"\0\xff"].concat());
        content.extend(random.bytes(5000));
        let found = scan(secret.path, &content);
        assert!(finds(&found, secret, 2), "{secret:?}: {found:?}");
    }
}

#[test]
fn a_planted_secret_is_found_in_a_config_and_a_history() {
    for secret in planted().iter().filter(|secret| !secret.by_path) {
        for place in ["config: env", "config: label", "history 2"] {
            let text = format!("RUN x && \n{}", secret.text);
            let found = scan_text(place, &text);
            let here = |f: &Finding| f.rule == secret.rule && f.path == place.as_bytes();
            assert!(found.iter().any(here), "{secret:?}: {found:?}");
        }
    }
}

#[test]
fn any_value_of_an_environment_variable_that_says_secret_is_found() {
    for pair in ["DB_PASSWORD=postgres", "APP_KEY=hunter2", "GITHUB_TOKEN=abcd1", "SMTP_PASS=mail"]
    {
        assert_eq!(scan_text("config: env", pair).len(), 1, "{pair}");
    }
    for text in ["RUN |1 NPM_TOKEN=simple /bin/sh -c npm ci", "RUN DB_PASSWORD=simple ./build"] {
        assert_eq!(scan_text("history 4", text).len(), 1, "{text}");
    }
    for pair in [
        "PATH=/usr/bin",
        "RUN TOKEN=$(cat /run/secrets/token) ./build",
        "RUN echo password=simple",
        "GPG_KEY=E3FF2839C048B25C084DEBE9B26995E310250568",
        "PASSWORD_FILE=/run/secrets/db",
        "TOKEN=",
        "POSTGRES_PASSWORD=${PASSWORD}",
        "PYTHON_SHA256=8d3ed8ec5c88c1c95f5e558612a725450d2452813ddad5e58fdb1a53b1209b78",
    ] {
        assert_eq!(scan_text("config: env", pair), [], "{pair}");
    }
}

#[test]
fn nearly_all_random_values_are_found() {
    type Make = fn(&mut Random, usize) -> String;
    let kinds: [(Make, usize); 8] = [
        (Random::alnum, 16),
        (Random::alnum, 20),
        (Random::alnum, 40),
        (Random::base64, 44),
        (Random::lower, 32),
        (Random::hex, 32),
        (Random::hex, 64),
        (Random::letters, 32),
    ];
    let mut random = Random::new(9);
    for (number, (make, length)) in kinds.into_iter().enumerate() {
        let is_missed = |_: &usize| {
            let text = format!("api_token = \"{}\"", make(&mut random, length));
            scan("srv/x", text.as_bytes()).is_empty()
        };
        let missed = (0..1000).filter(is_missed).count();
        assert!(missed <= 20, "{missed} of 1000 of kind {number}");
    }
}

#[test]
fn a_secret_is_found_wherever_its_bytes_are_cut() {
    for secret in planted() {
        let content = format!("a\n{}\nb\n", secret.text);
        let content = content.as_bytes();
        for cut in 0..=content.len() {
            let mut scan = FileScan::new(secret.path.as_bytes());
            scan.data(&content[..cut]);
            scan.data(&content[cut..]);
            let found = scan.finish();
            assert!(finds(&found, &secret, 2), "cut at {cut}: {secret:?}: {found:?}");
        }
    }
}

#[test]
fn a_secret_is_found_wherever_a_window_ends() {
    const WINDOW: usize = 300;
    for secret in planted().iter().filter(|secret| !secret.by_path) {
        for before in (0..WINDOW).step_by(7) {
            // Enough after it that windows are searched before the file ends.
            let content =
                format!("{}\n{}\n{}", " ".repeat(before), secret.text, "z\n".repeat(6000));
            let mut scan =
                FileScan::with(secret.path.as_bytes(), kind_of(secret.path.as_bytes()), WINDOW);
            scan.data(content.as_bytes());
            let found = scan.finish();
            assert!(finds(&found, secret, 2), "{before} before: {secret:?}: {found:?}");
        }
    }
}

#[test]
fn lines_are_right_far_into_a_file() {
    let key = ["gh", "p_", &Random::new(1).alnum(36)].concat();
    let mut scan = FileScan::new(b"srv/log");
    for _ in 0..50_000 {
        scan.data(b"an ordinary line of a log\n");
    }
    scan.zeros(10 << 30);
    scan.data(b"\n");
    scan.data(key.as_bytes());
    let found = scan.finish();
    assert_eq!(
        found.iter().map(|f| (f.line, f.rule)).collect::<Vec<_>>(),
        [(50_002, "github-token")]
    );
}

#[test]
fn a_hole_keeps_apart_what_belongs_together_only_when_it_is_near() {
    let found = |hole: u64| {
        let mut scan = FileScan::new(b"srv/x");
        scan.data(br#"{"kty":"EC","crv":"P-256","#);
        scan.zeros(hole);
        scan.data(format!(r#""d":"{}"}}"#, Random::new(4).alnum(40)).as_bytes());
        scan.finish().len()
    };
    assert_eq!((found(0), found(100), found(5000), found(1 << 40)), (1, 1, 0, 0));
}

#[test]
fn the_list_is_bounded_and_tells_a_line_once() {
    let mut random = Random::new(3);
    let token = |random: &mut Random| ["gh", "p_", &random.alnum(36)].concat();
    let twice = format!("{} {}\n", token(&mut random), token(&mut random));
    assert_eq!(scan("srv/x", twice.as_bytes()).len(), 1);
    let many: String = (0..100).map(|_| token(&mut random) + "\n").collect();
    let found = scan("srv/x", many.as_bytes());
    assert_eq!(found.len(), FINDINGS_MAX);
    assert_eq!(found.last().map(|f| f.line), Some(FINDINGS_MAX as u64));
}

#[test]
fn a_file_that_is_a_secret_by_its_name_is_none_when_it_is_empty() {
    assert_eq!(scan("root/.bash_history", b""), []);
    assert_eq!(scan("root/.bash_history", b"\n\n \0"), []);
    assert_eq!(scan("root/.bash_history", b"ls\n").len(), 1);
}

#[test]
fn the_secret_itself_is_in_nothing_that_is_printed() {
    for secret in planted() {
        let mut scan = FileScan::new(b"srv/x");
        scan.data(secret.text.as_bytes());
        let said = format!("{scan:?} {:?}", scan_text("env", &secret.text));
        let tail = &secret.text[secret.text.len().saturating_sub(12)..];
        assert!(secret.by_path || !said.contains(tail), "{said}");
    }
}

#[test]
fn the_page_lists_exactly_the_rules() {
    let page = include_str!("../../../../docs/secrets-in-saved-images.md");
    let rows = page.lines().filter_map(|line| {
        let (id, finds) = line.strip_prefix("| `")?.strip_suffix(" |")?.split_once("` | ")?;
        Some((id.to_owned(), finds.to_owned()))
    });
    let told = rules().map(|rule| (rule.id.to_owned(), rule.finds.to_owned()));
    assert_eq!(rows.collect::<Vec<_>>(), told.collect::<Vec<_>>());
}

#[derive(Debug, Clone)]
enum Piece {
    Secret(usize),
    Words(String),
    Bytes(Vec<u8>),
    Hole(u16),
}

fn pieces() -> impl Strategy<Value = Vec<Piece>> {
    let piece = prop_oneof![
        any::<usize>().prop_map(Piece::Secret),
        "[a-z =:\"\n]{0,80}".prop_map(Piece::Words),
        prop::collection::vec(any::<u8>(), 0..300).prop_map(Piece::Bytes),
        any::<u16>().prop_map(Piece::Hole),
    ];
    prop::collection::vec(piece, 0..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_found_does_not_depend_on_how_the_bytes_are_cut(
        pieces in pieces(),
        sizes in prop::collection::vec(1usize..400, 1..20),
        path in prop::sample::select(vec!["srv/x", "srv/.env", "root/.npmrc", "srv/Cargo.lock"]),
    ) {
        let secrets = planted();
        let content: Vec<u8> = pieces.iter().flat_map(|piece| match piece {
            Piece::Secret(number) => secrets[number % secrets.len()].text.clone().into_bytes(),
            Piece::Words(words) => words.clone().into_bytes(),
            Piece::Bytes(bytes) => bytes.clone(),
            Piece::Hole(length) => vec![0; usize::from(*length)],
        }).collect();
        let whole = scan(path, &content);

        let mut cut = FileScan::with(path.as_bytes(), kind_of(path.as_bytes()), sizes[0] + 64);
        let mut rest = &content[..];
        for size in sizes.iter().cycle() {
            let (piece, after) = rest.split_at((*size).min(rest.len()));
            // A piece of zeros is told as a hole, as a sparse file has it.
            if piece.iter().all(|b| *b == 0) { cut.zeros(piece.len() as u64) } else { cut.data(piece) }
            rest = after;
            if rest.is_empty() { break }
        }
        prop_assert_eq!(cut.finish(), whole);
    }
}
