//! Objects as programs read them: one per line, each with a `schema` that names its kind and
//! version. Fields are added, never changed; snapshots in the tests hold them.
//!
//! Bytes that are not UTF-8 are given as text with replacement characters.

use std::path::Path;

use serde_json::{Map, Value, json};
use towline_proto::ids::{NodeId, SandboxId};
use towline_proto::v1;

/// Returns a sandbox as `tow ls --json` and `tow inspect --json` print it.
pub fn sandbox(sandbox: &v1::Sandbox) -> Value {
    let spec = sandbox.spec.clone().unwrap_or_default();
    let observed = sandbox.observed.clone().unwrap_or_default();
    let shape = spec.shape.unwrap_or_default();
    json!({
        "schema": "towline.sandbox/1",
        "id": id_text::<SandboxId>(&sandbox.id),
        "name": spec.name,
        "project": sandbox.project,
        "owner": sandbox.owner,
        "phase": phase(sandbox),
        "desired": desired(sandbox),
        "reason": observed.reason,
        "timeout_s": spec.timeout_s,
        "expires_ms": sandbox.expires_ms,
        "generation": sandbox.generation,
        "epoch": sandbox.epoch,
        "node": id_text::<NodeId>(&sandbox.node_id),
        "driver": observed.driver,
        "isolation": isolation(&spec, &observed),
        "start": observed.start,
        "image": image(&spec),
        "image_digest": observed.image_digest,
        "policy": spec.policy,
        "shape": {
            "cpus": shape.cpus,
            "memory_mib": shape.memory_mib,
            "disk_mib": shape.disk_mib,
            "processes_max": shape.processes_max,
        },
        "folder": spec.folder.as_ref().map(|folder| bytes(&folder.path)),
        "user": spec.user.as_ref().map(|user| json!({
            "name": user.name, "uid": user.uid, "gid": user.gid, "home": bytes(&user.home),
        })),
        "forked_from": sandbox
            .forked_from
            .as_ref()
            .map(|origin| id_text::<SandboxId>(&origin.sandbox_id)),
        "main_exit": observed.main_exit.as_ref().map(exit_status),
        "created_ms": sandbox.created_ms,
        "since_ms": sandbox.since_ms,
        "revision": sandbox.revision,
    })
}

/// Returns a sandbox with the ports that were published with it.
pub fn sandbox_with_ports(sandbox: &v1::Sandbox, ports: &[v1::PublishedPort]) -> Value {
    let mut object = self::sandbox(sandbox);
    object["ports"] = ports.iter().map(crate::ports::object).collect();
    object
}

/// Returns a node as `tow node ls --json` prints it.
pub fn node(node: &v1::Node) -> Value {
    let capacity = |capacity: Option<v1::Capacity>| {
        let capacity = capacity.unwrap_or_default();
        json!({
            "cpus": capacity.cpus,
            "memory_mib": capacity.memory_mib,
            "disk_mib": capacity.disk_mib,
        })
    };
    json!({
        "schema": "towline.node/1",
        "id": id_text::<NodeId>(&node.id),
        "name": node.name,
        "state": node_state(node),
        "epoch": node.epoch,
        "capacity": capacity(node.capacity),
        "reserved": capacity(node.reserved),
        "link_endpoint": node.link_endpoint,
        "embedded": node.embedded,
        "version": node.version,
        "drivers": node.drivers.iter().map(|driver| json!({
            "name": driver.name, "accel": driver.accel, "snapshot": driver.snapshot,
            "hotplug": driver.hotplug, "gpu": driver.gpu, "fork": driver.fork,
        })).collect::<Vec<_>>(),
    })
}

/// Returns an image as `tow image ls --json` prints it.
pub fn image_record(image: &v1::Image) -> Value {
    json!({
        "schema": "towline.image/1",
        "name": image.name,
        "digest": image.digest,
        "bytes": image.bytes,
        "created_ms": image.created_ms,
    })
}

/// Returns what `tow image export` wrote.
pub fn image_exported(image: &v1::Image, path: &Path, bytes: u64) -> Value {
    json!({
        "schema": "towline.exported/1",
        "name": image.name,
        "digest": image.digest,
        "path": path.display().to_string(),
        "bytes": bytes,
    })
}

/// Returns what `tow image push` did.
pub fn image_pushed(name: &str, pushed: &v1::ImagePushed) -> Value {
    json!({
        "schema": "towline.pushed/1",
        "name": name,
        "digest": pushed.digest,
        "reference": pushed.reference,
        "bytes_sent": pushed.bytes_sent,
        "blobs_sent": pushed.blobs_sent,
        "blobs_there": pushed.blobs_there,
        "blobs_mounted": pushed.blobs_mounted,
    })
}

