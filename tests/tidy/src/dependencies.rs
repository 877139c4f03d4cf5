//! The dependency table of ARCHITECTURE.md as data: which of our crates may know which.

/// Each crate, its folder, and what it may depend on (ours only, dev-dependencies aside).
/// `*` means any.
pub const TABLE: &[(&str, &str, &[&str])] = &[
    ("towline-proto", "proto", &[]),
    ("towline-filesync", "proto/filesync", &["towline-proto"]),
    ("towline-streams", "proto/streams", &["towline-proto"]),
    ("towline-link", "proto/link", &["towline-proto", "towline-streams"]),
    ("towline-control-core", "control-plane/core", &["towline-proto"]),
    (
        "towline-control-plane",
        "control-plane",
        &["towline-control-core", "towline-link", "towline-proto"],
    ),
    ("towline-node-core", "node-agent/core", &["towline-proto"]),
    (
        "towline-guest-agent",
        "node-agent/guest",
        &["towline-proto", "towline-filesync", "towline-streams"],
    ),
    ("towline-images", "node-agent/images", &["towline-proto"]),
    ("towline-node-helper", "node-agent/helper", &[]),
    (
        "towline-node-agent",
        "node-agent",
        &[
            "towline-node-core",
            "towline-node-helper",
            "towline-images",
            "towline-link",
            "towline-streams",
            "towline-proto",
        ],
    ),
    (
        "towline-client",
        "client",
        &["towline-link", "towline-streams", "towline-filesync", "towline-proto"],
    ),
    (
        "towline-simulator",
        "tests/simulator",
        &["towline-control-core", "towline-node-core", "towline-filesync", "towline-proto"],
    ),
    ("towline-end-to-end", "tests/end-to-end", &["*"]),
    ("towline-fuzz-targets", "tests/fuzz-targets", &["*"]),
    ("towline-tidy", "tests/tidy", &[]),
    ("towline-benches", "benches", &["*"]),
];

/// Crates that decide, and what they must not know, however indirectly.
pub const SANS_IO: &[&str] = &["towline-control-core", "towline-node-core", "towline-filesync"];
/// Runtimes and transports.
pub const FORBIDDEN_IN_SANS_IO: &[&str] = &["tokio", "mio", "quinn", "rustls", "tonic", "hyper"];
