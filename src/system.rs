//! What the system says of this process and of the machine: CPU time and memory; and processors for copies beside a device.

use rayon::{ThreadPool, ThreadPoolBuilder};
use std::sync::OnceLock;
use std::time::Duration;

/// Threads that copy side by side: more of them do not make memory faster.
const COPY_THREADS: usize = 8;

/// Runs `work` where its rayon loops take several processors, where a worker's own take one. For copies on the host beside a device: its one worker
/// waits for them, and the other processors have nothing to do.
pub fn side_by_side<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    static COPIERS: OnceLock<Option<ThreadPool>> = OnceLock::new();
    let copiers = COPIERS.get_or_init(|| {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = processors.min(COPY_THREADS);
        ThreadPoolBuilder::new().num_threads(threads).build().ok()
    });
    match copiers {
        Some(copiers) => copiers.install(work),
        // The system gives no threads: then on this one.
        None => work(),
    }
}

/// CPU time of the calling thread.
pub fn thread_cpu() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec as u32)
}

/// CPU time of the process, all threads.
pub fn process_cpu() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec as u32)
}

/// Peak resident bytes of the process so far, or 0 where the system does not tell.
pub fn peak_host_bytes() -> u64 {
    bytes_of("/proc/self/status", "VmHWM").unwrap_or(0)
}

/// Resident bytes of the process now, or 0 where the system does not tell.
pub fn resident_host_bytes() -> u64 {
    bytes_of("/proc/self/status", "VmRSS").unwrap_or(0)
}

/// What the line `name: 123 kB` of a file of the system says.
fn bytes_of(path: &str, name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(path).ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}

/// Bytes that the process may have resident: what the system says is available, or less where a control group sets a limit; no bound
/// where neither tells.
pub fn available_host_bytes() -> u64 {
    let number = |path: &str| -> Option<u64> { std::fs::read_to_string(path).ok()?.trim().parse().ok() };
    let groups = [
        "/sys/fs/cgroup/memory.max",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
    ];
    let system = bytes_of("/proc/meminfo", "MemAvailable");
    let limits = groups.into_iter().filter_map(number).chain(system);
    limits.min().unwrap_or(u64::MAX)
}

/// Gives memory that is free within the process back to the system. The allocator keeps what threads freed; large panels that come and
/// go leave holes in it, which without this grew to half of a run's peak.
pub fn release_free_memory() {
    // SAFETY: no arguments but a number; it may be called at any time from any thread.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    unsafe {
        libc::malloc_trim(0);
    }
}
