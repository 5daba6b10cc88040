//! What all subcommands print with: lines, outcomes, tables, JSON, progress bars.
//!
//! `println!` panics where stdout is full, and a command that panics while it prints may lose what
//! it has done. `outln!` and `errln!` print in its place: the first failure of stdout is kept,
//! the command goes on to its end, and [`finish`] tells `main`. Nobody can be told of stderr's.

use std::fmt;
use std::io::{self, Write};
use std::path::Path;
use std::sync::OnceLock;

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use fathom_reference::files::{self, VALUE, shorten};
use indicatif::{ProgressBar, ProgressStyle};

/// Prints on stdout.
macro_rules! out {
    ($($arg:tt)*) => { $crate::output::print(format_args!($($arg)*)) };
}

/// Prints a line on stdout.
macro_rules! outln {
    () => { $crate::output::print(format_args!("\n")) };
    ($($arg:tt)*) => { $crate::output::print(format_args!("{}\n", format_args!($($arg)*))) };
}

/// Prints a line on stderr.
macro_rules! errln {
    ($($arg:tt)*) => { $crate::output::print_err(format_args!("{}\n", format_args!($($arg)*))) };
}

/// Why stdout took no more.
static FAILED: OnceLock<io::Error> = OnceLock::new();

/// Writes to stdout, unless that has failed before.
pub fn print(text: fmt::Arguments<'_>) {
    if FAILED.get().is_none()
        && let Err(error) = io::stdout().lock().write_fmt(text)
    {
        let _ = FAILED.set(error);
    }
}

/// Writes to stderr.
pub fn print_err(text: fmt::Arguments<'_>) {
    let _ = io::stderr().lock().write_fmt(text);
}

/// Characters of a word and of a line that an error shows whole: any file's path, and no value of a
/// hundred thousand characters.
const WORD: usize = 400;
const LINE: usize = 4000;

/// An error as it is shown: what is longer than anybody reads loses its middle.
pub fn readable(text: &str) -> String {
    let word = |word: &str| {
        if word.chars().count() > WORD { shorten(word, VALUE) } else { word.to_owned() }
    };
    let line = |line: &str| line.split(' ').map(word).collect::<Vec<_>>().join(" ");
    text.split('\n').map(|l| shorten(&line(l), LINE)).collect::<Vec<_>>().join("\n")
}

/// Prints an error on stderr.
pub fn error(error: &dyn fmt::Display) {
    errln!("error: {}", readable(&error.to_string()));
}

/// Writes out what stdout still buffers.
pub fn flush() {
    if FAILED.get().is_none()
        && let Err(error) = io::stdout().lock().flush()
    {
        let _ = FAILED.set(error);
    }
}

/// Flushes stdout; the first error of all that was printed, if there was one.
pub fn finish() -> Option<&'static io::Error> {
    flush();
    FAILED.get()
}

/// How a command ended that was able to do its work; the process's exit code follows from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// What was asked holds: exit code 0.
    Holds,
    /// A check failed: exit code 1.
    Fails,
    /// Part of the input was bad, and has been reported: exit code 2.
    BadInput,
    /// The command that was run ended with a code of its own, which is passed on.
    Ended(u8),
}

/// A command's result; an error is printed and exits with 2.
pub type Result = std::result::Result<Outcome, Box<dyn std::error::Error>>;

/// A table without borders; the columns numbered in `right` are aligned to the right.
pub fn table(header: &[&str], right: &[usize], rows: Vec<Vec<String>>) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header.to_vec());
    table.add_rows(rows);
    for &column in right {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// Prints one JSON document on stdout.
///
/// # Errors
/// A value that JSON has no form for.
pub fn print_json(value: &impl serde::Serialize) -> serde_json::Result<()> {
    outln!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}

/// Writes a file beside its target and renames it: an interrupted run leaves the old file or the
/// new.
///
/// # Errors
/// A sentence with the path.
pub fn write_file(path: &Path, bytes: &[u8]) -> std::result::Result<(), String> {
    files::replace(path, |file, _| file.write_all(bytes))
        .map_err(|e| format!("cannot write {}: {e}", path.display()))
}

/// A progress bar of `len` steps on stderr; nothing is drawn where that is no terminal.
pub fn progress(len: usize, what: &'static str) -> ProgressBar {
    let bar = ProgressBar::new(len as u64);
    bar.set_style(
        ProgressStyle::with_template("{prefix} {bar:30} {pos}/{len} {wide_msg} {eta}")
            .expect("a constant template"),
    );
    bar.set_prefix(what);
    bar
}
