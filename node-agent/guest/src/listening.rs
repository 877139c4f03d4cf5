//! Which TCP ports are listened on in the sandbox, and by whom: the kernel's own tables, and the
//! descriptors of each process. Reads only; bounded by what a list is good for.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read as _};
use std::net::IpAddr;
use std::path::Path;

use towline_proto::v1::{ListeningPort, PortList};

/// Listeners that a list tells of.
const PORTS_MAX: usize = 1024;
/// Bytes read of a table: some thousand sockets.
const TABLE_MAX: u64 = 4 << 20;
/// Processes and descriptors that are looked at.
const PROCESSES_MAX: usize = 8192;
const DESCRIPTORS_MAX: usize = 65_536;
/// The state of a listening socket in the tables.
const LISTEN: &str = "0A";

/// Lists them, by port. `proc` is where procfs is.
pub fn list(proc: &Path) -> PortList {
    let mut found = BTreeMap::new();
    for (table, len) in [("net/tcp", 4), ("net/tcp6", 16)] {
        // A kernel without IPv6 has no second table.
        if let Ok(text) = read_bounded(&proc.join(table)) {
            for (address, port, inode) in text.lines().skip(1).filter_map(|l| listener(l, len)) {
                if found.len() < PORTS_MAX {
                    found.insert((port, address), inode);
                }
            }
        }
    }
    let owners = if found.is_empty() { BTreeMap::new() } else { owners(proc) };
    let port = |((port, address), inode): ((u16, Vec<u8>), u64)| {
        let (pid, process) = owners.get(&inode).cloned().unwrap_or_default();
        let pid = if pid == 0 { 0 } else { pid_inside(&proc.join(pid.to_string()), pid) };
        ListeningPort { port: port.into(), address, pid, process }
    };
    PortList { ports: found.into_iter().map(port).collect() }
}

fn read_bounded(path: &Path) -> io::Result<String> {
    let mut text = Vec::new();
    fs::File::open(path)?.take(TABLE_MAX).read_to_end(&mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// A line of a table: `sl local_address rem_address st … inode`.
fn listener(line: &str, len: usize) -> Option<(Vec<u8>, u16, u64)> {
    let mut fields = line.split_ascii_whitespace();
    let local = fields.nth(1)?;
    (fields.nth(1)? == LISTEN).then_some(())?;
    let inode = fields.nth(5)?.parse().ok()?;
    let (address, port) = local.split_once(':')?;
    Some((address_bytes(address, len)?, u16::from_str_radix(port, 16).ok()?, inode))
}

/// Words of 32 bits in the machine's order, in hexadecimal.
fn address_bytes(text: &str, len: usize) -> Option<Vec<u8>> {
    if text.len() != 2 * len || !text.is_ascii() {
        return None;
    }
    let words = (0..len / 4).map(|word| u32::from_str_radix(&text[word * 8..word * 8 + 8], 16));
    let bytes: Vec<[u8; 4]> =
        words.map(|word| word.map(u32::to_ne_bytes)).collect::<Result<_, _>>().ok()?;
    let bytes = bytes.concat();
    // What listens for both families is shown as the kernel shows it; mapped addresses as IPv4.
    match <[u8; 16]>::try_from(&bytes[..]).map(IpAddr::from).map(|ip| ip.to_canonical()) {
        Ok(IpAddr::V4(ip)) => Some(ip.octets().to_vec()),
        Ok(IpAddr::V6(_)) | Err(_) => Some(bytes),
    }
}

/// Which process has which socket, by inode.
fn owners(proc: &Path) -> BTreeMap<u64, (u32, String)> {
    let mut owners = BTreeMap::new();
    let mut descriptors = 0;
    let processes = fs::read_dir(proc).into_iter().flatten().flatten();
    for process in processes.take(PROCESSES_MAX) {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let mut name = None;
        for fd in fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten() {
            descriptors += 1;
            if descriptors > DESCRIPTORS_MAX {
                return owners;
            }
            let Some(inode) = socket_inode(&fd.path()) else { continue };
            let name = name.get_or_insert_with(|| comm(&process.path()));
            // The first process by number: whoever opened it, rather than its children.
            let owner = owners.entry(inode).or_insert_with(|| (pid, name.clone()));
            if pid < owner.0 {
                *owner = (pid, name.clone());
            }
        }
    }
    owners
}

fn socket_inode(fd: &Path) -> Option<u64> {
    let target = fs::read_link(fd).ok()?;
    target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

/// The number that the workload sees: that of the innermost pid namespace.
fn pid_inside(process: &Path, pid: u32) -> u32 {
    let status = fs::read_to_string(process.join("status")).unwrap_or_default();
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    numbers.and_then(|n| n.split_ascii_whitespace().next_back()?.parse().ok()).unwrap_or(pid)
}

fn comm(process: &Path) -> String {
    fs::read_to_string(process.join("comm")).unwrap_or_default().trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv6Addr, TcpListener};

    #[test]
    fn a_listener_of_ours_is_found_with_its_process() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let list = list(Path::new("/proc"));
        let found = list.ports.iter().find(|found| found.port == u32::from(port)).unwrap();
        assert_eq!(found.address, [127, 0, 0, 1]);
        assert_eq!(found.pid, std::process::id());
        assert!(!found.process.is_empty());
        drop(listener);
        let gone = super::list(Path::new("/proc"));
        assert!(!gone.ports.iter().any(|found| found.port == u32::from(port)));
    }

    #[test]
    fn lines_of_the_tables_are_read_and_others_are_skipped() {
        let v4 = "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 4242 1 0 100 0 0 10 0";
        let bytes = if cfg!(target_endian = "little") { [127, 0, 0, 1] } else { [1, 0, 0, 127] };
        assert_eq!(listener(v4, 4), Some((bytes.to_vec(), 8080, 4242)));
        assert_eq!(listener(&v4.replace(" 0A ", " 01 "), 4), None);
        let any =
            format!("0: {}:0050 {}:0000 0A 0:0 0:0 0 0 0 7 1", "0".repeat(32), "0".repeat(32));
        assert_eq!(listener(&any, 16), Some((Ipv6Addr::UNSPECIFIED.octets().to_vec(), 80, 7)));
        for bad in ["", "0: zz:50 x 0A", "0: 0100007F:99999 0:0 0A 0:0 0:0 0 0 0 7 1"] {
            assert_eq!(listener(bad, 4), None, "{bad}");
        }
    }
}
