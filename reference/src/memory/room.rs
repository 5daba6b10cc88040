//! Whether there is memory for a job, asked before it begins: what it needs by name, and what the
//! machine and the process's control groups leave.
//!
//! A process that takes more than there is is killed by the system, without a word and with all
//! that it has done. Where nothing says how much there is, nothing is refused.

use std::fmt;
use std::path::{Path, PathBuf};

/// The environment variable that, set to 1, lets a job begin however little memory there is.
pub const IGNORE: &str = "FATHOM_IGNORE_MEMORY";

/// What a job holds in memory at once, by name, in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Need {
    /// What the error calls the job: `training 'tiny'`.
    pub job: String,
    /// Each part's name and bytes.
    pub parts: Vec<(&'static str, u64)>,
}

/// There is too little memory.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{} needs {} of memory ({need}), and {} are available; {IGNORE}=1 begins nevertheless",
    need.job, bytes(need.sum()), bytes(*available)
)]
pub struct NoRoom {
    /// What the job holds, part by part.
    pub need: Need,
    /// Bytes that this process may still take.
    pub available: u64,
}

impl Need {
    /// Bytes of all parts together.
    pub fn sum(&self) -> u64 {
        self.parts.iter().map(|(_, bytes)| bytes).fold(0, |a, b| a.saturating_add(*b))
    }

    /// Refuses the job where less memory is available than it needs, unless [`IGNORE`] is set.
    ///
    /// # Errors
    /// [`NoRoom`] with the bytes of every part.
    pub fn check(self) -> Result<(), NoRoom> {
        let ignored = std::env::var_os(IGNORE).is_some_and(|value| value == "1");
        match available() {
            Some(available) if !ignored && self.sum() > available => {
                Err(NoRoom { need: self, available })
            }
            _ => Ok(()),
        }
    }
}

impl fmt::Display for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let held = self.parts.iter().filter(|(_, n)| *n > 0);
        let parts: Vec<String> = held.map(|(name, n)| format!("{name} {}", bytes(*n))).collect();
        f.write_str(&parts.join(", "))
    }
}

fn bytes(n: u64) -> String {
    match n {
        0..1_000_000_000 => format!("{:.1} MB", n as f64 / 1e6),
        _ => format!("{:.1} GB", n as f64 / 1e9),
    }
}

/// Bytes that this process may still take: what the machine has available, and what the process's
/// control groups and their parents leave of their limits; `None` where none of them says.
pub fn available() -> Option<u64> {
    let machine = std::fs::read_to_string("/proc/meminfo").ok();
    let machine = machine.and_then(|text| mem_available(&text));
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let left = group_folders(&groups).into_iter().filter_map(|folder| left_of(&folder));
    left.chain(machine).min()
}

/// `MemAvailable` of /proc/meminfo.
fn mem_available(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes << 10)
}

/// The folders of the memory controller that /proc/self/cgroup leads to, with their parents.
fn group_folders(text: &str) -> Vec<PathBuf> {
    let mut folders = Vec::new();
    for line in text.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let root = match controllers {
            "" => Path::new("/sys/fs/cgroup"),
            list if list.split(',').any(|name| name == "memory") => {
                Path::new("/sys/fs/cgroup/memory")
            }
            _ => continue,
        };
        let below = Path::new(path.trim_start_matches('/'));
        // Within a container the path may be the host's: its own limit then stands at the root.
        folders.extend(below.ancestors().map(|part| root.join(part)));
    }
    folders
}

/// What a control group leaves: its limit less what it uses, without cached files.
fn left_of(folder: &Path) -> Option<u64> {
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).ok();
    let number = |name: &str| read(name)?.trim().parse::<u64>().ok();
    let limit = number("memory.max").or_else(|| number("memory.limit_in_bytes"))?;
    let used = number("memory.current").or_else(|| number("memory.usage_in_bytes"))?;
    let stat = read("memory.stat").unwrap_or_default();
    let cached = stat.lines().filter_map(|line| {
        let (name, bytes) = line.split_once(' ')?;
        ["inactive_file", "active_file"].contains(&name).then(|| bytes.parse::<u64>().ok())?
    });
    Some(limit.saturating_sub(used.saturating_sub(cached.sum::<u64>())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_that_cannot_fit_is_refused_with_its_parts() {
        let parts = vec![("weights", 3 << 60), ("gradients", 1_500_000), ("moments", 0)];
        let refused = Need { job: "training 'x'".into(), parts }.check().unwrap_err().to_string();
        for part in ["training 'x' needs", "weights 3458764513.8 GB, gradients 1.5 MB)", IGNORE] {
            assert!(refused.contains(part), "{refused}");
        }
        assert!(!refused.contains("moments"), "{refused}");
        assert_eq!(Need { job: "nothing".into(), parts: Vec::new() }.check(), Ok(()));
    }

    #[test]
    fn limits_are_read_where_the_system_writes_them() {
        let text = "MemTotal:  100 kB\nMemAvailable:     42 kB\n";
        assert_eq!(mem_available(text), Some(42 << 10));
        let folders = group_folders("4:cpu,memory:/a\n0::/x/y\n");
        let expected = ["memory/a", "memory/", "x/y", "x", ""];
        assert_eq!(folders, expected.map(|f| Path::new("/sys/fs/cgroup").join(f)).to_vec());

        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            std::fs::write(folder.path().join(name), text).unwrap();
        };
        write("memory.current", "700\n");
        assert_eq!(left_of(folder.path()), None);
        write("memory.max", "max\n");
        assert_eq!(left_of(folder.path()), None);
        write("memory.max", "1000\n");
        write("memory.stat", "anon 5\ninactive_file 200\nactive_file 100\n");
        assert_eq!(left_of(folder.path()), Some(600));
    }
}
