//! Why a configuration cannot be used: file, place, what was expected and what was found.

use std::path::PathBuf;

/// Why an architecture cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file that the error is about.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The file is not what it should be.
    #[error("{}, at '{place}': expected {expected}, found {found}", path.display())]
    Value {
        /// The file, or the preset's name.
        path: PathBuf,
        /// The key, in the file's own names.
        place: String,
        /// What should stand there.
        expected: String,
        /// What stands there.
        found: String,
    },
    /// No preset has this name.
    #[error("{0}")]
    Preset(String),
}

/// A key of a layered configuration is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{place}: {key}: {message}")]
pub struct KeyError {
    /// File and line, the flag that set the key, or what else it comes from.
    pub place: String,
    /// The dotted key.
    pub key: String,
    /// What is allowed, what was found, and the nearest name.
    pub message: String,
}
