//! Attacks on, and races with, changes of a real tree.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;

use super::*;
use crate::content::{BLOCK, ContentId};

fn path(text: &str) -> TreePath {
    TreePath::from_bytes(text.as_bytes()).unwrap()
}

struct Scratch {
    dir: tempfile::TempDir,
    root: Root,
    stage: Stage,
}

impl Scratch {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("root")).unwrap();
        fs::create_dir(dir.path().join("outside")).unwrap();
        let root = Root::open(&dir.path().join("root")).unwrap();
        let stage = Stage::open(&root, None, false).unwrap();
        Self { dir, root, stage }
    }

    fn at(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join("root").join(name)
    }

    fn outside(&self) -> std::path::PathBuf {
        self.dir.path().join("outside")
    }

    fn staged(&mut self, text: &str) -> Staged {
        let mut file = self.stage.file(text.len() as u64).unwrap();
        if !text.is_empty() {
            file.block(0, text.as_bytes()).unwrap();
        }
        self.stage.finish(file, 0o640, 1_600_000_000_000_000_001).unwrap()
    }

    fn put(&mut self, to: &str, text: &str, expected: Option<&Entry>) -> io::Result<Outcome> {
        let staged = self.staged(text);
        self.stage.put(&path(to), staged, expected)
    }

    fn look(&self, at: &str) -> Option<Entry> {
        self.root.look(&path(at)).unwrap()
    }

    /// Ends the session; nothing of it may stay.
    fn close(self) {
        self.stage.close().unwrap();
        assert!(!self.dir.path().join("root/.tow-stage").exists());
        assert_eq!(fs::read_dir(self.dir.path().join("outside")).unwrap().count(), 0);
    }
}

fn is_changed(outcome: &io::Result<Outcome>) -> bool {
    matches!(outcome, Ok(Outcome::Changed(_)))
}

fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap()
}

#[test]
fn a_file_comes_with_mode_and_time_and_only_where_nothing_is() {
    let mut scratch = Scratch::new();
    let Ok(Outcome::Done(Some(done))) = scratch.put("f", "new", None) else { panic!("not put") };
    assert_eq!((done.mode, done.stamp.mtime_ns), (0o640, 1_600_000_000_000_000_001));
    assert!(is_changed(&scratch.put("f", "again", None)));
    assert_eq!(text(&scratch.at("f")), "new");
    scratch.close();
}

#[test]
fn an_edit_that_raced_is_put_back() {
    let mut scratch = Scratch::new();
    fs::write(scratch.at("f"), "old").unwrap();
    let expected = scratch.look("f").unwrap();
    fs::write(scratch.at("f"), "edited meanwhile").unwrap();
    assert!(is_changed(&scratch.put("f", "theirs", Some(&expected))));
    assert!(is_changed(&scratch.stage.remove(&path("f"), Some(&expected))));
    assert!(is_changed(&scratch.stage.set(&path("f"), 0o777, 0, &expected)));
    assert_eq!(text(&scratch.at("f")), "edited meanwhile");
    fs::remove_file(scratch.at("f")).unwrap();
    assert!(is_changed(&scratch.put("f", "theirs", Some(&expected))), "it vanished");
    assert!(!scratch.at("f").exists());
    let now = scratch.look("f");
    assert!(now.is_none());
    scratch.close();
}

#[test]
fn what_is_expected_is_replaced_and_removed() {
    let mut scratch = Scratch::new();
    fs::write(scratch.at("f"), "old").unwrap();
    let expected = scratch.look("f");
    assert!(matches!(scratch.put("f", "new", expected.as_ref()), Ok(Outcome::Done(_))));
    assert_eq!(text(&scratch.at("f")), "new");
    let link = scratch.stage.symlink(b"/anywhere").unwrap();
    let expected = scratch.look("f");
    assert!(matches!(scratch.stage.put(&path("f"), link, expected.as_ref()), Ok(Outcome::Done(_))));
    let expected = scratch.look("f");
    assert_eq!(expected.as_ref().unwrap().target, b"/anywhere");
    assert_eq!(
        scratch.stage.directory(&path("f"), 0o750, expected.as_ref()).unwrap(),
        Outcome::Done(scratch.look("f"))
    );
    assert_eq!(fs::metadata(scratch.at("f")).unwrap().permissions().mode() & 0o777, 0o750);
    fs::write(scratch.at("f/in"), "").unwrap();
    let expected = scratch.look("f");
    assert_eq!(scratch.stage.remove(&path("f"), expected.as_ref()).unwrap(), Outcome::NotEmpty);
    assert!(matches!(scratch.put("f", "x", expected.as_ref()), Ok(Outcome::NotEmpty)));
    fs::remove_file(scratch.at("f/in")).unwrap();
    assert!(matches!(scratch.put("f", "x", expected.as_ref()), Ok(Outcome::Done(_))));
    scratch.close();
}

