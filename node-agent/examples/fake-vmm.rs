//! Plays a Cloud Hypervisor with a fault, for `tests/vmm_faults.rs`: the fault and the order that it
//! meets are in its own file name (`fake-vmm.500.vm.create`). It runs no VM. What it is told it
//! appends to `told` in its folder.
#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::exit, reason = "a program of tests")]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

fn main() {
    let arguments: Vec<_> = std::env::args().collect();
    let name = arguments[0].rsplit('/').next().unwrap();
    let (fault, meets) = name.strip_prefix("fake-vmm.").unwrap().split_once('.').unwrap();
    if arguments[1] == "--version" {
        println!("{}", if fault == "version" { meets } else { "cloud-hypervisor v53.0" });
        return;
    }
    if (fault, meets) == ("exit", "start") {
        std::process::exit(3);
    }
    let socket = arguments[2].strip_prefix("path=").unwrap();
    let listener = UnixListener::bind(socket).unwrap();
    for stream in listener.incoming() {
        serve(stream.unwrap(), fault, meets);
    }
}

fn serve(mut stream: UnixStream, fault: &str, meets: &str) {
    let order = read_order(&stream);
    let mut told = std::fs::File::options().create(true).append(true).open("told").unwrap();
    writeln!(told, "{order}").unwrap();
    let answer = match fault {
        _ if order != meets => "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}".to_owned(),
        "exit" => std::process::exit(3),
        "hang" => loop {
            std::thread::park();
        },
        "junk" => "\u{1}\u{2}\u{3}\r\n\r\n".to_owned(),
        "endless" => {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n");
            while stream.write_all(&[b'x'; 4096]).is_ok() {}
            return;
        }
        status => format!("HTTP/1.1 {status} \r\nContent-Length: 9\r\n\r\nno reason"),
    };
    // Whoever asked may have gone.
    let _ = stream.write_all(answer.as_bytes());
}

/// Reads a request whole; gives its order.
fn read_order(stream: &UnixStream) -> String {
    let mut lines = BufReader::new(stream);
    let mut line = String::new();
    lines.read_line(&mut line).unwrap();
    let order = line.split(' ').nth(1).unwrap_or_default().replace("/api/v1/", "");
    let mut body = 0;
    while lines.read_line(&mut line).unwrap() > 0 && !line.ends_with("\r\n\r\n") {
        let lower = line.to_ascii_lowercase();
        let length = lower.rsplit_once("content-length:").map(|(_, rest)| rest);
        let digits = length.and_then(|rest| rest.lines().next()).unwrap_or("0").trim();
        body = digits.parse().unwrap_or(0);
    }
    lines.take(body).read_to_end(&mut Vec::new()).unwrap();
    order
}
