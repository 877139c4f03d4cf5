//! What an image holds of what a guest said, and that a guest's nonsense makes none.
#![expect(clippy::unwrap_used, clippy::print_stderr, reason = "a test that fails, fails here")]

use std::fs;
use std::io::Read as _;
use std::process::Command;

use serde_json::{Value, json};
use towline_images::fixture::{Layer, Layout};
use towline_images::save::{
    Compression, Save, SaveError, SaveRequest, SavedImage, Settings, Times,
};
use towline_images::{Digest, Store, import, prepare};
use towline_proto::v1::{FileType, LayerEntry, LayerXattr};

const YEAR_2001: i64 = 978_307_200;

fn has_tools() -> bool {
    let has = Command::new("mksquashfs").arg("-version").output().is_ok();
    if !has {
        eprintln!("SKIPPED: mksquashfs (squashfs-tools) is not installed");
    }
    has
}

/// A store with an image in it.
struct Node {
    store: Store,
    base: Digest,
    cache: tempfile::TempDir,
}

impl Node {
    fn new() -> Self {
        Self::in_cache(tempfile::tempdir().unwrap())
    }

    fn in_cache(cache: tempfile::TempDir) -> Self {
        let store = Store::open(cache.path()).unwrap();
        let layer = Layer::new().file("etc/conf", 0o644, b"old").file("gone", 0o644, b"x").finish();
        let config = r#"{"Env":["PATH=/bin","A=1"],"Cmd":["old"],"Labels":{"k":"v"},"Other":7}"#;
        let layout = Layout { config: config.into(), ..Layout::new(vec![layer]) };
        let base = import(&store, &layout.archive()[..], &mut |_| {}).unwrap().digest;
        Self { store, base, cache }
    }

    fn begin(&self, request: impl FnOnce(&mut SaveRequest)) -> Save {
        let mut wanted = SaveRequest {
            base: self.base,
            base_name: "base:1".into(),
            squash: false,
            times: Times::Clamp(YEAR_2001),
            compression: Compression::Zstd,
            settings: Settings::default(),
            allowed: Vec::new(),
        };
        request(&mut wanted);
        Save::begin(&self.store, wanted).unwrap()
    }

    fn save(&self, entries: &[LayerEntry]) -> SavedImage {
        self.save_as(entries, |_| {})
    }

    fn save_as(
        &self,
        entries: &[LayerEntry],
        request: impl FnOnce(&mut SaveRequest),
    ) -> SavedImage {
        let mut save = self.begin(request);
        entries.iter().for_each(|entry| save.entry(entry).unwrap());
        save.finish().unwrap()
    }

    fn blob(&self, digest: &str) -> Vec<u8> {
        let hex = digest.strip_prefix("sha256:").unwrap();
        fs::read(self.cache.path().join("images/blobs/sha256").join(hex)).unwrap()
    }

    /// The manifest and the config.
    fn documents(&self, saved: &SavedImage) -> (Value, Value) {
        let manifest = self.blob(&saved.image.digest.to_string());
        let manifest: Value = serde_json::from_slice(&manifest).unwrap();
        let config = self.blob(manifest["config"]["digest"].as_str().unwrap());
        (manifest, serde_json::from_slice(&config).unwrap())
    }

    /// The newest layer's archive, unpacked by somebody else's reader.
    fn layer(&self, saved: &SavedImage) -> Vec<u8> {
        let (manifest, _) = self.documents(saved);
        let layer = manifest["layers"].as_array().unwrap().last().unwrap().clone();
        let bytes = self.blob(layer["digest"].as_str().unwrap());
        match layer["mediaType"].as_str().unwrap().rsplit('+').next().unwrap() {
            "zstd" => zstd::stream::decode_all(&bytes[..]).unwrap(),
            _ => {
                let mut out = Vec::new();
                flate2::read::GzDecoder::new(&bytes[..]).read_to_end(&mut out).unwrap();
                out
            }
        }
    }

    fn count(&self, folder: &str) -> usize {
        fs::read_dir(self.cache.path().join("images").join(folder)).unwrap().count()
    }
}

