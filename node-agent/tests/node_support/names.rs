//! A resolver that knows what a test says, one answer after another.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Mutex;

use futures_util::future::BoxFuture;
use towline_node_agent::egress::name::TargetName;
use towline_node_agent::egress::resolver::{Resolve, ResolveError};
use towline_proto::v1::DnsRecord;

#[derive(Debug, Default)]
pub(crate) struct Names {
    /// What each name leads to; the last answer stays.
    pub(crate) answers: Mutex<BTreeMap<String, Vec<Vec<IpAddr>>>>,
}

impl Names {
    pub(crate) fn set(&self, name: &str, answers: &[&str]) {
        let answers = answers.iter().map(|answer| vec![answer.parse().unwrap()]).collect();
        self.answers.lock().unwrap().insert(name.into(), answers);
    }
}

impl Resolve for Names {
    fn addresses(&self, name: TargetName) -> BoxFuture<'_, Result<Vec<IpAddr>, ResolveError>> {
        let mut answers = self.answers.lock().unwrap();
        let answer = answers.get_mut(name.as_str()).and_then(|left| match left.len() {
            0 | 1 => left.first().cloned(),
            _ => Some(left.remove(0)),
        });
        Box::pin(async move { answer.ok_or(ResolveError::NoSuchName) })
    }

    fn records(
        &self,
        _: TargetName,
        _: u16,
    ) -> BoxFuture<'_, Result<Vec<DnsRecord>, ResolveError>> {
        Box::pin(async { Err(ResolveError::NoData) })
    }
}
