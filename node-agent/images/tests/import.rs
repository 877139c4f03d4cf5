//! Whole imports: from an archive to a disk, read back with unsquashfs.
#![expect(clippy::unwrap_used, clippy::print_stderr, reason = "a test that fails, fails here")]

use std::path::Path;
use std::process::Command;

use towline_images::fixture::{Compression, Layer, Layout, archive_of};
use towline_images::{ImageError, Prepared, Store, import, import_layout, prepare};

/// `cap_net_raw+ep` as the kernel stores it.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

fn has_tools() -> bool {
    let there = |tool: &str| Command::new(tool).arg("-version").output().is_ok();
    let has = there("mksquashfs") && there("unsquashfs");
    if !has {
        eprintln!("SKIPPED: mksquashfs and unsquashfs (squashfs-tools) are not installed");
    }
    has
}

fn imported(layout: &Layout) -> (tempfile::TempDir, Store, Prepared) {
    let cache = tempfile::tempdir().unwrap();
    let store = Store::open(cache.path()).unwrap();
    let image = import(&store, &layout.archive()[..], &mut |_| {}).unwrap();
    assert_eq!(image.digest, layout.files().1);
    let prepared = prepare(&store, &image.digest, &mut |_| {}).unwrap();
    (cache, store, prepared)
}

/// `unsquashfs -lln` without times and the root: mode, owner, size or device, path.
fn listing(disk: &Path) -> Vec<String> {
    let out = Command::new("unsquashfs").args(["-lln", "-d", ""]).arg(disk).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    text.lines()
        .filter(|line| line.contains(" /"))
        .map(|line| {
            let mut words: Vec<_> = line.split_whitespace().collect();
            let path = words.iter().position(|word| word.starts_with('/')).unwrap();
            words.drain(path - 2..path);
            words.join(" ")
        })
        .collect()
}

/// What `unsquashfs -s` says of a disk.
fn summary(disk: &Path, what: &str) -> String {
    let out = Command::new("unsquashfs").arg("-s").arg(disk).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let line = text.lines().find_map(|line| line.strip_prefix(what));
    line.unwrap_or_else(|| panic!("{text}")).trim().to_owned()
}

fn content(disk: &Path, path: &str) -> Vec<u8> {
    let out = Command::new("unsquashfs").arg("-cat").arg(disk).arg(path).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    out.stdout
}

#[test]
fn a_root_file_system_arrives_whole() {
    if !has_tools() {
        return;
    }
    let big: Vec<u8> = (0..400_000u32).flat_map(|n| n.to_le_bytes()).collect();
    let long = format!("usr/{}/{}", "d".repeat(200), "f".repeat(200));
    let base = Layer::new()
        .folder("bin", 0o755)
        .file("bin/busybox", 0o4755, &big)
        .hard_link("bin/sh", "bin/busybox")
        .symlink("sbin", "bin")
        .folder("tmp", 0o1777)
        .device("dev/null", 1, 3)
        .fifo("run/pipe")
        .file_with_xattr("bin/ping", b"ping", b"security.capability", &CAPABILITY)
        .file(&long, 0o600, b"long")
        .file(b"odd\xff \n name", 0o644, b"odd")
        .finish();
    for compression in [Compression::Plain, Compression::Gzip, Compression::Zstd] {
        let mut layout = Layout::new(vec![base.clone()]);
        layout.compression = compression;
        layout.config = r#"{"Env":["PATH=/bin","bad","X=a=b"],"User":"app:7","WorkingDir":"/srv",
            "Entrypoint":["/bin/sh","-c"],"Cmd":["true"]}"#
            .into();
        let (_cache, _store, image) = imported(&layout);
        assert_eq!(image.layers.len(), 1);
        let disk = &image.layers[0];
        let lines = listing(disk);
        let has = |line: &str| assert!(lines.iter().any(|l| l == line), "{line}\n{lines:#?}");
        has("-rwsr-xr-x 0/0 1600000 /bin/busybox");
        has("-rwsr-xr-x 0/0 1600000 /bin/sh");
        has("lrwxrwxrwx 0/0 3 /sbin -> bin");
        has("drwxrwxrwt 0/0 3 /tmp");
        has("crw-rw-rw- 0/0 1, 3 /dev/null");
        has("prw-r--r-- 0/0 0 /run/pipe");
        has(&format!("-rw------- 0/0 4 /{long}"));
        assert_eq!(content(disk, "bin/busybox"), big);
        assert_eq!(content(disk, &long), b"long");
        assert_eq!(summary(disk, "Number of xattr ids"), "1", "file capabilities are kept");
        assert_eq!(image.config.env, [b"PATH=/bin".to_vec(), b"X=a=b".to_vec()]);
        assert_eq!(image.config.user, "app:7");
        assert_eq!(image.config.workdir, b"/srv");
        assert_eq!(image.config.entrypoint, [b"/bin/sh".to_vec(), b"-c".to_vec()]);
        assert_eq!(image.config.cmd, [b"true".to_vec()]);
    }
}

