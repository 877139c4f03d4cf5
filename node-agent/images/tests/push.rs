//! Pushes to a registry that dies, lies, forgets, wants a login and sends elsewhere.
#![expect(clippy::unwrap_used, reason = "a test that fails, fails here")]

use std::collections::BTreeSet;
use std::error::Error as _;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{Semaphore, watch};
use towline_images::fixture::{Layer, Layout};
use towline_images::registry::{
    Credentials, Pace, Private, PullRequest, Puller, PushError, PushRequest, Pushed, Pusher,
};
use towline_images::{Digest, Store, import};

mod fake_registry;
use fake_registry::shelf::Shelf;
use fake_registry::{Fake, Reply, Seen};

macro_rules! needs_mksquashfs {
    () => {
        if std::process::Command::new("mksquashfs").arg("-version").output().is_err() {
            eprintln!("SKIPPED: mksquashfs (squashfs-tools) is not installed");
            return;
        }
    };
}

/// Two layers, the second too large to go out in one request without parts.
fn layout() -> Layout {
    let mut noise = 7u32;
    let content: Vec<u8> = std::iter::repeat_with(|| {
        noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        noise.to_be_bytes()[0]
    })
    .take(3 << 20)
    .collect();
    let lower = Layer::new().file("lower", 0o644, b"lower").finish();
    let upper = Layer::new().file("upper", 0o644, &content).finish();
    Layout::new(vec![lower, upper])
}

/// A node that has the image.
struct Node {
    cache: tempfile::TempDir,
    pusher: Pusher,
    digest: Digest,
    /// Bytes of its blobs, by digest.
    blobs: Vec<(String, usize)>,
}

impl Node {
    fn new() -> Node {
        Node::of(&layout())
    }

    fn of(layout: &Layout) -> Node {
        let cache = tempfile::tempdir().unwrap();
        let store = Store::open(cache.path()).unwrap();
        let digest = import(&store, &layout.archive()[..], &mut |_| {}).unwrap().digest;
        let pace = Pace {
            tries: 4,
            first_pause: Duration::from_millis(1),
            longest_pause: Duration::from_secs(30),
            ..Pace::default()
        };
        let (files, manifest) = layout.files();
        let blobs = files.iter().filter_map(|(path, bytes)| {
            let hex = path.strip_prefix("blobs/sha256/")?;
            (hex != manifest.hex()).then(|| (format!("sha256:{hex}"), bytes.len()))
        });
        let blobs = blobs.collect();
        Node { cache, pusher: Pusher { store, private: Private::Any, pace }, digest, blobs }
    }

    /// One that gives up at once.
    fn impatient() -> Node {
        let mut node = Node::new();
        node.pusher.pace.tries = 1;
        node
    }

    fn largest(&self) -> (String, usize) {
        self.blobs.iter().max_by_key(|(_, size)| *size).unwrap().clone()
    }

    fn bytes(&self) -> usize {
        self.blobs.iter().map(|(_, size)| size).sum()
    }

    async fn push(&self, reference: impl Into<String>) -> Result<Pushed, PushError> {
        self.push_as(reference, None, &[]).await
    }

    async fn push_as(
        &self,
        reference: impl Into<String>,
        credentials: Option<Credentials>,
        mount_from: &[&str],
    ) -> Result<Pushed, PushError> {
        let request = PushRequest {
            digest: self.digest,
            reference: reference.into(),
            credentials,
            insecure: false,
            mount_from: mount_from.iter().map(|name| (*name).to_owned()).collect(),
        };
        self.pusher.push(request, &watch::Sender::new(None)).await
    }

    async fn refused(&self, reference: impl Into<String>) -> String {
        chain(&self.push(reference).await.unwrap_err())
    }
}

fn chain(error: &PushError) -> String {
    let source = error.source().map(|source| format!(": {source}"));
    format!("{error}{}", source.unwrap_or_default())
}

fn alice(password: &str) -> Option<Credentials> {
    Some(Credentials::Basic { username: "alice".into(), password: password.into() })
}

/// Counts how often it is asked.
fn counter() -> impl Fn() -> usize {
    let count = AtomicUsize::new(0);
    move || count.fetch_add(1, Ordering::Relaxed)
}

/// A registry that takes all.
async fn shelf() -> (Shelf, Fake) {
    let shelf = Shelf::default();
    let answers = shelf.clone();
    (shelf, Fake::start(move |seen| answers.answer(seen)).await)
}

