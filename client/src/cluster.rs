//! The cluster that a command talks to: which one, started where it is ours to start.
//!
//! Leaves connecting, renewal and leaders to `session.rs`. An embedded cluster whose supervisor
//! died is started again by whoever needs it; one that was taken down by `tow down` is started
//! only by verbs that create.

use std::sync::Arc;

use tonic::{Response, Status};
use towline_link::status::RpcError;

use crate::commands::Env;
use crate::config::{Config, EMBEDDED};
use crate::embedded::{self, Holder, Layout};
use crate::error::Failure;
use crate::session::{Client, Session};

/// A cluster in reach.
#[derive(Debug, Clone)]
pub struct Cluster {
    session: Arc<Session>,
}

/// When an embedded cluster may be started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// Whenever it does not run: the verb makes something new.
    Always,
    /// Only when it should run: it was not taken down.
    UnlessDown,
}

/// Makes sure that the cluster that is meant can be asked, and returns its context's name.
pub async fn ensure(env: &Env, start: Start) -> anyhow::Result<String> {
    let config = Config::load()?;
    let selected = config.selected(env.context.as_deref())?.map(|(name, _)| name);
    match selected {
        Some(name) if name != EMBEDDED => Ok(name),
        known => {
            ensure_embedded(env, start, known.is_some()).await?;
            Ok(EMBEDDED.to_owned())
        }
    }
}

async fn ensure_embedded(env: &Env, start: Start, known: bool) -> anyhow::Result<()> {
    let layout = Layout::new()?;
    // Whoever holds the lock restarts what fails: calls only have to be patient. Without a
    // context it is still on its way up for the first time.
    if known && Holder::find(&layout.lock())?.is_some() {
        return Ok(());
    }
    if start == Start::UnlessDown {
        if !known {
            return Err(Failure::new("no cluster is configured")
                .hint("`tow up --detach` starts one on this machine")
                .into());
        }
        if layout.down_mark().exists() {
            return Err(Failure::new("the embedded cluster is down")
                .hint("`tow up --detach` starts it")
                .into());
        }
    }
    embedded::ensure_started(&layout, &env.printer).await.map(drop)
}

impl Cluster {
    /// Opens the cluster that is meant, starting the embedded one where that is right.
    pub async fn open(env: &Env, start: Start) -> anyhow::Result<Self> {
        let name = ensure(env, start).await?;
        let session = Session::selected(Some(&name)).await?;
        let session =
            session.ok_or_else(|| Failure::new("the embedded cluster wrote no context"))?;
        Ok(Self { session: Arc::new(session) })
    }

    /// Name of its context.
    pub fn context(&self) -> &str {
        self.session.name()
    }

    /// Makes a call, again where that may help.
    pub async fn call<T, F, Fut>(&self, call: F) -> anyhow::Result<T>
    where
        F: FnMut(Client) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        self.try_call(call).await.map_err(|error| self.explain(error))
    }

    /// As [`Self::call`], with the error as it came.
    pub async fn try_call<T, F, Fut>(&self, call: F) -> Result<T, RpcError>
    where
        F: FnMut(Client) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        self.session.call(call).await
    }

    /// A client for streams.
    pub fn client(&self) -> Client {
        self.session.client()
    }

    /// Turns a call's failure into ours, with the other side's own words.
    pub fn explain(&self, error: RpcError) -> anyhow::Error {
        match error {
            RpcError::Unreachable(_) => {
                let endpoint = &self.session.context().endpoint;
                Failure::new(format!("could not reach the control plane at `{endpoint}`"))
                    .hint("`tow status` says how it is, `tow doctor` checks this machine")
                    .because(error)
            }
            RpcError::Unauthenticated(text) => Failure::new(text).hint(
                "`tow down` and `tow up --detach` renew your identity in an embedded cluster",
            ),
            other => Failure::new(other.to_string()),
        }
        .into()
    }
}
