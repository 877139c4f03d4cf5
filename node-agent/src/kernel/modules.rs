//! Which kernel modules a guest needs and in what order they load, from each module's own `depends`:
//! an unpacked package has no modules.dep, and nobody runs depmod here.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// What the guest agent needs, besides what these depend on. Built-in ones are passed over.
const WANTED: [&str; 12] = [
    "virtio_mmio",
    "virtio_console",
    "virtio_pci",
    "vmw_vsock_virtio_transport",
    "virtio_rng",
    "virtio_blk",
    "squashfs",
    "ext4",
    "overlay",
    "fuse",
    "tun",
    "tcp_diag",
];
/// Longest chain of dependencies; more is a loop.
const DEPTH_MAX: usize = 16;

/// Copies the wanted modules, and what they depend on, from a kernel's module tree to a flat
/// directory; returns the file names in the order of loading.
pub(super) fn select(tree: &Path, into: &Path) -> Result<Vec<String>, String> {
    let mut files = BTreeMap::new();
    find(tree, 0, &mut files);
    let builtin = fs::read_to_string(tree.join("modules.builtin")).unwrap_or_default();
    let builtin: Vec<String> = builtin.lines().map(|line| module_name(Path::new(line))).collect();
    let mut order = Vec::new();
    for wanted in WANTED {
        add(wanted, &files, &builtin, 0, &mut order)?;
    }
    let mut names = Vec::new();
    for path in &order {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        fs::copy(path, into.join(&name)).map_err(|error| format!("copying {name}: {error}"))?;
        names.push(name);
    }
    Ok(names)
}

fn add(
    name: &str,
    files: &BTreeMap<String, PathBuf>,
    builtin: &[String],
    depth: usize,
    order: &mut Vec<PathBuf>,
) -> Result<(), String> {
    if builtin.iter().any(|known| known == name) {
        return Ok(());
    }
    let path = files.get(name).ok_or_else(|| format!("it has no module `{name}`"))?;
    if order.contains(path) {
        return Ok(());
    }
    if depth > DEPTH_MAX {
        return Err(format!("its module `{name}` depends on itself"));
    }
    let bytes = fs::read(path).map_err(|error| format!("reading module `{name}`: {error}"))?;
    let info = modinfo(&bytes).ok_or_else(|| format!("module `{name}` has no .modinfo"))?;
    for needed in depends(info) {
        add(&needed, files, builtin, depth + 1, order)?;
    }
    order.push(path.clone());
    Ok(())
}

fn find(dir: &Path, depth: usize, files: &mut BTreeMap<String, PathBuf>) {
    if depth > DEPTH_MAX {
        return;
    }
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            find(&path, depth + 1, files);
        } else if path.extension().is_some_and(|ext| ext == "ko") {
            files.insert(module_name(&path), path);
        }
    }
}

/// A module's name is its file's, with underscores.
fn module_name(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().replace('-', "_")
}

