//! A file mapped into memory: large checkpoints are read where they lie.
#![allow(unsafe_code)]

use std::io;
use std::path::Path;

use memmap2::Mmap;

use crate::files;

/// Maps a file for reading.
///
/// # Errors
/// Those of the file system.
pub fn map(path: &Path) -> io::Result<Mmap> {
    let file = files::open_regular(path)?;
    // SAFETY: the mapping is private and read-only. A file that someone truncates meanwhile would
    // end the process with SIGBUS, not corrupt it; checkpoints are replaced by renaming.
    unsafe { Mmap::map(&file) }
}
