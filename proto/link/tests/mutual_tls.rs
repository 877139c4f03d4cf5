//! Who may speak with whom, over real connections: gRPC's TLS, the Unix socket, enrolment by pin,
//! and a certificate that is replaced while the server runs.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use common::{HOUR, authority, good, leaf};
use tokio::net::{TcpListener, UnixListener};
use towline_link::authority::CertificateAuthority;
use towline_link::enroll::{self, JoinToken};
use towline_link::identity::{Identity, LeafKey, Role};
use towline_link::peer::Peer;
use towline_link::rpc::{self, Listener, Routes};
use towline_link::status::RpcError;
use towline_link::tls::{self, ALPN_H2, CertStore, ClientAuth, Trust};
use towline_proto::ids::TokenId;
use towline_proto::v1::*;

/// A control plane that enrols, says who is asking, and refuses the rest.
struct Fake {
    ca: Arc<CertificateAuthority>,
    seen: Arc<Mutex<Vec<Peer>>>,
}

type Answer<T> = Result<tonic::Response<T>, tonic::Status>;

/// Writes what `async_trait` would have written: it does not look into macros.
macro_rules! unserved {
    ($($name:ident: $request:ty => $response:ty),* $(,)?) => {
        $(fn $name<'s, 'f>(
            &'s self,
            _: tonic::Request<$request>,
        ) -> std::pin::Pin<Box<dyn Future<Output = Answer<$response>> + Send + 'f>>
        where
            's: 'f,
            Self: 'f,
        {
            Box::pin(async { Err(RpcError::refused("not served by the fake").into()) })
        })*
    };
}

#[tonic::async_trait]
impl rpc::ControlPlane for Fake {
    type WatchSandboxStream = tokio_stream::Empty<Result<Sandbox, tonic::Status>>;

    async fn enroll(&self, request: tonic::Request<EnrollRequest>) -> Answer<EnrollResponse> {
        let request = request.into_inner();
        let token = request.token.parse::<JoinToken>();
        if token.is_ok_and(|token| token.secret != "good") {
            return Err(RpcError::Unauthenticated("the token is unknown".into()).into());
        }
        let cluster = self.ca.certificate().cluster();
        let identity = Identity::new(cluster, Role::User, &request.name)
            .map_err(|e| RpcError::Invalid(e.to_string()))?;
        let certificate_pem = self
            .ca
            .issue(&request.csr_pem, &identity, SystemTime::now(), HOUR)
            .map_err(|e| RpcError::Invalid(e.to_string()))?;
        Ok(tonic::Response::new(EnrollResponse {
            certificate_pem,
            ca_pem: self.ca.certificate_pem().into(),
            identity: identity.to_string(),
            cluster_id: cluster.into(),
        }))
    }

    async fn get_cluster_status(
        &self,
        request: tonic::Request<GetClusterStatusRequest>,
    ) -> Answer<ClusterStatus> {
        let peer = request.extensions().get::<Peer>().cloned().unwrap();
        let known = peer.identity.is_some() || peer.uid.is_some();
        self.seen.lock().unwrap().push(peer);
        if !known {
            return Err(RpcError::Unauthenticated("show a certificate".into()).into());
        }
        Ok(tonic::Response::new(ClusterStatus { version: "fake".into(), ..Default::default() }))
    }

    async fn watch_sandbox(
        &self,
        _: tonic::Request<GetSandboxRequest>,
    ) -> Answer<Self::WatchSandboxStream> {
        Err(RpcError::NotFound("there is no sandbox `x`".into()).into())
    }

    unserved! {
        renew_certificate: RenewCertificateRequest => EnrollResponse,
        create_token: CreateTokenRequest => CreateTokenResponse,
        revoke_token: RevokeTokenRequest => RevokeTokenResponse,
        create_sandbox: CreateSandboxRequest => Sandbox,
        fork_sandbox: ForkSandboxRequest => ForkSandboxResponse,
        get_sandbox: GetSandboxRequest => Sandbox,
        list_sandboxes: ListSandboxesRequest => ListSandboxesResponse,
        set_desired: SetDesiredRequest => Sandbox,
        set_expiry: SetExpiryRequest => Sandbox,
        resize_sandbox: ResizeSandboxRequest => Sandbox,
        issue_ticket: IssueTicketRequest => IssueTicketResponse,
        put_image: PutImageRequest => Image,
        list_images: ListImagesRequest => ListImagesResponse,
        delete_image: DeleteImageRequest => DeleteImageResponse,
        list_nodes: ListNodesRequest => ListNodesResponse,
    }
}

struct Server {
    endpoint: String,
    seen: Arc<Mutex<Vec<Peer>>>,
    _task: tokio::task::JoinSet<()>,
}

async fn serve(ca: &Arc<CertificateAuthority>, store: &CertStore, auth: ClientAuth) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = listener.local_addr().unwrap().to_string();
    let config = tls::server_config(store, ca.certificate(), auth, &[ALPN_H2]).unwrap();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let fake = Fake { ca: Arc::clone(ca), seen: Arc::clone(&seen) };
    let mut task = tokio::task::JoinSet::new();
    task.spawn(async move {
        let routes = Routes::new(rpc::control_plane_server(fake));
        rpc::serve(Listener::Tcp(listener, config), routes, std::future::pending()).await.unwrap();
    });
    Server { endpoint, seen, _task: task }
}