/// Returns how a process ended.
pub fn exit_status(status: &v1::ExitStatus) -> Value {
    use v1::exit_status::How;
    let mut object = Map::new();
    match status.how {
        Some(How::Code(code)) => object.insert("code".into(), code.into()),
        Some(How::Signal(signal)) => object.insert("signal".into(), signal.into()),
        None => None,
    };
    object.insert("reason".into(), status.reason.clone().into());
    if let Some(usage) = &status.usage {
        let usage = json!({
            "user_us": usage.user_us, "system_us": usage.system_us,
            "rss_max_kib": usage.rss_max_kib, "wall_us": usage.wall_us,
        });
        object.insert("usage".into(), usage);
    }
    object.into()
}

/// Returns the phase's word.
pub fn phase(sandbox: &v1::Sandbox) -> String {
    let observed = sandbox.observed.clone().unwrap_or_default();
    word(observed.phase().as_str_name(), "PHASE_")
}

/// Returns the wish's word.
pub fn desired(sandbox: &v1::Sandbox) -> String {
    word(sandbox.desired().as_str_name(), "DESIRED_")
}

/// Returns the node state's word.
pub fn node_state(node: &v1::Node) -> String {
    word(node.state().as_str_name(), "NODE_STATE_")
}

/// Returns the image as it was asked for.
pub fn image(spec: &v1::SandboxSpec) -> String {
    use v1::image_ref::Source;
    match spec.image.as_ref().and_then(|image| image.source.as_ref()) {
        Some(Source::Oci(reference)) => reference.clone(),
        Some(Source::Local(_)) => "local".into(),
        None => String::new(),
    }
}

/// Returns what is between the sandbox and its node: as observed, else as asked for.
pub fn isolation(spec: &v1::SandboxSpec, observed: &v1::Observed) -> String {
    match observed.isolation.is_empty() {
        true => word(spec.isolation().as_str_name(), "ISOLATION_"),
        false => observed.isolation.clone(),
    }
}

/// Returns an id with its prefix, or nothing for bytes that are none.
pub fn id_text<Id: for<'a> TryFrom<&'a [u8]> + ToString>(bytes: &[u8]) -> String {
    Id::try_from(bytes).map(|id| id.to_string()).unwrap_or_default()
}

/// Returns bytes as text, for showing.
pub fn bytes(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn word(name: &str, prefix: &str) -> String {
    name.strip_prefix(prefix).unwrap_or(name).to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What programs read: a change here is a change of the contract.
    #[test]
    fn a_sandbox_is_printed_as_reviewed() {
        let spec = v1::SandboxSpec {
            name: "quick-otter".into(),
            image: Some(v1::ImageRef {
                source: Some(v1::image_ref::Source::Oci("debian:12".into())),
            }),
            shape: Some(v1::Shape {
                cpus: 2,
                memory_mib: 2048,
                disk_mib: 20480,
                processes_max: 4096,
            }),
            isolation: v1::Isolation::Vm.into(),
            policy: "public".into(),
            folder: Some(v1::Folder { path: b"/home/me/\xffp".to_vec(), device: 1, inode: 2 }),
            ..Default::default()
        };
        let status = v1::ExitStatus {
            how: Some(v1::exit_status::How::Signal(9)),
            reason: "out of memory".into(),
            usage: Some(v1::Usage { user_us: 1, system_us: 2, rss_max_kib: 3, wall_us: 4 }),
        };
        let observed = v1::Observed {
            phase: v1::Phase::Stopped.into(),
            driver: "qemu".into(),
            isolation: "vm (kvm)".into(),
            start: "warm".into(),
            main_exit: Some(status),
            ..Default::default()
        };
        let sandbox = v1::Sandbox {
            id: SandboxId::from_parts(1, [0; 10]).to_vec(),
            node_id: NodeId::from_parts(2, [0; 10]).to_vec(),
            project: "default".into(),
            owner: "me".into(),
            desired: v1::Desired::Stopped.into(),
            spec: Some(spec),
            observed: Some(observed),
            ..Default::default()
        };
        insta::assert_json_snapshot!(super::sandbox(&sandbox));
    }

    #[test]
    fn images_that_go_out_keep_their_fields() {
        let digest = "sha256:ab".to_owned();
        let image =
            v1::Image { name: "app:1".into(), digest: digest.clone(), ..Default::default() };
        let pushed = v1::ImagePushed {
            digest,
            reference: "reg.example/app:1".into(),
            bytes_sent: 1,
            blobs_sent: 2,
            blobs_there: 3,
            blobs_mounted: 4,
        };
        let exported = super::image_exported(&image, super::Path::new("app.tar"), 5);
        insta::assert_json_snapshot!([exported, super::image_pushed("app:1", &pushed)]);
    }
}
