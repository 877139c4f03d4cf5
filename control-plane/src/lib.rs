//! The control plane's driver: write-ahead log, API, telemetry around `towline-control-core`.
//!
//! `start` opens the data directory and serves; `main` is only arguments and signals. Left out:
//! every decision (the core) and how bytes are carried (`towline-link`).

mod api;
pub mod config;
pub mod disk;
pub mod driver;
pub mod keys;
pub mod log_store;
mod serve;

pub use config::Config;
pub use serve::{Running, start};
