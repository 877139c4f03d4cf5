//! The exec engine as an ordinary process of this machine, over in-memory streams: statuses,
//! terminals, signals, resumption, bounds, hostile clients.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should say where")]

mod support;

use std::sync::Arc;
use std::time::Duration;

use support::{BOUND, Client, Random, command, host, resume, sh, start};
use towline_proto::frame::{Frame, FrameKind};
use towline_proto::limits::{DETACHED_OUTPUT_MAX, UNACKED_MAX};
use towline_proto::v1::{
    ExecExit, ExecOpen, ExecResize, ExecResume, ExecSignal, ExecStart, ExecStarted, StreamError,
    StreamErrorCode, Terminal,
};

#[tokio::test]
async fn output_status_and_usage_arrive() {
    let host = host();
    let out = host.run(1, sh("cat; echo oops >&2; exit 7"), b"hello").await;
    assert_eq!((out.code(), out.stdout().as_str(), out.stderr().as_str()), (7, "hello", "oops\n"));
    let out = host.run(2, sh("kill -SEGV $$"), b"").await;
    assert_eq!(out.code(), 128 + 11);
    let out = host.run(3, command(&["sh", "-c", "echo \"$0|$1\"", "a b", "*"]), b"").await;
    assert_eq!(out.stdout(), "a b|*\n");
}

