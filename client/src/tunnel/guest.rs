//! Streams to one sandbox through the daemon, and what to make of it when they break.
//!
//! Leaves tickets and links to the daemon. The control plane is asked only when something is
//! wrong, so that a plain exec costs no call.

use std::time::Duration;

use tokio::sync::OnceCell;
use towline_proto::v1::{self, Desired, Phase, StreamErrorCode, stream_open::Kind};

use super::exec::{DialError, Dialer, Verdict, Wire};
use crate::cluster::{self, Cluster, Start};
use crate::commands::Env;
use crate::daemon::DaemonFailure;
use crate::daemon::client::{DaemonClient, OpenError, OpenedStream};
use crate::daemon::place::Place;
use crate::error::Failure;
use crate::output::human;
use crate::sandbox;

/// Bound on asking the control plane about a broken stream.
const VERDICT_MAX: Duration = Duration::from_secs(3);

/// How often, and how far apart, the record is looked at for what the node has just reported.
const REPORT_LOOKS: u32 = 10;
const REPORT_PAUSE: Duration = Duration::from_millis(150);

/// Bound on asking for news after a command that failed: nobody waits for them.
const NEWS_MAX: Duration = Duration::from_secs(1);

/// One sandbox, by what was typed or by its record.
#[derive(Debug)]
pub struct Guest<'a> {
    env: &'a Env,
    daemon: DaemonClient,
    sandbox: v1::OpenSandboxStream,
    cluster: OnceCell<Cluster>,
}

impl<'a> Guest<'a> {
    /// A sandbox by name or id as typed; starts the embedded cluster if it should run.
    pub async fn named(env: &'a Env, text: &str) -> anyhow::Result<Self> {
        use v1::get_sandbox_request::Which;
        let sandbox = match sandbox::which(text).which {
            Some(Which::Id(sandbox_id)) => {
                v1::OpenSandboxStream { sandbox_id, ..Default::default() }
            }
            _ => v1::OpenSandboxStream { sandbox_name: text.to_owned(), ..Default::default() },
        };
        let context = cluster::ensure(env, Start::UnlessDown).await?;
        Self::new(env, &context, sandbox)
    }

    /// A sandbox that was found already.
    pub fn of(env: &'a Env, cluster: Cluster, found: &v1::Sandbox) -> anyhow::Result<Self> {
        let sandbox = v1::OpenSandboxStream { sandbox_id: found.id.clone(), ..Default::default() };
        let guest = Self::new(env, cluster.context(), sandbox)?;
        Ok(Self { cluster: OnceCell::new_with(Some(cluster)), ..guest })
    }

    /// A node's image store instead of a sandbox.
    pub fn image_store(env: &'a Env, context: &str) -> anyhow::Result<Self> {
        Self::new(env, context, v1::OpenSandboxStream::default())
    }

    /// The image store of one node.
    pub fn image_store_of(env: &'a Env, context: &str, node_id: Vec<u8>) -> anyhow::Result<Self> {
        Self::new(env, context, v1::OpenSandboxStream { node_id, ..Default::default() })
    }

    fn new(env: &'a Env, context: &str, sandbox: v1::OpenSandboxStream) -> anyhow::Result<Self> {
        let daemon = DaemonClient::new(Place::discover()?, context)?;
        Ok(Self { env, daemon, sandbox, cluster: OnceCell::new() })
    }

    /// The daemon that carries the streams.
    pub fn daemon(&self) -> &DaemonClient {
        &self.daemon
    }

    /// Opens a stream of any kind.
    pub async fn open(&self, kind: Kind) -> Result<OpenedStream, OpenError> {
        open(&self.daemon, &self.sandbox, kind).await
    }

    /// What opens streams to the same sandbox for a task of its own.
    pub fn opener(&self) -> Opener {
        Opener { daemon: self.daemon.clone(), sandbox: self.sandbox.clone() }
    }

    /// Opens a stream to a node's image store with a ticket that was got for this one purpose.
    pub async fn open_images(
        &self,
        node_id: Vec<u8>,
        ticket: Vec<u8>,
        kind: Kind,
    ) -> Result<OpenedStream, OpenError> {
        let open = Some(v1::StreamOpen { ticket, kind: Some(kind) });
        let request = v1::OpenSandboxStream { node_id, open, ..Default::default() };
        self.daemon.open(request).await
    }

    async fn cluster(&self) -> anyhow::Result<&Cluster> {
        self.cluster.get_or_try_init(|| Cluster::open(self.env, Start::UnlessDown)).await
    }

    /// Looks at the sandbox's record, where the control plane can be asked in time.
    pub async fn record(&self) -> anyhow::Result<Option<v1::Sandbox>> {
        // A supervisor that was killed is replaced here: nobody else would.
        cluster::ensure(self.env, Start::UnlessDown).await?;
        let cluster = self.cluster().await?;
        let look = async {
            match self.sandbox.sandbox_id.is_empty() {
                false => sandbox::by_id(cluster, &self.sandbox.sandbox_id).await,
                true => sandbox::find(cluster, &self.sandbox.sandbox_name).await.map(Some),
            }
        };
        tokio::time::timeout(VERDICT_MAX, look).await?
    }

