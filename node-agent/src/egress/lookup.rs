//! What a name is, as far as a guest agent needs to know to answer DNS: whether it is there, of
//! which families, or its records of another type. Addresses are not told.
//!
//! Under policy `none` nothing is looked up: not even a name leaks.

use std::net::IpAddr;

use tokio::io::AsyncWrite;
use towline_proto::frame::{Frame, FrameKind};
use towline_proto::v1::{EgressProtocol, LookupAnswer, LookupOpen, StreamErrorCode};
use towline_streams::FrameWriter;

use super::dial::Target;
use super::name::TargetName;
use super::policy::{Policy, closed};
use super::resolver::ResolveError;
use super::{SandboxEgress, decision_of};
use crate::gates::Refused;
use crate::streams;

/// DNS record types of addresses.
const A: u16 = 1;
const AAAA: u16 = 28;
/// DNS response codes.
const SERVER_FAILURE: u32 = 2;
const NO_SUCH_NAME: u32 = 3;
const REFUSED: u32 = 5;
/// Types that mean a transfer or everything: no answer to a stub (RFC 6895, RFC 8482).
const META_TYPES: std::ops::RangeInclusive<u16> = 128..=255;

impl SandboxEgress {
    /// Serves a stream that began with `open`.
    pub(crate) async fn serve_lookup<W: AsyncWrite + Unpin>(
        &self,
        open: LookupOpen,
        mut writer: FrameWriter<W>,
    ) {
        let pass = match self.gates.enter_running(self.sandbox) {
            Ok(pass) => pass,
            Err(refused) => return streams::refuse(&mut writer, &refused).await,
        };
        let answer = tokio::select! {
            answer = self.look_up(&open) => answer,
            () = pass.revoked() => return,
        };
        match answer {
            Ok(answer) => {
                let frame = Frame::message(FrameKind::LookupAnswer, &answer);
                if writer.send(&frame).await.is_ok() {
                    let _ = writer.finish().await;
                }
            }
            Err(refused) => streams::refuse(&mut writer, &refused).await,
        }
    }

    async fn look_up(&self, open: &LookupOpen) -> Result<LookupAnswer, Refused> {
        let invalid = |message: String| Refused::new(StreamErrorCode::Invalid, message);
        let name = TargetName::parse(&open.name).map_err(|error| invalid(error.to_string()))?;
        let wanted = u16::try_from(open.record_type)
            .map_err(|_| invalid(format!("{} is not a record type", open.record_type)))?;
        if self.policy == Policy::None {
            let target = Target::Name(name);
            let protocol = EgressProtocol::Unspecified;
            let decision = decision_of(protocol, &target, 0, String::new(), &closed());
            self.feed.egress(decision);
            return Ok(LookupAnswer { response_code: REFUSED, ..LookupAnswer::default() });
        }
        if wanted == 0 || META_TYPES.contains(&wanted) {
            return Ok(LookupAnswer { response_code: REFUSED, ..LookupAnswer::default() });
        }
        let permit = self.lookups.acquire().await;
        let resolver = &self.node.dialler.resolver;
        let answer = if [A, AAAA].contains(&wanted) {
            resolver.addresses(name).await.map(|addresses| LookupAnswer {
                has_ipv4: addresses.iter().any(IpAddr::is_ipv4),
                has_ipv6: addresses.iter().any(IpAddr::is_ipv6),
                ..LookupAnswer::default()
            })
        } else {
            let records = resolver.records(name, wanted).await;
            records.map(|records| LookupAnswer { records, ..LookupAnswer::default() })
        };
        drop(permit);
        Ok(answer.unwrap_or_else(|error| LookupAnswer {
            response_code: match error {
                ResolveError::NoSuchName => NO_SUCH_NAME,
                ResolveError::NoData => 0,
                ResolveError::TimedOut | ResolveError::Failed(_) => SERVER_FAILURE,
            },
            ..LookupAnswer::default()
        }))
    }
}
