//! Builds the local image of this machine twice and says what it cost: `cargo run --example
//! local_image -p towline-images`.
#![expect(clippy::print_stdout, reason = "its output is what it is for")]

use std::time::Instant;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let cache = tempfile::tempdir()?;
    let home = std::env::var_os("HOME").ok_or("HOME is not set")?;
    for round in 0..2 {
        let start = Instant::now();
        let built =
            towline_images::local::build(cache.path(), "/".as_ref(), home.as_ref(), &mut |_| {})?;
        println!(
            "{:?}: {} {:?}, manifest of {} bytes",
            start.elapsed(),
            built.id,
            built.summary,
            std::fs::metadata(&built.path)?.len()
        );
        if round == 1 {
            println!("kept out: {:#?}", built.denied);
        }
    }
    Ok(())
}
