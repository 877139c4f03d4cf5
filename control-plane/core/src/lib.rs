//! The control plane's decisions, sans-IO: raft, replicated state, placement, reconcile.
