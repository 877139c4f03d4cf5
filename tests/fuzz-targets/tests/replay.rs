//! Every kept input of every fuzz target, and each of them cut and changed a little.

use std::path::Path;

fn replay(name: &str, target: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
    let mut inputs = 0;
    for entry in std::fs::read_dir(&folder).expect("the corpus") {
        let input = std::fs::read(entry.expect("an entry").path()).expect("an input");
        inputs += 1;
        target(&input);
        for cut in [input.len() / 2, input.len().saturating_sub(1)] {
            target(&input[..cut]);
        }
        for at in (0..input.len()).step_by((input.len() / 32).max(1)) {
            let mut changed = input.clone();
            changed[at] ^= 0xff;
            target(&changed);
        }
    }
    assert!(inputs > 0, "{} holds inputs", folder.display());
}

macro_rules! replays {
    ($($target:ident)*) => {
        $(#[test]
        fn $target() {
            replay(stringify!($target), towline_fuzz_targets::$target);
        })*
    };
}

replays! {
    frames guest_messages oci_documents registry_answers docker_documents layer_archives layer_streams
    fuse_requests sync_frames tcp_frames copy_archives egress workload_packets dns_questions
    helper_requests
}
