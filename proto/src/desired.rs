//! What a desired state means, wherever it is read.

use crate::v1::Desired;

impl Desired {
    /// Whether a sandbox that is wanted so holds CPU and memory.
    pub fn is_up(self) -> bool {
        matches!(self, Self::Running | Self::Paused)
    }
}