/// One call as whoever `client` is, to a server that should be `ca`'s `role`.
async fn ask(
    server: &Server,
    client: Option<&CertStore>,
    trust: Trust,
    role: Role,
) -> Result<ClusterStatus, String> {
    let config = tls::client_config(client, trust, role, &[ALPN_H2]).unwrap();
    let channel = rpc::connect(&server.endpoint, config).await.map_err(chain)?;
    let answer = rpc::control_plane(channel).get_cluster_status(GetClusterStatusRequest {}).await;
    answer.map(tonic::Response::into_inner).map_err(|e| RpcError::from(e).to_string())
}

fn chain(error: impl std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text += &format!(": {error}");
        source = error.source();
    }
    text
}

fn trust(ca: &CertificateAuthority) -> Trust {
    Trust::Ca(ca.certificate().clone())
}

#[tokio::test]
async fn members_and_users_of_one_cluster_meet() {
    let ca = Arc::new(authority("cluster_a"));
    let server = serve(&ca, &good(&ca, Role::Member), ClientAuth::Required).await;
    let user = good(&ca, Role::User);
    ask(&server, Some(&user), trust(&ca), Role::Member).await.unwrap();
    let peer = server.seen.lock().unwrap()[0].clone();
    assert_eq!(peer.identity.unwrap().to_string(), "spiffe://cluster_a/user/ada");
    assert_eq!(peer.spki_sha256, Some(user.info().spki_sha256));
    assert_eq!(peer.not_after, Some(user.info().not_after));
    assert_eq!(peer.uid, None);
}

#[tokio::test]
async fn a_client_refuses_servers_that_are_not_what_they_should_be() {
    let ca = Arc::new(authority("cluster_a"));
    let other = Arc::new(authority("cluster_a"));
    let user = good(&ca, Role::User);
    let past = SystemTime::now() - 10 * HOUR;
    for (store, role, words) in [
        (good(&ca, Role::Node), Role::Member, "is not a member"),
        (good(&ca, Role::User), Role::Member, "UnknownIssuer|RequiredEku|not valid for|usage"),
        (good(&other, Role::Member), Role::Member, "BadSignature"),
        (leaf(&ca, "cluster_b", Role::Member, SystemTime::now(), HOUR), Role::Member, "not of"),
        (leaf(&ca, "cluster_a", Role::Member, past, HOUR), Role::Member, "expired"),
    ] {
        let server = serve(&ca, &store, ClientAuth::Optional).await;
        let error = ask(&server, Some(&user), trust(&ca), role).await.unwrap_err();
        assert!(words.split('|').any(|w| error.contains(w)), "`{error}` lacks `{words}`");
        assert!(server.seen.lock().unwrap().is_empty());
    }
}

#[tokio::test]
async fn a_server_refuses_clients_of_others_expired_ones_and_none() {
    let ca = Arc::new(authority("cluster_a"));
    let other = authority("cluster_a");
    let server = serve(&ca, &good(&ca, Role::Member), ClientAuth::Required).await;
    let past = SystemTime::now() - 10 * HOUR;
    for client in [
        None,
        Some(good(&other, Role::User)),
        Some(leaf(&ca, "cluster_b", Role::User, SystemTime::now(), HOUR)),
        Some(leaf(&ca, "cluster_a", Role::User, past, HOUR)),
    ] {
        ask(&server, client.as_ref(), trust(&ca), Role::Member).await.unwrap_err();
    }
    assert!(server.seen.lock().unwrap().is_empty(), "no refused client reaches the service");
}

#[tokio::test]
async fn enrolment_by_pin_gives_an_identity_that_works() {
    let ca = Arc::new(authority("cluster_a"));
    let server = serve(&ca, &good(&ca, Role::Member), ClientAuth::Optional).await;
    let pin = Trust::from_pin(&ca.pin()).unwrap();

    // Without a certificate the service itself must refuse, and does.
    let error = ask(&server, None, pin.clone(), Role::Member).await.unwrap_err();
    assert_eq!(error, "show a certificate");

    let token = |secret: &str, pin| JoinToken {
        id: TokenId::from_bytes([1; 16]),
        secret: secret.into(),
        pin,
    };
    let Trust::Pin(digest) = pin else { unreachable!() };
    let error = enroll::enroll(&server.endpoint, &token("bad", digest), "grace").await.unwrap_err();
    assert_eq!(error.to_string(), "the control plane refused: the token is unknown");
    let error = enroll::enroll(&server.endpoint, &token("good", digest), "../x").await.unwrap_err();
    assert!(error.to_string().contains("is not a name"), "{error}");
    let enrolled = enroll::enroll(&server.endpoint, &token("good", digest), "grace").await.unwrap();
    assert_eq!(enrolled.identity.to_string(), "spiffe://cluster_a/user/grace");
    let store = enrolled.store().unwrap();
    ask(&server, Some(&store), trust(&ca), Role::Member).await.unwrap();
    let error = enroll::enroll(&server.endpoint, &token("good", [0; 32]), "x").await.unwrap_err();
    assert!(chain(error).contains("not of the cluster that the token is for"));

    let wrong = Trust::from_pin(&authority("cluster_a").pin()).unwrap();
    let error = ask(&server, None, wrong, Role::Member).await.unwrap_err();
    assert!(error.contains("not of the cluster that the token is for"), "{error}");
    assert!(Trust::from_pin("xyz").is_err() && Trust::from_pin(&"é".repeat(32)).is_err());
}

