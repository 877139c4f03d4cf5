//! The real `tow` where no cluster is: exit codes, streams and words. What needs a cluster is in
//! `tests/end-to-end`.

use std::path::Path;
use std::process::{Command, Output};

struct Home(tempfile::TempDir);

impl Home {
    fn new() -> Self {
        Self(tempfile::Builder::new().prefix("tow-").tempdir().expect("a folder"))
    }

    fn folder(&self, name: &str) -> std::path::PathBuf {
        let path = self.0.path().join(name);
        std::fs::create_dir_all(&path).expect("a folder");
        path
    }

    fn tow(&self, folder: &Path, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tow"));
        command.args(args).current_dir(folder).env_clear();
        command
            .env("PATH", std::env::var_os("PATH").expect("PATH"))
            .env("HOME", self.folder("home"));
        for name in ["XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR"] {
            command.env(name, self.folder(name));
        }
        command.output().expect("tow starts")
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn exit_codes_without_a_cluster() {
    let home = Home::new();
    let folder = home.folder("project");
    let cases: [(&[&str], i32, &str); 12] = [
        (&[], 2, "Usage"),
        (&["no-such-verb"], 2, "unrecognized"),
        (&["run", "--no-such-flag"], 2, "--no-such-flag"),
        (&["run", "--gpus", "1", "--", "true"], 2, "not in this version"),
        (&["run", "--memory", "lots", "--", "true"], 2, "not a size"),
        (&["run"], 2, "tow run -- CMD"),
        (&["exec", "somebody"], 2, "CMD"),
        (&["exec", "somebody", "--", "true"], 125, "tow up"),
        (&["attach", "somebody"], 125, "tow up"),
        (&["ls"], 1, "tow up"),
        (&["rm", "somebody"], 1, "tow up"),
        (&["--context", "work", "ls"], 1, "no context `work`"),
    ];
    for (args, code, words) in cases {
        let output = home.tow(&folder, args);
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {error}");
        assert!(error.contains(words), "{args:?}: {error}");
        assert!(output.stdout.is_empty(), "{args:?}: stdout is for answers");
        assert!(!error.contains('\x1b'), "no colour where there is no terminal");
    }
}

#[test]
fn folders_that_cannot_be_meant_are_refused_before_anything_starts() {
    let home = Home::new();
    for folder in [Path::new("/").to_owned(), home.folder("home")] {
        let output = home.tow(&folder, &["run", "--", "true"]);
        assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
        assert!(text(&output.stderr).contains("--no-sync"));
    }
    let folder = home.folder("project");
    std::fs::write(folder.join("towline.toml"), "imge = 'debian:12'\n").unwrap();
    let output = home.tow(&folder, &["run", "--", "true"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("did you mean `image`"), "{}", text(&output.stderr));
}

#[test]
fn answers_are_on_stdout_and_objects_name_their_schema() {
    let home = Home::new();
    let folder = home.folder("project");
    let version = home.tow(&folder, &["version", "--json"]);
    let object: serde_json::Value = serde_json::from_slice(&version.stdout).unwrap();
    assert_eq!(object["schema"], "towline.version/1");
    assert_eq!(object["tow"], env!("CARGO_PKG_VERSION"));

    let status = home.tow(&folder, &["status", "--json"]);
    assert_eq!(status.status.code(), Some(1), "no cluster is not ready");
    let object: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
    assert_eq!(object["ready"], false);

    let script = home.tow(&folder, &["completions", "bash"]);
    assert!(script.status.success() && text(&script.stdout).contains("inspect"));

    let doctor = home.tow(&folder, &["doctor", "--json"]);
    assert!(!doctor.stdout.is_empty());
    for line in text(&doctor.stdout).lines() {
        let object: serde_json::Value = serde_json::from_str(line).unwrap();
        assert_eq!(object["schema"], "towline.check/1");
        let done = object["grade"] == "ok" || object["todo"].is_string();
        assert!(done, "what is wrong comes with what to do: {line}");
    }
}

#[test]
fn down_without_a_cluster_is_not_an_error() {
    let home = Home::new();
    let output = home.tow(&home.folder("project"), &["down"]);
    assert!(output.status.success());
    assert!(text(&output.stdout).contains("down already"));
}