fn methods(fake: &Fake, method: &str) -> usize {
    fake.seen("").iter().filter(|seen| seen.method == method).count()
}

#[tokio::test]
async fn an_image_is_there_as_it_is_here_and_is_sent_once() {
    needs_mksquashfs!();
    let (shelf, fake) = shelf().await;
    let node = Node::new();
    let name = format!("{}/a/x:1", fake.address);
    let pushed = node.push(&name).await.unwrap();
    let bytes_sent = node.bytes() as u64;
    let expected = Pushed {
        digest: node.digest,
        reference: name.clone(),
        bytes_sent,
        blobs_sent: 3,
        blobs_there: 0,
        blobs_mounted: 0,
    };
    assert_eq!(pushed, expected);
    assert_eq!(shelf.came(), node.bytes(), "no byte is sent twice");
    assert_eq!(shelf.open(), 0);
    let manifest = shelf.manifest("a/x", "1").unwrap();
    assert_eq!(Digest::of(&manifest), node.digest, "the very bytes");
    let seen = fake.seen("");
    assert!(seen.last().unwrap().path.contains("/manifests/1"), "the name comes last");

    // Again: heads of blobs, and the name.
    let again = node.push(&name).await.unwrap();
    assert_eq!((again.blobs_sent, again.blobs_there, again.bytes_sent), (0, 3, 0));
    assert_eq!(shelf.came(), node.bytes());
    // By its digest instead of a tag.
    node.push(format!("{}/a/x@{}", fake.address, node.digest)).await.unwrap();
    assert!(shelf.manifest("a/x", &node.digest.to_string()).is_some());

    let cache = tempfile::tempdir().unwrap();
    let store = Store::open(cache.path()).unwrap();
    let (turns, pace) = (Arc::new(Semaphore::new(1)), Pace::default());
    let puller = Puller { store, turns, private: Private::Any, pace };
    let request = PullRequest { reference: name, credentials: None, insecure: false };
    let pulled = puller.pull(request, &watch::Sender::new(None)).await.unwrap();
    assert_eq!(pulled.digest, node.digest);
}

#[tokio::test]
async fn one_layer_more_is_one_layer_and_a_config() {
    needs_mksquashfs!();
    let (shelf, fake) = shelf().await;
    let node = Node::new();
    node.push(format!("{}/x", fake.address)).await.unwrap();
    let mut more = layout();
    more.layers.push(Layer::new().file("more", 0o644, b"more").finish());
    let more = Node::of(&more);
    let came = shelf.came();
    let pushed = more.push(format!("{}/x:2", fake.address)).await.unwrap();
    assert_eq!((pushed.blobs_sent, pushed.blobs_there), (2, 2));
    assert_eq!(shelf.came() - came, usize::try_from(pushed.bytes_sent).unwrap());
}

#[tokio::test]
async fn what_broke_off_goes_on_where_it_stopped() {
    needs_mksquashfs!();
    let shelf = Shelf::default();
    let (answers, times) = (shelf.clone(), counter());
    let cut_at = 1 << 20;
    let fake = Fake::start_cutting(
        move |seen| answers.answer(seen),
        move |seen| (seen.method == "PATCH" && times() < 2).then_some(cut_at),
    )
    .await;
    let node = Node::new();
    let (_, size) = node.largest();
    node.push(format!("{}/x", fake.address)).await.unwrap();
    let patches: Vec<_> = fake.seen("").into_iter().filter(|s| s.method == "PATCH").collect();
    let ranges: Vec<_> = patches.iter().map(|seen| seen.header("content-range")).collect();
    let last = size - 1;
    let expected = [0, cut_at, 2 * cut_at].map(|from| format!("{from}-{last}"));
    assert_eq!(ranges, expected.each_ref().map(|range| Some(&range[..])));
    assert_eq!(shelf.came(), node.bytes(), "no byte is sent twice");

    // One that gives up says how far it came, and names nothing.
    let shelf = Shelf::default();
    let answers = shelf.clone();
    let fake = Fake::start_cutting(
        move |seen| answers.answer(seen),
        move |seen| (seen.method == "PATCH").then_some(1000),
    )
    .await;
    let error = node.refused(format!("{}/x", fake.address)).await;
    assert!(error.contains("of layer 2 of 2"), "{error}");
    assert!(shelf.manifest("x", "latest").is_none());
    assert_eq!(methods(&fake, "PATCH"), 4, "as often as it may try");
}