#[tokio::test]
async fn a_replaced_certificate_is_used_without_a_restart() {
    let ca = Arc::new(authority("cluster_a"));
    let past = SystemTime::now() - 10 * HOUR;
    let store = leaf(&ca, "cluster_a", Role::Member, past, HOUR);
    let server = serve(&ca, &store, ClientAuth::Required).await;
    let user = good(&ca, Role::User);
    ask(&server, Some(&user), trust(&ca), Role::Member).await.unwrap_err();
    let key = LeafKey::generate().unwrap();
    let identity = Identity::new("cluster_a", Role::Member, "m1").unwrap();
    let pem = ca.issue(&key.csr_pem().unwrap(), &identity, SystemTime::now(), HOUR).unwrap();
    store.replace(&pem, &key.to_pem(), ca.certificate()).unwrap();
    ask(&server, Some(&user), trust(&ca), Role::Member).await.unwrap();
    assert!(!store.wants_renewal(SystemTime::now()));
    assert!(store.wants_renewal(SystemTime::now() + HOUR.mul_f32(0.6)));
    assert!(
        store.replace(&pem, &LeafKey::generate().unwrap().to_pem(), ca.certificate()).is_err(),
        "a key that is not the certificate's is refused"
    );
}

#[tokio::test]
async fn a_unix_socket_tells_the_uid_and_errors_keep_their_text() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("admin.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let ca = Arc::new(authority("cluster_a"));
    let seen = Arc::new(Mutex::new(Vec::new()));
    let fake = Fake { ca, seen: Arc::clone(&seen) };
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let server = tokio::spawn(async move {
        let routes = Routes::new(rpc::control_plane_server(fake));
        rpc::serve(Listener::Unix(listener), routes, async {
            let _ = stopped.await;
        })
        .await
    });
    let mut client = rpc::control_plane(rpc::connect_unix(&path).await.unwrap());
    client.get_cluster_status(GetClusterStatusRequest {}).await.unwrap();
    let uid = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(&path).unwrap());
    assert_eq!(seen.lock().unwrap()[0].uid, Some(uid));
    let error = client.create_sandbox(CreateSandboxRequest::default()).await.unwrap_err();
    assert_eq!(RpcError::from(error), RpcError::refused("not served by the fake"));
    let error = client.watch_sandbox(GetSandboxRequest::default()).await.unwrap_err();
    assert_eq!(RpcError::from(error), RpcError::NotFound("there is no sandbox `x`".into()));
    stop.send(()).unwrap();
    tokio::time::timeout(Duration::from_secs(10), server).await.unwrap().unwrap().unwrap();
    let error = client.get_cluster_status(GetClusterStatusRequest {}).await.unwrap_err();
    assert!(RpcError::from(error).may_retry(), "a server that left may come back");
}

#[test]
fn the_authority_survives_a_restart_and_keeps_its_key_private() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let ca = authority("cluster_a");
    ca.save(dir.path()).unwrap();
    let again = CertificateAuthority::load(dir.path()).unwrap();
    assert_eq!((again.pin(), again.certificate().cluster()), (ca.pin(), "cluster_a"));
    let key = dir.path().join("ca.key");
    assert_eq!(std::fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o640)).unwrap();
    let error = CertificateAuthority::load(dir.path()).unwrap_err();
    assert!(error.to_string().contains("chmod 600"), "{error}");
}

#[test]
fn a_requests_own_wishes_are_ignored() {
    let ca = authority("cluster_a");
    let key = rcgen::KeyPair::generate().unwrap();
    let mut parameters =
        rcgen::CertificateParams::new(vec!["control-plane.example".to_owned()]).unwrap();
    let uri = "spiffe://cluster_a/operator/root".try_into().unwrap();
    parameters.subject_alt_names.push(rcgen::SanType::URI(uri));
    parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let request = parameters.serialize_request(&key).unwrap().pem().unwrap();
    let identity = Identity::new("cluster_a", Role::User, "mallory").unwrap();
    let pem = ca.issue(&request, &identity, SystemTime::now(), HOUR).unwrap();
    let info = towline_link::identity::CertificateInfo::from_pem(&pem).unwrap();
    assert_eq!(info.identity, identity);
    let (_, der) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).unwrap();
    let certificate = der.parse_x509().unwrap();
    assert!(!certificate.is_ca());
    let names = certificate.subject_alternative_name().unwrap().unwrap();
    assert_eq!(names.value.general_names.len(), 1);
}
