//! Small values as people type them: sizes, environment, keys. Parse once, here.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};

/// Parses a size as docker takes it (`512m`, `2g`, bytes without a unit; also `2GiB`) and returns
/// mebibytes, rounded up.
pub fn size_mib(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is not a size: write for example 512m or 2g");
    let lower = text.trim().to_ascii_lowercase();
    let digits = lower.len() - lower.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = lower.split_at(digits);
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let scale: u64 = match unit.trim_start() {
        "" | "b" => 1,
        "k" | "kb" | "kib" => 1 << 10,
        "m" | "mb" | "mib" => 1 << 20,
        "g" | "gb" | "gib" => 1 << 30,
        "t" | "tb" | "tib" => 1 << 40,
        _ => return Err(wrong()),
    };
    let bytes = number.checked_mul(scale).ok_or_else(|| format!("`{text}` is too large"))?;
    match bytes.div_ceil(1 << 20) {
        0 => Err(wrong()),
        _ if bytes < 1 << 20 => Err(format!("`{text}` is less than a mebibyte: say 512m or 2g")),
        mib => Ok(mib),
    }
}

/// Parses how long until a sandbox is stopped (`90s`, `30m`, `2h`, `1d12h`; `never`) and returns
/// seconds, rounded up; 0 is never.
pub fn timeout_s(text: &str) -> Result<u64, String> {
    if text == "never" {
        return Ok(0);
    }
    let wrong = || format!("`{text}` is not a duration: write for example 30m, 2h, 1d or never");
    let duration = humantime::parse_duration(text).map_err(|_| wrong())?;
    let seconds = duration.as_secs() + u64::from(duration.subsec_nanos() > 0);
    if seconds == 0 {
        Err(format!("`{text}` is no time at all: say never for none"))
    } else {
        Ok(seconds)
    }
}

/// Parses `NAME=value`, or `NAME` alone, which takes the value from `lookup` and is nothing when
/// it has none, as with docker.
pub fn env(
    text: &OsStr,
    lookup: impl Fn(&OsStr) -> Option<OsString>,
) -> Result<Option<Vec<u8>>, String> {
    let bytes = text.as_bytes();
    let name = bytes.split(|&b| b == b'=').next().unwrap_or_default();
    if name.is_empty() {
        return Err(format!("`{}` has no variable name", text.to_string_lossy()));
    }
    if bytes.contains(&0) {
        return Err(format!("`{}` holds a NUL byte", text.to_string_lossy()));
    }
    if name.len() < bytes.len() {
        return Ok(Some(bytes.to_vec()));
    }
    Ok(lookup(text).map(|value| [name, b"=", value.as_bytes()].concat()))
}

/// Parses an env file: a variable per line, `#` comments, no quoting, as docker reads it.
pub fn env_file(
    text: &[u8],
    lookup: impl Fn(&OsStr) -> Option<OsString>,
) -> Result<Vec<Vec<u8>>, String> {
    let mut all = Vec::new();
    for (number, line) in text.split(|&b| b == b'\n').enumerate() {
        let line = line.strip_suffix(b"\r").unwrap_or(line).trim_ascii_start();
        if line.is_empty() || line.starts_with(b"#") {
            continue;
        }
        let line = OsString::from_vec(line.to_vec());
        let parsed =
            env(&line, &lookup).map_err(|error| format!("line {}: {error}", number + 1))?;
        all.extend(parsed);
    }
    Ok(all)
}

/// Parses `ctrl-p,ctrl-q` or `ctrl-a,d`; empty text means that no key detaches.
pub fn detach_keys(text: &str) -> Result<Vec<u8>, String> {
    if text.is_empty() {
        return Ok(Vec::new());
    }
    text.split(',').map(|key| detach_key(key).ok_or_else(|| bad_key(key))).collect()
}

fn bad_key(key: &str) -> String {
    format!("`{key}` is not a key: write a letter, or ctrl- and one of a-z @ [ \\ ] ^ _")
}

fn detach_key(key: &str) -> Option<u8> {
    let (control, rest) = match key.to_ascii_lowercase().strip_prefix("ctrl-") {
        Some(rest) => (true, rest.to_owned()),
        None => (false, key.to_owned()),
    };
    let [byte] = rest.as_bytes() else { return None };
    match (control, byte) {
        (false, 0x21..=0x7e) => Some(*byte),
        (true, b'a'..=b'z') => Some(byte - b'a' + 1),
        (true, b'@') => Some(0),
        (true, b'[' | b'\\' | b']' | b'^' | b'_') => Some(byte - b'@'),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        let good = [("512m", 512), ("2g", 2048), ("2GiB", 2048), ("1048577", 2), ("1536k", 2)];
        for (text, mib) in good {
            assert_eq!(size_mib(text), Ok(mib), "{text}");
        }
        for text in
            ["", "g", "1.5g", "-1", "12q", "0", "512", "99999999999999999999g", "20000000000g"]
        {
            assert!(size_mib(text).is_err(), "{text}");
        }
    }

    #[test]
    fn timeouts() {
        let good = [("90s", 90), ("2h", 7200), ("1d12h", 129_600), ("1500ms", 2), ("never", 0)];
        for (text, seconds) in good {
            assert_eq!(timeout_s(text), Ok(seconds), "{text}");
        }
        for text in ["", "0s", "2", "-1h", "soon", "99999999999999999999d"] {
            assert!(timeout_s(text).is_err(), "{text}");
        }
    }

    #[test]
    fn environment() {
        let lookup = |name: &OsStr| (name == "HERE").then(|| OsString::from("x=y"));
        assert_eq!(env(OsStr::new("A=b=c"), lookup), Ok(Some(b"A=b=c".to_vec())));
        assert_eq!(env(OsStr::new("HERE"), lookup), Ok(Some(b"HERE=x=y".to_vec())));
        assert_eq!(env(OsStr::new("GONE"), lookup), Ok(None));
        assert!(env(OsStr::new("=b"), lookup).is_err());
        let odd = OsStr::from_bytes(b"A=\xff\xfe");
        assert_eq!(env(odd, lookup), Ok(Some(b"A=\xff\xfe".to_vec())));
        let file = env_file(b"# c\n\nA=1\r\n  B= 2\nHERE\n", lookup).unwrap();
        assert_eq!(file, [&b"A=1"[..], b"B= 2", b"HERE=x=y"]);
        assert!(env_file(b"A=1\n=2\n", lookup).unwrap_err().starts_with("line 2"));
    }

    #[test]
    fn keys() {
        assert_eq!(detach_keys("ctrl-p,ctrl-q"), Ok(vec![16, 17]));
        assert_eq!(detach_keys("ctrl-\\,d"), Ok(vec![28, b'd']));
        assert_eq!(detach_keys(""), Ok(vec![]));
        assert!(detach_keys("ctrl-1").is_err() && detach_keys("ab").is_err());
    }
}
