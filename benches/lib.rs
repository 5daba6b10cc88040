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
