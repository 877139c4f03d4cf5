//! Projects, and which user belongs to which. A project owns names and, later, quotas and secrets.

use std::collections::BTreeMap;

use towline_proto::v1::ProjectRecord;

/// The project of whoever was not put into another.
pub const DEFAULT_PROJECT: &str = "default";

/// Projects by name, and the project of each user who came with a token.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Projects {
    pub(crate) by_name: BTreeMap<String, ProjectRecord>,
    pub(crate) users: BTreeMap<String, String>,
}

impl Projects {
    /// The project of a user.
    pub fn of_user(&self, user: &str) -> &str {
        self.users.get(user).map_or(DEFAULT_PROJECT, String::as_str)
    }

    pub(super) fn ensure(&mut self, name: &str, now_ms: u64) {
        self.by_name
            .entry(name.to_owned())
            .or_insert_with(|| ProjectRecord { name: name.to_owned(), created_ms: now_ms });
    }

    pub(super) fn admit(&mut self, user: &str, project: &str) {
        self.users.insert(user.to_owned(), project.to_owned());
    }
}
