//! One run in a folder at a time: `run.lock`.
//!
//! The operating system holds the lock and lets go of it when the process ends, however it ends.
//! The file says who holds it, and is empty once a run has ended by itself; what a killed run left
//! in it is thus a stale claim. A claim of another host is never taken over, since a file system
//! may not share locks between hosts.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};

use super::TrainError;

/// Name of the lock's file in a run's folder.
pub const FILE: &str = "run.lock";

/// A folder that belongs to this process until the value is dropped.
#[derive(Debug)]
pub struct Lock {
    file: File,
    path: PathBuf,
    /// Whether the file was not there.
    new: bool,
    /// Whether something began: until then the folder is left as it was found.
    begun: bool,
    /// The claim of a process that ended without giving the folder back: `process 12 on host`.
    pub stale: Option<String>,
}

impl Lock {
    /// Claims `folder` for this process.
    ///
    /// # Errors
    /// [`TrainError::Folder`] where another process holds it, naming process and host.
    pub fn acquire(folder: &Path) -> Result<Lock, TrainError> {
        let path = folder.join(FILE);
        let wrong = |message: String| TrainError::Folder { path: folder.to_owned(), message };
        let io = |e: io::Error| TrainError::Folder { path: path.clone(), message: e.to_string() };
        let new = !path.exists();
        let mut options = OpenOptions::new();
        let mut file =
            options.read(true).write(true).create(true).truncate(false).open(&path).map_err(io)?;
        let locked = match file.try_lock() {
            Ok(()) => true,
            Err(TryLockError::WouldBlock) => false,
            Err(TryLockError::Error(e)) => return Err(io(e)),
        };
        let mut claim = String::new();
        file.read_to_string(&mut claim).map_err(io)?;
        let claim = claim.trim().to_owned();
        if !locked {
            let message =
                format!("another run is in this folder ({claim}); name another with --out");
            return Err(wrong(message));
        }
        let own = format!("process {} on {}", std::process::id(), host());
        let host_of = |claim: &str| claim.split_once(" on ").map(|(_, host)| host.to_owned());
        if !claim.is_empty() && host_of(&claim) != host_of(&own) {
            let file = path.display();
            let message = format!("claimed by {claim}; if that run has ended, delete {file}");
            return Err(wrong(message));
        }
        let stale = (!claim.is_empty()).then_some(claim);
        let mut lock = Lock { file, path: path.clone(), new, begun: false, stale };
        lock.write(&own).map_err(io)?;
        Ok(lock)
    }

    /// Says that the run has begun: from now on the lock's file stays in the folder.
    pub fn begin(&mut self) {
        self.begun = true;
    }

    fn write(&mut self, claim: &str) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.rewind()?;
        self.file.write_all(claim.as_bytes())
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // A claim that stays is only called stale by the next run.
        let _ = match (self.begun, self.new, self.stale.take()) {
            (false, true, _) => std::fs::remove_file(&self.path),
            (false, false, Some(claim)) => self.write(&claim),
            _ => self.write(""),
        };
    }
}

fn host() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").ok();
    let name = name.or_else(|| std::env::var("HOSTNAME").ok());
    name.map_or_else(|| "this machine".into(), |n| n.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_has_one_run_and_a_stale_claim_is_taken_over() {
        let folder = tempfile::tempdir().unwrap();
        drop(Lock::acquire(folder.path()).unwrap());
        assert!(!folder.path().join(FILE).exists(), "nothing was begun");
        let mut first = Lock::acquire(folder.path()).unwrap();
        first.begin();
        assert_eq!(first.stale, None);
        let error = Lock::acquire(folder.path()).unwrap_err().to_string();
        let own = format!("process {} on {}", std::process::id(), host());
        assert!(error.contains(&own) && error.contains("another run"), "{error}");
        drop(first);
        assert_eq!(Lock::acquire(folder.path()).unwrap().stale, None);
        let killed = format!("process 1 on {}", host());
        std::fs::write(folder.path().join(FILE), &killed).unwrap();
        assert_eq!(Lock::acquire(folder.path()).unwrap().stale, Some(killed));
        std::fs::write(folder.path().join(FILE), "process 1 on elsewhere").unwrap();
        let error = Lock::acquire(folder.path()).unwrap_err().to_string();
        assert!(error.contains("elsewhere") && error.contains("delete"), "{error}");
    }
}