#[tokio::test]
async fn any_request_may_fail_once() {
    needs_mksquashfs!();
    let node = Node::new();
    // An honest push's requests.
    let (_, fake) = shelf().await;
    node.push(format!("{}/x", fake.address)).await.unwrap();
    let count = fake.seen("").len();
    assert!(count >= 12, "{count}");
    for nth in 0..count {
        for kind in ["refused", "lost before", "lost after"] {
            let shelf = Shelf::default();
            let (answers, times) = (shelf.clone(), counter());
            let fake = Fake::start(move |seen| match (times() == nth, kind) {
                (true, "refused") => Reply::new(500, ""),
                (true, "lost before") => Reply::default(),
                (true, _) => {
                    answers.answer(seen);
                    Reply::default()
                }
                (false, _) => answers.answer(seen),
            })
            .await;
            let pushed = node.push(format!("{}/x", fake.address)).await;
            let pushed = pushed.unwrap_or_else(|e| panic!("{nth} {kind}: {}", chain(&e)));
            assert_eq!(pushed.digest, node.digest);
            assert!(shelf.manifest("x", "latest").is_some(), "{nth} {kind}");
            let requests = fake.seen("").len();
            assert!(requests <= count + 5, "{nth} {kind}: {requests} for {count}");
            assert!(shelf.came() <= 2 * node.bytes(), "{nth} {kind}");
        }
    }
}

#[tokio::test]
async fn a_registry_that_takes_less_is_sent_the_rest() {
    needs_mksquashfs!();
    let shelf = Shelf::default();
    let answers = shelf.clone();
    let most = 700_000;
    let fake = Fake::start(move |seen| {
        let mut seen = seen.clone();
        if seen.method == "PATCH" {
            seen.body.truncate(most);
        }
        answers.answer(&seen)
    })
    .await;
    let node = Node::new();
    node.push(format!("{}/x", fake.address)).await.unwrap();
    assert_eq!(methods(&fake, "PATCH"), node.largest().1.div_ceil(most));
    assert_eq!(shelf.came(), node.bytes());

    // One that takes nothing is given up.
    let answers = Shelf::default();
    let fake = Fake::start(move |seen| match &seen.method[..] {
        "PATCH" => answers.answer(&Seen { body: Vec::new(), ..seen.clone() }),
        _ => answers.answer(seen),
    })
    .await;
    let error = node.refused(format!("{}/x", fake.address)).await;
    assert!(error.contains("ended the transfer of layer 2 of 2 after 0 of"), "{error}");
    assert_eq!(methods(&fake, "PATCH"), 4);
}

