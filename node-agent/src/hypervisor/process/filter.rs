//! The system calls that no `process` sandbox may make: those that reach what the kernel does not
//! keep apart by namespaces, or that few programs use and many exploits have.
//!
//! It is a list of what is refused, because programs of any kind must run; refusals are EPERM, as
//! programs meet them in containers. Programs of 32 bits are not run.

use std::collections::BTreeMap;

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

use super::super::HypervisorError;

/// The kernel's modules, clock, keys, tracing and logs; handles that pass by mounts; memory of
/// others by faults; rings of calls that a filter does not see.
#[cfg(target_arch = "x86_64")]
const REFUSED: &[i64] = &[
    libc::SYS_acct,
    libc::SYS_add_key,
    libc::SYS_bpf,
    libc::SYS_clock_adjtime,
    libc::SYS_clock_settime,
    libc::SYS_delete_module,
    libc::SYS_finit_module,
    libc::SYS_init_module,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    libc::SYS_ioperm,
    libc::SYS_iopl,
    libc::SYS_kcmp,
    libc::SYS_kexec_file_load,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_lookup_dcookie,
    libc::SYS_nfsservctl,
    libc::SYS_open_by_handle_at,
    libc::SYS_perf_event_open,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
    libc::SYS_request_key,
    libc::SYS_settimeofday,
    libc::SYS_swapoff,
    libc::SYS_swapon,
    libc::SYS_syslog,
    libc::SYS_sysfs,
    libc::SYS_uselib,
    libc::SYS_userfaultfd,
    libc::SYS_ustat,
    libc::SYS_vhangup,
    libc::SYS__sysctl,
];

/// Where the same calls are a second time, for programs of the x32 kind.
const X32: i64 = 0x4000_0000;

/// The filter as the kernel reads it.
pub(super) fn program() -> Result<Vec<u8>, HypervisorError> {
    let failed = |error: &dyn std::fmt::Display| {
        HypervisorError::Spec(format!("the system call filter could not be made: {error}"))
    };
    let calls = REFUSED.iter().flat_map(|&call| [call, call | X32]);
    let rules: BTreeMap<_, _> = calls.map(|call| (call, Vec::new())).collect();
    let refuse = SeccompAction::Errno(libc::EPERM.cast_unsigned());
    let arch = std::env::consts::ARCH.try_into().map_err(|error| failed(&error))?;
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, arch);
    let filter = filter.map_err(|error| failed(&error))?;
    let program: BpfProgram = filter.try_into().map_err(|error| failed(&error))?;
    Ok(program.iter().flat_map(bytes).collect())
}

/// A `struct sock_filter`.
fn bytes(instruction: &seccompiler::sock_filter) -> [u8; 8] {
    let [a, b] = instruction.code.to_ne_bytes();
    let [c, d, e, f] = instruction.k.to_ne_bytes();
    [a, b, instruction.jt, instruction.jf, c, d, e, f]
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_filter_fits_the_kernel() {
        let bytes = super::program().unwrap();
        assert_eq!(bytes.len() % 8, 0);
        assert!(bytes.len() / 8 > super::REFUSED.len());
        // BPF_MAXINSNS.
        assert!(bytes.len() / 8 <= 4096);
    }
}
