//! What all subcommands print with: outcomes, tables, JSON, progress bars.

use std::io::{self, Write};
use std::path::Path;

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use fathom_reference::files;
use indicatif::{ProgressBar, ProgressStyle};

/// How a command ended that was able to do its work; the exit code follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// What was asked holds: 0.
    Holds,
    /// A check failed: 1.
    Fails,
    /// Part of the input was bad, and has been reported: 2.
    BadInput,
}

/// A command's result; an error is printed and exits with 2.
pub type Result = std::result::Result<Outcome, Box<dyn std::error::Error>>;

/// A table without borders; columns named in `right` are aligned right.
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
/// Those of stdout.
pub fn print_json(value: &impl serde::Serialize) -> io::Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, value)?;
    out.write_all(b"\n")
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

/// A progress bar on stderr; nothing is drawn where that is no terminal.
pub fn progress(len: usize, what: &'static str) -> ProgressBar {
    let bar = ProgressBar::new(len as u64);
    bar.set_style(
        ProgressStyle::with_template("{prefix} {bar:30} {pos}/{len} {wide_msg} {eta}")
            .expect("a constant template"),
    );
    bar.set_prefix(what);
    bar
}