#[test]
fn higher_layers_hide_lower_names_without_extended_attributes() {
    if !has_tools() {
        return;
    }
    let base = Layer::new()
        .folder("etc", 0o711)
        .file("etc/a", 0o644, b"a")
        .file("etc/b", 0o644, b"b")
        .file("old/x", 0o644, b"x")
        .file("old/y", 0o644, b"y");
    let change = Layer::new()
        .file("etc/.wh.a", 0o644, b"")
        .file("etc/c", 0o644, b"c")
        .folder("old", 0o755)
        .file("old/.wh..wh..opq", 0o644, b"")
        .file("old/z", 0o644, b"z");
    let nothing = Layer::new();
    let layout = Layout::new(vec![base.finish(), nothing.finish(), change.finish()]);
    let (_cache, _store, image) = imported(&layout);
    assert_eq!(image.layers.len(), 2, "a layer without a change needs no disk");
    let lines = listing(&image.layers[1]);
    let expected = [
        "drwx--x--x 0/0 36 /etc",
        "c--------- 0/0 0, 0 /etc/a",
        "-rw-r--r-- 0/0 1 /etc/c",
        "drwxr-xr-x 0/0 45 /old",
        "c--------- 0/0 0, 0 /old/x",
        "c--------- 0/0 0, 0 /old/y",
        "-rw-r--r-- 0/0 1 /old/z",
    ];
    let plain = |line: &str| {
        // A folder's own size depends on its names only; not what is tested.
        let words: Vec<_> = line.split(' ').collect();
        if line.starts_with('d') { [words[0], words[1], words[3]].join(" ") } else { line.into() }
    };
    let lines: Vec<String> = lines.iter().map(|line| plain(line)).collect();
    assert_eq!(lines, expected.map(plain));
}

#[test]
fn the_same_layers_give_the_same_disks_and_are_made_once() {
    if !has_tools() {
        return;
    }
    let base = Layer::new().file("a", 0o644, &[7; 300_000]).file("b", 0o644, b"b").finish();
    let more = Layer::new().file("c", 0o644, b"c").finish();
    let first = Layout::new(vec![base.clone()]);
    let second = Layout::new(vec![base, more]);
    let (_cache, store, alone) = imported(&first);
    let digest = import(&store, &second.archive()[..], &mut |_| {}).unwrap().digest;
    let both = prepare(&store, &digest, &mut |_| {}).unwrap();
    assert_eq!(both.layers[0], alone.layers[0]);
    let kept: Vec<_> = store.list().unwrap().into_iter().map(|image| image.digest).collect();
    assert!(kept.contains(&digest) && kept.contains(&alone.digest) && kept.len() == 2);

    // At another time: a second is what squashfs tells apart.
    std::thread::sleep(std::time::Duration::from_millis(1100));
    let (_other_cache, _other, again) = imported(&second);
    for (one, other) in both.layers.iter().zip(&again.layers) {
        assert!(std::fs::read(one).unwrap() == std::fs::read(other).unwrap(), "same bytes");
    }
}

