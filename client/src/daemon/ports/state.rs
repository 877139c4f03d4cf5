//! The file of kept ports: replaced as a whole, readable by its owner only. A daemon that was killed
//! is taken up from it.

use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use towline_proto::ids::SandboxId;

use super::{Mapping, Scope};
use crate::config::write_private;

/// What the file is, and its version.
const SCHEMA: &str = "towline.daemon-ports/1";

/// One port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) scope: Scope,
    pub(super) name: String,
    pub(super) asked: Mapping,
    /// Where it was.
    pub(super) host_port: u16,
}

#[derive(Debug, Serialize, Deserialize)]
struct File {
    schema: String,
    ports: Vec<Line>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Line {
    config: PathBuf,
    context: String,
    sandbox: String,
    name: String,
    host: Option<IpAddr>,
    asked_port: u16,
    host_port: u16,
    port: u16,
}

/// Reads the file; a missing one holds nothing.
pub(super) fn load(path: &Path) -> io::Result<Vec<Record>> {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let file: File = serde_json::from_slice(&text)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    if file.schema != SCHEMA {
        let text = format!("{}: `{}` is not `{SCHEMA}`", path.display(), file.schema);
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    Ok(file.ports.into_iter().filter_map(record).collect())
}

fn record(line: Line) -> Option<Record> {
    let sandbox: SandboxId = line.sandbox.parse().ok()?;
    Some(Record {
        scope: Scope { config: line.config, context: line.context, sandbox },
        name: line.name,
        asked: Mapping { host: line.host, host_port: line.asked_port, port: line.port },
        host_port: line.host_port,
    })
}

/// Replaces the file; nothing to keep means no file.
pub(super) fn store(path: &Path, records: Vec<Record>) -> io::Result<()> {
    if records.is_empty() {
        return match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        };
    }
    let line = |record: Record| Line {
        config: record.scope.config,
        context: record.scope.context,
        sandbox: record.scope.sandbox.to_string(),
        name: record.name,
        host: record.asked.host,
        asked_port: record.asked.host_port,
        host_port: record.host_port,
        port: record.asked.port,
    };
    let file = File { schema: SCHEMA.into(), ports: records.into_iter().map(line).collect() };
    write_private(path, &serde_json::to_vec_pretty(&file).map_err(io::Error::other)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_stored_is_loaded_and_nothing_leaves_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ports.json");
        assert!(load(&path).unwrap().is_empty());
        let record = Record {
            scope: Scope {
                config: "/c/config.toml".into(),
                context: "c".into(),
                sandbox: SandboxId::from_bytes([7; 16]),
            },
            name: "web".into(),
            asked: Mapping { host: None, host_port: 80, port: 8080 },
            host_port: 8081,
        };
        store(&path, vec![record.clone()]).unwrap();
        assert_eq!(load(&path).unwrap(), [record]);
        store(&path, Vec::new()).unwrap();
        assert!(!path.exists());
        std::fs::write(&path, "{").unwrap();
        assert!(load(&path).is_err(), "a damaged file is said, not taken for none");
    }
}
