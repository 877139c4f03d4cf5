//! Starts real embedded clusters in folders of their own, runs `tow` in them, and finds their
//! processes to kill. Leaves what is checked to the tests.
//!
//! Everything a cluster starts is ended when it is dropped, by process id, and only if it belongs
//! to that cluster's folders. Every wait has a bound and says what it waited for.

pub mod cluster;
pub mod debian;
pub mod http;
pub mod leftovers;
pub mod moments;
pub mod oci;
pub mod process;
pub mod registry;
pub mod run;
pub mod terminal;
pub mod wire;

pub use cluster::Cluster;
pub use run::{Finished, Running};

/// Prints why a test does nothing; `make test` counts these lines.
#[macro_export]
macro_rules! skipped {
    ($($why:tt)*) => {{
        #[allow(clippy::print_stdout)]
        { println!("SKIPPED: {}", format_args!($($why)*)); }
        return;
    }};
}
