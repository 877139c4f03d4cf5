//! The real binary, seen from its sockets: sandboxes, identity, tickets, refusals, restarts.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail the test")]

mod common;

use common::{FakeNode, LONG, Server, by_id, key, list, set, spec, until};
use tonic::Code;
use towline_link::enroll::{self, JoinToken};
use towline_link::identity::Role;
use towline_link::rpc;
use towline_link::ticket::{TicketContext, TicketVerifier};
use towline_link::tls::{ALPN_H2, Trust, client_config};
use towline_proto::ids::NodeId;
use towline_proto::v1::{self, Desired, Phase, TokenRole};

const GIB: u64 = 1024;

fn create(name: &str) -> v1::CreateSandboxRequest {
    v1::CreateSandboxRequest { idempotency_key: key(), spec: Some(spec(name)) }
}

/// Waits until the node has registered.
async fn node_is_there(client: &mut rpc::ControlPlaneClient<tonic::transport::Channel>) {
    let wait = async {
        while client
            .list_nodes(v1::ListNodesRequest {})
            .await
            .unwrap()
            .into_inner()
            .nodes
            .is_empty()
        {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(LONG, wait).await.expect("the node registers");
}

#[tokio::test]
async fn a_sandbox_lives_stops_starts_and_goes() {
    let server = Server::start().await;
    let mut client = server.client().await;
    let refused = client.create_sandbox(create("a")).await.unwrap_err();
    assert!(refused.message().contains("no node yet"), "{refused}");
    let node = FakeNode::start(server.socket(), 64 * GIB);
    node_is_there(&mut client).await;

    let request = create("");
    let made = client.create_sandbox(request.clone()).await.unwrap().into_inner();
    let again = client.create_sandbox(request.clone()).await.unwrap().into_inner();
    assert_eq!(made.id, again.id, "the same key is the same sandbox");
    let other = v1::CreateSandboxRequest { spec: Some(spec("b")), ..request };
    let refused = client.create_sandbox(other).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    let shape = made.spec.as_ref().unwrap().shape.unwrap();
    assert_eq!((shape.cpus, shape.processes_max), (4, 4096), "the shape is complete");
    assert!(made.spec.as_ref().unwrap().name.contains('-'), "it got a name");

    let phase = |wanted: Phase| {
        move |s: &v1::Sandbox| {
            s.observed.as_ref().is_some_and(|o| o.phase() == wanted && o.generation == s.generation)
        }
    };
    until(&mut client, &made.id, phase(Phase::Running)).await;
    client.set_desired(set(&made.id, Desired::Stopped)).await.unwrap();
    until(&mut client, &made.id, phase(Phase::Stopped)).await;
    client.set_desired(set(&made.id, Desired::Running)).await.unwrap();
    let running = until(&mut client, &made.id, phase(Phase::Running)).await;
    assert_eq!(running.generation, 3);
    client.set_desired(set(&made.id, Desired::Deleted)).await.unwrap();
    // A watch that comes too late finds nothing; one that is there sees it go.
    let gone = async {
        while client.get_sandbox(by_id(&made.id)).await.is_ok() {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(LONG, gone).await.expect("the record goes");
    assert!(node.has.lock().unwrap().is_empty());
    let nodes = client.list_nodes(v1::ListNodesRequest {}).await.unwrap().into_inner().nodes;
    assert_eq!(nodes[0].reserved, Some(v1::Capacity::default()), "nothing stays reserved");
}

#[tokio::test]
async fn refusals_say_what_would_change_them() {
    let server = Server::start().await;
    let mut client = server.client().await;
    let _node = FakeNode::start(server.socket(), 18 * GIB);
    node_is_there(&mut client).await;
    let mut request = create("big");
    request.spec.as_mut().unwrap().shape.as_mut().unwrap().memory_mib = 64 * GIB;
    let refused = client.create_sandbox(request).await.unwrap_err();
    assert!(
        refused.message().contains("no node has 64 GiB of memory free; the largest has 18 GiB")
    );
    let mut request = create("net");
    request.spec.as_mut().unwrap().policy = "web".into();
    let refused = client.create_sandbox(request).await.unwrap_err();
    assert!(refused.message().contains("there is no policy `web`"), "{refused}");
    let mut request = create("img");
    let source = Some(v1::image_ref::Source::Oci("nosuch:1".into()));
    request.spec.as_mut().unwrap().image = Some(v1::ImageRef { source });
    let refused = client.create_sandbox(request).await.unwrap_err();
    assert!(refused.message().contains("tow image import"), "{refused}");
    client.create_sandbox(create("one")).await.unwrap();
    let refused = client.create_sandbox(create("one")).await.unwrap_err();
    assert!(refused.message().contains("is taken by sbx_"), "{refused}");
}

async fn enrolled(
    server: &Server,
    role: TokenRole,
    name: &str,
) -> (enroll::Enrolled, rpc::ControlPlaneClient<tonic::transport::Channel>) {
    let mut admin = server.client().await;
    let request = v1::CreateTokenRequest {
        idempotency_key: key(),
        role: role.into(),
        ttl_s: 600,
        uses_max: 1,
        ..Default::default()
    };
    let first = admin.create_token(request.clone()).await.unwrap().into_inner();
    let second = admin.create_token(request).await.unwrap().into_inner();
    assert_eq!(first.token, second.token, "the same key is the same token");
    let token: JoinToken = first.token.parse().unwrap();
    let enrolled = enroll::enroll(&server.endpoint(), &token, name).await.unwrap();
    let spent = enroll::enroll(&server.endpoint(), &token, "eve").await.unwrap_err();
    assert!(format!("{spent:?}").contains("used up"), "{spent:?}");
    let store = enrolled.store().unwrap();
    let trust = Trust::Ca(enrolled.ca.clone());
    let tls = client_config(Some(&store), trust, Role::Member, &[ALPN_H2]).unwrap();
    let channel = rpc::connect(&server.endpoint(), tls).await.unwrap();
    (enrolled, rpc::control_plane(channel))
}

#[tokio::test]
async fn users_see_their_own_and_get_tickets_for_it() {
    let server = Server::start().await;
    let mut admin = server.client().await;
    let _node = FakeNode::start(server.socket(), 64 * GIB);
    node_is_there(&mut admin).await;
    let (ada, mut ada_client) = enrolled(&server, TokenRole::User, "ada").await;
    let (_, mut bob_client) = enrolled(&server, TokenRole::User, "bob").await;
    let made = ada_client.create_sandbox(create("hers")).await.unwrap().into_inner();
    assert_eq!(made.owner, "ada");
    let code = |status: tonic::Status| status.code();
    assert_eq!(
        bob_client.get_sandbox(by_id(&made.id)).await.map_err(code).err(),
        Some(Code::NotFound)
    );
    let stop = set(&made.id, Desired::Stopped);
    assert_eq!(bob_client.set_desired(stop).await.map_err(code).err(), Some(Code::NotFound));
    assert!(list(&mut bob_client).await.is_empty());
    assert_eq!(list(&mut ada_client).await.len(), 1);
    assert_eq!(list(&mut admin).await.len(), 1);
    let token = v1::CreateTokenRequest { idempotency_key: key(), ..Default::default() };
    assert_eq!(
        bob_client.create_token(token).await.map_err(code).err(),
        Some(Code::Unauthenticated)
    );

    let ask = v1::IssueTicketRequest { sandbox_id: made.id.clone(), ..Default::default() };
    assert!(bob_client.issue_ticket(ask.clone()).await.is_err());
    assert!(admin.issue_ticket(ask.clone()).await.is_err(), "no certificate to bind it to");
    let ticket = ada_client.issue_ticket(ask).await.unwrap().into_inner();
    assert_eq!(ticket.link_endpoint, "127.0.0.1:7");
    let key_file = std::fs::read_to_string(server.data().join("ticket.key")).unwrap();
    let bytes: Vec<u8> = (0..key_file.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&key_file[at..at + 2], 16).unwrap())
        .collect();
    let signer = towline_link::ticket::TicketSigner::from_pkcs8(&bytes).unwrap();
    let spki = towline_link::identity::spki_sha256(&ada.certificate_pem).unwrap();
    let context = TicketContext {
        cluster_id: ada.identity.cluster(),
        node_id: NodeId::try_from(ticket.node_id.as_slice()).unwrap(),
        client_spki_sha256: &spki,
        now_unix_s: ticket.expires_unix_s - 1,
    };
    let checked = TicketVerifier::new(&[signer.public_key()]).verify(&ticket.ticket, &context);
    assert_eq!(checked.unwrap().epoch, 1);
}

#[tokio::test]
async fn a_second_process_is_kept_out_and_sigterm_ends_well() {
    let mut server = Server::start().await;
    let second = server.command().output().unwrap();
    assert!(!second.status.success());
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(said.contains("is in use by another control plane"), "{said}");
    let mut client = server.client().await;
    let _node = FakeNode::start(server.socket(), 64 * GIB);
    node_is_there(&mut client).await;
    let made = client.create_sandbox(create("kept")).await.unwrap().into_inner();
    assert!(server.terminate().success());
    server.spawn();
    let mut client = server.client().await;
    let found = client.get_sandbox(by_id(&made.id)).await.unwrap().into_inner();
    assert_eq!(found.spec.unwrap().name, "kept");
}

#[tokio::test]
async fn a_damaged_log_is_refused_with_what_to_do() {
    let mut server = Server::start().await;
    let mut client = server.client().await;
    let _node = FakeNode::start(server.socket(), 64 * GIB);
    node_is_there(&mut client).await;
    for n in 0..5 {
        client.create_sandbox(create(&format!("s{n}"))).await.unwrap();
    }
    server.kill();
    let log = server.data().join("log/wal-0000000000000001");
    let mut bytes = std::fs::read(&log).unwrap();
    bytes[100] ^= 1;
    std::fs::write(&log, bytes).unwrap();
    let output = server.command().output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success());
    assert!(
        said.contains("is damaged at byte") && said.contains("restore") | said.contains("Restore"),
        "{said}"
    );
}
