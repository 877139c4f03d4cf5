use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;

use rustix::fs::{Mode, OFlags, ResolveFlags};

use super::*;

fn base(path: &Path) -> Base {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY;
    let directory = rustix::fs::open(path, flags, Mode::empty()).unwrap();
    Base { directory, resolve: ResolveFlags::empty() }
}

/// Copies as `tow cp` would, from and to these directories.
fn copy(from: &Path, source: &str, to: &Path, place: &str) -> Result<Totals, String> {
    let name = source_name(source.as_bytes());
    let source = base(from).source(source.as_bytes()).map_err(|e| e.to_string())?;
    let mut archive = Vec::new();
    pack(&source, &mut archive).map_err(|e| e.to_string())?;
    let place = base(to).place(place.as_bytes(), name, true).map_err(|e| e.to_string())?;
    unpack(&archive[..], &place, None).map_err(|e| e.to_string())
}

fn two() -> (tempfile::TempDir, tempfile::TempDir) {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fs::create_dir_all(from.path().join("d/e")).unwrap();
    fs::write(from.path().join("d/e/f"), "deep").unwrap();
    fs::write(from.path().join("file"), "text").unwrap();
    symlink("e/f", from.path().join("d/link")).unwrap();
    (from, to)
}

#[test]
fn the_four_cases_of_docker_cp() {
    let (from, to) = two();
    let (from, to) = (from.path(), to.path());
    // A file to a name that is not there, to one that is, into a directory.
    copy(from, "file", to, "new").unwrap();
    assert_eq!(fs::read(to.join("new")).unwrap(), b"text");
    fs::write(to.join("new"), "old and longer").unwrap();
    copy(from, "file", to, "new").unwrap();
    assert_eq!(fs::read(to.join("new")).unwrap(), b"text");
    copy(from, "file", to, ".").unwrap();
    assert_eq!(fs::read(to.join("file")).unwrap(), b"text");
    assert!(copy(from, "file", to, "absent/").unwrap_err().contains("no directory"));
    assert!(copy(from, "file", to, "absent/deeper").is_err());
    // A directory to a name that is not there: that is its name. Into one that is: beneath it.
    copy(from, "d", to, "copy").unwrap();
    assert_eq!(fs::read(to.join("copy/e/f")).unwrap(), b"deep");
    copy(from, "d", to, "copy").unwrap();
    assert_eq!(fs::read(to.join("copy/d/e/f")).unwrap(), b"deep");
    assert_eq!(fs::read_link(to.join("copy/link")).unwrap(), Path::new("e/f"));
    // Its content.
    copy(from, "d/.", to, "content").unwrap();
    assert_eq!(fs::read(to.join("content/e/f")).unwrap(), b"deep");
    copy(from, "d/.", to, "content").unwrap();
    assert!(!to.join("content/d").exists());
    assert!(copy(from, "d", to, "new").is_err(), "a directory does not replace a file");
    assert!(copy(from, "gone", to, "x").is_err());
    assert!(!to.join(".tow-stage").exists());
}

#[test]
fn modes_times_links_and_long_names_are_kept() {
    let (from, to) = two();
    let (from, to) = (from.path(), to.path());
    let long = "n".repeat(200);
    let deep = format!("d/{long}/{long}");
    fs::create_dir(from.join(format!("d/{long}"))).unwrap();
    fs::write(from.join(&deep), vec![7; 3 << 20]).unwrap();
    symlink("t".repeat(300), from.join("d/far")).unwrap();
    fs::set_permissions(from.join("d/e/f"), fs::Permissions::from_mode(0o640)).unwrap();
    fs::set_permissions(from.join("d/e"), fs::Permissions::from_mode(0o550)).unwrap();
    let old = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000);
    fs::File::open(from.join("d/e/f")).unwrap().set_modified(old).unwrap();
    fs::File::open(from.join("d/e")).unwrap().set_modified(old).unwrap();
    let totals = copy(from, "d", to, "d").unwrap();
    assert_eq!((totals.files, totals.bytes), (7, (3 << 20) + 4));
    assert_eq!(fs::read(to.join(&deep)).unwrap(), vec![7; 3 << 20]);
    assert_eq!(fs::read_link(to.join("d/far")).unwrap().as_os_str().len(), 300);
    let file = fs::metadata(to.join("d/e/f")).unwrap();
    assert_eq!((file.mode() & 0o777, file.mtime()), (0o640, 1_000_000));
    let directory = fs::metadata(to.join("d/e")).unwrap();
    assert_eq!((directory.mode() & 0o777, directory.mtime()), (0o550, 1_000_000));
    for dir in [from, to] {
        fs::set_permissions(dir.join("d/e"), fs::Permissions::from_mode(0o750)).unwrap();
    }
}