#[tokio::test]
async fn what_cannot_run_says_126_or_127_and_why() {
    let host = host();
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, mode: u32, content: &[u8]| {
        use std::os::unix::fs::PermissionsExt;
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let not_found = StreamErrorCode::CommandNotFound;
    let cannot = StreamErrorCode::CannotExecute;
    let cases = [
        ("no-such-command-here".to_owned(), not_found, "PATH"),
        ("/no/such/file".to_owned(), not_found, "does not exist"),
        (file("plain", 0o644, b"#!/bin/sh\n"), cannot, "ermission denied"),
        (file("bad", 0o755, b"#!/no/such/interpreter\n"), cannot, "interpreter"),
        (file("binary", 0o755, b"\0\x01\x02no program"), cannot, "no program"),
        (dir.path().to_str().unwrap().to_owned(), cannot, "ermission denied"),
    ];
    for (key, (command_name, code, words)) in (10u8..).zip(cases) {
        let error = host.run(key, command(&[&command_name]), b"").await.refusal();
        assert_eq!(error.code(), code, "{error:?}");
        assert!(error.message.contains(words), "{error:?}");
    }
    let what = ExecStart { cwd: b"/no/such/folder".to_vec(), ..sh("true") };
    let error = host.run(30, what, b"").await.refusal();
    assert_eq!(error.code(), cannot);
    assert!(error.message.contains("`/no/such/folder`"), "{error:?}");
    // As execvp does it: a script without an interpreter line is the shell's.
    let script = file("script", 0o755, b"echo from $1\n");
    let out = host.run(31, command(&[&script, "here"]), b"").await;
    assert_eq!(out.stdout(), "from here\n");
    assert!(
        host.table.list().execs.iter().all(|e| e.exited.is_some()),
        "refused ones are no execs"
    );
}

#[tokio::test]
async fn the_path_of_the_exec_itself_is_searched() {
    let host = host();
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("/bin/echo", dir.path().join("my-own-echo")).unwrap();
    let path = format!("PATH=/nowhere:{}", dir.path().display()).into_bytes();
    let what = ExecStart { env: vec![path], ..command(&["my-own-echo", "found"]) };
    assert_eq!(host.run(1, what, b"").await.stdout(), "found\n");
}

#[tokio::test]
async fn a_terminal_is_one_with_a_size_and_an_end_of_file() {
    let host = host();
    let terminal = Some(Terminal { rows: 33, columns: 77, term: "xterm-256color".into() });
    let what = ExecStart { terminal, ..sh("test -t 0 && test -t 2 && stty size; echo $TERM; cat") };
    let mut stream = host.open(start(1, what));
    assert!(next::<ExecStarted>(&mut stream, FrameKind::Started).await.terminal);
    let size = ExecResize { rows: 40, columns: 100 };
    stream.writer.send_message(FrameKind::Resize, &size).await.unwrap();
    let first = until_shown(&mut stream, "xterm-256color").await;
    assert!(first.starts_with("33 77") || first.starts_with("40 100"), "{first}");
    stream.writer.send_data(FrameKind::Stdin, 0, b"line\nrest").await.unwrap();
    stream.writer.send_data(FrameKind::StdinEof, 9, &[]).await.unwrap();
    let (shown, exit) = to_the_end(&mut stream).await;
    for echoed_and_printed in ["line\r\n", "rest"] {
        assert_eq!(shown.matches(echoed_and_printed).count(), 2, "{shown:?}");
    }
    assert_eq!(exit.status.unwrap().how, Some(code(0)));
}

#[tokio::test]
async fn signals_reach_the_group_and_the_terminals_foreground() {
    let host = host();
    let script = "trap 'echo got; exit 3' TERM; echo ready; while :; do sleep 0.05; done";
    let mut stream = host.open(start(1, sh(script)));
    next::<ExecStarted>(&mut stream, FrameKind::Started).await;
    until_shown(&mut stream, "ready").await;
    let term = ExecSignal { signal: 15 };
    stream.writer.send_message(FrameKind::Signal, &term).await.unwrap();
    let (shown, exit) = to_the_end(&mut stream).await;
    assert_eq!((shown.as_str(), exit.status.unwrap().how), ("got\n", Some(code(3))));

    // An interactive shell gives each job a group of its own.
    let terminal = Some(Terminal { rows: 24, columns: 80, term: String::new() });
    let what = ExecStart { terminal, ..sh("set -m; (echo ready; exec sleep 1000); echo after $?") };
    let mut stream = host.open(start(2, what));
    next::<ExecStarted>(&mut stream, FrameKind::Started).await;
    until_shown(&mut stream, "ready").await;
    stream.writer.send_message(FrameKind::Signal, &ExecSignal { signal: 15 }).await.unwrap();
    let (shown, _) = to_the_end(&mut stream).await;
    assert!(shown.contains("after 143"), "only the foreground job was ended: {shown:?}");
}

#[tokio::test]
async fn a_command_ends_though_its_background_children_hold_the_output() {
    let host = host();
    let out = host.run(1, sh("sleep 3 & echo done"), b"").await;
    assert_eq!(out.stdout(), "done\n");
}

#[tokio::test]
async fn a_command_that_does_not_read_its_input_is_no_obstacle() {
    let host = host();
    let out = host.run(1, sh("exec 0<&-; echo closed"), &vec![7; 3 * UNACKED_MAX]).await;
    assert_eq!((out.code(), out.stdout().as_str()), (0, "closed\n"));
}

#[tokio::test]
async fn cut_at_random_points_nothing_is_lost_or_doubled() {
    for seed in [0x5eed, 0xbad_cafe, 0x1234_5678] {
        let host = host();
        let mut random = Random(seed);
        let input = random.bytes(20 << 20);
        let mut client = Client::new(1, input.clone());
        let script = "tee /dev/stderr";
        let mut opened = host.open(start(1, sh(script)));
        let mut cuts = 0;
        let outcome = loop {
            let cut = usize::try_from(random.below(3 << 20)).unwrap();
            if let Some(outcome) = client.session(opened, cut).await {
                break outcome;
            }
            cuts += 1;
            opened = host.open(client.resume());
        };
        assert_eq!(outcome.code(), 0);
        assert!(client.stdout == input && client.stderr == input, "seed {seed:#x}, {cuts} cuts");
        assert!(cuts > 5, "{cuts} cuts");
    }
}

/// Together they hold more than the agent keeps before it holds each to little.
#[tokio::test]
async fn many_at_once_all_get_through_with_little_memory() {
    let host = Arc::new(host());
    let input = Arc::new(Random(0x5eed).bytes(2 << 20));
    let mut all = tokio::task::JoinSet::new();
    for key in 1..=128 {
        let (host, input) = (Arc::clone(&host), Arc::clone(&input));
        all.spawn(async move {
            let mut client = Client::new(key, input.to_vec());
            let opened = host.open(start(key, sh("cat")));
            let out = client.session(opened, usize::MAX).await.unwrap();
            out.code() == 0 && client.stdout == *input
        });
    }
    assert!(all.join_all().await.into_iter().all(|right| right));
}

#[tokio::test]
async fn starting_twice_attaches() {
    let host = host();
    let what = sh("echo $$; cat");
    let mut first = host.open(start(1, what.clone()));
    let pid = next::<ExecStarted>(&mut first, FrameKind::Started).await.pid;
    let mut second = host.open(start(1, what));
    assert_eq!(next::<ExecStarted>(&mut second, FrameKind::Started).await.pid, pid);
    let error: StreamError = loop {
        let frame = frame(&mut first).await;
        if frame.is(FrameKind::Error) {
            break frame.decode().unwrap();
        }
    };
    assert_eq!(error.code(), StreamErrorCode::TakenOver);
    second.writer.send_data(FrameKind::StdinEof, 0, &[]).await.unwrap();
    let (shown, exit) = to_the_end(&mut second).await;
    assert_eq!(shown, format!("{pid}\n"));
    assert_eq!(exit.status.unwrap().how, Some(code(0)));
    assert_eq!(host.table.list().execs.len(), 1);
}

#[tokio::test]
async fn a_vanished_client_holds_the_output_back_and_gets_all_of_it_later() {
    let host = host();
    let total = 3 * DETACHED_OUTPUT_MAX;
    let dir = tempfile::tempdir().unwrap();
    let mark = dir.path().join("written");
    let script = format!("head -c {total} /dev/zero; : > {}", mark.display());
    let mut stream = host.open(start(1, sh(&script)));
    next::<ExecStarted>(&mut stream, FrameKind::Started).await;
    drop(stream);
    // It is held at the bound: give it time to run past it if it could.
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!mark.exists(), "more than {DETACHED_OUTPUT_MAX} bytes were taken");
    let mut client = Client::new(1, Vec::new());
    let outcome = client.session(host.open(client.resume()), usize::MAX).await.unwrap();
    assert_eq!((outcome.code(), client.stdout.len()), (0, total));
    assert!(mark.exists());
}