fn depends(info: &[u8]) -> Vec<String> {
    let line = info.split(|&byte| byte == 0).find_map(|line| line.strip_prefix(b"depends="));
    let names = String::from_utf8_lossy(line.unwrap_or_default()).replace('-', "_");
    names.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

/// The `.modinfo` section of a 64-bit little-endian ELF file.
fn modinfo(elf: &[u8]) -> Option<&[u8]> {
    if !elf.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let table = read(elf, 0x28, 8)?;
    let size = read(elf, 0x3a, 2)?;
    let count = read(elf, 0x3c, 2)?;
    let names = read(elf, 0x3e, 2)?;
    let section = |number: usize| table.checked_add(number.checked_mul(size)?);
    let content = |at: usize| {
        let start = read(elf, at.checked_add(0x18)?, 8)?;
        elf.get(start..start.checked_add(read(elf, at.checked_add(0x20)?, 8)?)?)
    };
    let names = content(section(names)?)?;
    for number in 0..count {
        let at = section(number)?;
        let name = names.get(read(elf, at, 4)?..)?;
        if name.starts_with(b".modinfo\0") {
            return content(at);
        }
    }
    None
}

fn read(bytes: &[u8], at: usize, len: usize) -> Option<usize> {
    let field = bytes.get(at..at.checked_add(len)?)?;
    let number = field.iter().rev().fold(0u64, |number, &byte| number << 8 | u64::from(byte));
    usize::try_from(number).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF file with nothing but a .modinfo section.
    fn module(info: &[u8]) -> Vec<u8> {
        let names = b"\0.modinfo\0.shstrtab\0";
        let mut elf = b"\x7fELF\x02\x01".to_vec();
        elf.resize(64, 0);
        let (info_at, names_at) = (64, 64 + info.len());
        let table = names_at + names.len();
        elf[0x28..0x30].copy_from_slice(&(table as u64).to_le_bytes());
        elf[0x3a..0x3c].copy_from_slice(&64u16.to_le_bytes());
        elf[0x3c..0x3e].copy_from_slice(&3u16.to_le_bytes());
        elf[0x3e..0x40].copy_from_slice(&2u16.to_le_bytes());
        elf.extend_from_slice(info);
        elf.extend_from_slice(names);
        elf.resize(table + 3 * 64, 0);
        for (number, name, at, len) in
            [(1, 1u32, info_at, info.len()), (2, 10, names_at, names.len())]
        {
            let header = &mut elf[table + number * 64..][..64];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[0x18..0x20].copy_from_slice(&(at as u64).to_le_bytes());
            header[0x20..0x28].copy_from_slice(&(len as u64).to_le_bytes());
        }
        elf
    }

    #[test]
    fn modules_come_after_what_they_depend_on_and_once() {
        let tree = tempfile::tempdir().unwrap();
        let into = tempfile::tempdir().unwrap();
        let write = |name: &str, depends: &str| {
            let info = format!("license=GPL\0depends={depends}\0name={name}\0");
            fs::write(tree.path().join(format!("{name}.ko")), module(info.as_bytes())).unwrap();
        };
        write("virtio", "");
        write("virtio_ring", "");
        write("virtio_mmio", "virtio_ring,virtio");
        write("virtio_console", "virtio,virtio_ring");
        write("virtio_pci", "virtio_pci_modern_dev,virtio,virtio_ring");
        write("virtio_pci_modern_dev", "");
        write("vsock", "");
        write("vmw_vsock_virtio_transport", "virtio,vsock");
        write("virtio-rng", "virtio");
        write("virtio_blk", "virtio,virtio_ring");
        write("squashfs", "");
        write("overlay", "");
        write("fuse", "");
        write("tun", "");
        write("inet_diag", "");
        write("tcp_diag", "inet_diag");
        fs::write(tree.path().join("modules.builtin"), "kernel/fs/ext4/ext4.ko\n").unwrap();
        let order = select(tree.path(), into.path()).unwrap();
        assert_eq!(
            order.join(" "),
            "virtio_ring.ko virtio.ko virtio_mmio.ko virtio_console.ko virtio_pci_modern_dev.ko \
             virtio_pci.ko vsock.ko vmw_vsock_virtio_transport.ko virtio-rng.ko virtio_blk.ko \
             squashfs.ko overlay.ko fuse.ko tun.ko inet_diag.ko tcp_diag.ko"
        );
        fs::remove_file(tree.path().join("fuse.ko")).unwrap();
        assert_eq!(select(tree.path(), into.path()).unwrap_err(), "it has no module `fuse`");
    }

    #[test]
    fn a_damaged_module_is_an_error_not_a_panic() {
        let good = module(b"depends=virtio\0");
        assert_eq!(depends(modinfo(&good).unwrap()), ["virtio"]);
        for len in 0..good.len() {
            let _ = modinfo(&good[..len]);
        }
        let mut wild = good;
        for at in 0x28..0x40 {
            wild[at] = 0xff;
            assert!(modinfo(&wild).is_none());
        }
    }
}
