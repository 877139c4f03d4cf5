//! A real terminal to drive `tow` in: one tmux server per test, on a socket of its own.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::run::wait_for;

/// A tmux server with one window.
#[derive(Debug)]
pub struct Terminal {
    socket: PathBuf,
}

impl Terminal {
    /// Starts a shell of this size whose environment is the command's.
    #[track_caller]
    pub fn start(environment: &Command, folder: &Path, columns: u16, rows: u16) -> Self {
        let socket = folder.join("tmux");
        let mut command = Command::new("tmux");
        command.env_clear();
        for (name, value) in environment.get_envs() {
            if let Some(value) = value {
                command.env(name, value);
            }
        }
        command.env("TERM", "xterm-256color").env("PS1", "$ ").current_dir(folder);
        command.arg("-f").arg("/dev/null").arg("-S").arg(&socket);
        command.args(["new-session", "-d", "-x", &columns.to_string(), "-y", &rows.to_string()]);
        command.args(["/bin/sh"]);
        let status = command.status().expect("tmux starts");
        assert!(status.success(), "tmux new-session: {status}");
        Self { socket }
    }

    fn tmux(&self, arguments: &[&str]) -> String {
        let output = Command::new("tmux")
            .arg("-S")
            .arg(&self.socket)
            .args(arguments)
            .output()
            .expect("tmux");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Types a line.
    pub fn line(&self, text: &str) {
        self.tmux(&["send-keys", "-l", text]);
        self.tmux(&["send-keys", "Enter"]);
    }

    /// Presses a key by tmux's name for it: `C-c`.
    pub fn key(&self, name: &str) {
        self.tmux(&["send-keys", name]);
    }

    /// Changes the window's size.
    pub fn resize(&self, columns: u16, rows: u16) {
        let (columns, rows) = (columns.to_string(), rows.to_string());
        self.tmux(&["resize-window", "-x", &columns, "-y", &rows]);
    }

    /// What is on the screen.
    pub fn screen(&self) -> String {
        self.tmux(&["capture-pane", "-p"])
    }

    /// Waits until the screen shows the text.
    #[track_caller]
    pub fn wait(&self, text: &str, bound: Duration) {
        let mut last = String::new();
        let start = std::time::Instant::now();
        while start.elapsed() < bound {
            last = self.screen();
            if last.contains(text) {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("waited {bound:?} for `{text}`; the screen shows:\n{last}");
    }

    /// Waits for the server to be there.
    pub fn ready(&self) {
        wait_for("the tmux socket", Duration::from_secs(10), || self.socket.exists().then_some(()));
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.tmux(&["kill-server"]);
    }
}
