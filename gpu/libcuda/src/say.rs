//! Words of the driver to the user: on stderr, and what kernels print on stdout. A stream that is
//! full or closed loses them and stops nothing.

use std::ffi::{c_char, c_int, c_void};
use std::io::Write;

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
