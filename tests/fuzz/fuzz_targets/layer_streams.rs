//! libFuzzer's entry for the target of the same name in `towline-fuzz-targets`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| towline_fuzz_targets::layer_streams(bytes));
