//! The configuration file, checked. Unknown keys are errors.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

/// Longest path of a Unix socket that Linux takes, less the socket's own name.
const SOCKET_DIR_MAX: usize = 107 - "/admin.sock".len();

/// What `control-plane.toml` says.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where the log, the snapshots and the keys lie. Made if it is not there.
    pub data_dir: PathBuf,
    /// Where laptops and nodes connect. Port 0 takes a free one, which the file `endpoint` in the
    /// data directory then names.
    pub listen: SocketAddr,
    /// Name in this member's certificate.
    pub member_name: String,
}

impl Config {
    /// Reads and checks a file.
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("reading the configuration `{}`", path.display()))?;
        let config: Self = toml::from_str(&text)
            .with_context(|| format!("in the configuration `{}`", path.display()))?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<()> {
        ensure!(
            self.data_dir.is_absolute(),
            "data_dir = \"{}\" must be an absolute path",
            self.data_dir.display()
        );
        ensure!(
            self.data_dir.as_os_str().len() <= SOCKET_DIR_MAX,
            "data_dir = \"{}\" is too long: a socket in it must have a path of at most 107 bytes, \
             so choose one of at most {SOCKET_DIR_MAX}",
            self.data_dir.display()
        );
        towline_link::identity::check_name(&self.member_name).context("in member_name")
    }

    /// The socket on which the machine's owner is an operator.
    pub fn admin_socket(&self) -> PathBuf {
        self.data_dir.join("admin.sock")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config> {
        let file = tempfile::NamedTempFile::new()?;
        std::fs::write(file.path(), text)?;
        Config::load(file.path())
    }

    #[test]
    fn a_good_file_is_read_and_bad_ones_say_why() {
        let good = "data_dir = \"/x\"\nlisten = \"127.0.0.1:0\"\nmember_name = \"m1\"\n";
        assert_eq!(parse(good).unwrap().member_name, "m1");
        let fails = |text: &str, why: &str| {
            let error = format!("{:#}", parse(text).unwrap_err());
            assert!(error.contains(why), "{error}");
        };
        fails(&format!("{good}colour = 1\n"), "colour");
        fails(&good.replace("/x", "x"), "absolute");
        fails(&good.replace("/x", &format!("/{}", "x".repeat(120))), "too long");
        fails(&good.replace("\"m1\"", "\"a b\""), "member_name");
    }
}
