//! The whole state as versioned bytes and back. Layout changes get a new version here and a golden
//! file in the tests; a reader refuses what is newer than itself.

use prost::Message;
use towline_proto::v1::outcome::What;
use towline_proto::v1::{Desired, MembershipRecord, Observed, Phase, Sandbox, StateSnapshot};

use crate::command::Halt;
use crate::refusal::Refusal;
use crate::state::State;
use crate::state::tokens::token_id;

/// The newest layout that this build writes and reads; a state is written in the oldest that holds
/// all of it.
///
/// 1: the first. 2: timeouts. 3: pauses and forks.
pub const VERSION: u32 = 3;

/// Encodes the state.
pub fn encode(state: &State) -> Vec<u8> {
    StateSnapshot {
        version: version_of(state),
        cluster_id: state.cluster_id.clone(),
        revision: state.revision,
        now_ms: state.now_ms,
        sandboxes: state.sandboxes.after(None).map(|(_, record)| record.clone()).collect(),
        nodes: state.nodes.iter().map(|(_, record)| record.clone()).collect(),
        projects: state.projects.by_name.values().cloned().collect(),
        tokens: state.tokens.by_id.values().cloned().collect(),
        images: state.images.iter().cloned().collect(),
        dedup: state.dedup.iter().cloned().collect(),
        users: state
            .projects
            .users
            .iter()
            .map(|(user, project)| MembershipRecord {
                user: user.clone(),
                project: project.clone(),
            })
            .collect(),
    }
    .encode_to_vec()
}

fn version_of(state: &State) -> u32 {
    let needs = |sandbox: &Sandbox| {
        let timeout_s = sandbox.spec.as_ref().map_or(0, |spec| spec.timeout_s);
        let phase = sandbox.observed.as_ref().map(Observed::phase);
        let is_paused = sandbox.desired() == Desired::Paused || phase == Some(Phase::Paused);
        if is_paused || sandbox.forked_from.is_some() {
            3
        } else if timeout_s != 0 || !sandbox.desired_reason.is_empty() {
            2
        } else {
            1
        }
    };
    let records = state.sandboxes.after(None);
    let versions = records.filter_map(|(_, record)| record.sandbox.as_ref()).map(needs);
    let forked = state.dedup.iter().any(|record| {
        let what = record.outcome.as_ref().and_then(|outcome| outcome.what.as_ref());
        matches!(what, Some(What::Forked(_)))
    });
    versions.max().unwrap_or(1).max(if forked { 3 } else { 1 })
}

/// Decodes a state; `index` is only for the message.
pub fn decode(index: u64, bytes: &[u8]) -> Result<State, Halt> {
    let refuse = |reason: String| Halt::Snapshot { index, reason };
    let snapshot = StateSnapshot::decode(bytes).map_err(|error| refuse(error.to_string()))?;
    if snapshot.version == 0 || snapshot.version > VERSION {
        return Err(refuse(format!(
            "its version is {}, and this build reads up to {VERSION}: upgrade this member",
            snapshot.version
        )));
    }
    from_message(snapshot).map_err(|refusal| refuse(refusal.message))
}

fn from_message(snapshot: StateSnapshot) -> Result<State, Refusal> {
    let mut state = State {
        cluster_id: snapshot.cluster_id,
        revision: snapshot.revision,
        now_ms: snapshot.now_ms,
        ..State::default()
    };
    for record in snapshot.sandboxes {
        state.sandboxes.insert(record)?;
    }
    for record in snapshot.nodes {
        state.nodes.insert(record)?;
    }
    for token in snapshot.tokens {
        state.tokens.by_id.insert(token_id(&token.id)?, token);
    }
    for record in snapshot.dedup {
        state.dedup.insert(record);
    }
    let projects = snapshot.projects.into_iter().map(|project| (project.name.clone(), project));
    state.projects.by_name = projects.collect();
    let users = snapshot.users.into_iter().map(|member| (member.user, member.project));
    state.projects.users = users.collect();
    let images = snapshot.images.into_iter().map(|image| (image.name.clone(), image));
    state.images.by_name = images.collect();
    Ok(state)
}
