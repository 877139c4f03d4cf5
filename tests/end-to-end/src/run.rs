//! Runs a command within a bound, with its streams held.

use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How a command ended and what it wrote.
#[derive(Debug, Clone)]
pub struct Finished {
    /// What was run, for messages.
    pub what: String,
    /// As a shell would show it: 128+n for a signal.
    pub code: i32,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
}

impl Finished {
    /// Standard output as text, without the last newline.
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim_end_matches('\n').to_owned()
    }

    /// Standard error as text.
    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Panics with both streams unless the code is this.
    #[track_caller]
    pub fn expect(self, code: i32) -> Self {
        assert!(
            self.code == code,
            "`{}` ended with {} instead of {code}\nstdout: {}\nstderr: {}",
            self.what,
            self.code,
            self.out(),
            self.err()
        );
        self
    }

    /// Panics unless it succeeded.
    #[track_caller]
    pub fn ok(self) -> Self {
        self.expect(0)
    }
}

/// A command that goes on.
#[derive(Debug)]
pub struct Running {
    what: String,
    child: Child,
    readers: [Option<JoinHandle<Vec<u8>>>; 2],
    writer: Option<JoinHandle<()>>,
}

impl Running {
    /// Starts it. `stdin` is written and then closed; `None` gives an empty input.
    #[track_caller]
    pub fn start(command: &mut Command, stdin: Option<Vec<u8>>) -> Self {
        let what = format!("{command:?}");
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command.stdin(if stdin.is_some() { Stdio::piped() } else { Stdio::null() });
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{what}: {error}"));
        let writer = stdin.map(|bytes| {
            let mut pipe = child.stdin.take().expect("stdin is a pipe");
            // A command may well end without reading all of it.
            std::thread::spawn(move || drop(pipe.write_all(&bytes)))
        });
        let readers = [
            child.stdout.take().map(|pipe| std::thread::spawn(|| all(pipe))),
            child.stderr.take().map(|pipe| std::thread::spawn(|| all(pipe))),
        ];
        Self { what, child, readers, writer }
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("a process id")
    }

    /// Whether it has ended.
    pub fn ended(&mut self) -> bool {
        self.child.try_wait().expect("a child can be waited for").is_some()
    }

    /// Waits for its end; kills it and panics after the bound.
    #[track_caller]
    pub fn finish(mut self, bound: Duration) -> Finished {
        let deadline = Instant::now() + bound;
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                break status;
            }
            if Instant::now() > deadline {
                drop(self.child.kill());
                drop(self.child.wait());
                let texts = self.readers.map(|r| r.and_then(|r| r.join().ok()).unwrap_or_default());
                panic!(
                    "`{}` did not end within {bound:?}\nstdout: {}\nstderr: {}",
                    self.what,
                    String::from_utf8_lossy(&texts[0]),
                    String::from_utf8_lossy(&texts[1])
                );
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        if let Some(writer) = self.writer.take() {
            drop(writer.join());
        }
        let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
        let [stdout, stderr] =
            self.readers.map(|r| r.and_then(|reader| reader.join().ok()).unwrap_or_default());
        Finished { what: self.what, code, stdout, stderr }
    }
}

fn all(mut pipe: impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    drop(pipe.read_to_end(&mut bytes));
    bytes
}

/// Waits until `probe` gives something; panics after the bound with what it waited for.
#[track_caller]
pub fn wait_for<T>(what: &str, bound: Duration, mut probe: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + bound;
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited {bound:?} for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