fn entry(path: &str, kind: FileType) -> LayerEntry {
    let (mode, modified_s) = (0o640, YEAR_2001 + 5);
    LayerEntry { path: path.into(), r#type: kind.into(), mode, modified_s, ..Default::default() }
}

fn file(path: &str, content: &[u8]) -> LayerEntry {
    let size = content.len() as u64;
    LayerEntry { size, content: content.to_vec(), ..entry(path, FileType::Regular) }
}

fn removed(path: &str) -> LayerEntry {
    LayerEntry { path: path.into(), ..Default::default() }
}

/// Of every kind.
fn changes() -> Vec<LayerEntry> {
    // No line's end in it: the reader of these tests takes that for the record's.
    let xattr = LayerXattr { name: b"security.capability".to_vec(), value: vec![1, 0, 61, 255] };
    vec![
        LayerEntry {
            device_major: 1,
            device_minor: 3,
            ..entry("dev-null", FileType::CharacterDevice)
        },
        file("etc/conf", b"new"),
        removed("gone"),
        LayerEntry { target: b"../\xff".to_vec(), ..entry("link", FileType::Symlink) },
        LayerEntry { has_links: true, xattrs: vec![xattr], ..file("one", b"1") },
        LayerEntry { mode: 0o1777, modified_s: 3, ..entry("open", FileType::Directory) },
        file(&format!("open/{}", "n".repeat(255)), b""),
        entry("pipe", FileType::Fifo),
        LayerEntry { hard_link: b"one".to_vec(), ..entry("two", FileType::Regular) },
    ]
}

#[test]
fn a_layer_holds_each_change_as_others_read_it() {
    if !has_tools() {
        return;
    }
    let node = Node::new();
    for compression in [Compression::Zstd, Compression::Gzip] {
        let mut save = node.begin(|request| request.compression = compression);
        changes().iter().for_each(|entry| save.entry(entry).unwrap());
        save.entry(&LayerEntry { size: 200_010, ..entry("z-large", FileType::Regular) }).unwrap();
        save.data(b"begin").unwrap();
        save.hole(200_000).unwrap();
        save.data(b"ended").unwrap();
        let saved = save.finish().unwrap();
        assert_eq!((saved.entries, saved.image.layers), (10, 2));

        let archive = node.layer(&saved);
        let (_, config) = node.documents(&saved);
        let diff_ids = config["rootfs"]["diff_ids"].as_array().unwrap();
        assert_eq!(diff_ids[1], Digest::of(&archive).to_string());
        assert_eq!(saved.layer_unpacked_bytes, archive.len() as u64);
        let mut read = Vec::new();
        let mut archive = tar::Archive::new(&archive[..]);
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
            let path = if path.len() > 100 { format!("{} bytes", path.len()) } else { path };
            let link = entry.link_name_bytes().map(|link| link.escape_ascii().to_string());
            let pax: Vec<_> = entry
                .pax_extensions()
                .unwrap()
                .into_iter()
                .flatten()
                .map(|pax| pax.unwrap().key().unwrap().to_owned())
                .filter(|key| key != "path")
                .collect();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            let header = entry.header();
            let (mode, mtime) = (header.mode().unwrap(), header.mtime().unwrap());
            let kind = header.entry_type().as_byte() as char;
            let (link, pax) = (link.unwrap_or_default(), pax.join(","));
            let line = format!("{kind} {path} {mode:o} {mtime} {} {link} {pax}", content.len());
            read.push(line.trim_end().to_owned());
        }
        assert_eq!(
            read,
            [
                "3 dev-null 640 978307200 0",
                "0 etc/conf 640 978307200 3",
                "0 .wh.gone 0 0 0",
                "2 link 640 978307200 0 ../\\xff",
                "0 one 640 978307200 1  SCHILY.xattr.security.capability",
                "5 open 1777 3 0",
                "0 260 bytes 640 978307200 0",
                "6 pipe 640 978307200 0",
                "1 two 640 978307200 0 one",
                "0 z-large 640 978307200 200010",
            ]
        );
    }
    assert_eq!(node.count("tmp"), 0, "nothing is left");
}

#[test]
fn the_same_state_is_the_same_image_on_any_node_and_another_is_another() {
    if !has_tools() {
        return;
    }
    let (node, other) = (Node::new(), Node::new());
    let digest = node.save(&changes()).image.digest;
    assert_eq!(other.save(&changes()).image.digest, digest);
    let all: [fn(&mut LayerEntry); 5] = [
        |entry| entry.content[0] ^= 1,
        |entry| entry.mode ^= 1,
        |entry| entry.uid = 1,
        |entry| entry.xattrs[0].value[0] ^= 1,
        |entry| entry.xattrs.clear(),
    ];
    for change in all {
        let mut entries = changes();
        change(&mut entries[4]);
        assert_ne!(other.save(&entries).image.digest, digest);
    }
    let mut later = changes();
    later.iter_mut().filter(|entry| entry.modified_s > 3).for_each(|entry| entry.modified_s += 9);
    assert_eq!(other.save(&later).image.digest, digest, "times are clamped");
    let kept =
        |entries: &[LayerEntry]| node.save_as(entries, |request| request.times = Times::Keep);
    assert_ne!(kept(&later).image.digest, kept(&changes()).image.digest);
    // It starts where it was saved.
    assert_eq!(prepare(&node.store, &digest, &mut |_| {}).unwrap().layers.len(), 2);
}

