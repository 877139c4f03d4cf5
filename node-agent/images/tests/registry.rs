//! Pulls from a registry that dies, lies, stalls, wants a login and sends elsewhere.
#![expect(clippy::unwrap_used, reason = "a test that fails, fails here")]

use std::error::Error as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{Semaphore, watch};
use tokio_rustls::TlsAcceptor;
use towline_images::fixture::{Layer, Layout};
use towline_images::registry::{Credentials, Pace, Private, PullError, PullRequest, Puller};
use towline_images::{Imported, Store, prepare};

mod fake_registry;
use fake_registry::{Fake, Image, Reply, Seen};

macro_rules! needs_mksquashfs {
    () => {
        if std::process::Command::new("mksquashfs").arg("-version").output().is_err() {
            eprintln!("SKIPPED: mksquashfs (squashfs-tools) is not installed");
            return;
        }
    };
}

/// Two layers, the second too large for one packet.
fn layout() -> Layout {
    let mut noise = 7u32;
    let content: Vec<u8> = std::iter::repeat_with(|| {
        noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        noise.to_be_bytes()[0]
    })
    .take(300_000)
    .collect();
    let lower = Layer::new().file("lower", 0o644, b"lower").finish();
    let upper = Layer::new().file("upper", 0o644, &content).finish();
    Layout::new(vec![lower, upper])
}

struct Node {
    _cache: tempfile::TempDir,
    puller: Puller,
}

impl Node {
    fn new() -> Node {
        let cache = tempfile::tempdir().unwrap();
        let store = Store::open(cache.path()).unwrap();
        let pace = Pace {
            tries: 4,
            first_pause: Duration::from_millis(1),
            longest_pause: Duration::from_secs(30),
            ..Pace::default()
        };
        let turns = Arc::new(Semaphore::new(1));
        Node { _cache: cache, puller: Puller { store, turns, private: Private::Any, pace } }
    }

    /// One that gives up at once.
    fn impatient() -> Node {
        let mut node = Node::new();
        node.puller.pace.tries = 1;
        node
    }

    async fn pull(&self, reference: impl Into<String>) -> Result<Imported, PullError> {
        self.pull_as(reference, None).await
    }

    async fn pull_as(
        &self,
        reference: impl Into<String>,
        credentials: Option<Credentials>,
    ) -> Result<Imported, PullError> {
        let request = PullRequest { reference: reference.into(), credentials, insecure: false };
        self.puller.pull(request, &watch::Sender::new(None)).await
    }

    async fn refused(&self, reference: impl Into<String>) -> String {
        chain(&self.pull(reference).await.unwrap_err())
    }

    /// Whether the image can be used.
    fn has(&self, imported: &Imported) -> bool {
        prepare(&self.puller.store, &imported.digest, &mut |_| {}).is_ok()
    }

    fn is_empty(&self) -> bool {
        self.puller.store.list().unwrap().is_empty()
    }
}

