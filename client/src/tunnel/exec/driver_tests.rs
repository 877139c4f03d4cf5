//! The driver against guests that answer from a script, over real sockets.

use std::collections::VecDeque;
use std::sync::Mutex;

use super::super::client::How;
use super::*;
use tokio::net::UnixStream;
use towline_proto::v1::exec_open::How as Wanted;
use towline_proto::v1::exit_status::How as Ending;

/// What one stream does after it was opened.
enum Script {
    Frames(Vec<Frame>),
    CannotDial { retry: bool },
}

struct Fake {
    scripts: Mutex<VecDeque<Script>>,
    opens: Mutex<Vec<v1::ExecOpen>>,
    gone: bool,
}

impl Fake {
    fn new(scripts: impl IntoIterator<Item = Script>) -> Self {
        let scripts = Mutex::new(scripts.into_iter().collect());
        Self { scripts, opens: Mutex::default(), gone: false }
    }
}

impl Dialer for Fake {
    async fn dial(&self, open: v1::ExecOpen) -> Result<Wire, DialError> {
        self.opens.lock().unwrap().push(open);
        let script =
            self.scripts.lock().unwrap().pop_front().expect("no more streams than expected");
        let frames = match script {
            Script::Frames(frames) => frames,
            Script::CannotDial { retry } => {
                return Err(DialError { error: anyhow::anyhow!("nobody there"), retry });
            }
        };
        let (ours, theirs) = UnixStream::pair().unwrap();
        tokio::spawn(async move {
            let mut writer = FrameWriter::new(theirs);
            for frame in frames {
                writer.send(&frame).await.unwrap();
            }
        });
        let (read, write) = ours.into_split();
        Ok(Wire { reader: FrameReader::new(read), writer: FrameWriter::new(write) })
    }

    async fn verdict(&self) -> Verdict {
        match self.gone {
            true => Verdict::Gone(anyhow::anyhow!("the sandbox stopped")),
            false => Verdict::MayComeBack,
        }
    }

    fn notice(&self, _: &str) {}
}

fn started() -> Frame {
    Frame::message(FrameKind::Started, &v1::ExecStarted::default())
}

fn exited(code: i32) -> Frame {
    let status = v1::ExitStatus { how: Some(Ending::Code(code)), ..Default::default() };
    let exit = v1::ExecExit { status: Some(status), ..Default::default() };
    Frame::message(FrameKind::Exit, &exit)
}

fn refused(code: v1::StreamErrorCode) -> Frame {
    let error = v1::StreamError { code: code.into(), message: "no\x1b[2J".into() };
    Frame::message(FrameKind::Error, &error)
}

fn io() -> Io {
    Io {
        stdin: false,
        terminal: false,
        forward_signals: true,
        detach_keys: Vec::new(),
        only_start: false,
    }
}

async fn drive(fake: &Fake) -> anyhow::Result<Ended> {
    run(fake, ExecClient::new(vec![1; 16], How::Start(v1::ExecStart::default())), io()).await
}

#[tokio::test]
async fn a_broken_link_is_resumed_and_the_commands_code_is_ours() {
    let fake = Fake::new([
        Script::Frames(vec![]),
        Script::Frames(vec![started()]),
        Script::CannotDial { retry: true },
        Script::Frames(vec![started(), exited(7)]),
    ]);
    assert_eq!(drive(&fake).await.unwrap().exit(), Exit(7));
    let opens = fake.opens.into_inner().unwrap();
    let resumes = |open: &v1::ExecOpen| matches!(open.how, Some(Wanted::Resume(_)));
    assert_eq!(opens.iter().map(resumes).collect::<Vec<_>>(), [false, false, true, true]);
    assert!(opens.iter().all(|open| open.exec_id == [1; 16]));
}

#[tokio::test]
async fn refusals_have_a_shells_codes_and_cannot_drive_the_terminal() {
    use v1::StreamErrorCode as Code;
    let cases =
        [(Code::CommandNotFound, Some(127)), (Code::CannotExecute, Some(126)), (Code::Limit, None)];
    for (code, expected) in cases {
        let fake = Fake::new([Script::Frames(vec![refused(code)])]);
        let error = drive(&fake).await.unwrap_err();
        assert_eq!(crate::error::wanted_code(&error), expected);
        assert!(!error.to_string().contains('\x1b'));
    }
}

#[tokio::test]
async fn what_cannot_come_back_ends_at_once() {
    let mut fake = Fake::new([Script::Frames(vec![started()])]);
    fake.gone = true;
    let error = drive(&fake).await.unwrap_err();
    assert!(error.to_string().contains("stopped"), "{error}");
    let fake = Fake::new([Script::CannotDial { retry: false }]);
    assert!(drive(&fake).await.unwrap_err().to_string().contains("nobody"));
}

#[tokio::test]
async fn only_starting_does_not_wait_for_the_end() {
    let fake = Fake::new([Script::Frames(vec![started()])]);
    let io = Io { only_start: true, ..io() };
    let client = ExecClient::new(vec![1; 16], How::Start(v1::ExecStart::default()));
    assert!(matches!(run(&fake, client, io).await.unwrap(), Ended::Left));
}