#[test]
fn nothing_changed_is_the_base_itself() {
    if !has_tools() {
        return;
    }
    let node = Node::new();
    let saved = node.save(&[]);
    assert_eq!((saved.image.digest, saved.layer_bytes), (node.base, 0));
    let same = Settings { cmd: Some(vec!["old".into()]), ..Settings::default() };
    assert_eq!(node.save_as(&[], |request| request.settings = same).image.digest, node.base);
    let first = node.save(&changes());
    let node = Node { base: first.image.digest, ..node };
    assert_eq!(node.save(&[]).image, first.image);
    let noted = Settings { message: "as it was".into(), ..Settings::default() };
    let noted = node.save_as(&[], |request| request.settings = noted);
    assert_eq!(noted.image.layers, 2);
    let (_, config) = node.documents(&noted);
    let newest = config["history"].as_array().unwrap().last().unwrap().clone();
    assert_eq!((&newest["comment"], &newest["empty_layer"]), (&json!("as it was"), &json!(true)));
}

#[test]
fn a_squashed_image_has_one_layer_and_says_what_made_it() {
    if !has_tools() {
        return;
    }
    let node = Node::new();
    let all = || changes().into_iter().filter(|entry| entry.path != b"gone").collect::<Vec<_>>();
    let squash = |request: &mut SaveRequest| request.squash = true;
    let saved = node.save_as(&all(), squash);
    let (manifest, config) = node.documents(&saved);
    assert_eq!((saved.image.layers, manifest["layers"].as_array().unwrap().len()), (1, 1));
    assert_eq!(config["rootfs"]["diff_ids"].as_array().unwrap().len(), 1);
    let empty: Vec<_> =
        config["history"].as_array().unwrap().iter().map(|event| &event["empty_layer"]).collect();
    let (newest, older) = empty.split_last().unwrap();
    assert!(newest.is_null() && older.iter().all(|empty| **empty == json!(true)), "{config}");
    assert_eq!(config["config"]["Cmd"], json!(["old"]));
    let annotations = manifest["annotations"].as_object().unwrap();
    assert!(!annotations.keys().any(|key| key.contains("base")), "it has no layer of its base");
    assert_eq!(prepare(&node.store, &saved.image.digest, &mut |_| {}).unwrap().layers.len(), 1);

    let mut save = node.begin(squash);
    let error = save.entry(&removed("gone")).unwrap_err().to_string();
    assert!(error.contains("removed from nothing"), "{error}");
    drop(save);
    let node = Node { base: saved.image.digest, ..node };
    assert_eq!(node.save_as(&all(), squash).image, saved.image, "it is squashed already");
}

#[test]
fn settings_go_over_those_of_the_base_and_the_rest_stays() {
    if !has_tools() {
        return;
    }
    let node = Node::new();
    let settings = Settings {
        entrypoint: Some(vec!["/bin/app".into()]),
        env: vec![("A".into(), "2=2".into()), ("B".into(), String::new())],
        workdir: Some("/srv".into()),
        user: Some("7:8".into()),
        labels: vec![("l".into(), "m".into())],
        ..Settings::default()
    };
    let saved = node.save_as(&changes(), |request| request.settings = settings);
    let (manifest, config) = node.documents(&saved);
    assert_eq!(
        config["config"],
        json!({
            "Entrypoint": ["/bin/app"], "Env": ["PATH=/bin", "A=2=2", "B="], "WorkingDir": "/srv",
            "User": "7:8", "Labels": {"k": "v", "l": "m"}, "Other": 7,
        })
    );
    assert_eq!(config["created"], "2001-01-01T00:00:00Z");
    assert_eq!(
        manifest["annotations"],
        json!({
            "org.opencontainers.image.base.digest": node.base.to_string(),
            "org.opencontainers.image.base.name": "base:1",
            "org.opencontainers.image.created": "2001-01-01T00:00:00Z",
        })
    );
    let prepared = prepare(&node.store, &saved.image.digest, &mut |_| {}).unwrap();
    assert_eq!(prepared.config.entrypoint, [b"/bin/app"]);
}