#[test]
fn many_layers_become_sixteen_disks() {
    if !has_tools() {
        return;
    }
    let layers = (0..40)
        .map(|n| {
            let layer = Layer::new().file(format!("f{n}"), 0o644, n.to_string().as_bytes());
            // Each later layer removes a file of two before.
            let layer = if n >= 2 { layer.file(format!(".wh.f{}", n - 2), 0, b"") } else { layer };
            layer.finish()
        })
        .collect();
    let (_cache, _store, image) = imported(&Layout::new(layers));
    assert_eq!(image.layers.len(), 16);
    let top = listing(&image.layers[15]);
    assert_eq!(
        top,
        [
            "c--------- 0/0 0, 0 /f13",
            "c--------- 0/0 0, 0 /f14",
            "-rw-r--r-- 0/0 2 /f38",
            "-rw-r--r-- 0/0 2 /f39"
        ]
    );
}

#[test]
fn imports_at_the_same_time_and_from_a_folder_agree() {
    if !has_tools() {
        return;
    }
    let layer = Layer::new().file("a", 0o644, &[1; 100_000]).finish();
    let layout = Layout::new(vec![layer]);
    let cache = tempfile::tempdir().unwrap();
    let folder = tempfile::tempdir().unwrap();
    for (path, bytes) in layout.files().0 {
        let path = folder.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
    std::thread::scope(|scope| {
        for n in 0..4 {
            let (layout, cache, folder) = (&layout, cache.path(), folder.path());
            scope.spawn(move || {
                let store = Store::open(cache).unwrap();
                let image = match n % 2 {
                    0 => import(&store, &layout.archive()[..], &mut |_| {}),
                    _ => import_layout(&store, folder, &mut |_| {}),
                };
                assert_eq!(image.unwrap().digest, layout.files().1);
            });
        }
    });
    let root = cache.path().join("images");
    let files = |name: &str| std::fs::read_dir(root.join(name)).unwrap().count();
    assert_eq!((files("tmp"), files("locks")), (0, 0), "nothing is left over");
    assert_eq!(files("layers"), 2, "a disk and its listing");
}

/// What an import of a layout with one such layer says, and that it leaves nothing behind.
fn refused(layout: &Layout) -> ImageError {
    refused_archive(&layout.archive())
}

fn refused_archive(archive: &[u8]) -> ImageError {
    let cache = tempfile::tempdir().unwrap();
    let store = Store::open(cache.path()).unwrap();
    let error = import(&store, archive, &mut |_| {}).unwrap_err();
    assert!(store.list().unwrap().is_empty(), "a refused image is not kept");
    for folder in ["tmp", "locks", "layers", "blobs/sha256"] {
        let left: Vec<_> =
            std::fs::read_dir(cache.path().join("images").join(folder)).unwrap().collect();
        assert!(left.is_empty(), "{folder}: {left:?}");
    }
    error
}

fn check_refused(layer: Layer, why: &str) {
    let error = refused(&Layout::new(vec![layer.finish()])).to_string();
    assert!(error.contains(why), "{error} / {why}");
}

#[test]
fn hostile_layers_are_refused_with_the_entry_that_is_to_blame() {
    if !has_tools() {
        return;
    }
    let new = Layer::new;
    check_refused(new().file("../../etc/cron.d/x", 0o644, b""), "entry 0 `../../etc/cron.d/x`");
    check_refused(new().file("ok", 0o644, b"").file("/etc/passwd", 0o644, b""), "entry 1");
    check_refused(new().symlink("a", "/etc").hard_link("b", "a/../../x"), "`..`");
    check_refused(new().hard_link("b", "/etc/shadow"), "not in the layer");
    check_refused(new().device("x", 0, 0), "whiteout");
    check_refused(new().symlink("a", "b").symlink("b", "a").file("a/x", 0, b""), "circle");
    check_refused(new().file("f", 0o644, b"").file("f/x", 0o644, b""), "no folder");
    check_refused(new().file("n".repeat(300), 0o644, b""), "255");
    check_refused(new().file("d/".repeat(2100) + "f", 0o644, b""), "4095");
}

#[test]
fn a_symlink_in_a_layer_leads_nowhere_on_the_host() {
    if !has_tools() {
        return;
    }
    let outside = tempfile::tempdir().unwrap();
    let layer = Layer::new().symlink("out", outside.path().to_str().unwrap()).file(
        "out/planted",
        0o644,
        b"planted",
    );
    let (_cache, _store, image) = imported(&Layout::new(vec![layer.finish()]));
    assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
    let inside = format!("{}/planted", outside.path().display());
    assert_eq!(content(&image.layers[0], &inside), b"planted", "inside of the image instead");
}

#[test]
fn content_that_is_not_what_its_digest_says_is_refused() {
    let layout = Layout::new(vec![Layer::new().file("a", 0o644, b"a").finish()]);
    let (mut files, _) = layout.files();
    files[0].1[20] ^= 1;
    let error = refused_archive(&archive_of(&files));
    assert!(matches!(error, ImageError::WrongDigest { .. }), "{error}");

    // The right blob of another layer than the config says.
    let (mut files, _) = layout.files();
    let other = Layout::new(vec![Layer::new().file("b", 0o644, b"b").finish()]).files().0;
    files[2..].clone_from_slice(&other[2..]);
    files[0] = other[0].clone();
    files[1] = layout.files().0[1].clone();
    let error = refused_archive(&archive_of(&files));
    assert!(matches!(error, ImageError::MissingBlob { .. }), "{error}");

    let (files, _) = layout.files();
    let without_layer: Vec<_> = files[1..].to_vec();
    let error = refused_archive(&archive_of(&without_layer));
    assert!(error.to_string().starts_with("the archive lacks layer sha256:"), "{error}");
}

#[test]
fn a_layer_with_another_diff_id_is_refused() {
    if !has_tools() {
        return;
    }
    let layout = Layout::new(vec![Layer::new().file("a", 0o644, b"a").finish()]);
    let (files, _) = layout.files();
    let wrong = "0".repeat(64);
    let config = String::from_utf8(files[1].1.clone()).unwrap();
    let at = config.find("diff_ids\":[\"sha256:").unwrap() + 19;
    let config = format!("{}{wrong}{}", &config[..at], &config[at + 64..]);
    let digest = |bytes: &str| towline_images::Digest::of(bytes.as_bytes()).hex();
    let replace = |at: usize, from: &str, to: &str| {
        String::from_utf8(files[at].1.clone()).unwrap().replace(from, to)
    };
    let manifest = replace(2, &files[1].0[13..], &digest(&config));
    let index = replace(4, &files[2].0[13..], &digest(&manifest));
    let files = [
        files[0].clone(),
        (format!("blobs/sha256/{}", digest(&config)), config.into_bytes()),
        (format!("blobs/sha256/{}", digest(&manifest)), manifest.into_bytes()),
        files[3].clone(),
        ("index.json".into(), index.into_bytes()),
    ];
    let error = refused_archive(&archive_of(&files));
    assert!(error.to_string().starts_with("layer 1 does not have the content"), "{error}");
}

#[test]
fn an_archive_cut_off_anywhere_is_refused() {
    let archive = Layout::new(vec![Layer::new().file("a", 0o644, b"a").finish()]).archive();
    for cut in (0..archive.len() - 1024 - 512).step_by(311) {
        refused_archive(&archive[..cut]);
    }
    refused_archive(b"");
    refused_archive(b"hello");
    refused_archive(&[0x1f, 0x8b, 8, 0, 0, 0]);
}

#[test]
fn a_decompression_bomb_is_refused_before_it_fills_anything() {
    if !has_tools() {
        return;
    }
    // 1 GiB of zeros in a file, packed to a few KiB.
    let size: u64 = 1 << 30;
    let mut head = Layer::new().file("zeros", 0o644, b"").finish();
    head.truncate(512);
    head[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
    head[148..156].fill(b' ');
    let sum: u32 = head.iter().map(|byte| u32::from(*byte)).sum();
    head[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let mut packed = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
    std::io::copy(
        &mut std::io::Read::chain(&head[..], std::io::Read::take(std::io::repeat(0), size)),
        &mut packed,
    )
    .unwrap();
    let packed = packed.finish().unwrap();
    assert!(packed.len() < 2 << 20);
    let mut layout = Layout::new(vec![packed]);
    layout.compression = Compression::Plain;
    let error = refused(&layout).to_string();
    assert!(error.contains("decompression bomb"), "{error}");
    // The same around a whole archive.
    let error = refused_archive(&layout.layers[0]).to_string();
    assert!(error.contains("decompression bomb"), "{error}");
}

#[test]
fn the_image_for_this_machine_is_chosen() {
    let mut layout = Layout::new(vec![Layer::new().file("a", 0o644, b"a").finish()]);
    layout.platform = "linux/s390x".into();
    let error = refused(&layout).to_string();
    assert!(error.starts_with("the image is for linux/s390x; this node runs linux/"), "{error}");
    if !has_tools() {
        return;
    }
    // An index of both, behind another index.
    let (mut files, _) = layout.files();
    let ours = Layout::new(layout.layers.clone());
    let (our_files, digest) = ours.files();
    let index_of = |files: &[(String, Vec<u8>)]| {
        let text = String::from_utf8(files[4].1.clone()).unwrap();
        let from = text.find('[').unwrap() + 1;
        text[from..text.len() - 2].to_owned()
    };
    let attestation = r#"{"mediaType":"application/vnd.oci.image.manifest.v1+json","size":2,
        "digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
        "platform":{"os":"unknown","architecture":"unknown"}}"#;
    let nested = format!(
        r#"{{"schemaVersion":2,"manifests":[{},{attestation},{}]}}"#,
        index_of(&files),
        index_of(&our_files)
    );
    let nested_digest = towline_images::Digest::of(nested.as_bytes());
    let index = format!(
        r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"application/vnd.oci.image.index.v1+json","size":{},"digest":"{nested_digest}"}}]}}"#,
        nested.len()
    );
    files.truncate(4);
    files.extend(our_files.into_iter().take(3));
    files.push((format!("blobs/sha256/{}", nested_digest.hex()), nested.into_bytes()));
    files.push(("index.json".into(), index.into_bytes()));
    let cache = tempfile::tempdir().unwrap();
    let store = Store::open(cache.path()).unwrap();
    let archive = towline_images::fixture::gzip(&archive_of(&files));
    assert_eq!(import(&store, &archive[..], &mut |_| {}).unwrap().digest, digest);
}