#[test]
fn no_way_leads_through_a_symlink() {
    let mut scratch = Scratch::new();
    let outside = scratch.outside();
    symlink(&outside, scratch.at("absolute")).unwrap();
    symlink("../outside", scratch.at("relative")).unwrap();
    symlink(".", scratch.at("here")).unwrap();
    symlink("/proc/self/root", scratch.at("magic")).unwrap();
    for parent in ["absolute", "relative", "here", "magic"] {
        let inside = format!("{parent}/x");
        assert!(is_changed(&scratch.put(&inside, "evil", None)), "{parent}");
        assert!(is_changed(&scratch.stage.directory(&path(&inside), 0o755, None)), "{parent}");
        let file = Entry::new(Kind::File, 0o644);
        assert!(is_changed(&scratch.stage.remove(&path(&inside), Some(&file))), "{parent}");
        assert!(scratch.look(&inside).is_none());
        assert!(read_blocks(&scratch.root, &path(&inside), |_, _, _| Ok(())).is_err());
    }
    assert!(is_changed(&scratch.put("absolute", "evil", None)), "the link itself is not replaced");
    assert!(scratch.at("absolute").is_symlink());
    scratch.close();
}

#[test]
fn a_parent_swapped_all_the_time_never_lets_anything_out() {
    let mut scratch = Scratch::new();
    let (real, link) = (scratch.at("d"), scratch.at("l"));
    fs::create_dir(&real).unwrap();
    symlink(scratch.outside(), &link).unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let mut put = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let flags = rustix::fs::RenameFlags::EXCHANGE;
                rustix::fs::renameat_with(sys::CWD, &real, sys::CWD, &link, flags).unwrap();
            }
        });
        for number in 0..300 {
            put += usize::from(matches!(
                scratch.put(&format!("d/{number}"), "x", None),
                Ok(Outcome::Done(_))
            ));
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    let inside = fs::read_dir(scratch.at("d")).unwrap().count()
        + fs::read_dir(scratch.at("l")).unwrap().count();
    assert_eq!(inside, put);
    scratch.close();
}

#[test]
fn a_stage_that_is_a_symlink_is_refused_and_one_left_behind_is_cleaned() {
    let scratch = Scratch::new();
    let left = scratch.at(".tow-stage/dead");
    fs::create_dir(&left).unwrap();
    fs::write(left.join("1"), "half a file").unwrap();
    let second = Stage::open(&scratch.root, None, false).unwrap();
    assert!(!left.exists());
    second.close().unwrap();
    scratch.close();

    let scratch = tempfile::tempdir().unwrap();
    symlink("/tmp", scratch.path().join(".tow-stage")).unwrap();
    let root = Root::open(scratch.path()).unwrap();
    assert!(Stage::open(&root, None, false).is_err());
}

#[test]
fn blocks_are_taken_in_order_and_within_the_file_only() {
    let mut scratch = Scratch::new();
    let size = (3 * BLOCK + 5) as u64;
    let mut file = scratch.stage.file(size).unwrap();
    assert!(file.block(1, &[1; BLOCK]).is_err());
    assert!(file.block(0, &[1; BLOCK - 1]).is_err());
    assert!(file.block(BLOCK as u64, &[1; BLOCK]).is_ok());
    assert!(file.block(0, &[1; BLOCK]).is_err(), "going back");
    assert!(file.block(3 * BLOCK as u64, &[1; 6]).is_err(), "beyond the end");
    assert!(file.block(3 * BLOCK as u64, &[1; 5]).is_ok());
    assert!(file.block(u64::MAX - (u64::MAX % BLOCK as u64), &[1; 5]).is_err());
    let staged = scratch.stage.finish(file, 0o600, 0).unwrap();
    scratch.stage.put(&path("f"), staged, None).unwrap();
    let mut expected = vec![0; 3 * BLOCK + 5];
    expected[BLOCK..2 * BLOCK].fill(1);
    expected[3 * BLOCK..].fill(1);
    assert_eq!(fs::read(scratch.at("f")).unwrap(), expected);
    assert_eq!(content_of(&scratch.root, &path("f")).unwrap(), Some(ContentId::of(&expected)));
    scratch.close();
}

#[test]
fn a_tree_is_removed_without_following_anything() {
    let mut scratch = Scratch::new();
    fs::create_dir_all(scratch.at("d/e/f")).unwrap();
    fs::write(scratch.at("d/e/x"), "").unwrap();
    let kept = scratch.dir.path().join("kept");
    fs::create_dir(&kept).unwrap();
    fs::write(kept.join("precious"), "").unwrap();
    symlink(&kept, scratch.at("d/link")).unwrap();
    scratch.stage.remove_all(&path("d")).unwrap();
    assert!(!scratch.at("d").exists() && kept.join("precious").exists());
    scratch.close();
}
