//! Holding engines to the same bits: case files, suites, record and replay, diagnosis.
//!
//! - [`case_file`]: reading and writing cases, the project's common test format.
//! - [`compare`]: two tensors, bit by bit.
//! - [`catalog`]: the ops as documentation shows them, and their example cases.
//! - [`check`]: whole folders of case files against an engine.
//! - [`conform`]: an engine against the reference on drawn cases.
//! - [`coverage`]: which ops of which runs our kernels compute, as documentation shows it.
//! - [`inference`]: the model's code as the serving simulator's source of op records.
//! - [`junit`], [`github`]: verdicts as continuous integration reads them.
//! - [`lockstep`]: two backends that run every op together.
//! - [`record`]: the op calls of a run as case files, and the op trace.
//! - [`replay`]: a recording against an engine.
//! - [`demo`]: built-in cases of the demonstration.
//! - [`emulated`]: our FP8 GEMM on the emulator's library, for the demonstration and benchmarks.
//! - [`diagnose`]: which arithmetic produced this output?
//! - [`quality`]: what is known of the kernels without a GPU: machine code, bytes, conflicts.
//! - [`model_code`]: the model's code as the simulator's source of op records.
//!
//! It sees every engine; only the command line sees it.
#![forbid(unsafe_code)]

pub mod case_file;
pub mod catalog;
pub mod check;
pub mod compare;
pub mod conform;
pub mod coverage;
pub mod demo;
pub mod diagnose;
pub mod emulated;
pub mod github;
pub mod inference;
pub mod junit;
pub mod lockstep;
pub mod model_code;
pub mod quality;
pub mod record;
pub mod replay;
pub mod run_scenario;
pub mod ships_log;

use std::io::{self, Write};
use std::path::Path;

use fathom_reference::files;

/// Writes a file beside its target and renames it, so that no half-written file is ever seen.
///
/// # Errors
/// Those of the file system; the target is then as it was before.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    std::fs::create_dir_all(folder)?;
    files::replace(path, |file, _| file.write_all(bytes))
}
