//! Training data: sources of documents, the tokenizer, packing, and the place in all of it.
//!
//! [`Loader`] turns a [`DataConfig`] into packed sequences. It indexes every source once (offsets,
//! not text), removes duplicates, shuffles by a permutation that is computed and not stored, and
//! is a pure function of (configuration, seed, sequence length): [`Loader::state`] and
//! [`Loader::restore`] continue it at any sequence, to the bit.
//!
//! - `source`: files to documents; `text`, `jsonl`, `parquet` (behind the feature of that name) and
//!   the built-in corpus are its formats.
//! - `duplicates`: exact (blake3) and near (MinHash) duplicates.
//! - `order`: the permutation.
//! - [`tokenizer`]: byte-level BPE.
//! - `loader`: fill-in-the-middle, splitting of joined tokens, packing.
//!
//! This room knows no model: of it, it only makes the [`crate::model::Batch`].

pub mod builtin;
mod config;
mod duplicates;
mod loader;
mod order;
#[cfg(feature = "parquet")]
mod parquet;
mod source;
mod text;
pub mod tokenizer;

use std::path::PathBuf;

pub use config::{
    DataConfig, Duplicates, Format, SourceConfig, Split, TokenizerConfig, ValidationConfig,
};
pub use loader::{Loader, LoaderState, SourceState};
pub use text::read_text;
pub use tokenizer::{TextStream, Tokenizer};

/// Why training data or a tokenizer cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A file or folder cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file that the error is about.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A file's content is not what its format asks for.
    #[error("{}, {place}: expected {expected}, found {found}", path.display())]
    Content {
        /// The file that the error is about.
        path: PathBuf,
        /// Line (from 1), or row group and row.
        place: String,
        /// What should stand there.
        expected: String,
        /// What stands there.
        found: String,
    },
    /// A setting that cannot be followed.
    #[error("[data] {key}: expected {expected}, found {found}")]
    Setting {
        /// The dotted key below `[data]`.
        key: String,
        /// The values that it may have.
        expected: String,
        /// The value that it has.
        found: String,
    },
    /// A tokenizer that cannot be used.
    #[error("{}: {message}", path.display())]
    Tokenizer {
        /// The tokenizer's file, or `(trained)`.
        path: PathBuf,
        /// What was expected and found.
        message: String,
    },
    /// A state that belongs to other data or other settings.
    #[error("the data position does not fit: expected {what} {expected}, found {found}")]
    State {
        /// What differs: data, tokenizer, sequence length, seed or place.
        what: &'static str,
        /// What this loader has.
        expected: String,
        /// What the state says.
        found: String,
    },
}

impl DataError {
    fn io(path: &std::path::Path) -> impl FnOnce(std::io::Error) -> DataError {
        let path = path.to_owned();
        |source| DataError::Io { path, source }
    }

    fn setting(key: &str, expected: impl Into<String>, found: impl ToString) -> DataError {
        DataError::Setting { key: key.into(), expected: expected.into(), found: found.to_string() }
    }
}
