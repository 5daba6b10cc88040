//! Benchmarks only: the files beside this one are criterion targets, `records/` keeps runs with
//! their machine and date. Nothing here is tested for time; `docs/performance.md` quotes the
//! records.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

/// CPU time of this thread so far, on Linux.
fn cpu_time() -> Option<Duration> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    text.split(' ').next()?.parse().ok().map(Duration::from_nanos)
}

/// How long `work` takes: by the clock, or (`alone`: it is all on this thread) by the thread's CPU
/// time where the system tells it, so that other work on the machine counts less.
pub fn time(alone: bool, work: impl FnOnce()) -> Duration {
    let (start, cpu) = (Instant::now(), cpu_time());
    work();
    let elapsed = start.elapsed();
    let used = cpu.and_then(|before| Some(cpu_time()? - before));
    used.filter(|_| alone).unwrap_or(elapsed)
}

/// CPU seconds of this process so far, in all its threads; by the clock where the system does not
/// tell them.
pub fn process_seconds() -> f64 {
    static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    let threads = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let nanoseconds = threads.filter_map(|thread| {
        let text = std::fs::read_to_string(thread.path().join("schedstat")).ok()?;
        text.split(' ').next()?.parse::<u64>().ok()
    });
    match nanoseconds.sum::<u64>() {
        0 => START.get_or_init(Instant::now).elapsed().as_secs_f64(),
        nanoseconds => nanoseconds as f64 * 1e-9,
    }
}