#[test]
fn an_unknown_image_and_other_archives_say_what_to_do() {
    let cache = tempfile::tempdir().unwrap();
    let store = Store::open(cache.path()).unwrap();
    let digest = towline_images::Digest::of(b"");
    let error = prepare(&store, &digest, &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("tow image import"), "{error}");
    let docker = archive_of(&[("manifest.json".into(), b"[]".to_vec())]);
    let error = refused_archive(&docker).to_string();
    assert!(error.contains("save one alone"), "{error}");
    let other = archive_of(&[("hello".into(), b"world".to_vec())]);
    let error = refused_archive(&other).to_string();
    assert!(error.contains("neither an OCI image layout nor an archive of docker save"), "{error}");
}

/// An archive as an old `docker save` writes it: the manifest last, one layer linked to another.
#[test]
fn an_archive_of_docker_save_is_imported() {
    if !has_tools() {
        return;
    }
    let same = Layer::new().file("once", 0o644, b"once").finish();
    let upper = Layer::new().file("upper", 0o644, b"upper").file(".wh.once", 0o644, b"").finish();
    let ids = [&same, &upper, &same].map(|layer| towline_images::Digest::of(layer).to_string());
    let ours = Layout::new(vec![]).platform;
    let architecture = ours.strip_prefix("linux/").unwrap();
    let config = format!(
        r#"{{"os":"linux","architecture":"{architecture}","config":{{"Env":["A=b"]}},"rootfs":{{"type":"layers","diff_ids":["{}","{}","{}"]}}}}"#,
        ids[0], ids[1], ids[2]
    );
    let manifest = r#"[{"Config":"c.json","RepoTags":["x:1"],"Layers":["a/layer.tar","b/layer.tar","c/layer.tar"]}]"#;
    let archive = Layer::new()
        .folder("a", 0o755)
        .file("a/VERSION", 0o644, b"1.0")
        .file("a/json", 0o644, b"{}")
        .file("a/layer.tar", 0o644, &same)
        .file("b/layer.tar", 0o644, &upper)
        .symlink("c/layer.tar", "../a/layer.tar")
        .file("c.json", 0o644, config.as_bytes())
        .file("manifest.json", 0o644, manifest.as_bytes())
        .file("repositories", 0o644, b"{}")
        .finish();
    let cache = tempfile::tempdir().unwrap();
    let store = Store::open(cache.path()).unwrap();
    let image = import(&store, &archive[..], &mut |_| {}).unwrap();
    let again = import(&store, &towline_images::fixture::gzip(&archive)[..], &mut |_| {}).unwrap();
    assert_eq!(image, again, "the same archive is the same image");
    let prepared = prepare(&store, &image.digest, &mut |_| {}).unwrap();
    assert_eq!(prepared.layers.len(), 3);
    assert_eq!(content(&prepared.layers[2], "once"), b"once");
    assert_eq!(prepared.config.env, [b"A=b"]);

    // A layer that is not what the config says.
    let wrong = config.replacen(&ids[0], &ids[1], 1);
    let archive = Layer::new()
        .file("a/layer.tar", 0o644, &same)
        .file("b/layer.tar", 0o644, &upper)
        .symlink("c/layer.tar", "../a/layer.tar")
        .file("c.json", 0o644, wrong.as_bytes())
        .file("manifest.json", 0o644, manifest.as_bytes())
        .finish();
    let error = refused_archive(&archive).to_string();
    assert!(error.contains("layer 1 does not have the content"), "{error}");
}

