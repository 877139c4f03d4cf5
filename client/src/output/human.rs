//! Tables, sizes and ages as people read them. Nothing here depends on colour.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Lays rows out in columns; the first row is the heading. Control characters are made visible, so
/// that no name can drive the terminal.
pub fn table(rows: &[Vec<String>]) -> Vec<String> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let cells: Vec<Vec<String>> =
        rows.iter().map(|row| row.iter().map(|cell| printable(cell)).collect()).collect();
    let width = |column: usize| {
        cells.iter().filter_map(|row| row.get(column)).map(|c| c.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    cells.iter().map(|row| line(row, &widths)).collect()
}

fn line(row: &[String], widths: &[usize]) -> String {
    let mut text = String::new();
    for (cell, width) in row.iter().zip(widths) {
        text.push_str(cell);
        text.extend(std::iter::repeat_n(' ', width + 2 - cell.chars().count().min(*width)));
    }
    text.trim_end().to_owned()
}

/// Replaces control characters.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// Returns text of at most `max` characters, with a mark where something is left out.
pub fn shortened(text: &str, max: usize) -> String {
    match text.char_indices().nth(max) {
        None => text.to_owned(),
        Some(_) => text.chars().take(max.saturating_sub(1)).chain(['…']).collect(),
    }
}

/// Returns `1.5 GiB` for mebibytes.
pub fn mib(mib: u64) -> String {
    bytes(mib << 20)
}

/// Returns `1.5 GiB` for bytes.
pub fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let (mut unit, mut scaled) = (0, bytes);
    let mut tenths = 0;
    while scaled >= 1024 && unit + 1 < UNITS.len() {
        tenths = (scaled % 1024) * 10 / 1024;
        scaled /= 1024;
        unit += 1;
    }
    match tenths {
        0 => format!("{scaled} {}", UNITS[unit]),
        _ => format!("{scaled}.{tenths} {}", UNITS[unit]),
    }
}

/// Returns `3 min` for the time since then, in Unix milliseconds; empty when there is none.
pub fn age(unix_ms: u64) -> String {
    if unix_ms == 0 {
        return String::new();
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    duration(now.saturating_sub(Duration::from_millis(unix_ms)))
}

/// Returns `2h 30m`, or `never` for 0 seconds.
pub fn timeout(seconds: u64) -> String {
    match seconds {
        0 => "never".into(),
        seconds => humantime::format_duration(Duration::from_secs(seconds)).to_string(),
    }
}

/// Returns `in 3 min` for a time to come, in Unix milliseconds.
pub fn until(unix_ms: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    match Duration::from_millis(unix_ms).checked_sub(now) {
        Some(left) => format!("in {}", duration(left)),
        None => "now".into(),
    }
}

/// Returns `3 min`: the largest unit that fits.
pub fn duration(duration: Duration) -> String {
    match duration.as_secs() {
        s @ 0..60 => format!("{s} s"),
        s @ 60..3_600 => format!("{} min", s / 60),
        s @ 3_600..86_400 => format!("{} h", s / 3_600),
        s => format!("{} d", s / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_ages() {
        let cases = [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2 << 30, "2 GiB")];
        for (size, text) in cases {
            assert_eq!(bytes(size), text);
        }
        assert_eq!(duration(Duration::from_secs(59)), "59 s");
        assert_eq!(duration(Duration::from_secs(7_200)), "2 h");
    }

    #[test]
    fn a_table_lines_up_and_shows_no_control_characters() {
        let rows = [vec!["A".into(), "B".into()], vec!["long\x1b[0m".into(), "x".into()]];
        assert_eq!(table(&rows), ["A         B", "long\u{fffd}[0m  x"]);
    }
}
