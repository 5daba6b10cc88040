//! The file format: JSON Lines whose first line names the kind of record and the version.
//!
//! ```text
//! {"fathom_trace":"op","version":2}
//! {"seq":0,"step":0,"rank":0,"op":"gemm_fp8","class":"gemm", ...}
//! ```
//!
//! Readers refuse other versions and unknown fields, naming file and line. A trace of an older
//! version is recorded anew, which takes seconds: what it lacks cannot be guessed.

use std::io::{self, BufRead, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::input::{self, MESSAGE, VALUE, shorten};
use crate::{KernelRecord, OpRecord};

/// A kind of record that a trace file holds.
pub trait Record: Serialize + DeserializeOwned {
    /// The word in the header line.
    const KIND: &'static str;
    /// The version of the record's fields; raised when a field comes, goes or changes its meaning.
    const VERSION: u32;
}

impl Record for OpRecord {
    const KIND: &'static str = "op";
    /// Version 2 has `class`.
    const VERSION: u32 = 2;
}

impl Record for KernelRecord {
    const KIND: &'static str = "kernel";
    const VERSION: u32 = 1;
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    fathom_trace: String,
    version: u32,
}

/// Why a trace could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The file system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The trace file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A line is not what it should be.
    #[error("{}:{line}: expected {expected}, found {found}", path.display())]
    Line {
        /// The trace file.
        path: PathBuf,
        /// Line, counted from 1.
        line: usize,
        /// What should stand there.
        expected: String,
        /// What stands there.
        found: String,
    },
}

/// Writes records one a line, after the header.
pub struct Writer<R, W: Write> {
    out: W,
    record: std::marker::PhantomData<R>,
}

impl<R: Record, W: Write> Writer<R, W> {
    /// Begins a trace: writes the header line.
    ///
    /// # Errors
    /// Those of the underlying writer.
    pub fn new(mut out: W) -> io::Result<Self> {
        let header = Header { fathom_trace: R::KIND.to_owned(), version: R::VERSION };
        writeln!(out, "{}", serde_json::to_string(&header)?)?;
        Ok(Writer { out, record: std::marker::PhantomData })
    }

    /// Appends one record.
    ///
    /// # Errors
    /// Those of the underlying writer.
    pub fn write(&mut self, record: &R) -> io::Result<()> {
        serde_json::to_writer(&mut self.out, record)?;
        self.out.write_all(b"\n")
    }

    /// Flushes and gives the underlying writer back.
    ///
    /// # Errors
    /// Those of the underlying writer.
    pub fn finish(mut self) -> io::Result<W> {
        self.out.flush()?;
        Ok(self.out)
    }
}

/// Reads a whole trace from `input`; `path` is only named in errors.
///
/// # Errors
/// [`TraceError`] with file and line where the header or a record is malformed.
pub fn read<R: Record>(input: impl BufRead, path: &Path) -> Result<Vec<R>, TraceError> {
    let mut lines = input.lines().enumerate();
    let io_error = |source| TraceError::Io { path: path.to_owned(), source };
    let wrong = |line: usize, expected: String, found: String| TraceError::Line {
        path: path.to_owned(),
        line: line + 1,
        expected,
        found,
    };
    let expected =
        format!("the header {{\"fathom_trace\":\"{}\",\"version\":{}}}", R::KIND, R::VERSION);
    let Some((_, first)) = lines.next() else {
        return Err(wrong(0, expected, "an empty file".to_owned()));
    };
    let first = first.map_err(io_error)?;
    match serde_json::from_str::<Header>(&first) {
        Ok(h) if h.fathom_trace == R::KIND && h.version == R::VERSION => {}
        _ => return Err(wrong(0, expected, shorten(&first, VALUE))),
    }
    let mut records = Vec::new();
    for (number, line) in lines {
        let line = line.map_err(io_error)?;
        let record = serde_json::from_str(&line).map_err(|e| {
            let expected = format!("a record of kind '{}'", R::KIND);
            wrong(number, expected, shorten(&e.to_string(), MESSAGE))
        })?;
        records.push(record);
    }
    Ok(records)
}

/// Opens and reads a trace file.
///
/// # Errors
/// As [`read`].
pub fn read_file<R: Record>(path: &Path) -> Result<Vec<R>, TraceError> {
    let file =
        input::open(path).map_err(|source| TraceError::Io { path: path.to_owned(), source })?;
    read(io::BufReader::new(file), path)
}