#[test]
fn an_image_without_a_file_still_has_a_disk() {
    if !has_tools() {
        return;
    }
    let (_cache, _store, image) = imported(&Layout::new(vec![]));
    assert_eq!(image.layers.len(), 1);
    assert!(listing(&image.layers[0]).is_empty());
}

#[test]
fn a_file_of_zeros_takes_no_space() {
    if !has_tools() {
        return;
    }
    const SIZE: u64 = 100 << 20;
    let zeros = vec![0; usize::try_from(SIZE).unwrap()];
    let mut layout = Layout::new(vec![Layer::new().file("zeros", 0o644, &zeros).finish()]);
    layout.compression = Compression::Plain;
    let (cache, _store, image) = imported(&layout);
    assert_eq!(listing(&image.layers[0]), [format!("-rw-r--r-- 0/0 {SIZE} /zeros")]);
    let blobs = std::fs::read_dir(cache.path().join("images/blobs/sha256")).unwrap();
    let disks = std::fs::read_dir(cache.path().join("images/layers")).unwrap();
    let used: u64 = blobs
        .chain(disks)
        .map(|entry| std::os::unix::fs::MetadataExt::blocks(&entry.unwrap().metadata().unwrap()))
        .sum();
    assert!(used * 512 < 2 << 20, "{used} blocks");
}