#[test]
fn special_files_are_left_out_and_counted() {
    let (from, to) = two();
    let pipe = from.path().join("d/pipe");
    let kind = rustix::fs::FileType::Fifo;
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, kind, Mode::from_raw_mode(0o644), 0).unwrap();
    let source = base(from.path()).source(b"d").unwrap();
    assert_eq!(pack(&source, io::sink()).unwrap().skipped, 1);
    drop(to);
}

/// An archive with one entry of this kind.
fn hostile(kind: tar::EntryType, name: &[u8], link: &[u8], body: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.as_old_mut().name[..name.len()].copy_from_slice(name);
    header.as_old_mut().linkname[..link.len()].copy_from_slice(link);
    header.set_entry_type(kind);
    header.set_mode(0o4777);
    header.set_mtime(1);
    header.set_size(body.len() as u64);
    header.set_cksum();
    let mut archive = header.as_bytes().to_vec();
    archive.extend_from_slice(body);
    archive.resize(archive.len().next_multiple_of(512) + 1024, 0);
    archive
}

#[test]
fn what_could_lead_out_or_was_not_asked_for_is_refused_by_name() {
    use tar::EntryType as T;
    let (outside, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    symlink(outside.path(), to.path().join("out")).unwrap();
    let cases: [(T, &[u8], &[u8], &str); 10] = [
        (T::Regular, b"/etc/x", b"", "absolute"),
        (T::Regular, b"../x", b"", "`../x`"),
        (T::Regular, b"a/../../x", b"", "cannot be made"),
        (T::Regular, b"out/x", b"", "`out/x`"),
        (T::Directory, b"out/d/", b"", "`out/d/`"),
        (T::Link, b"hard", b"/etc/passwd", "hard link"),
        (T::Char, b"null", b"", "device"),
        (T::Block, b"sda", b"", "device"),
        (T::Fifo, b"pipe", b"", "pipe"),
        (T::Symlink, b"empty", b"", "nothing that could be"),
    ];
    let place = base(to.path()).place(b".", None, true).unwrap();
    for (kind, name, link, wanted) in cases {
        let error = unpack(&hostile(kind, name, link, b"")[..], &place, None).unwrap_err();
        assert!(error.to_string().contains(wanted), "{error}");
    }
    // A link out may be made: it is data. Nothing goes through it.
    unpack(&hostile(T::Symlink, b"link", b"/etc", b"")[..], &place, None).unwrap();
    assert!(unpack(&hostile(T::Regular, b"link/x", b"", b"")[..], &place, None).is_err());
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);

    let place = base(to.path()).place(b".", Some(b"wanted"), true).unwrap();
    let error = unpack(&hostile(T::Regular, b".bashrc", b"", b"x")[..], &place, None).unwrap_err();
    assert!(error.to_string().contains("not asked for"), "{error}");
    unpack(&hostile(T::Regular, b"wanted", b"", b"x")[..], &place, None).unwrap();
    let mode = fs::metadata(to.path().join("wanted")).unwrap().mode();
    assert_eq!(mode & 0o7777, 0o777, "no set-user-id");
    assert!(!to.path().join(".tow-stage").exists());
}

#[test]
fn a_cut_archive_leaves_no_half_file_and_a_long_record_is_not_read() {
    let to = tempfile::tempdir().unwrap();
    let place = base(to.path()).place(b".", None, true).unwrap();
    let whole = hostile(tar::EntryType::Regular, b"f", b"", &[1; 4000]);
    assert!(unpack(&whole[..2000], &place, None).is_err());
    assert_eq!(fs::read_dir(to.path()).unwrap().count(), 0);
    let long = hostile(tar::EntryType::GNULongName, b"x", b"", &vec![b'a'; 100_000]);
    let error = unpack(&long[..], &place, None).unwrap_err();
    assert!(error.to_string().contains("extension record"), "{error}");
}
