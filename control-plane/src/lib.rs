//! The control plane's driver: write-ahead log, peers, API, telemetry.
