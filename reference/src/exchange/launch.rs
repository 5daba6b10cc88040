//! Starts the ranks of a run as processes of this machine: the same command line once a rank, with
//! the variables that torchrun sets.

use std::io;
use std::net::TcpListener;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// Set for a process that was started here: it stops with a checkpoint when its standard input
/// ends.
pub const LAUNCHED: &str = "FATHOM_LAUNCHED";

/// How long ranks have to end once one has failed, until they are killed.
const GRACE: Duration = Duration::from_secs(8);

/// How often the ranks are looked after.
const TICK: Duration = Duration::from_millis(10);

/// How the ranks ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// The exit code of each; none where a signal ended it.
    pub codes: Vec<Option<i32>>,
    /// Ranks that did not end by themselves after another had failed, and were killed.
    pub killed: Vec<usize>,
}

/// Starts `world` processes of `command` and waits for their end. Each has `threads` threads where
/// `RAYON_NUM_THREADS` does not say otherwise. Once `stop` says so, all are asked to stop.
///
/// # Errors
/// Where a process cannot be started.
pub fn run(
    mut command: impl FnMut() -> io::Result<Command>,
    (world, threads): (usize, usize),
    stop: &dyn Fn() -> bool,
) -> io::Result<Ended> {
    let port = TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port();
    let run = format!("{} {port}", std::process::id());
    let mut ranks = Ranks(Vec::new());
    for rank in 0..world {
        let mut command = command()?;
        for (name, value) in [("RANK", rank), ("LOCAL_RANK", rank)] {
            command.env(name, value.to_string());
        }
        for name in ["WORLD_SIZE", "LOCAL_WORLD_SIZE"] {
            command.env(name, world.to_string());
        }
        command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
        command.env("TORCHELASTIC_RUN_ID", &run).env(LAUNCHED, "1");
        if std::env::var_os("RAYON_NUM_THREADS").is_none_or(|n| n.is_empty()) {
            command.env("RAYON_NUM_THREADS", threads.to_string());
        }
        let mut child = command.stdin(Stdio::piped()).spawn()?;
        let input = child.stdin.take();
        ranks.0.push(Rank { child, input, code: None });
    }
    ranks.wait(stop)
}

struct Rank {
    child: Child,
    /// Closed to ask the rank to stop.
    input: Option<ChildStdin>,
    code: Option<Option<i32>>,
}

struct Ranks(Vec<Rank>);

impl Ranks {
    fn wait(&mut self, stop: &dyn Fn() -> bool) -> io::Result<Ended> {
        let (mut failed, mut killed) = (None::<Instant>, Vec::new());
        loop {
            for rank in self.0.iter_mut().filter(|rank| rank.code.is_none()) {
                if let Some(status) = rank.child.try_wait()? {
                    rank.code = Some(status.code());
                    if status.code() != Some(0) {
                        failed.get_or_insert_with(Instant::now);
                    }
                }
            }
            if self.0.iter().all(|rank| rank.code.is_some()) {
                let codes = self.0.iter().map(|rank| rank.code.flatten()).collect();
                return Ok(Ended { codes, killed });
            }
            if stop() {
                self.0.iter_mut().for_each(|rank| rank.input = None);
            }
            if failed.is_some_and(|failed| failed.elapsed() > GRACE) && killed.is_empty() {
                for (i, rank) in self.0.iter_mut().enumerate().filter(|(_, r)| r.code.is_none()) {
                    rank.child.kill()?;
                    killed.push(i);
                }
            }
            thread::sleep(TICK);
        }
    }
}

impl Drop for Ranks {
    /// Leaves no rank behind where one could not be started.
    fn drop(&mut self) {
        for rank in self.0.iter_mut().filter(|rank| rank.code.is_none()) {
            let _ = rank.child.kill();
            let _ = rank.child.wait();
        }
    }
}