#[test]
fn a_full_disk_is_said_and_leaves_nothing_half_made() {
    use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

    struct Unmount<'a>(&'a Path);
    impl Drop for Unmount<'_> {
        fn drop(&mut self) {
            let _ = unmount(self.0, UnmountFlags::DETACH);
        }
    }
    let small = tempfile::tempdir().unwrap();
    // Room for what an import must leave to others and 40 MiB, not for what is imported.
    let options = Some(c"size=104m");
    if let Err(error) = mount("tmpfs", small.path(), "tmpfs", MountFlags::empty(), options) {
        eprintln!("SKIPPED: mounting a small file system needs root: {error}");
        return;
    }
    let _unmount = Unmount(small.path());
    // Bytes that do not compress.
    let noise: Vec<u8> = (0..60u32 << 18)
        .flat_map(|n| n.wrapping_mul(2_654_435_761).rotate_left(n % 31).to_le_bytes())
        .collect();
    let mut layout = Layout::new(vec![Layer::new().file("noise", 0o644, &noise).finish()]);
    layout.compression = Compression::Plain;
    let archive = layout.archive();
    drop((noise, layout));
    let store = Store::open(small.path()).unwrap();
    let error = import(&store, &archive[..], &mut |_| {}).unwrap_err();
    assert!(matches!(error, ImageError::NoSpace { .. }), "{error}");
    assert!(error.to_string().starts_with("no space for the image at `"), "{error}");
    assert!(store.list().unwrap().is_empty());
    for folder in ["tmp", "blobs/sha256", "layers"] {
        let left = std::fs::read_dir(small.path().join("images").join(folder)).unwrap().count();
        assert_eq!(left, 0, "{folder}");
    }
}

