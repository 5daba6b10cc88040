//! Words of the driver to the user: on stderr, and what kernels print on stdout. A stream that is
//! full or closed loses them and stops nothing.

use std::ffi::{c_char, c_int, c_void};
use std::io::Write;
use std::sync::Mutex;

use fathom_emulator::{Finding, Ub};

/// Writes a line to stderr, `fathom: ` before it.
macro_rules! say {
    ($($arg:tt)*) => { $crate::say::line(format_args!($($arg)*)) };
}
pub(crate) use say;

/// See [`say!`].
pub(crate) fn line(words: std::fmt::Arguments<'_>) {
    // There is nobody to tell of a failure.
    let _ = writeln!(std::io::stderr(), "fathom: {words}");
}

/// Defects that were told: kind, kernel and line. The first of a process is told why it matters.
static TOLD: Mutex<Vec<(Ub, String, u32)>> = Mutex::new(Vec::new());

/// Tells a finding, as soon as it is made; a defect once.
pub(crate) fn finding(finding: &Finding) {
    let place = (finding.kind, finding.kernel.clone(), finding.line);
    let mut told = TOLD.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if told.contains(&place) {
        return;
    }
    let first = told.is_empty();
    told.push(place);
    drop(told);
    say!("{finding}");
    if first {
        let (why, silence) = (finding.kind.why(), finding.to_silence());
        line(format_args!("  why it matters: {why}\n  to silence it: {silence}"));
    }
}

unsafe extern "C" {
    static stdout: *mut c_void;
    fn fwrite(data: *const c_char, size: usize, count: usize, file: *mut c_void) -> usize;
    fn fflush(file: *mut c_void) -> c_int;
}

/// Prints what a kernel printed, behind what the client's own `printf` has printed so far.
pub(crate) fn print(words: &str) {
    if !words.is_empty() {
        // SAFETY: C's standard output, which is there in every process that has a C library.
        unsafe {
            fwrite(words.as_ptr().cast(), 1, words.len(), stdout);
            fflush(stdout);
        }
    }
}
