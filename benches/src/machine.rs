//! Names the machine that the figures are from.

/// One line: CPUs, memory, kernels.
pub(crate) fn describe(vmm: &str) -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, key: &str| {
        let line = text.lines().find(|line| line.starts_with(key)).unwrap_or_default();
        line.split(':').nth(1).unwrap_or_default().trim().to_owned()
    };
    let cpu = field(&read("/proc/cpuinfo"), "model name");
    let memory_kib: u64 = field(&read("/proc/meminfo"), "MemTotal")
        .split(' ')
        .next()
        .and_then(|text| text.parse().ok())
        .unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let build = if cfg!(debug_assertions) { "debug" } else { "release" };
    format!(
        "Machine: {cores} cores ({cpu}), {} GiB, Linux {}; microVMs by {vmm}; {build} build; \
         medians.",
        memory_kib >> 20,
        read("/proc/sys/kernel/osrelease").trim()
    )
}
