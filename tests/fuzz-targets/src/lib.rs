//! What strangers can send, as functions of bytes. `tests/fuzz` drives them with libFuzzer; the kept
//! corpus is replayed by `make test`. A target fails by panicking.

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};
use towline_filesync::copy::{Place, unpack};
use towline_filesync::tree::Root;
use towline_node_helper::decide::{Table, Vmm};
use towline_node_helper::protocol::{Malformed, Request};
use towline_proto::durable::Durable;
use towline_proto::frame;
use towline_proto::limits::TCP_FIRST_WINDOW;
use towline_proto::mux::preamble::{HostScan, Marker};
use towline_proto::mux::terms::Terms;
use towline_proto::mux::{End, Mux, Read, WINDOW};
use towline_proto::v1;

/// Frames of any stream, and each message that a frame can hold.
pub fn frames(bytes: &[u8]) {
    let mut buffer = BytesMut::from(bytes);
    while let Ok(Some(frame)) = frame::decode(&mut buffer) {
        let (offset, data) = frame.split_data().unwrap_or_default();
        assert!(data.len() <= frame.body.len(), "{offset}");
        drop(frame.decode::<v1::StreamOpen>());
        drop(frame.decode::<v1::StreamError>());
        drop(frame.decode::<v1::DaemonRequest>());
        drop(frame.decode::<v1::DaemonAnswer>());
        drop(frame.decode::<v1::ExecStarted>());
        drop(frame.decode::<v1::ExecExit>());
        drop(frame.decode::<v1::ExecList>());
        drop(frame.decode::<v1::DiffPart>());
        drop(frame.decode::<v1::DiffDone>());
        drop(frame.decode::<v1::SaveOpen>());
        drop(frame.decode::<v1::Saved>());
        drop(frame.decode::<v1::SaveSecrets>());
        drop(frame.decode::<v1::LayerPart>());
        drop(frame.decode::<v1::LayerDone>());
        drop(frame.decode::<v1::SignedTicket>());
    }
}

/// What a hostile guest can say: its answer to the preamble, the multiplexer, and the messages on the
/// control stream.
pub fn guest_messages(bytes: &[u8]) {
    guest_answer(bytes);
    let mut mux = Mux::new(End::Host, Terms::new(WINDOW));
    for piece in bytes.chunks(61) {
        if mux.receive(Bytes::copy_from_slice(piece)).is_err() {
            break;
        }
        let mut out = BytesMut::new();
        mux.transmit(&mut out, 64 << 10);
        while let Some((stream, _)) = mux.accept() {
            let mut into = [0; 512];
            while let Ok(Read::Data(read)) = mux.read(stream, &mut into) {
                assert!(read <= into.len());
            }
        }
    }
    towline_node_agent::guests::fuzz_control(bytes);
}

/// The guest knows marker and nonce: what it may forge begins with them, and its terms are its own.
fn guest_answer(bytes: &[u8]) {
    let mut scan = HostScan::new(&[Marker::BOOT], b"nonce of fuzzing");
    let mut mux = Mux::new(End::Host, Terms::new(WINDOW));
    let Ok(stream) = mux.open(towline_proto::mux::Priority::Bulk) else { return };
    for piece in bytes.chunks(61) {
        let Ok(session) = scan.push(Bytes::copy_from_slice(piece)) else { return };
        if let Some(terms) = scan.terms() {
            mux.agree(terms);
        }
        if mux.receive(session).is_err() {
            return;
        }
        let _full_or_ended = mux.write(stream, piece);
        mux.transmit(&mut BytesMut::new(), 64 << 10);
    }
}

/// What somebody who became the node agent can ask of the helper, one request after the other: what is
/// done is one of the verbs, with what was listed, within bounds.
pub fn helper_requests(bytes: &[u8]) {
    let mut table = Table::new(vec!["/usr/bin/vmm".into()], (1000, 2), BTreeMap::new(), None);
    for (now, packet) in (1..).zip(bytes.split(|&byte| byte == b'\n')) {
        // As many descriptors as it speaks of.
        let parse = |descriptors| Request::parse(packet, descriptors);
        let request = parse(0).or_else(|error| match error {
            Malformed::Descriptors { wanted, .. } => parse(wanted),
            other => Err(other),
        });
        match request {
            Ok(Request::Spawn(spawn)) => {
                let Ok(uid) = table.admit(&spawn, now) else { continue };
                assert!((1000..1002).contains(&uid) && spawn.program == "/usr/bin/vmm");
                assert!(spawn.files.iter().all(|given| given.path.starts_with('/')));
                assert!(spawn.files.iter().all(|given| !given.path.contains("/../")));
                assert!(table.iter().all(|(name, vmm)| vmm.uid != uid && *name != spawn.name));
                let bound = spawn.bound.then_some(now % 2);
                table.started(spawn.name, Vmm { pid: 2, uid, bound });
            }
            Ok(Request::End { name, .. }) => {
                if table.get(&name).is_ok() {
                    table.ended(&name);
                }
            }
            Ok(Request::Lease { until_ns }) => {
                let renewed = table.renew(until_ns, now);
                assert!(renewed.is_err() || table.expired(now).is_empty());
            }
            Ok(Request::List {}) => assert!(table.iter().count() <= 2),
            Err(error) => assert!(error.to_string().len() < 2048),
        }
    }
}

