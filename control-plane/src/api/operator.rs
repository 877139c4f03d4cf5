//! Letting people and machines in: join tokens, enrolment, renewal.

use std::time::SystemTime;

use tonic::Status;
use towline_control_core::{Answer, Caller, Request, Role};
use towline_link::enroll::JoinToken;
use towline_link::identity::{Identity, Role as LinkRole, check_name};
use towline_link::peer::Peer;
use towline_proto::ids::TokenId;
use towline_proto::limits::LEAF_LIFE;
use towline_proto::v1::{self, TokenRole};
use tracing::info;

use super::Service;
use crate::keys::{random, secret_digest, unix_ms};

/// Longest certificate signing request.
const CSR_BYTES_MAX: usize = 16 << 10;

impl Service {
    pub(super) async fn new_token(
        &self,
        caller: Caller,
        request: v1::CreateTokenRequest,
    ) -> Result<v1::CreateTokenResponse, Status> {
        let id = TokenId::from_parts(unix_ms(), random().map_err(internal)?);
        let token = self.keys.join_token(id).map_err(internal)?;
        let ask = Request::CreateToken { request, id, secret_sha256: secret_digest(&token.secret) };
        let Answer::Token(id) = self.core.request(caller, ask).await? else {
            return Err(Status::internal("the core did not answer with a token"));
        };
        // A repeated request is answered with the id of the first, and so with the same secret.
        let token = self.keys.join_token(id).map_err(internal)?;
        Ok(v1::CreateTokenResponse { token: token.to_string(), token_id: id.to_vec() })
    }

    pub(super) async fn admit(
        &self,
        request: v1::EnrollRequest,
    ) -> Result<v1::EnrollResponse, Status> {
        check_csr(&request.csr_pem)?;
        check_name(&request.name).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let token: JoinToken = request
            .token
            .parse()
            .map_err(|_| Status::invalid_argument("this is not a join token (`tow1.…`)"))?;
        let used = v1::UseTokenCommand {
            id: token.id.to_vec(),
            secret_sha256: secret_digest(&token.secret),
            name: request.name.clone(),
        };
        let stranger = Caller { role: Role::Stranger, name: String::new() };
        let answer = self.core.request(stranger, Request::UseToken(used)).await?;
        let Answer::Admitted { role, project } = answer else {
            return Err(Status::internal("the core did not answer with a role"));
        };
        let role = match role {
            TokenRole::User => LinkRole::User,
            TokenRole::Node => LinkRole::Node,
            TokenRole::Operator => LinkRole::Operator,
            TokenRole::Unspecified => return Err(Status::internal("a token without a role")),
        };
        let identity =
            Identity::new(&self.keys.member.cluster_id, role, &request.name).map_err(internal)?;
        info!(%identity, project, "enrolled");
        self.certify(&identity, &request.csr_pem)
    }

    pub(super) fn renew(
        &self,
        peer: &Peer,
        request: &v1::RenewCertificateRequest,
    ) -> Result<v1::EnrollResponse, Status> {
        check_csr(&request.csr_pem)?;
        let Some(identity) = &peer.identity else {
            return Err(Status::unauthenticated(
                "only the holder of a certificate can renew it: enroll with a join token",
            ));
        };
        self.certify(identity, &request.csr_pem)
    }

    fn certify(&self, identity: &Identity, csr_pem: &str) -> Result<v1::EnrollResponse, Status> {
        let certificate_pem = self
            .keys
            .authority
            .issue(csr_pem, identity, SystemTime::now(), LEAF_LIFE)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        Ok(v1::EnrollResponse {
            certificate_pem,
            ca_pem: self.keys.authority.certificate_pem().to_owned(),
            identity: identity.to_string(),
            cluster_id: self.keys.member.cluster_id.clone(),
        })
    }
}

fn check_csr(csr_pem: &str) -> Result<(), Status> {
    if csr_pem.is_empty() || csr_pem.len() > CSR_BYTES_MAX {
        return Err(Status::invalid_argument("a certificate signing request (PEM) is needed"));
    }
    Ok(())
}

fn internal(error: impl std::fmt::Display) -> Status {
    Status::internal(error.to_string())
}
