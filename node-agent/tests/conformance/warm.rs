//! Warm starts: a restored guest is what a booted one is, and shares nothing with its siblings that
//! must not be shared.

use std::collections::BTreeSet;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use futures_util::future::BoxFuture;
use towline_node_agent::guest_link::GuestLink;
use towline_node_agent::hypervisor::cloud_hypervisor::CloudHypervisor;
use towline_node_agent::hypervisor::qemu::Qemu;
use towline_node_agent::hypervisor::{DiskLimits, Hypervisor, VmShape};
use towline_proto::v1::{ExecStart, GuestConfigure, User};

use crate::guest::{
    BOOT_MAX, Guest, SECRET, cloud_hypervisor_in, config, configuration, layer, run_async, spec,
    start, vm_dir,
};

pub(crate) const SHAPE: VmShape = VmShape { cpus: 1, memory_mib: 320 };

/// What programs can see of a machine, a line each, but for time, load, and what is each one's own
/// by intent. One program: processes are dear in an emulated guest.
const LOOK_AROUND: &str = r#"
sub slurp { my $text = ""; if (open my $file, "<", $_[0]) { local $/; $text = <$file> // $!; } else { $text = "$!\n" } $text }
sub say_all { my ($what, $text) = @_; print "$what: $_\n" for split /\n/, $text }
say_all("mount", slurp("/proc/self/mountinfo"));
print "environment: $_=$ENV{$_}\n" for sort keys %ENV;
print "user: $< $> $( $)\n";
say_all($_, slurp("/proc/self/$_")) for qw(limits oom_score_adj cgroup);
say_all($_, slurp("/proc/$_")) for qw(cmdline version cpuinfo partitions filesystems devices misc);
for (split /\n/, slurp("/proc/modules")) { my @field = split; print "module: @field[0..4]\n" }
sub names { opendir my $dir, $_[0] or return; sort grep { !/^\.\.?$/ } readdir $dir }
for (grep { /^\d+$/ && $_ != $$ } names("/proc")) { print "process: $_ ", slurp("/proc/$_/comm") }
sub walk {
  my ($do, $from, @skip) = @_;
  for my $name (names($from)) {
    my $path = "$from/$name"; $path =~ s{^//}{/};
    next if grep { $path =~ $_ } @skip;
    $do->($path);
    walk($do, $path, @skip) if -d $path && !-l $path;
  }
}
walk(sub { my $p = $_[0]; print "setting: $p ", slurp($p) =~ s/\n/ /gr, "\n" if -f $p && -r $p }, "/proc/sys",
  qr{/random/|nr-?_|_nr$|-nr$|-state$|ns_last_pid|/quota/|/pty/nr|stable_secret|netdev_rss_key|dentry|inode});
walk(sub { my @s = lstat $_[0]; my $to = readlink($_[0]) // ""; printf "file: %s %o %d:%d %d %s\n", $_[0], $s[2], $s[4], $s[5], $s[2] & 0x4000 ? 0 : $s[7], $to },
  "/", qr{^/(proc|sys|lib/modules|usr/lib/modules)/});
walk(sub { print "device: $_[0] ", readlink($_[0]) // "", "\n" }, $_) for qw(/sys/bus/virtio /sys/class/net /sys/class/block /sys/class/misc);
for my $disk (map { "/sys/block/$_" } names("/sys/block")) { print "disk: $disk ", map({ slurp("$disk/$_") =~ s/\n/ /r } qw(size ro serial)), "\n" }
"#;

/// 1/32 of what was free at an early moment of a boot, in KiB: no two boots agree on the last digit.
const RESERVE: &str = "setting: /proc/sys/vm/user_reserve_kbytes ";
/// By how much it may differ, in KiB: for 2 MiB more or less that were free.
const RESERVE_SLACK: u64 = 64;

/// Everything that a machine draws for itself, a line each.
const DRAW: &str = r#"
cat /proc/sys/kernel/random/uuid /proc/sys/kernel/random/boot_id /etc/machine-id
perl -e 'open F, "<", "/dev/urandom"; read F, $b, 32; print unpack("H*", $b), "\n"'
perl -e '$b = "\0" x 32; syscall(318, $b, 32, 0) == 32 or die; print unpack("H*", $b), "\n"'
mknod /dev/drawn c 10 183 && perl -e 'open F, "<", "/dev/drawn"; sysread F, $b, 32; print unpack("H*", $b), "\n"'; rm /dev/drawn
perl -e 'open F, "<", "/proc/self/auxv"; local $/; $_ = <F>; print unpack("H*", $_), "\n"'
if type ssh-keygen > /dev/null 2>&1; then echo root:x:0:0::/root:/bin/sh > /etc/passwd; ssh-keygen -q -t ed25519 -N "" -f /root/key < /dev/null && cat /root/key.pub; fi
"#;

/// Whether a cache may be the test's own: templates are in it, and the guest kernel is not.
type Making<'m, D> = &'m dyn Fn(&Path) -> BoxFuture<'_, Option<D>>;

/// QEMU, with templates of this test's own.
fn own_qemu(cache: &Path) -> BoxFuture<'_, Option<Qemu>> {
    Box::pin(async move {
        let mut config = config()?;
        cache.clone_into(&mut config.cache_dir);
        Some(Qemu::new(config).await.unwrap())
    })
}

/// Cloud Hypervisor, with templates of this test's own.
fn own_cloud_hypervisor(cache: &Path) -> BoxFuture<'_, Option<CloudHypervisor>> {
    Box::pin(cloud_hypervisor_in(Some(cache), DiskLimits::default()))
}

pub(crate) async fn configure(guest: &mut Guest, number: u8) {
    let configure = GuestConfigure {
        layers: 1,
        machine_id: vec![number; 16],
        entropy: towline_node_agent::guest_configure::random::<64>().unwrap().to_vec(),
        ..configuration()
    };
    guest.link.configure(&guest.vm, &configure, BOOT_MAX).await.unwrap();
}

async fn script(guest: &Guest, script: &str) -> String {
    let out = guest.run_as_root(script).await;
    assert_eq!((out.code, &out.refused), (0, &None), "{out:?}");
    out.stdout
}

#[test]
fn vm_that_is_restored_is_what_a_booted_one_is_and_shares_no_secret() {
    restored_is_as_booted(&own_qemu);
}

#[test]
fn cloud_hypervisor_that_is_restored_is_what_a_booted_one_is_and_shares_no_secret() {
    restored_is_as_booted(&own_cloud_hypervisor);
}

pub(crate) fn restored_is_as_booted<D: Hypervisor>(making: Making<'_, D>) {
    run_async(async {
        let cache = tempfile::tempdir().unwrap();
        let Some(driver) = making(cache.path()).await else { return };
        assert!(driver.capabilities().snapshot);
        let dirs = [vm_dir(), vm_dir(), vm_dir()];
        let [(_, first), (_, second), (_, third)] = &dirs;
        assert!(driver.restore(&spec(first, vec![])).await.unwrap().is_none(), "none was made");
        driver.make_template(SHAPE).await.unwrap();
        check_kept(&cache.path().join("templates"));

        // Two at once, from one file.
        let layers = vec![layer(first).unwrap()];
        let (mut one, mut two) = tokio::join!(
            Guest::restore_only(&driver, first, layers.clone()),
            Guest::restore_only(&driver, second, layers.clone()),
        );
        tokio::join!(configure(&mut one, 1), configure(&mut two, 2));
        let mut cold = Guest::boot_only(&driver, third, layers).await;
        configure(&mut cold, 3).await;

        compare(&look_around(&two).await, &look_around(&cold).await);
        let (of_one, of_two) = (script(&one, DRAW).await, script(&two, DRAW).await);
        assert!(of_one.lines().count() >= 7, "{of_one}");
        for (one, two) in of_one.lines().zip(of_two.lines()) {
            assert_ne!(one, two, "two guests drew the same");
        }
        check_clock(&one).await;
        check_modules(&one).await;
        check_later_session(one).await;
    });
}

async fn look_around(guest: &Guest) -> String {
    let user = Some(User { name: "root".into(), ..User::default() });
    let out = guest.run_as(ExecStart { user, ..start(&["perl", "-e", LOOK_AROUND]) }).await;
    assert_eq!((out.code, out.stderr.as_str()), (0, ""), "{:?}", out.refused);
    out.stdout
}

fn compare(warm: &str, booted: &str) {
    let reserve = |text: &str| -> u64 {
        let line = text.lines().find_map(|line| line.strip_prefix(RESERVE));
        line.expect("the reserve").trim().parse().unwrap()
    };
    let (one, other) = (reserve(warm), reserve(booted));
    assert!(one.abs_diff(other) <= RESERVE_SLACK, "{RESERVE}{one} and {other}");
    let lines = |text: &str| {
        let same = text.lines().filter(|line| !line.starts_with(RESERVE));
        same.map(str::to_owned).collect::<BTreeSet<_>>()
    };
    let (warm, booted) = (lines(warm), lines(booted));
    let only_warm: Vec<_> = warm.difference(&booted).collect();
    let only_booted: Vec<_> = booted.difference(&warm).collect();
    let none: Vec<&String> = Vec::new();
    assert_eq!((&only_warm, &only_booted), (&none, &none), "{only_warm:#?}{only_booted:#?}");
    for wanted in ["mount: ", "/lib/modules ro,", "file: /etc/hostname ", "disk: /sys/block/vda "] {
        assert!(
            warm.iter().any(|line| line.contains(wanted)),
            "`{wanted}` is missing in {warm:#?}"
        );
    }
    let disks: Vec<_> = warm.iter().filter(|line| line.starts_with("disk: ")).collect();
    assert_eq!(disks.len(), 3, "places without a disk stay out of sight: {disks:?}");
    assert!(warm.len() > 800, "{} lines", warm.len());
}

/// Private, and nothing else is left of the making.
fn check_kept(templates: &Path) {
    let names = |dir: &Path| {
        let entries = std::fs::read_dir(dir).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect::<Vec<_>>()
    };
    let mut names = names(templates);
    names.sort();
    let [seal, template, key, lock] = &names[..] else { panic!("{names:?}") };
    assert!(template.ends_with("-1x320.template") && seal.ends_with("-1x320.seal"), "{names:?}");
    assert_eq!((key.as_str(), lock.as_str()), ("key", "lock"));
    let mut bytes = 0;
    for path in [templates.join(template)].iter().flat_map(|path| files(path)) {
        let meta = std::fs::metadata(&path).unwrap();
        assert_eq!(meta.permissions().mode() & 0o077, 0, "{}", path.display());
        bytes += meta.blocks() * 512;
    }
    assert!(bytes < 200 << 20, "{bytes} bytes");
}

/// A file, or all of a folder and itself.
fn files(path: &Path) -> Vec<PathBuf> {
    let inside = std::fs::read_dir(path).into_iter().flatten().flatten();
    inside.map(|entry| entry.path()).chain([path.to_owned()]).collect()
}

async fn check_clock(guest: &Guest) {
    // What the configuration said, not when the template was made.
    let now: u64 = script(guest, "perl -e 'print time'").await.parse().unwrap();
    assert!((1_800_000_000..1_800_000_600).contains(&now), "{now}");
}

/// The kernel's own modules can be loaded by name.
async fn check_modules(guest: &Guest) {
    let look = "ls /lib/modules/$(uname -r)/modules.dep && type kmod";
    if guest.run_as_root(look).await.code != 0 {
        eprintln!("SKIPPED: this machine has no kmod");
        return;
    }
    let out = script(guest, "bash -c 'exec -a modprobe kmod veth' && cat /proc/modules").await;
    assert!(out.contains("\nveth ") || out.starts_with("veth "), "{out}");
    let out = guest.run_as_root("touch /lib/modules/x").await;
    assert!(out.stderr.contains("Read-only"), "{out:?}");
}

/// Another node agent takes a restored guest up like any other.
async fn check_later_session(mut guest: Guest) {
    drop(guest.link);
    guest.link = GuestLink::connect(&guest.vm, SECRET, BOOT_MAX).await.unwrap();
    assert!(guest.link.hello.configured && !guest.link.hello.boot_id.is_empty());
    assert_eq!(guest.run(&["sh", "-c", "exit 7"]).await.code, 7);
}

#[test]
fn vm_is_not_restored_from_a_damaged_template_and_another_is_made() {
    run_async(async {
        let cache = tempfile::tempdir().unwrap();
        let Some(driver) = own_qemu(cache.path()).await else { return };
        driver.make_template(SHAPE).await.unwrap();
        let templates = cache.path().join("templates");
        let template = std::fs::read_dir(&templates)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .find(|path| path.extension().is_some_and(|ext| ext == "template"))
            .unwrap();
        let file = std::fs::OpenOptions::new().write(true).open(&template).unwrap();
        file.set_len(file.metadata().unwrap().len() / 2).unwrap();
        let (_guard, dir) = vm_dir();
        assert!(driver.restore(&spec(&dir, vec![])).await.unwrap().is_none(), "its seal is broken");
        assert!(!template.exists(), "and it is gone");

        // What a killed maker left goes with the next one.
        let left = templates.join("making-x/save");
        std::fs::create_dir_all(&left).unwrap();
        driver.make_template(SHAPE).await.unwrap();
        assert!(!left.exists());
        // Another one's seal does not do.
        let seal = template.with_extension("seal");
        let other = seal.with_file_name("other-1x320.seal");
        std::fs::copy(&seal, &other).unwrap();
        std::fs::copy(&template, other.with_extension("template")).unwrap();
        std::fs::rename(other.with_extension("template"), &template).unwrap();
        assert!(driver.restore(&spec(&dir, vec![])).await.unwrap().is_none());
        // Nor does none.
        driver.make_template(SHAPE).await.unwrap();
        std::fs::remove_file(&seal).unwrap();
        assert!(driver.restore(&spec(&dir, vec![])).await.unwrap().is_none());
        driver.make_template(SHAPE).await.unwrap();
        let vm = driver.restore(&spec(&dir, vec![])).await.unwrap().unwrap();
        vm.kill().unwrap();
        vm.wait_exit().await;
        driver.drop_template(SHAPE);
        assert!(!template.exists() && !seal.exists());
    });
}
