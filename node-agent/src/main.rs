//! Placeholder until the first function lands.
fn main() {}
