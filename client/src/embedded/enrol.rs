//! Our own and the node's way into the embedded cluster, by the control plane's admin socket.
//!
//! Only the owner of the cluster's data can open that socket, which is the proof that would
//! otherwise be a join token's. The context is written last: once it is there, everything it
//! names is.

use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use towline_link::enroll::{self, JoinToken};
use towline_link::identity::CertificateInfo;
use towline_link::rpc::{self, ControlPlaneClient};
use towline_link::status::RpcError;
use towline_proto::v1;

use super::configs::NODE;
use super::layout::Layout;
use crate::config::{Config, Context, EMBEDDED, write_private};
use crate::session::{new_key, store_enrolled};

/// Life of a token that is used at once.
const USER_TOKEN_LIFE: Duration = Duration::from_secs(600);
/// Life of the node's token: long enough for a node agent that is slow to start.
const NODE_TOKEN_LIFE: Duration = Duration::from_secs(24 * 3600);
/// Project of everything in an embedded cluster.
const PROJECT: &str = "default";

/// A client of the control plane as its operator.
pub(super) type Admin = ControlPlaneClient<tonic::transport::Channel>;

/// Connects to the admin socket.
pub(super) async fn connect(layout: &Layout) -> anyhow::Result<Admin> {
    let channel = rpc::connect_unix(&layout.admin_socket()).await?;
    Ok(rpc::control_plane(channel))
}

async fn create_token(
    admin: &mut Admin,
    role: v1::TokenRole,
    name: &str,
    life: Duration,
) -> anyhow::Result<String> {
    let request = v1::CreateTokenRequest {
        idempotency_key: new_key(),
        role: role.into(),
        project: PROJECT.to_owned(),
        ttl_s: life.as_secs(),
        uses_max: 1,
        name: name.to_owned(),
    };
    let answer = admin.create_token(request).await.map_err(RpcError::from);
    Ok(answer.context("creating a join token")?.into_inner().token)
}

/// Writes a fresh join token for the node agent.
pub(super) async fn write_node_token(admin: &mut Admin, layout: &Layout) -> anyhow::Result<()> {
    let token = create_token(admin, v1::TokenRole::Node, NODE, NODE_TOKEN_LIFE).await?;
    write_private(&layout.node_token(), token.as_bytes()).context("writing the node's join token")
}

/// Makes sure that we have a certificate with at least half of its life left, and that the
/// context says where the cluster is.
pub(super) async fn ensure_user(
    admin: &mut Admin,
    layout: &Layout,
    endpoint: &str,
) -> anyhow::Result<()> {
    let cluster_id = cluster_id(admin).await?;
    let known = Config::load()?.context.remove(EMBEDDED);
    let context = match known.filter(|known| is_fresh(known, &cluster_id)) {
        Some(known) => Context { endpoint: endpoint.to_owned(), ..known },
        None => enrol_user(admin, layout, endpoint).await?,
    };
    write_context(context)
}

/// Gets a new certificate for us from the running cluster, where the old one is of no use.
pub async fn renew_user(layout: &Layout) -> anyhow::Result<()> {
    let endpoint = Config::load()?.context.remove(EMBEDDED).map(|known| known.endpoint);
    let endpoint = endpoint.context("the embedded cluster wrote no context")?;
    ensure_user(&mut connect(layout).await?, layout, &endpoint).await
}

async fn cluster_id(admin: &mut Admin) -> anyhow::Result<String> {
    let status = admin.get_cluster_status(v1::GetClusterStatusRequest {}).await;
    Ok(status
        .map_err(RpcError::from)
        .context("asking for the cluster's id")?
        .into_inner()
        .cluster_id)
}

fn is_fresh(context: &Context, cluster_id: &str) -> bool {
    let Ok(pem) = std::fs::read_to_string(&context.cert_file) else { return false };
    let fresh = CertificateInfo::from_pem(&pem).is_ok_and(|info| {
        SystemTime::now() < info.half_life() && info.identity.cluster() == cluster_id
    });
    fresh && context.key_file.exists() && context.ca_file.exists()
}

async fn enrol_user(admin: &mut Admin, layout: &Layout, endpoint: &str) -> anyhow::Result<Context> {
    let name = crate::user::identity_name();
    let token = create_token(admin, v1::TokenRole::User, &name, USER_TOKEN_LIFE).await?;
    let token: JoinToken = token.parse().context("reading our join token")?;
    let enrolled = enroll::enroll(endpoint, &token, &name)
        .await
        .context("enrolling you in the embedded cluster")?;
    store_enrolled(&layout.keys, endpoint, &enrolled)
        .with_context(|| format!("could not write below `{}`", layout.keys.display()))
}

fn write_context(context: Context) -> anyhow::Result<()> {
    let mut config = Config::load()?;
    let before = config.clone();
    config.current.get_or_insert_with(|| EMBEDDED.to_owned());
    config.context.insert(EMBEDDED.to_owned(), context);
    if config != before {
        config.store()?;
    }
    Ok(())
}
