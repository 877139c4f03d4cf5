//! Join tokens: digests of secrets, with an expiry in replicated time and a number of uses.

use std::collections::BTreeMap;

use towline_proto::ids::TokenId;
use towline_proto::v1::{TokenRecord, TokenRole, UseTokenCommand};

use crate::refusal::{Refusal, RefusalKind};

/// Most tokens at once.
const TOKENS_MAX: usize = 10_000;

/// Tokens by id.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Tokens {
    pub(crate) by_id: BTreeMap<TokenId, TokenRecord>,
}

impl Tokens {
    pub(super) fn create(&mut self, token: &TokenRecord) -> Result<TokenId, Refusal> {
        let id = token_id(&token.id)?;
        if self.by_id.len() >= TOKENS_MAX {
            return Err(Refusal::new(
                RefusalKind::Exhausted,
                format!("there are {TOKENS_MAX} join tokens already: revoke some"),
            ));
        }
        if self.by_id.contains_key(&id) {
            return Err(Refusal::new(RefusalKind::AlreadyExists, format!("{id} exists already")));
        }
        self.by_id.insert(id, token.clone());
        Ok(id)
    }

    pub(super) fn revoke(&mut self, id: &[u8]) -> Result<(), Refusal> {
        let id = token_id(id)?;
        match self.by_id.remove(&id) {
            Some(_) => Ok(()),
            None => Err(Refusal::not_found(format!("no join token {id}: it may have expired"))),
        }
    }

    /// Takes one use, if the secret is right. One message for all that is wrong with it.
    pub(super) fn use_once(
        &mut self,
        used: &UseTokenCommand,
        now_ms: u64,
    ) -> Result<(TokenRole, String), Refusal> {
        let id = token_id(&used.id)?;
        let token = self
            .by_id
            .get_mut(&id)
            .filter(|token| token.secret_sha256 == used.secret_sha256 && token.expires_ms > now_ms);
        let Some(token) = token else {
            return Err(Refusal::denied(
                "the join token is wrong, revoked, used up or expired: ask an operator for \
                 another (`tow token create`)",
            ));
        };
        if !token.name.is_empty() && token.name != used.name {
            return Err(Refusal::denied(format!(
                "this join token is for `{}` only, not `{}`",
                token.name, used.name
            )));
        }
        token.uses_left = token.uses_left.saturating_sub(1);
        let admitted = (token.role(), token.project.clone());
        if token.uses_left == 0 {
            self.by_id.remove(&id);
        }
        Ok(admitted)
    }

    pub(super) fn expire(&mut self, now_ms: u64) {
        self.by_id.retain(|_, token| token.expires_ms > now_ms);
    }
}

pub(crate) fn token_id(bytes: &[u8]) -> Result<TokenId, Refusal> {
    TokenId::try_from(bytes).map_err(|error| Refusal::invalid(format!("token id: {error}")))
}