#[tokio::test]
async fn a_detached_exec_spools_for_any_number_of_readers() {
    let host = host();
    let script = "i=0; while [ $i -lt 200000 ]; do echo $i; i=$((i+1)); done; echo err >&2";
    let what = ExecStart { detached: true, main: true, ..sh(script) };
    let mut starter = host.open(start(1, what));
    next::<ExecStarted>(&mut starter, FrameKind::Started).await;
    drop(starter);
    let newest = ExecOpen {
        exec_id: Vec::new(),
        how: Some(towline_proto::v1::exec_open::How::Resume(ExecResume {
            newest_main: true,
            ..ExecResume::default()
        })),
    };
    let read = async || {
        let mut client = Client::new(1, Vec::new());
        let outcome = client.session(host.open(newest.clone()), usize::MAX).await.unwrap();
        assert_eq!(outcome.stderr(), "err\n");
        outcome.stdout()
    };
    let (one, two) = tokio::join!(read(), read());
    assert_eq!(one, two);
    assert_eq!(one.lines().count(), 200_000);
    assert!(one.ends_with("199999\n"));
    // Later still, from the middle, without waiting.
    let from_the_middle =
        resume(1, ExecResume { stdout_offset: 1000, no_follow: true, ..ExecResume::default() });
    let mut late = host.open(from_the_middle);
    assert_eq!(next::<ExecStarted>(&mut late, FrameKind::Started).await.stdout_offset, 1000);
}

