//! What a guest is told once per boot: the sandbox's settings over those of its image, entropy from
//! the operating system, the clock, and the secret that marks later sessions.

use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::rand::{GetRandomFlags, getrandom};
use sha2::{Digest, Sha256};
use towline_images::ImageConfig;
use towline_node_core::Assignment;
use towline_proto::ids::ForkId;
use towline_proto::v1::{Become, GuestConfigure, Isolation, SandboxSpec};

use crate::images::Image;

/// Entropy for the guest's random number generator: twice what seeds it.
const ENTROPY: usize = 64;
/// Longest hostname that Linux takes.
const HOSTNAME_MAX: usize = 64;

/// Draws bytes from the operating system.
pub fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        filled += getrandom(&mut bytes[filled..], GetRandomFlags::empty())?;
    }
    Ok(bytes)
}

/// Makes the configuration.
pub fn guest_configure(
    assignment: &Assignment,
    image: &Image,
    resync_marker: [u8; 32],
) -> io::Result<GuestConfigure> {
    let spec = &assignment.spec;
    let ImageConfig { env, user, workdir, entrypoint, cmd } = &image.config;
    let shape = spec.shape.unwrap_or_default();
    Ok(GuestConfigure {
        resync_marker: resync_marker.to_vec(),
        hostname: hostname(&spec.name),
        unix_ns: unix_ns(),
        entropy: random::<ENTROPY>()?.to_vec(),
        machine_id: machine_id(assignment),
        layers: u32::try_from(image.layers.len()).unwrap_or(u32::MAX),
        local_image: image.local.is_some(),
        folder: spec.folder.as_ref().map(|folder| folder.path.clone()).unwrap_or_default(),
        user: spec.user.clone(),
        env: environment(env, spec),
        cwd: workdir.clone(),
        entrypoint: entrypoint.clone(),
        cmd: cmd.clone(),
        image_user: user.clone(),
        processes_max: shape.processes_max,
        memory_max_bytes: match spec.isolation() {
            // The guest agent keeps some for itself and gives the rest.
            Isolation::Unspecified | Isolation::Vm => 0,
            // What the machine has is no measure.
            Isolation::Process => shape.memory_mib << 20,
        },
        git: spec.git.clone(),
    })
}

/// Who a copy is from now on.
pub fn guest_become(
    assignment: &Assignment,
    fork: ForkId,
    resync_marker: [u8; 32],
) -> io::Result<Become> {
    Ok(Become {
        fork_id: fork.to_vec(),
        sandbox_id: assignment.sandbox.to_string(),
        resync_marker: resync_marker.to_vec(),
        hostname: hostname(&assignment.spec.name),
        unix_ns: unix_ns(),
        entropy: random::<ENTROPY>()?.to_vec(),
        machine_id: machine_id(assignment),
    })
}

/// Now, for a guest's clock.
pub fn unix_ns() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

fn machine_id(assignment: &Assignment) -> Vec<u8> {
    Sha256::digest(assignment.sandbox.as_bytes())[..16].to_vec()
}

/// The environment of every command. A git that is not the system's own (in /usr/local, say) looks for
/// the system's configuration, and with it for whose commits are, beside itself.
fn environment(image: &[Vec<u8>], spec: &SandboxSpec) -> Vec<Vec<u8>> {
    let git = spec.git.iter().map(|_| b"GIT_CONFIG_SYSTEM=/etc/gitconfig".to_vec());
    let defaults: Vec<_> = git.chain(image.iter().cloned()).collect();
    merged(&defaults, &spec.env)
}

/// The image's environment with the sandbox's over it, each name once.
fn merged(image: &[Vec<u8>], sandbox: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let name = |entry: &[u8]| entry.split(|b| *b == b'=').next().map(<[u8]>::to_vec);
    let mut env: Vec<Vec<u8>> = Vec::new();
    for entry in image.iter().chain(sandbox) {
        env.retain(|earlier| name(earlier) != name(entry));
        env.push(entry.clone());
    }
    env
}

/// A sandbox's name as a hostname.
fn hostname(name: &str) -> String {
    let allowed = |c: char| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' };
    let host: String = name.chars().map(allowed).take(HOSTNAME_MAX).collect();
    let host = host.trim_matches(['-', '.']);
    if host.is_empty() { "sandbox".into() } else { host.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sandboxs_environment_wins() {
        let of =
            |entries: &[&str]| entries.iter().map(|e| e.as_bytes().to_vec()).collect::<Vec<_>>();
        let env = merged(&of(&["A=1", "B=2"]), &of(&["A=3=4", "C="]));
        assert_eq!(env, of(&["B=2", "A=3=4", "C="]));
    }

    #[test]
    fn any_name_becomes_a_hostname() {
        assert_eq!(hostname("my_box.1"), "my-box.1");
        assert_eq!(hostname("é"), "sandbox");
        assert_eq!(hostname(&"x".repeat(100)).len(), 64);
    }
}