fn chain(error: &PullError) -> String {
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

#[tokio::test]
async fn an_image_is_pulled_once_and_shared() {
    needs_mksquashfs!();
    let image = Image::new(&layout());
    let (answers, digest) = (image.clone(), image.manifest.clone());
    let fake = Fake::start(move |seen| answers.answer(seen)).await;
    let node = Node::new();
    let name = format!("{}/x", fake.address);
    let (one, two) = tokio::join!(node.pull(&name), node.pull(&name));
    let one = one.unwrap();
    assert_eq!(one, two.unwrap());
    assert_eq!((one.digest.to_string(), one.layers), (digest.clone(), 2));
    assert!(node.has(&one));
    let again = node.pull(format!("{}/x@{digest}", fake.address)).await.unwrap();
    assert_eq!(again, one);
    for (path, _) in &image.files {
        let Some(hex) = path.strip_prefix("blobs/sha256/") else { continue };
        let times = fake.seen(&format!("/v2/x/blobs/sha256:{hex}")).len();
        let is_manifest = digest.ends_with(hex);
        assert_eq!(times, usize::from(!is_manifest), "each blob is fetched once: {path}");
    }
}

#[tokio::test]
async fn what_broke_off_goes_on_where_it_stopped() {
    needs_mksquashfs!();
    let image = Image::new(&layout());
    let (largest, size) = image.largest();
    let (cut_at, times) = (size / 3, counter());
    let path = format!("/v2/x/blobs/{largest}");
    let of = path.clone();
    let fake = Fake::start(move |seen| {
        let reply = image.answer(seen);
        // The first pull's connection breaks, so does the second pull's first.
        if seen.path == of && times() < 2 { Reply { cut: Some(cut_at), ..reply } } else { reply }
    })
    .await;
    let mut node = Node::impatient();
    let name = format!("{}/x", fake.address);
    let error = node.pull(&name).await.unwrap_err();
    assert!(matches!(error, PullError::Cut { .. }), "{error}");
    assert!(node.is_empty(), "half an image is none");
    node.puller.pace.tries = 4;
    let imported = node.pull(&name).await.unwrap();
    assert!(node.has(&imported));
    let asked: Vec<_> = fake.seen(&path).iter().map(Seen::from).collect();
    assert_eq!(asked, [None, Some(cut_at), Some(2 * cut_at)]);
}

#[tokio::test]
async fn a_registry_without_ranges_begins_anew() {
    needs_mksquashfs!();
    let image = Image::new(&layout());
    let (largest, size) = image.largest();
    let times = counter();
    let fake = Fake::start(move |seen| {
        if !seen.path.ends_with(&largest) {
            return image.answer(seen);
        }
        let reply = Reply::new(200, image.blob(&largest).unwrap());
        if times() == 0 { Reply { cut: Some(size - 10), ..reply } } else { reply }
    })
    .await;
    let node = Node::new();
    let imported = node.pull(format!("{}/x", fake.address)).await.unwrap();
    assert!(node.has(&imported));
}

#[tokio::test]
async fn a_wrong_range_is_not_believed() {
    needs_mksquashfs!();
    let image = Image::new(&layout());
    let (largest, size) = image.largest();
    let times = counter();
    let fake = Fake::start(move |seen| {
        let reply = image.answer(seen);
        match seen.path.ends_with(&largest).then(&times) {
            Some(0) => Reply { cut: Some(1000), ..reply },
            Some(1) => Reply::new(206, &image.blob(&largest).unwrap()[500..])
                .with("content-range", format!("bytes 500-{}/{size}", size - 1)),
            _ => reply,
        }
    })
    .await;
    let node = Node::new();
    let imported = node.pull(format!("{}/x", fake.address)).await.unwrap();
    assert!(node.has(&imported));
}

#[tokio::test]
async fn a_damaged_beginning_is_fetched_anew() {
    needs_mksquashfs!();
    let image = Image::new(&layout());
    let (largest, size) = image.largest();
    let fake = Fake::start(move |seen| image.answer(seen)).await;
    let node = Node::new();
    let partial = node._cache.path().join("images/partial").join(&largest["sha256:".len()..]);
    std::fs::write(&partial, vec![0; size / 2]).unwrap();
    let imported = node.pull(format!("{}/x", fake.address)).await.unwrap();
    assert!(node.has(&imported));
    assert!(!partial.exists());
    let asked: Vec<_> = fake.seen(&largest).iter().map(Seen::from).collect();
    assert_eq!(asked, [Some(size / 2), None]);
}

#[tokio::test]
async fn lies_are_named_and_leave_nothing() {
    needs_mksquashfs!();
    let image = Image::new(&layout());
    let (largest, size) = image.largest();
    let times = counter();
    let fake = Fake::start(move |seen| {
        let mut reply = image.answer(seen);
        match seen.path.ends_with(&largest).then(&times) {
            Some(0) => reply.body[size / 2] ^= 1,
            Some(1) => reply = Reply::new(200, [&reply.body[..], b"more"].concat()),
            _ => {}
        }
        reply
    })
    .await;
    let node = Node::impatient();
    let name = format!("{}/x", fake.address);
    let error = node.refused(&name).await;
    assert!(error.contains("layer 2 of 2 does not have the content that its digest"), "{error}");
    let error = node.refused(&name).await;
    assert!(error.contains("more than the"), "{error}");
    assert!(node.is_empty());
    let imported = node.pull(&name).await.unwrap();
    assert!(node.has(&imported));
}

#[tokio::test]
async fn manifests_are_not_trusted() {
    let image = Image::new(&layout());
    let index = |platform: &str| {
        format!(
            r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"application/vnd.oci.image.manifest.v1+json","size":2,"digest":"sha256:{}","platform":{{"os":"linux","architecture":"{platform}"}}}}]}}"#,
            "a".repeat(64)
        )
    };
    let cases: Vec<(Reply, &str)> = vec![
        (Reply::new(200, "{}"), "neither an image nor an index"),
        (Reply::new(200, r#"{"schemaVersion":1,"fsLayers":[]}"#), "schema 1"),
        (Reply::new(200, index("s390x")), "the image is for linux/s390x; this node runs"),
        (
            Reply::new(200, r#"{"schemaVersion":2,"manifests":[],"layers":[]}"#),
            "an index and an image at once",
        ),
        (
            Reply::new(200, "{}").with("docker-content-digest", image.manifest.clone()),
            "sent something else than sha256:",
        ),
        (Reply::new(200, vec![b' '; (4 << 20) + 1]), "its manifest has more than 4194304 bytes"),
        (Reply::new(200, "").with("content-length", "x"), "could not reach the registry"),
        (Reply::new(404, ""), "has no manifest latest of x"),
        (
            Reply::new(403, r#"{"errors":[{"message":"no way"}]}"#),
            "wants a login, or has no such image (no way): `docker login 127.0.0.1",
        ),
    ];
    for (reply, expected) in cases {
        let fake = Fake::start(move |seen| match seen.path.contains("manifests") {
            true => reply.clone(),
            false => Reply::new(200, "{}"),
        })
        .await;
        let error = Node::impatient().refused(format!("{}/x", fake.address)).await;
        assert!(error.contains(expected), "{expected}: {error}");
    }
    // One that is named by its digest is asked for by it, and must be it.
    let fake = Fake::start(move |seen| match seen.path.contains("manifests") {
        true => Reply::new(200, r#"{"schemaVersion":2,"layers":[]}"#),
        false => Reply::new(200, "{}"),
    })
    .await;
    let error = Node::new().refused(format!("{}/x@{}", fake.address, image.manifest)).await;
    assert!(error.contains(&format!("something else than {}", image.manifest)), "{error}");
}

#[tokio::test]
async fn a_token_goes_to_the_registry_and_nowhere_else() {
    needs_mksquashfs!();
    let image = Image::new(&layout());
    let store = {
        let image = image.clone();
        Fake::start(move |seen| {
            let path = seen.path.replace("/store/", "/v2/x/blobs/");
            image.answer(&Seen { path, ..seen.clone() })
        })
        .await
    };
    let tokens = Fake::start(|seen| match seen.header("authorization") {
        // alice:s3cret
        Some("Basic YWxpY2U6czNjcmV0") => Reply::new(200, r#"{"token":"t0ken"}"#),
        _ => Reply::new(401, ""),
    })
    .await;
    let (elsewhere, realm) = (store.address.clone(), tokens.address.clone());
    let fake = Fake::start(move |seen| {
        if seen.header("authorization") != Some("Bearer t0ken") {
            let challenge = format!(
                r#"Bearer realm="http://{realm}/token",service="reg",scope="repository:x:pull""#
            );
            return Reply::new(401, "").with("www-authenticate", challenge);
        }
        match seen.path.strip_prefix("/v2/x/blobs/") {
            Some(digest) => {
                Reply::new(307, "").with("location", format!("http://{elsewhere}/store/{digest}"))
            }
            None => image.answer(seen),
        }
    })
    .await;
    let node = Node::new();
    let name = format!("{}/x", fake.address);
    let error = chain(&node.pull_as(&name, alice("wrong")).await.unwrap_err());
    assert!(error.contains("does not accept the credentials"), "{error}");
    assert!(!error.contains("wrong"), "{error}");
    let error = node.refused(&name).await;
    assert!(error.contains("wants a login"), "{error}");
    let imported = node.pull_as(&name, alice("s3cret")).await.unwrap();
    assert!(node.has(&imported));
    let asked = tokens.seen("/token");
    assert!(asked[0].path.contains("scope=repository%3Ax%3Apull"), "{}", asked[0].path);
    assert!(asked[0].path.contains("service=reg"), "{}", asked[0].path);
    let stored = store.seen("/store/");
    assert_eq!(stored.len(), 3, "config and two layers");
    assert!(stored.iter().all(|seen| seen.header("authorization").is_none()), "{stored:?}");
}

#[tokio::test]
async fn an_identity_token_is_exchanged_and_an_old_token_renewed() {
    needs_mksquashfs!();
    let image = Image::new(&layout());
    let times = counter();
    let tokens = Fake::start(move |seen| {
        let good = seen.method == "POST"
            && seen.text().contains("grant_type=refresh_token")
            && seen.text().contains("refresh_token=r3fresh");
        match good {
            true => Reply::new(200, format!(r#"{{"access_token":"t{}"}}"#, times())),
            false => Reply::new(401, ""),
        }
    })
    .await;
    let realm = tokens.address.clone();
    let fake = Fake::start(move |seen| {
        // Each part of the protocol wants a younger token.
        let wanted = if seen.path.contains("/blobs/") { "Bearer t1" } else { "Bearer t0" };
        if seen.header("authorization") == Some(wanted) {
            return image.answer(seen);
        }
        let challenge = format!(r#"Bearer realm="http://{realm}/token",service="reg""#);
        Reply::new(401, "").with("www-authenticate", challenge)
    })
    .await;
    let node = Node::new();
    let identity = Some(Credentials::Identity("r3fresh".into()));
    let imported = node.pull_as(format!("{}/x", fake.address), identity).await.unwrap();
    assert!(node.has(&imported));
    assert_eq!(tokens.seen("/token").len(), 2, "three blobs at once renew one token");
}

#[tokio::test]
async fn a_password_is_shown_only_when_asked_for() {
    needs_mksquashfs!();
    let image = Image::new(&layout());
    let fake = Fake::start(move |seen| match seen.header("authorization") {
        Some("Basic YWxpY2U6czNjcmV0") => image.answer(seen),
        _ => Reply::new(401, "").with("www-authenticate", "Basic realm=\"Registry\""),
    })
    .await;
    let node = Node::new();
    let name = format!("{}/x", fake.address);
    let imported = node.pull_as(&name, alice("s3cret")).await.unwrap();
    assert!(node.has(&imported));
    assert_eq!(fake.seen("/v2/")[0].header("authorization"), None);
    let error = chain(&node.pull_as(&name, alice("wrong")).await.unwrap_err());
    assert!(error.contains("does not accept the credentials"), "{error}");
    let error = node.refused(&name).await;
    assert!(error.contains(&format!("`docker login {}`", fake.address)), "{error}");
}

#[tokio::test]
async fn a_busy_registry_is_waited_for_but_not_for_ever() {
    needs_mksquashfs!();
    let image = Image::new(&layout());
    let times = counter();
    let answers = image.clone();
    let fake = Fake::start(move |seen| match times() % 4 {
        0 => Reply::new(503, ""),
        1 => Reply::new(429, "").with("retry-after", "0"),
        _ => answers.answer(seen),
    })
    .await;
    let node = Node::new();
    let imported = node.pull(format!("{}/x", fake.address)).await.unwrap();
    assert!(node.has(&imported));

    let body = r#"{"errors":[{"code":"TOOMANYREQUESTS","message":"pull rate limit"}]}"#;
    let fake = Fake::start(move |_| Reply::new(429, body).with("retry-after", "21600")).await;
    let error = node.refused(format!("{}/x", fake.address)).await;
    assert!(error.contains("again in 21600 s") && error.contains("pull rate limit"), "{error}");
    assert_eq!(fake.seen("/v2/").len(), 1);

    let fake = Fake::start(|_| Reply::new(500, "")).await;
    let error = node.refused(format!("{}/x", fake.address)).await;
    assert!(error.contains("answered 500"), "{error}");
}

#[tokio::test]
async fn redirects_lead_nowhere_that_the_registry_may_not_reach() {
    for (location, expected) in [
        ("http://169.254.169.254/latest/meta-data", "link-local"),
        ("http://[fe80::1]/x", "link-local"),
        ("file:///etc/passwd", "something that is not https"),
        ("/v2/x/manifests/latest", "redirects without end"),
        ("http://", "redirects to no URL"),
    ] {
        let fake = Fake::start(move |seen| match seen.path.contains("manifests") {
            true => Reply::new(302, "").with("location", location),
            false => Reply::new(200, "{}"),
        })
        .await;
        let error = Node::new().refused(format!("{}/x", fake.address)).await;
        assert!(error.contains(expected), "{location}: {error}");
        assert!(fake.seen("manifests").len() <= 6, "{location}");
    }
}

#[tokio::test]
async fn a_token_service_may_not_be_anywhere_either() {
    for (realm, expected) in [
        ("http://169.254.169.254/token", "link-local"),
        ("gopher://x/", "not reached by https"),
        ("here", "no URL"),
    ] {
        let fake = Fake::start(move |_| {
            Reply::new(401, "").with("www-authenticate", format!("Bearer realm=\"{realm}\""))
        })
        .await;
        let error = Node::new().refused(format!("{}/x", fake.address)).await;
        assert!(error.contains(expected), "{realm}: {error}");
    }
}

#[tokio::test]
async fn somebody_elses_node_reaches_listed_private_registries_only() {
    let fake = Fake::start(|_| Reply::new(404, "")).await;
    let mut node = Node::new();
    node.puller.private = Private::Only(Vec::new());
    let name = format!("{}/x", fake.address);
    let error = node.refused(&name).await;
    assert!(error.contains("loopback") && error.contains("private_registries"), "{error}");
    assert!(fake.seen("").is_empty(), "it is not even asked");
    node.puller.private = Private::Only(vec![fake.address.clone()]);
    let error = node.refused(&name).await;
    assert!(error.contains("has no manifest"), "{error}");
    // Metadata services are nobody's registry.
    let error = Node::new().refused("169.254.169.254/x").await;
    assert!(error.contains("link-local"), "{error}");
}

#[tokio::test]
async fn a_stalled_registry_is_given_up() {
    let image = Image::new(&layout());
    let (largest, _) = image.largest();
    let fake = Fake::start(move |seen| {
        let stall = seen.path.ends_with(&largest).then_some(1000);
        Reply { stall, ..image.answer(seen) }
    })
    .await;
    let mut node = Node::impatient();
    node.puller.pace.read = Duration::from_millis(300);
    let error = node.pull(format!("{}/x", fake.address)).await.unwrap_err();
    assert!(matches!(error, PullError::Slow { .. }), "{}", chain(&error));
}

#[tokio::test]
async fn an_unknown_certificate_is_said_and_not_gone_round() {
    let signed = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let key =
        rustls_pki_types::PrivateKeyDer::try_from(signed.signing_key.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![signed.cert.der().clone()], key)
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let fake = Fake::start_tls(acceptor, |_| Reply::new(200, "{}")).await;
    let error = Node::new().refused(format!("{}/x", fake.address)).await;
    assert!(error.contains("certificate of 127.0.0.1"), "{error}");
    assert!(fake.seen("").is_empty(), "nothing was said to it");
}

#[tokio::test]
async fn nobody_there_is_said() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let error = Node::impatient().refused(format!("{address}/x")).await;
    assert!(error.contains(&format!("could not reach the registry {address}")), "{error}");
}
