//! Answers to questions, from the applied state. Whether it is new enough (`read_index`) is the
//! caller's business. Users see what is theirs; what is not theirs does not exist.

use std::collections::{BTreeMap, BTreeSet};

use towline_proto::ids::{NodeId, SandboxId};
use towline_proto::v1::{self, get_sandbox_request::Which};

use crate::input::{Answer, Caller, Role};
use crate::refusal::Refusal;
use crate::state::State;
use crate::state::nodes::is_silent;
use crate::state::sandboxes::{no_sandbox, node_id, sandbox_id};

/// Most images that a ticket to collect may keep: their list travels in one frame.
const KEEP_MAX: usize = 10_000;
/// Most sandboxes on one page.
const PAGE_MAX: usize = 1000;

/// Finds the caller's sandbox.
pub(crate) fn find<'a>(
    state: &'a State,
    caller: &Caller,
    which: &v1::GetSandboxRequest,
) -> Result<(SandboxId, &'a v1::SandboxRecord), Refusal> {
    match &which.which {
        Some(Which::Id(bytes)) => {
            let id = sandbox_id(bytes)?;
            let record = state.sandboxes.get(id).filter(|record| sees(caller, record));
            Ok((id, record.ok_or_else(|| no_sandbox(id))?))
        }
        Some(Which::Name(name)) => state
            .sandboxes
            .by_name(state.projects.of_user(&caller.name), name)
            .filter(|(_, record)| sees(caller, record))
            .ok_or_else(|| {
                let name: String = name.chars().take(80).collect();
                Refusal::not_found(format!("no sandbox named `{}`", name.escape_debug()))
            }),
        None => Err(Refusal::invalid("say which sandbox: an id or a name")),
    }
}

fn sees(caller: &Caller, record: &v1::SandboxRecord) -> bool {
    let owner = record.sandbox.as_ref().map(|sandbox| sandbox.owner.as_str());
    caller.role == Role::Operator || owner == Some(caller.name.as_str())
}

pub(crate) fn list(
    state: &State,
    caller: &Caller,
    request: &v1::ListSandboxesRequest,
) -> Result<Answer, Refusal> {
    let from = match request.page.as_slice() {
        [] => None,
        page => Some(sandbox_id(page)?),
    };
    let limit = match usize::try_from(request.limit).unwrap_or(PAGE_MAX) {
        0 => PAGE_MAX,
        limit => limit.min(PAGE_MAX),
    };
    let mut wanted = state
        .sandboxes
        .after(from)
        .filter(|(_, record)| sees(caller, record) && in_folder(record, request.folder.as_ref()));
    let page: Vec<_> = wanted.by_ref().take(limit).collect();
    let more = wanted.next().is_some();
    let next_page = match page.last() {
        Some((id, _)) if more => id.to_vec(),
        _ => Vec::new(),
    };
    Ok(Answer::Sandboxes(v1::ListSandboxesResponse {
        sandboxes: page.into_iter().map(|(_, record)| state.view(record)).collect(),
        next_page,
        revision: state.revision,
    }))
}

fn in_folder(record: &v1::SandboxRecord, folder: Option<&v1::Folder>) -> bool {
    let Some(folder) = folder else { return true };
    let spec = record.sandbox.as_ref().and_then(|sandbox| sandbox.spec.as_ref());
    spec.and_then(|spec| spec.folder.as_ref()) == Some(folder)
}

/// What a ticket says: of a sandbox of the caller's, or of a node's image store.
pub(crate) fn ticket(
    state: &State,
    caller: &Caller,
    request: &v1::IssueTicketRequest,
) -> Result<Answer, Refusal> {
    if request.sandbox_id.is_empty() {
        let id = node_id(&request.node_id)?;
        let keep = request.collect.then(|| used_images(state)).transpose()?;
        return Ok(Answer::Ticket { sandbox: None, node: Box::new(node(state, id)?), keep });
    }
    let which = v1::GetSandboxRequest { which: Some(Which::Id(request.sandbox_id.clone())) };
    let (id, record) = find(state, caller, &which)?;
    let sandbox = record.sandbox.clone().unwrap_or_default();
    if sandbox.desired() == v1::Desired::Deleted {
        return Err(Refusal::precondition(format!("{id} is being deleted")));
    }
    let node = node(state, node_id(&sandbox.node_id)?)?;
    Ok(Answer::Ticket { sandbox: Some(Box::new(sandbox)), node: Box::new(node), keep: None })
}

/// Digests of the images that a name or anybody's sandbox uses.
fn used_images(state: &State) -> Result<Vec<String>, Refusal> {
    let named = state.images.iter().map(|image| image.digest.clone());
    let used = state.sandboxes.after(None).map(|(_, record)| record.image_digest.clone());
    let keep: BTreeSet<String> = named.chain(used).filter(|digest| !digest.is_empty()).collect();
    if keep.len() > KEEP_MAX {
        return Err(Refusal::unavailable(format!(
            "{} images are in use, more than {KEEP_MAX}: remove names first (`tow image rm`)",
            keep.len()
        )));
    }
    Ok(keep.into_iter().collect())
}

/// All images, with how many sandboxes were made from each.
pub(crate) fn images(state: &State) -> Vec<v1::Image> {
    let mut used: BTreeMap<&str, u32> = BTreeMap::new();
    for (_, record) in state.sandboxes.after(None) {
        *used.entry(record.image_digest.as_str()).or_default() += 1;
    }
    let counted = |image: &v1::Image| {
        let sandboxes = used.get(image.digest.as_str()).copied().unwrap_or(0);
        v1::Image { sandboxes, ..image.clone() }
    };
    state.images.iter().map(counted).collect()
}

fn node(state: &State, id: NodeId) -> Result<v1::Node, Refusal> {
    let record = state.nodes.get(id).ok_or_else(|| Refusal::not_found(format!("no node {id}")))?;
    let node = record.node.clone().unwrap_or_default();
    if is_silent(record) {
        return Err(Refusal::unavailable(format!(
            "node `{}` is silent: see whether its node agent runs (`tow status`)",
            node.name
        )));
    }
    Ok(node)
}
