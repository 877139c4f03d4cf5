//! tow: runs the command that was typed and chooses the exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    towline_client::main(std::env::args_os())
}
