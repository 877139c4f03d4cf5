//! Links in the documentation lead somewhere.

use std::path::{Path, PathBuf};

use towline_tidy::{links, workspace_root};

fn markdown(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            markdown(&path, found);
        } else if name.ends_with(".md") {
            found.push(path);
        }
    }
}

#[test]
fn links_lead_somewhere() {
    let mut files = Vec::new();
    markdown(&workspace_root().canonicalize().expect("the root"), &mut files);
    assert!(files.iter().any(|file| file.ends_with("README.md")), "README.md is there");
    let mut broken = Vec::new();
    for file in &files {
        let text = std::fs::read_to_string(file).expect("text");
        let folder = file.parent().expect("a folder");
        broken.extend(links::broken(folder, file, &text).iter().map(|l| format!("{file:?}: {l}")));
    }
    assert!(broken.is_empty(), "{broken:#?}");
}
