//! Who this member is and the keys it holds: the cluster's authority, the key that signs tickets,
//! the key that join tokens are derived from. All in files of the data directory (0600), never in
//! the log or a snapshot. Made at the first start, and never again over an existing log.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use ring::hmac;
use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Serialize};
use towline_link::authority::{CertificateAuthority, write_private};
use towline_link::enroll::JoinToken;
use towline_link::identity::{Identity, LeafKey, Role, hex};
use towline_link::ticket::TicketSigner;
use towline_link::tls::CertStore;
use towline_proto::ids::{ClusterId, TokenId};
use towline_proto::limits::LEAF_LIFE;

const MEMBER_FILE: &str = "member.toml";
const TICKET_KEY_FILE: &str = "ticket.key";
const TOKEN_KEY_FILE: &str = "token.key";

/// Which member of which cluster this data directory belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemberFile {
    /// Printed cluster id.
    pub cluster_id: String,
    /// Raft id.
    pub member: u64,
    /// Voters at the group's birth.
    pub voters: Vec<u64>,
}

/// Everything secret, and who we are.
#[derive(Debug)]
pub struct Keys {
    /// Which member this is.
    pub member: MemberFile,
    /// Issues certificates.
    pub authority: CertificateAuthority,
    /// Signs tickets.
    pub tickets: TicketSigner,
    token_key: hmac::Key,
    dir: PathBuf,
}

impl Keys {
    /// Reads what the data directory holds; makes a new cluster if it holds nothing.
    pub fn load_or_create(dir: &Path) -> Result<Self> {
        let path = dir.join(MEMBER_FILE);
        if !path.exists() {
            create(dir).context("making a new cluster")?;
        }
        let text = std::fs::read_to_string(&path).with_context(|| shown("reading", &path))?;
        let member: MemberFile = toml::from_str(&text).with_context(|| shown("in", &path))?;
        let authority = CertificateAuthority::load(&dir.join("ca")).context("reading the CA")?;
        ensure!(
            authority.certificate().cluster() == member.cluster_id,
            "the CA in `{}` is of {}, and this member of {}: the directory was mixed up",
            dir.join("ca").display(),
            authority.certificate().cluster(),
            member.cluster_id
        );
        let tickets = TicketSigner::from_pkcs8(&read_hex(&dir.join(TICKET_KEY_FILE))?)
            .context("reading the ticket key")?;
        let token_key = hmac::Key::new(hmac::HMAC_SHA256, &read_hex(&dir.join(TOKEN_KEY_FILE))?);
        Ok(Self { member, authority, tickets, token_key, dir: dir.to_owned() })
    }

    /// A fresh certificate for this member's own server.
    pub fn issue_own(&self, name: &str) -> Result<(String, String)> {
        let key = LeafKey::generate()?;
        let identity = Identity::new(&self.member.cluster_id, Role::Member, name)?;
        let life = LEAF_LIFE;
        let certificate =
            self.authority.issue(&key.csr_pem()?, &identity, SystemTime::now(), life)?;
        Ok((certificate, key.to_pem()))
    }

    /// A store with such a certificate.
    pub fn own_store(&self, name: &str) -> Result<CertStore> {
        let (certificate, key) = self.issue_own(name)?;
        Ok(CertStore::new(&certificate, &key, self.authority.certificate())?)
    }

    /// The token of an id. Its secret follows from the id and our key, so that a repeated request
    /// gets the same one although only its digest is stored.
    pub fn join_token(&self, id: TokenId) -> Result<JoinToken> {
        let secret = hex(hmac::sign(&self.token_key, id.as_bytes()).as_ref());
        let text = format!("tow1.{id}.{secret}.{}", self.authority.pin());
        text.parse().map_err(|error| anyhow::anyhow!("a token that we made is not one: {error}"))
    }

    /// The directory they lie in.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

/// The stored form of a token's secret.
pub fn secret_digest(secret: &str) -> Vec<u8> {
    ring::digest::digest(&ring::digest::SHA256, secret.as_bytes()).as_ref().to_vec()
}

/// Bytes that nobody can guess.
pub fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    match SystemRandom::new().fill(&mut bytes) {
        Ok(()) => Ok(bytes),
        Err(_) => bail!("the system has no random numbers"),
    }
}

/// Unix milliseconds by the system's clock.
pub fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// The member file is written last: a start that was cut short is taken up by the next.
fn create(dir: &Path) -> Result<()> {
    ensure!(
        !dir.join("log").exists(),
        "`{}` has a log but no {MEMBER_FILE}: the directory is incomplete; restore it from a \
         backup, or empty it to start anew",
        dir.display()
    );
    let ca_dir = dir.join("ca");
    let cluster_id = if ca_dir.join("ca.pem").exists() {
        CertificateAuthority::load(&ca_dir)?.certificate().cluster().to_owned()
    } else {
        let id = ClusterId::from_parts(unix_ms(), random()?).to_string();
        CertificateAuthority::create(&id, SystemTime::now())?.save(&ca_dir)?;
        id
    };
    write_private(&dir.join(TICKET_KEY_FILE), &hex(TicketSigner::generate()?.pkcs8()))?;
    write_private(&dir.join(TOKEN_KEY_FILE), &hex(&random::<32>()?))?;
    let member = MemberFile { cluster_id, member: 1, voters: vec![1] };
    write_private(&dir.join(MEMBER_FILE), &toml::to_string(&member)?)?;
    Ok(())
}

fn read_hex(path: &Path) -> Result<Vec<u8>> {
    let text = std::fs::read_to_string(path).with_context(|| shown("reading", path))?;
    let text = text.trim();
    let digits = text.len().is_multiple_of(2) && text.is_ascii();
    ensure!(digits, "`{}` is damaged: restore it from a backup", path.display());
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).with_context(|| shown("in", path)))
        .collect()
}

fn shown(what: &str, path: &Path) -> String {
    format!("{what} `{}`", path.display())
}