/// Index, manifest and config of an OCI image layout.
pub fn oci_documents(bytes: &[u8]) {
    towline_images::fuzzing::oci_document(bytes);
}

/// What a registry says besides documents: challenges, refusals, ranges; and references as typed.
pub fn registry_answers(bytes: &[u8]) {
    towline_images::fuzzing::registry_answer(bytes);
}

/// `manifest.json` of a `docker save` archive, and the laptop's docker configuration.
pub fn docker_documents(bytes: &[u8]) {
    towline_images::fuzzing::docker_manifest(bytes);
    let Ok(config) = towline_client::registry_login::Config::parse(bytes) else { return };
    for (registry, repository) in [("docker.io", "library/x"), ("quay.io", "team/x"), ("", "")] {
        drop(config.stored(registry, repository));
        let helper = config.helper(registry);
        assert!(helper.is_none_or(|program| !program.contains('/')), "a helper is no path");
    }
}

/// A layer's tar archive, normalised into a sink.
pub fn layer_archives(bytes: &[u8]) {
    towline_images::fuzzing::layer_archive(bytes);
}

/// What a guest tells of its files for `tow save`.
pub fn layer_streams(bytes: &[u8]) {
    towline_images::fuzzing::layer_stream(bytes);
}

/// A guest's FUSE requests to the local image, and the manifest that a restarted node agent reads.
pub fn fuse_requests(bytes: &[u8]) {
    towline_images::fuzzing::fuse_request(bytes);
    towline_images::fuzzing::local_manifest(bytes);
}

/// What a guest can ask of the network, and the file that its questions end up in.
pub fn egress(bytes: &[u8]) {
    towline_node_agent::egress::fuzz(bytes);
    towline_node_agent::feed::fuzz_file(bytes);
}

/// What a hostile guest can send as changed files.
pub fn sync_frames(bytes: &[u8]) {
    towline_filesync::wire::fuzz(bytes);
}

/// A forwarded connection's frames, from either end.
pub fn tcp_frames(bytes: &[u8]) {
    let mut state = Durable::default();
    if state.attach(0).is_err() {
        return;
    }
    state.on_read(Bytes::from_static(b"ours"));
    let mut buffer = BytesMut::from(bytes);
    while let Ok(Some(frame)) = frame::decode(&mut buffer) {
        if let Ok(v1::TcpConnected { received_offset }) = frame.decode() {
            drop(state.attach(received_offset));
        }
        drop(state.on_frame(&frame));
        assert!(state.held() <= TCP_FIRST_WINDOW + 4, "no more than was granted is held");
        while state.next_outgoing().is_some() {}
    }
}

/// An archive that a sandbox sends to `tow cp`: nothing beside its destination is touched.
pub fn copy_archives(bytes: &[u8]) {
    let Ok(outer) = tempfile::tempdir() else { return };
    let inner = outer.path().join("destination");
    let made = std::fs::create_dir(&inner).and_then(|()| {
        std::os::unix::fs::symlink(outer.path(), inner.join("out"))?;
        Root::open(&inner)
    });
    let Ok(root) = made else { return };
    let place = Place { root, only: None, directory_only: false };
    drop(unpack(bytes, &place, None));
    let beside = std::fs::read_dir(outer.path()).into_iter().flatten().count();
    assert_eq!(beside, 1, "nothing is made beside the destination");
    assert!(!inner.join(".tow-stage").exists(), "nothing half-made is left");
}

/// Packets that the workload sends to the outside, as the guest agent takes them from its device.
pub fn workload_packets(bytes: &[u8]) {
    towline_guest_agent::net::fuzzing::packets(bytes);
}

/// Messages to the sandbox's resolver.
pub fn dns_questions(bytes: &[u8]) {
    towline_guest_agent::net::fuzzing::question(bytes);
}