    /// Why a sandbox does not run, as its record says it, else as its node did: the node knows first.
    async fn not_running(&self, refused: DaemonFailure) -> anyhow::Error {
        let mut name = human::printable(&self.sandbox.sandbox_name);
        for _ in 0..REPORT_LOOKS {
            match self.record().await {
                Ok(Some(found)) => match judge(&found) {
                    Verdict::Gone(error) => return error,
                    Verdict::MayComeBack => name = sandbox::name(&found),
                },
                Ok(None) => return Failure::new("the sandbox was removed").into(),
                Err(_) => break,
            }
            tokio::time::sleep(REPORT_PAUSE).await;
        }
        Failure::new(human::printable(&refused.message))
            .hint(format!("`tow inspect {name}` says how it is, `tow start {name}` starts it"))
            .into()
    }

    /// What was said of the running sandbox since it was as in `before`, where the control plane
    /// was reached already and answers at once.
    pub async fn news(&self, before: &v1::Sandbox) -> Option<String> {
        let look = sandbox::by_id(self.cluster.get()?, &before.id);
        let now = tokio::time::timeout(NEWS_MAX, look).await.ok()?.ok()??;
        let news = sandbox::reason(&now);
        let told = news.is_empty() || news == sandbox::reason(before);
        (!told && sandbox::phase(&now) == Phase::Running).then_some(news)
    }
}

/// Opens streams to one sandbox.
#[derive(Debug, Clone)]
pub struct Opener {
    daemon: DaemonClient,
    sandbox: v1::OpenSandboxStream,
}

impl Opener {
    /// Opens a stream of any kind.
    pub async fn open(&self, kind: Kind) -> Result<OpenedStream, OpenError> {
        open(&self.daemon, &self.sandbox, kind).await
    }
}

async fn open(
    daemon: &DaemonClient,
    sandbox: &v1::OpenSandboxStream,
    kind: Kind,
) -> Result<OpenedStream, OpenError> {
    let open = Some(v1::StreamOpen { ticket: Vec::new(), kind: Some(kind) });
    daemon.open(v1::OpenSandboxStream { open, ..sandbox.clone() }).await
}

impl Dialer for Guest<'_> {
    async fn dial(&self, open: v1::ExecOpen) -> Result<Wire, DialError> {
        match self.open(Kind::Exec(open)).await {
            Ok(opened) => Ok(Wire { reader: opened.reader, writer: opened.writer }),
            Err(error) => {
                let retry = error.may_retry();
                let error = match error {
                    OpenError::Refused(refused) if refused.code == StreamErrorCode::NotRunning => {
                        self.not_running(refused).await
                    }
                    error => open_failed(error),
                };
                Err(DialError { retry, error })
            }
        }
    }

    async fn verdict(&self) -> Verdict {
        match self.record().await {
            Ok(Some(found)) => judge(&found),
            Ok(None) => Verdict::Gone(Failure::new("the sandbox was removed").into()),
            Err(error) => {
                tracing::debug!(%error, "cannot ask about the sandbox");
                Verdict::MayComeBack
            }
        }
    }

    fn notice(&self, text: &str) {
        self.env.printer.notice(text);
    }
}

fn judge(found: &v1::Sandbox) -> Verdict {
    let name = sandbox::name(found);
    let reason = found.observed.as_ref().map_or("", |observed| &observed.reason);
    let because = match reason {
        "" | "stopped" => String::new(),
        reason => format!(": {}", human::printable(reason)),
    };
    let again = || format!("`tow start {name}` starts it again; its disk is kept");
    match sandbox::phase(found) {
        _ if found.desired() == Desired::Deleted => {
            Verdict::Gone(Failure::new(format!("sandbox {name} was removed")).into())
        }
        Phase::Paused => {
            let text = format!("sandbox {name} is paused");
            let hint = format!("`tow resume {name}` lets it go on");
            Verdict::Gone(Failure::new(text).hint(hint).into())
        }
        Phase::Stopped => {
            let text = format!("sandbox {name} is stopped{because}");
            Verdict::Gone(Failure::new(text).hint(again()).into())
        }
        Phase::Failed => {
            let text = format!("sandbox {name} failed{because}");
            Verdict::Gone(Failure::new(text).hint(again()).into())
        }
        Phase::Lost => Verdict::Gone(
            Failure::new(format!("sandbox {name} is lost with its node{because}"))
                .hint(format!("`tow rm {name}` removes what is left"))
                .into(),
        ),
        _ => Verdict::MayComeBack,
    }
}

/// Says why no stream was opened, with what to type next.
pub fn open_failed(error: OpenError) -> anyhow::Error {
    match error {
        OpenError::Refused(failure) => {
            let hint = match failure.hint.split_once(' ') {
                Some(("tow", _)) => format!("`{}`", failure.hint),
                _ => failure.hint.clone(),
            };
            let text = Failure::new(human::printable(&failure.message));
            if hint.is_empty() { text.into() } else { text.hint(hint).into() }
        }
        OpenError::Daemon(error) => {
            Failure::new("the daemon could not be used").hint("`tow doctor`").because(error).into()
        }
    }
}
