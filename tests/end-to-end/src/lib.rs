//! Real binaries, real microVMs, real peers.