#[test]
fn what_a_killed_import_left_is_removed_and_a_running_one_is_not_disturbed() {
    let cache = tempfile::tempdir().unwrap();
    Store::open(cache.path()).unwrap();
    let tmp = cache.path().join("images/tmp");
    for name in ["import-dead", "import-alive"] {
        std::fs::create_dir(tmp.join(name)).unwrap();
        std::fs::write(tmp.join(name).join("lock"), b"").unwrap();
        std::fs::write(tmp.join(name).join("blob"), b"half").unwrap();
    }
    let held = std::fs::File::open(tmp.join("import-alive/lock")).unwrap();
    rustix::fs::flock(&held, rustix::fs::FlockOperation::LockExclusive).unwrap();
    Store::open(cache.path()).unwrap();
    assert!(!tmp.join("import-dead").exists());
    assert!(tmp.join("import-alive/blob").exists());
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig { cases: 500, ..Default::default() })]

    /// Honest layers with bytes changed: an error, or a stream that means the same when read again.
    #[test]
    fn a_damaged_layer_is_an_error_or_a_layer(
        flips in proptest::collection::vec((0usize..12_000, proptest::prelude::any::<u8>()), 1..6),
        fix_checksums in proptest::prelude::any::<bool>(),
        cut in 512usize..12_000,
    ) {
        let long = "long/".repeat(40) + "name";
        let mut bytes = Layer::new()
            .folder("a", 0o755)
            .file("a/b", 0o644, &[7; 700])
            .file_with_xattr("a/cap", b"x", b"security.capability", &CAPABILITY)
            .file(&long, 0o600, b"long")
            .hard_link("c", "a/b")
            .symlink("d", "a")
            .file("d/through", 0o644, b"")
            .file("a/.wh.b", 0o644, b"")
            .file("a/.wh..wh..opq", 0o644, b"")
            .device("dev/x", 5, 1)
            .fifo("f")
            .finish();
        for (at, value) in flips {
            let at = at % bytes.len();
            bytes[at] = value;
        }
        if fix_checksums {
            for block in bytes.chunks_exact_mut(512).filter(|block| &block[257..262] == b"ustar") {
                block[148..156].fill(b' ');
                let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
                block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            }
        }
        bytes.truncate(cut.max(512));
        towline_images::fuzzing::layer_archive(&bytes);
        towline_images::fuzzing::layer_archive(&towline_images::fixture::gzip(&bytes));
    }
}
