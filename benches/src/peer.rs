//! The peer of `tow exec`: an OpenSSH server on loopback, for this run only.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use towline_end_to_end::run::wait_for;

/// A running sshd.
pub(crate) struct Ssh {
    server: Child,
    folder: PathBuf,
    port: u16,
}

impl Ssh {
    /// Starts one with keys of its own, UsePAM no and UseDNS no.
    pub(crate) fn start(folder: &Path) -> anyhow::Result<Self> {
        let folder = folder.join("ssh");
        std::fs::create_dir_all(&folder)?;
        // Where sshd insists on its privilege separation folder; only root's sshd needs it.
        drop(std::fs::create_dir_all("/run/sshd"));
        for key in ["host", "user"] {
            let status = Command::new("ssh-keygen")
                .args(["-q", "-t", "ed25519", "-N", "", "-f"])
                .arg(folder.join(key))
                .status()
                .context("ssh-keygen")?;
            anyhow::ensure!(status.success(), "ssh-keygen failed");
        }
        std::fs::copy(folder.join("user.pub"), folder.join("authorized"))?;
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let at = folder.display();
        std::fs::write(
            folder.join("config"),
            format!(
                "Port {port}\nListenAddress 127.0.0.1\nHostKey {at}/host\nPidFile none\n\
                 AuthorizedKeysFile {at}/authorized\nStrictModes no\nUsePAM no\nUseDNS no\n\
                 PermitRootLogin yes\nPasswordAuthentication no\n"
            ),
        )?;
        let server = Command::new("/usr/sbin/sshd")
            .args(["-D", "-e", "-f"])
            .arg(folder.join("config"))
            .stderr(Stdio::null())
            .spawn()
            .context("starting sshd")?;
        let ssh = Self { server, folder, port };
        wait_for("sshd to answer", Duration::from_secs(20), || {
            ssh.command("true").status().is_ok_and(|status| status.success()).then_some(())
        });
        Ok(ssh)
    }

    /// `ssh 127.0.0.1 COMMAND`.
    pub(crate) fn command(&self, what: &str) -> Command {
        let mut command = Command::new("ssh");
        command.args(["-F", "/dev/null", "-o", "StrictHostKeyChecking=no", "-o", "BatchMode=yes"]);
        command.args(["-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR", "-i"]);
        command.arg(self.folder.join("user")).args(["-p", &self.port.to_string()]);
        command.args(["127.0.0.1", what]).stdin(Stdio::null());
        command
    }
}

impl Drop for Ssh {
    fn drop(&mut self) {
        drop(self.server.kill());
        drop(self.server.wait());
    }
}
