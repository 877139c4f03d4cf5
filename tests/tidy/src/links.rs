//! Finds links in Markdown and says which lead nowhere. Only links within the repository are
//! looked at: `[text](path)` and `[text](path#heading)`.

use std::path::{Path, PathBuf};

/// Says which links of `text`, a file of `folder`, name a file or heading that is not there.
pub fn broken(folder: &Path, file: &Path, text: &str) -> Vec<String> {
    targets(text)
        .into_iter()
        .filter(|target| !target.contains("://") && !target.starts_with("mailto:"))
        .filter(|target| !leads_somewhere(folder, file, text, target))
        .collect()
}

/// All link targets outside code fences.
fn targets(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut fenced = false;
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        }
        if fenced {
            continue;
        }
        let mut rest = line;
        while let Some(start) = rest.find("](") {
            rest = &rest[start + 2..];
            let Some(end) = rest.find(')') else { break };
            found.push(rest[..end].to_owned());
            rest = &rest[end..];
        }
    }
    found
}

fn leads_somewhere(folder: &Path, file: &Path, own_text: &str, target: &str) -> bool {
    let (path, heading) = target.split_once('#').unwrap_or((target, ""));
    if path.is_empty() {
        return has_heading(own_text, heading);
    }
    let path: PathBuf = folder.join(path);
    if path == file {
        return has_heading(own_text, heading);
    }
    match (path.exists(), heading) {
        (exists, "") => exists,
        (false, _) => false,
        (true, heading) => {
            std::fs::read_to_string(&path).is_ok_and(|text| has_heading(&text, heading))
        }
    }
}

fn has_heading(text: &str, wanted: &str) -> bool {
    text.lines().filter(|line| line.starts_with('#')).any(|line| slug(line) == wanted)
}

fn slug(line: &str) -> String {
    line.trim_start_matches('#')
        .trim()
        .to_lowercase()
        .chars()
        .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'))
        .map(|c| if c == ' ' { '-' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_file_and_a_missing_heading_are_found() {
        let text = "# Here\n[a](gone.md) [b](#here) [c](#there) [d](https://example.org/x)\n";
        let folder = Path::new("/nonexistent");
        assert_eq!(broken(folder, &folder.join("x.md"), text), ["gone.md", "#there"]);
    }
}