#[tokio::test]
async fn what_is_forgotten_begins_anew() {
    needs_mksquashfs!();
    let node = Node::new();
    for status in [404, 416] {
        let shelf = Shelf::default();
        let (answers, times) = (shelf.clone(), counter());
        let fake = Fake::start(move |seen| {
            if seen.method == "PATCH" && times() == 0 {
                answers.forget_uploads();
                return Reply::new(status, "");
            }
            answers.answer(seen)
        })
        .await;
        node.push(format!("{}/x", fake.address)).await.unwrap();
        assert!(shelf.manifest("x", "latest").is_some());
        assert_eq!(methods(&fake, "PATCH"), 2, "{status}");
    }
    // A range that is never right is not tried for ever.
    let answers = Shelf::default();
    let fake = Fake::start(move |seen| match &seen.method[..] {
        "PATCH" => Reply::new(416, r#"{"errors":[{"message":"range invalid"}]}"#),
        _ => answers.answer(seen),
    })
    .await;
    let error = node.refused(format!("{}/x", fake.address)).await;
    assert!(error.contains("answered 416") && error.contains("(range invalid)"), "{error}");
    assert_eq!(methods(&fake, "PATCH"), 2);
}

#[tokio::test]
async fn a_busy_registry_is_waited_for_but_not_for_ever() {
    needs_mksquashfs!();
    let shelf = Shelf::default();
    let (answers, times) = (shelf.clone(), counter());
    let fake = Fake::start(move |seen| match times() % 3 {
        0 => Reply::new(429, "").with("retry-after", "0"),
        _ => answers.answer(seen),
    })
    .await;
    let node = Node::new();
    node.push(format!("{}/x", fake.address)).await.unwrap();
    assert!(shelf.manifest("x", "latest").is_some());

    let answers = Shelf::default();
    let body = r#"{"errors":[{"message":"too many pushes"}]}"#;
    let fake = Fake::start(move |seen| match &seen.method[..] {
        "POST" => Reply::new(429, body).with("retry-after", "21600"),
        _ => answers.answer(seen),
    })
    .await;
    let error = node.refused(format!("{}/x", fake.address)).await;
    assert!(error.contains("again in 21600 s") && error.contains("too many pushes"), "{error}");
}

#[tokio::test]
async fn a_registry_that_names_something_else_is_not_believed() {
    needs_mksquashfs!();
    let node = Node::new();
    let answers = Shelf::default();
    let other = Digest::of(b"other").to_string();
    let said = other.clone();
    let fake = Fake::start(move |seen| {
        let mut reply = answers.answer(seen);
        if seen.method == "PUT" && seen.path.contains("/manifests/") {
            reply.headers = vec![("docker-content-digest".into(), said.clone())];
        }
        reply
    })
    .await;
    let error = node.push(format!("{}/x", fake.address)).await.unwrap_err();
    assert!(matches!(error, PushError::OtherDigest { .. }), "{error}");
    assert!(error.to_string().contains(&other), "{error}");

    let error = node.push(format!("{}/x@{other}", fake.address)).await.unwrap_err();
    assert!(matches!(error, PushError::NamedByDigest { .. }), "{error}");
}

#[tokio::test]
async fn what_a_registry_refuses_is_said_in_its_words() {
    needs_mksquashfs!();
    let node = Node::impatient();
    let said = r#"{"errors":[{"code":"DENIED","message":"no way"}]}"#;
    for (on, status, expected) in [
        ("POST", 403, "wants a login to write to x (no way): `docker login 127.0.0.1"),
        ("PUT", 403, "wants a login to write to x (no way)"),
        ("POST", 404, "no repository x that this login may write (no way)"),
        ("POST", 405, "answered 405 to the request for layer"),
        ("POST", 200, "it begins an upload with 200"),
        ("PATCH", 413, "answered 413 to the request for layer 2 of 2 (no way)"),
        ("POST", 307, "answered 307"),
        ("HEAD", 500, "answered 500"),
    ] {
        let shelf = Shelf::default();
        let answers = shelf.clone();
        let fake = Fake::start(move |seen| match seen.method == on {
            true if on == "HEAD" => Reply::new(status, ""),
            true => Reply::new(status, said).with("location", "/elsewhere"),
            false => answers.answer(seen),
        })
        .await;
        let error = node.refused(format!("{}/x", fake.address)).await;
        assert!(error.contains(expected), "{on} {status}: {error}");
        assert!(shelf.manifest("x", "latest").is_none());
    }
    let answers = Shelf::default();
    let fake = Fake::start(move |seen| match seen.method == "POST" {
        true => Reply::new(403, said),
        false if seen.header("authorization").is_none() => {
            Reply::new(401, "").with("www-authenticate", "Basic realm=\"r\"")
        }
        false => answers.answer(seen),
    })
    .await;
    let error = node.push_as(format!("{}/x", fake.address), alice("s3cret"), &[]).await;
    let error = chain(&error.unwrap_err());
    assert!(error.contains("does not let this user's docker configuration write to x"), "{error}");
    assert!(error.contains("(no way)") && !error.contains("s3cret"), "{error}");
}

#[tokio::test]
async fn a_token_that_expires_is_renewed_and_may_write() {
    needs_mksquashfs!();
    let times = counter();
    let tokens = Fake::start(move |seen| match seen.header("authorization") {
        // alice:s3cret
        Some("Basic YWxpY2U6czNjcmV0") => Reply::new(200, format!(r#"{{"token":"t{}"}}"#, times())),
        _ => Reply::new(401, ""),
    })
    .await;
    let shelf = Shelf::default();
    let (answers, realm) = (shelf.clone(), tokens.address.clone());
    let fake = Fake::start(move |seen| {
        // A token for each kind of request; they come one after the other.
        let wanted = match (&seen.method[..], seen.path.contains("/manifests/")) {
            ("PUT", true) => "Bearer t2",
            ("PATCH" | "PUT", _) => "Bearer t1",
            _ => "Bearer t",
        };
        if seen.header("authorization").is_some_and(|shown| shown.starts_with(wanted)) {
            return answers.answer(seen);
        }
        // As docker's registry says it: what one request needs, and nothing for a greeting.
        let scope = if seen.path == "/v2/" { "" } else { r#",scope="repository:x:pull""# };
        let challenge = format!(r#"Bearer realm="http://{realm}/token",service="reg"{scope}"#);
        Reply::new(401, "").with("www-authenticate", challenge)
    })
    .await;
    let node = Node::new();
    let name = format!("{}/x", fake.address);
    let base = format!("{}/base:1", fake.address);
    let pushed = node.push_as(&name, alice("s3cret"), &[&base]).await.unwrap();
    assert_eq!(pushed.blobs_sent, 3);
    assert!(shelf.manifest("x", "latest").is_some());
    let asked = tokens.seen("/token");
    assert!(asked.len() <= 4, "{} tokens", asked.len());
    for seen in &asked {
        assert!(seen.path.contains("scope=repository%3Ax%3Apull%2Cpush"), "{}", seen.path);
        assert!(seen.path.contains("scope=repository%3Abase%3Apull"), "{}", seen.path);
    }
    let error = chain(&node.push_as(&name, alice("wrong"), &[]).await.unwrap_err());
    assert!(error.contains("does not let") && !error.contains("wrong"), "{error}");
}

#[tokio::test]
async fn a_service_that_grants_all_or_nothing_is_asked_for_less() {
    needs_mksquashfs!();
    let tokens = Fake::start(|seen| match seen.path.contains("base") {
        true => Reply::new(403, ""),
        false => Reply::new(200, r#"{"token":"t"}"#),
    })
    .await;
    let shelf = Shelf::default();
    let (answers, realm) = (shelf.clone(), tokens.address.clone());
    let fake = Fake::start(move |seen| match seen.header("authorization") {
        Some("Bearer t") if !seen.path.contains("from=") => answers.answer(seen),
        _ => Reply::new(401, "")
            .with("www-authenticate", format!(r#"Bearer realm="http://{realm}/token""#)),
    })
    .await;
    let node = Node::new();
    let base = format!("{}/base:1", fake.address);
    let pushed = node.push_as(format!("{}/x", fake.address), None, &[&base]).await.unwrap();
    assert_eq!((pushed.blobs_sent, pushed.blobs_mounted), (3, 0));
    assert!(shelf.manifest("x", "latest").is_some());
}

#[tokio::test]
async fn layers_are_taken_over_where_the_registry_has_them() {
    needs_mksquashfs!();
    let (shelf, fake) = shelf().await;
    let node = Node::new();
    let (files, _) = layout().files();
    let (largest, size) = node.largest();
    let path = format!("blobs/{}", largest.replace(':', "/"));
    let bytes = &files.iter().find(|(name, _)| *name == path).unwrap().1;
    shelf.put("two", bytes);
    let names = ["one:1", "two:1", "three:1"].map(|name| format!("{}/{name}", fake.address));
    let names: Vec<_> = names.iter().map(|name| &name[..]).chain(["other.io/two:1"]).collect();
    let name = format!("{}/x", fake.address);
    let pushed = node.push_as(&name, None, &names).await.unwrap();
    assert_eq!((pushed.blobs_mounted, pushed.blobs_sent), (1, 2));
    assert_eq!(shelf.came(), node.bytes() - size, "what was taken over was not sent");
    assert_eq!(shelf.open(), 0, "uploads that were begun instead are given up");
    let asked = fake.seen("from=");
    assert!(asked.iter().all(|seen| !seen.path.contains("other")), "{asked:?}");
    assert!(asked.len() <= 9, "{}", asked.len());
    let froms: BTreeSet<_> =
        asked.iter().filter(|seen| seen.path.contains(&largest)).map(|seen| &seen.path).collect();
    assert!(froms.len() <= 2, "no further one is asked: {froms:?}");
}

#[tokio::test]
async fn an_upload_elsewhere_is_followed_without_the_login() {
    needs_mksquashfs!();
    let shelf = Shelf::default();
    let answers = shelf.clone();
    let store = Fake::start(move |seen| {
        let path = seen.path.replace("/store/", "/v2/");
        let mut reply = answers.answer(&Seen { path, ..seen.clone() });
        for (name, value) in &mut reply.headers {
            if name == "location" {
                *value = value.replace("/v2/", "/store/");
            }
        }
        reply
    })
    .await;
    let (answers, elsewhere) = (shelf.clone(), store.address.clone());
    let fake = Fake::start(move |seen| {
        if seen.header("authorization").is_none() {
            return Reply::new(401, "").with("www-authenticate", "Basic realm=\"r\"");
        }
        let mut reply = answers.answer(seen);
        for (name, value) in &mut reply.headers {
            if name == "location" {
                *value = format!("http://eve:hers@{elsewhere}{}", value.replace("/v2/", "/store/"));
            }
        }
        reply
    })
    .await;
    let node = Node::new();
    let name = format!("{}/x", fake.address);
    node.push_as(&name, alice("s3cret"), &[]).await.unwrap();
    assert!(shelf.manifest("x", "latest").is_some());
    let stored = store.seen("/store/");
    assert!(stored.len() >= 4, "{}", stored.len());
    assert!(stored.iter().all(|seen| seen.header("authorization").is_none()), "{stored:?}");
    assert_eq!(methods(&fake, "PATCH"), 0);
}

#[tokio::test]
async fn uploads_lead_nowhere_that_the_registry_may_not_reach() {
    needs_mksquashfs!();
    for (location, expected) in [
        ("http://169.254.169.254/latest/meta-data", "link-local"),
        ("file:///etc/passwd", "sends an upload to something that is not https"),
        ("http://", "sends an upload to no URL"),
        ("", "does not say where an upload goes on"),
    ] {
        let answers = Shelf::default();
        let fake = Fake::start(move |seen| match &seen.method[..] {
            "POST" if location.is_empty() => Reply::new(202, ""),
            "POST" => Reply::new(202, "").with("location", location),
            _ => answers.answer(seen),
        })
        .await;
        let error = Node::impatient().refused(format!("{}/x", fake.address)).await;
        assert!(error.contains(expected), "{location}: {error}");
    }
}

#[tokio::test]
async fn a_damaged_blob_never_arrives_whole() {
    needs_mksquashfs!();
    let node = Node::new();
    for (name, size) in &node.blobs {
        let path = node.cache.path().join("images/blobs/sha256").join(&name["sha256:".len()..]);
        let good = fs::read(&path).unwrap();
        for at in [0, size - 1] {
            let shelf = Shelf::default();
            let answers = shelf.clone();
            let fake = Fake::start(move |seen| answers.answer(seen)).await;
            let mut bad = good.clone();
            bad[at] ^= 1;
            fs::write(&path, &bad).unwrap();
            let error = node.refused(format!("{}/x", fake.address)).await;
            assert!(error.contains("is damaged on this node"), "{name} {at}: {error}");
            assert!(error.contains(path.to_str().unwrap()), "{error}");
            assert!(shelf.manifest("x", "latest").is_none());
            let put = fake.seen("digest=");
            assert!(put.iter().all(|seen| !seen.path.contains(&name["sha256:".len()..])));
        }
        fs::write(&path, &good[1..]).unwrap();
        let (shelf, fake) = shelf().await;
        let error = node.refused(format!("{}/x", fake.address)).await;
        assert!(error.contains("is damaged on this node"), "{error}");
        fs::remove_file(&path).unwrap();
        let error = node.refused(format!("{}/x", fake.address)).await;
        assert!(error.contains("is missing on this node"), "{error}");
        assert!(fake.seen("").is_empty() && shelf.blobs() == 0, "it is not even asked");
        fs::write(&path, &good).unwrap();
    }
    let (_, fake) = shelf().await;
    node.push(format!("{}/x", fake.address)).await.unwrap();
}

#[tokio::test]
async fn a_registry_that_takes_and_never_answers_is_given_up() {
    needs_mksquashfs!();
    let answers = Shelf::default();
    let fake = Fake::start(move |seen| match &seen.method[..] {
        "PATCH" => Reply { stall: Some(0), ..Reply::default() },
        _ => answers.answer(seen),
    })
    .await;
    let mut node = Node::impatient();
    node.pusher.pace.read = Duration::from_millis(200);
    node.pusher.pace.window = Duration::from_millis(200);
    node.pusher.pace.settle = Duration::from_millis(200);
    let error = node.refused(format!("{}/x", fake.address)).await;
    assert!(error.contains("is too slow: no answer to what was sent"), "{error}");
}

#[tokio::test]
async fn somebody_elses_node_reaches_listed_private_registries_only() {
    needs_mksquashfs!();
    let (_, fake) = shelf().await;
    let mut node = Node::new();
    node.pusher.private = Private::Only(Vec::new());
    let name = format!("{}/x", fake.address);
    let error = node.refused(&name).await;
    assert!(error.contains("loopback") && error.contains("private_registries"), "{error}");
    assert!(fake.seen("").is_empty(), "it is not even asked");
    node.pusher.private = Private::Only(vec![fake.address.clone()]);
    node.push(&name).await.unwrap();
}
