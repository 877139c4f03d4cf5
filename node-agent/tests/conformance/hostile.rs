//! What the machine outside shows of a sandbox, what its root cannot do to it, and that nothing of
//! it is left when it has been killed.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use sha2::{Digest, Sha256};
use towline_node_agent::hypervisor::Hypervisor;

use crate::guest::{BOOT_MAX, Guest};

/// Tries as root in the sandbox; each must fail. What it is called, and the line.
const ATTEMPTS: [(&str, &str); 12] = [
    ("sysrq", "echo h > /proc/sysrq-trigger"),
    ("core pattern", "echo x > /proc/sys/kernel/core_pattern"),
    ("panic", "echo 1 > /proc/sys/kernel/panic"),
    ("device node", "mknod /tmp/disk b 7 0"),
    ("kernel memory", "head -c 1 /proc/kcore"),
    ("proc of the node", "ls /proc/1/root/etc/shadow"),
    ("squashfs", "mount -t squashfs /dev/loop0 /tmp"),
    ("a host's disk", "mount -t ext4 /dev/loop0 /tmp"),
    // syslog, add_key, finit_module, bpf, io_uring_setup on x86-64: refused by the filter.
    ("kernel log", "perl -e 'exit(syscall(103, 3, my $b = \"x\" x 99, 99) < 0)'"),
    (
        "keys",
        "perl -e 'exit(syscall(248, my $t = \"user\", my $n = \"n\", my $p = \"p\", 1, -3) < 0)'",
    ),
    ("bpf", "perl -e 'exit(syscall(321, 5, my $a = \"\\0\" x 128, 128) < 0)'"),
    ("rings", "perl -e 'exit(syscall(425, 4, my $p = \"\\0\" x 128) < 0)'"),
];

impl Guest {
    /// The first process from outside: no environment, no descriptor that it does not need, a session
    /// of its own, no core dumps, a private folder.
    pub(crate) fn check_host_side(&self) {
        let pid = self.vm.identity().pid;
        let proc = Path::new("/proc").join(pid.to_string());
        let user = |path: &Path| {
            let status = fs::read_to_string(path.join("status")).unwrap();
            let ids = status.lines().find_map(|line| line.strip_prefix("Uid:")).unwrap();
            ids.split_whitespace().next().unwrap().to_owned()
        };
        let (own, vmms) = (user(Path::new("/proc/self")), user(&proc));
        eprintln!("the VMM is user {vmms}, the node agent is {own}");
        assert!(!self.has_own_user() || own != vmms, "it has no user of its own");
        let limits = fs::read_to_string(proc.join("limits")).unwrap();
        let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
        let words: Vec<&str> = core.split_whitespace().collect();
        assert_eq!(words[4..6], ["0", "0"], "{core}");
        let stat = fs::read_to_string(proc.join("stat")).unwrap();
        let session = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(3).unwrap();
        assert_eq!(session, pid.to_string(), "a session of its own");
        let link = fs::metadata(self.vm.link_socket()).unwrap();
        let folder = fs::metadata(self.vm.dir()).unwrap();
        let guarded = folder.permissions().mode() & 0o077 == 0;
        assert!(guarded || link.permissions().mode() & 0o077 == 0, "others reach the guest link");
        // What is another user's cannot be looked at any closer, but by root.
        let environment = match fs::read(proc.join("environ")) {
            Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => return,
            environment => environment.unwrap(),
        };
        assert_eq!(environment, b"", "no environment");
        let open: BTreeSet<String> = fs::read_dir(proc.join("fd"))
            .unwrap()
            .flatten()
            .filter_map(|entry| fs::read_link(entry.path()).ok())
            .map(|path| path.to_string_lossy().into_owned())
            .collect();
        let ours: BTreeSet<String> = fs::read_dir("/proc/self/fd")
            .unwrap()
            .flatten()
            .filter_map(|entry| fs::read_link(entry.path()).ok())
            .map(|path| path.to_string_lossy().into_owned())
            .filter(|path| path != "/dev/null" && !path.starts_with("anon_inode:"))
            .collect();
        let shared: Vec<&String> = open.intersection(&ours).collect();
        // The log in memory is held by both on purpose.
        let shared: Vec<_> =
            shared.into_iter().filter(|path| !path.starts_with("/memfd:towline-")).collect();
        assert!(shared.is_empty(), "descriptors of the node agent: {shared:?}");
        assert!(open.len() < 40, "{open:?}");
    }

    /// Whether it was started by the helper.
    pub(crate) fn has_own_user(&self) -> bool {
        self.capabilities.own_kernel
            && self.capabilities.missing.iter().all(|what| !what.starts_with("users: "))
    }

    /// Where the kernel is shared, root in the sandbox can do nothing to it.
    pub(crate) async fn check_hostile_root(&self) {
        // A guest with a kernel of its own may do all of this to it.
        if !self.asked("hostile root", "shared kernel", !self.capabilities.own_kernel) {
            return;
        }
        for (what, line) in ATTEMPTS {
            // perl's own errors are no refusals.
            let out = self.run_as_root(&format!("({line}) 2>&1 && echo DONE")).await;
            assert!(!out.stdout.contains("DONE"), "{what}: {out:?}");
            assert!(out.refused.is_none() && !out.stdout.contains("not found"), "{what}: {out:?}");
        }
        // What it sees of cgroups are its own, and it cannot raise what the node has set.
        let out = self
            .run_as_root(
                "mkdir -p /tmp/c; for kind in 'cgroup2 c' 'cgroup -o memory c' 'cgroup -o pids c'; do \
                 mount -t $kind /tmp/c || continue; \
                 for limit in pids.max memory.max memory.limit_in_bytes; do \
                 test -e /tmp/c/$limit && echo 9999999999 > /tmp/c/$limit && echo RAISED $limit; \
                 done; umount /tmp/c; done",
            )
            .await;
        assert!(!out.stdout.contains("RAISED") && out.stderr.contains("denied"), "{out:?}");
    }

    /// kill -9 of the first process, by whoever: nothing is left.
    pub(crate) async fn check_kill(self, driver: &dyn Hypervisor, dir: &Path) {
        let pid = self.vm.identity().pid;
        self.vm.kill().unwrap();
        let exit = self.vm.wait_exit().await;
        assert!(exit.status.contains("signal: 9"), "{exit}");
        assert!(!Path::new("/proc").join(pid.to_string()).join("exe").exists());
        assert!(driver.adopt(dir).unwrap().is_none());
        // The last mount goes a moment after the last process.
        let freed = async {
            while loop_device_of(dir) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(BOOT_MAX, freed).await.expect("no loop device is left");
        let digest = Sha256::digest(dir.as_os_str().as_encoded_bytes());
        let name: String = digest[..10].iter().map(|byte| format!("{byte:02x}")).collect();
        for hierarchy in ["", "unified", "memory", "pids", "cpu"] {
            let group = Path::new("/sys/fs/cgroup").join(hierarchy).join("towline").join(&name);
            assert!(!group.exists(), "{}", group.display());
        }
    }
}

fn loop_device_of(dir: &Path) -> bool {
    fs::read_dir("/sys/block").unwrap().flatten().any(|device| {
        fs::read_to_string(device.path().join("loop/backing_file"))
            .is_ok_and(|file| Path::new(file.trim_end()).starts_with(dir))
    })
}