#[test]
fn what_a_guest_may_not_say_makes_no_image() {
    if !has_tools() {
        return;
    }
    let node = Node::new();
    let (images, blobs) = (node.count("images"), node.count("blobs/sha256"));
    let large = LayerEntry { size: 100_000, ..entry("large", FileType::Regular) };
    type Say<'a> = &'a dyn Fn(&mut Save) -> Result<(), SaveError>;
    let cases: [Say<'_>; 7] = [
        &|save| save.data(b"of what?"),
        &|save| save.hole(1),
        &|save| save.entry(&large).and_then(|()| save.data(&[0; 100_001])),
        &|save| save.entry(&large).and_then(|()| save.hole(u64::MAX)),
        &|save| save.entry(&large).and_then(|()| save.entry(&file("next", b""))),
        &|save| save.entry(&file("whole", b"x")).and_then(|()| save.data(b"")),
        &|save| save.entry(&file("../up", b"")),
    ];
    for say in cases {
        let mut save = node.begin(|_| {});
        say(&mut save).unwrap_err();
    }
    let mut save = node.begin(|_| {});
    save.entry(&large).unwrap();
    save.data(b"some").unwrap();
    assert!(matches!(save.finish(), Err(SaveError::Guest(_))), "it ended within a file");
    // Zeros without end: neither here nor with whoever unpacks it.
    let mut save = node.begin(|_| {});
    save.entry(&LayerEntry { size: 60 << 30, ..entry("bomb", FileType::Regular) }).unwrap();
    let error = save.hole(60 << 30).unwrap_err().to_string();
    assert!(error.contains("/bomb"), "{error}");
    drop(save);
    assert_eq!((node.count("images"), node.count("blobs/sha256")), (images, blobs));
    assert_eq!(node.count("tmp"), 0, "nothing is left");
}

#[test]
fn a_full_disk_is_said_and_the_next_save_works() {
    use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

    struct Unmount(std::path::PathBuf);
    impl Drop for Unmount {
        fn drop(&mut self) {
            let _ = unmount(&self.0, UnmountFlags::DETACH);
        }
    }
    if !has_tools() {
        return;
    }
    let cache = tempfile::tempdir().unwrap();
    // Room for what is left to others and a little, not for what is saved.
    let options = Some(c"size=104m");
    if let Err(error) = mount("tmpfs", cache.path(), "tmpfs", MountFlags::empty(), options) {
        eprintln!("SKIPPED: mounting a small file system needs root: {error}");
        return;
    }
    let _unmount = Unmount(cache.path().to_owned());
    let node = Node::in_cache(cache);
    let before = (node.count("images"), node.count("blobs/sha256"));
    let mut save = node.begin(|_| {});
    let file = LayerEntry { size: 60 << 20, ..entry("noise", FileType::Regular) };
    save.entry(&file).unwrap();
    let mut number = 0_u32;
    // Bytes that do not compress.
    let mut noise = || {
        let words = (0..1_u32 << 18).map(|_| {
            number += 1;
            number.wrapping_mul(2_654_435_761).rotate_left(number % 31)
        });
        words.flat_map(u32::to_le_bytes).collect::<Vec<_>>()
    };
    let error = (0..60).find_map(|_| save.data(&noise()).err()).unwrap().to_string();
    assert!(error.starts_with("no space for the image at `"), "{error}");
    drop(save);
    assert_eq!((node.count("images"), node.count("blobs/sha256")), before);
    assert_eq!(node.count("tmp"), 0, "nothing is left");
    assert_eq!(node.save(&changes()).image.layers, 2);
}

#[test]
fn a_base_that_is_not_whole_any_more_is_said_to_be() {
    if !has_tools() {
        return;
    }
    let node = Node::new();
    let (manifest, _) = node.documents(&node.save(&[]));
    let layer = manifest["layers"][0]["digest"].as_str().unwrap().replace("sha256:", "");
    fs::remove_file(node.cache.path().join("images/blobs/sha256").join(layer)).unwrap();
    let request = SaveRequest {
        base: node.base,
        base_name: String::new(),
        squash: false,
        times: Times::Base,
        compression: Compression::Gzip,
        settings: Settings::default(),
        allowed: Vec::new(),
    };
    let error = Save::begin(&node.store, request).unwrap_err().to_string();
    assert!(error.contains("tow image pull"), "{error}");
}
