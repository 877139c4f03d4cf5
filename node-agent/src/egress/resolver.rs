//! What a name is: addresses by the system's own resolver (`getaddrinfo`, so /etc/hosts, split DNS
//! and whatever else this node is set up with count), other records by DNS.
//!
//! Left out: whether an address may be used. A look-up is bounded in time for whoever waits, and in
//! number for all, because the system's cannot be given up.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use dns_lookup::{AddrInfoHints, LookupErrorKind, SockType, getaddrinfo};
use futures_util::future::BoxFuture;
use hickory_resolver::TokioResolver;
use hickory_resolver::proto::rr::RecordType;
use hickory_resolver::proto::serialize::binary::BinEncodable as _;
use tokio::sync::{OnceCell, Semaphore};
use tokio::time::timeout;
use towline_proto::v1::DnsRecord;

use super::name::TargetName;

/// Look-ups of the system that run at once, each on a thread of its own.
const SYSTEM_LOOKUPS_MAX: usize = 128;
/// How long a look-up is waited for: as long as a stub resolver tries by default, twice.
const LOOKUP_MAX: Duration = Duration::from_secs(20);
/// Addresses of one name that are looked at.
pub const ADDRESSES_MAX: usize = 32;
/// Records of an answer, and bytes of one, that are passed on.
const RECORDS_MAX: usize = 64;
const RECORD_BYTES_MAX: usize = 4096;

/// Says why a name has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResolveError {
    /// Nobody has this name.
    #[error("there is no such name")]
    NoSuchName,
    /// The name has no records of this type.
    #[error("the name has no such records")]
    NoData,
    /// No answer in time.
    #[error("no answer within {} s", LOOKUP_MAX.as_secs())]
    TimedOut,
    /// Something else.
    #[error("the node could not look it up: {0}")]
    Failed(String),
}

/// Looks names up.
pub trait Resolve: fmt::Debug + Send + Sync {
    /// The addresses of a name, in the order in which they should be tried.
    fn addresses(&self, name: TargetName) -> BoxFuture<'_, Result<Vec<IpAddr>, ResolveError>>;

    /// Its records of a type other than A and AAAA.
    fn records(
        &self,
        name: TargetName,
        record_type: u16,
    ) -> BoxFuture<'_, Result<Vec<DnsRecord>, ResolveError>>;
}

/// As this machine is set up.
pub struct SystemResolver {
    running: Arc<Semaphore>,
    dns: OnceCell<TokioResolver>,
}

impl fmt::Debug for SystemResolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SystemResolver").finish_non_exhaustive()
    }
}

impl Default for SystemResolver {
    fn default() -> Self {
        Self { running: Arc::new(Semaphore::new(SYSTEM_LOOKUPS_MAX)), dns: OnceCell::new() }
    }
}

impl Resolve for SystemResolver {
    fn addresses(&self, name: TargetName) -> BoxFuture<'_, Result<Vec<IpAddr>, ResolveError>> {
        Box::pin(async move {
            let work = async {
                let permit = Arc::clone(&self.running).acquire_owned().await;
                let looked_up = tokio::task::spawn_blocking(move || {
                    // Held by the look-up itself: one that nobody waits for still takes a thread.
                    let _permit = permit;
                    system_addresses(&name)
                });
                looked_up.await.unwrap_or_else(|e| Err(ResolveError::Failed(e.to_string())))
            };
            timeout(LOOKUP_MAX, work).await.unwrap_or(Err(ResolveError::TimedOut))
        })
    }

    fn records(
        &self,
        name: TargetName,
        record_type: u16,
    ) -> BoxFuture<'_, Result<Vec<DnsRecord>, ResolveError>> {
        Box::pin(async move {
            let work = async {
                let resolver = self.dns.get_or_try_init(|| async { system_dns() }).await?;
                dns_records(resolver, &name, record_type).await
            };
            timeout(LOOKUP_MAX, work).await.unwrap_or(Err(ResolveError::TimedOut))
        })
    }
}

fn system_addresses(name: &TargetName) -> Result<Vec<IpAddr>, ResolveError> {
    let hints = AddrInfoHints { socktype: SockType::Stream.into(), ..AddrInfoHints::default() };
    let found = getaddrinfo(Some(name.as_str()), None, Some(hints));
    let found = found.map_err(|error| match error.kind() {
        LookupErrorKind::NoName => ResolveError::NoSuchName,
        LookupErrorKind::NoData => ResolveError::NoData,
        _ => {
            let error: std::io::Error = error.into();
            ResolveError::Failed(error.to_string())
        }
    })?;
    let mut addresses = Vec::new();
    for info in found.flatten() {
        let address = info.sockaddr.ip();
        if !addresses.contains(&address) && addresses.len() < ADDRESSES_MAX {
            addresses.push(address);
        }
    }
    if addresses.is_empty() { Err(ResolveError::NoData) } else { Ok(addresses) }
}

fn system_dns() -> Result<TokioResolver, ResolveError> {
    let failed = |error: &dyn fmt::Display| ResolveError::Failed(error.to_string());
    let builder = TokioResolver::builder_tokio().map_err(|error| failed(&error))?;
    builder.build().map_err(|error| failed(&error))
}

async fn dns_records(
    resolver: &TokioResolver,
    name: &TargetName,
    record_type: u16,
) -> Result<Vec<DnsRecord>, ResolveError> {
    let wanted = RecordType::from(record_type);
    // With its dot, so that nobody's search list is asked.
    let answer = resolver.lookup(format!("{name}."), wanted).await.map_err(|error| {
        if error.is_nx_domain() {
            ResolveError::NoSuchName
        } else if error.is_no_records_found() {
            ResolveError::NoData
        } else {
            ResolveError::Failed(error.to_string())
        }
    })?;
    let records = answer.answers().iter().filter(|record| record.record_type() == wanted);
    let records = records.take(RECORDS_MAX).filter_map(|record| {
        let data = record.data.to_bytes().ok()?;
        let fits = data.len() <= RECORD_BYTES_MAX;
        fits.then_some(DnsRecord { record_type: record_type.into(), ttl_s: record.ttl, data })
    });
    Ok(records.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_machines_hosts_file_counts_and_odd_literals_are_what_they_are() {
        let resolver = SystemResolver::default();
        for name in ["localhost", "127.1", "2130706433", "0x7f.1", "0177.0.0.1"] {
            let name = TargetName::parse(name).unwrap();
            let addresses = resolver.addresses(name.clone()).await.unwrap();
            assert!(addresses.iter().all(IpAddr::is_loopback), "{name}: {addresses:?}");
        }
        let missing = TargetName::parse("no-such-name.invalid").unwrap();
        let error = resolver.addresses(missing).await.unwrap_err();
        assert!(matches!(error, ResolveError::NoSuchName | ResolveError::Failed(_)), "{error}");
    }
}