#[tokio::test]
async fn hostile_clients_are_refused_and_leave_the_exec_alive() {
    let host = host();
    let mut stream = host.open(start(1, sh("cat")));
    next::<ExecStarted>(&mut stream, FrameKind::Started).await;
    drop(stream);
    let bad = [
        Frame::data(FrameKind::Stdin, 5, b"a gap"),
        Frame::raw(FrameKind::Stdin, &b"short"[..]),
        Frame::message(FrameKind::Signal, &ExecSignal { signal: 65 }),
        Frame::message(FrameKind::Signal, &ExecSignal { signal: -9 }),
        Frame::message(FrameKind::Signal, &ExecSignal { signal: 0 }),
        Frame::message(
            FrameKind::Ack,
            &towline_proto::v1::ExecAck { stdout_offset: 1, ..Default::default() },
        ),
        Frame::raw(FrameKind::Resize, &b"\xff\xff\xff"[..]),
        Frame::raw(FrameKind::Pong, &b""[..]),
        Frame { kind: 255, body: bytes(3) },
    ];
    for frame_to_send in bad {
        let mut stream = host.open(Client::new(1, Vec::new()).resume());
        next::<ExecStarted>(&mut stream, FrameKind::Started).await;
        stream.writer.send(&frame_to_send).await.unwrap();
        let answer = frame(&mut stream).await;
        let error: StreamError = answer.decode().unwrap();
        assert!(answer.is(FrameKind::Error), "{frame_to_send:?} got {answer:?}");
        assert_eq!(error.code(), StreamErrorCode::Invalid, "{frame_to_send:?}: {error:?}");
    }
    for open in [
        ExecOpen { exec_id: vec![1; 15], how: None },
        ExecOpen::default(),
        resume(1, ExecResume { stdout_offset: 1, ..ExecResume::default() }),
    ] {
        let mut stream = host.open(open);
        let error: StreamError = next(&mut stream, FrameKind::Error).await;
        assert_eq!(error.code(), StreamErrorCode::Invalid, "{error:?}");
    }
    let mut stream = host.open(resume(99, ExecResume::default()));
    let error: StreamError = next(&mut stream, FrameKind::Error).await;
    assert_eq!(error.code(), StreamErrorCode::UnknownExec);
    let mut client = Client::new(1, b"still here".to_vec());
    let outcome = client.session(host.open(client.resume()), usize::MAX).await.unwrap();
    assert_eq!(outcome.stdout(), "still here");
}

#[tokio::test]
async fn thousands_of_execs_leave_nothing_behind() {
    let host = host();
    for round in 0..1500u32 {
        let mut id = vec![0; 12];
        id.extend_from_slice(&round.to_le_bytes());
        let open = ExecOpen {
            exec_id: id,
            how: Some(towline_proto::v1::exec_open::How::Start(command(&["/bin/true"]))),
        };
        let mut client = Client::new(0, Vec::new());
        let outcome = client.session(host.open(open), usize::MAX).await.unwrap();
        assert_eq!(outcome.code(), 0, "round {round}");
    }
    let open_files = std::fs::read_dir("/proc/self/fd").unwrap().count();
    assert!(open_files < 200, "{open_files} descriptors are open");
    assert!(host.table.list().execs.len() <= towline_proto::limits::EXECS_MAX);
}

fn code(code: i32) -> towline_proto::v1::exit_status::How {
    towline_proto::v1::exit_status::How::Code(code)
}

fn bytes(len: usize) -> bytes::Bytes {
    vec![0; len].into()
}

async fn frame(stream: &mut support::Stream) -> Frame {
    let next = tokio::time::timeout(BOUND, stream.reader.next()).await.expect("a frame in time");
    next.unwrap().expect("a frame before the end")
}

async fn next<M: prost::Message + Default>(stream: &mut support::Stream, kind: FrameKind) -> M {
    let frame = frame(stream).await;
    assert!(frame.is(kind), "{kind:?} expected, not {frame:?}");
    frame.decode().unwrap()
}

async fn until_shown(stream: &mut support::Stream, words: &str) -> String {
    let mut shown = String::new();
    while !shown.contains(words) {
        let frame = frame(stream).await;
        if frame.is(FrameKind::Stdout) {
            shown += &String::from_utf8_lossy(&frame.split_data().unwrap().1);
        }
    }
    shown
}

async fn to_the_end(stream: &mut support::Stream) -> (String, ExecExit) {
    let mut shown = Vec::new();
    loop {
        let frame = frame(stream).await;
        if frame.is(FrameKind::Stdout) {
            shown.extend_from_slice(&frame.split_data().unwrap().1);
        } else if frame.is(FrameKind::Exit) {
            return (String::from_utf8_lossy(&shown).into_owned(), frame.decode().unwrap());
        } else {
            assert!(frame.is(FrameKind::Ack) || frame.is(FrameKind::Stderr), "{frame:?}");
        }
    }
}
