//! The one error type of the simulator: what is wrong, where, and what to do next.

use fathom_schedule::ScheduleError;
use std::path::{Path, PathBuf};

use fathom_config::{ConfigError, KeyError};
use fathom_trace::input;

/// Why a simulation could not be set up or read. Every variant is the user's to mend; broken
/// invariants panic.
#[derive(Debug, thiserror::Error)]
pub enum SimError {
    /// A scenario's key says something that is not allowed.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// An architecture cannot be used.
    #[error(transparent)]
    Architecture(#[from] ConfigError),
    /// A layout, schedule or model that cannot be combined; the sentence gives the reason.
    #[error("illegal layout: {0}")]
    Layout(String),
    /// A trace, table or model file is malformed.
    #[error("{file}: {message}")]
    Input {
        /// The file that the error is about.
        file: String,
        /// The place in it, what was expected and what was found.
        message: String,
    },
    /// The file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file that the error is about.
        path: PathBuf,
        /// What the operating system said.
        #[source]
        source: std::io::Error,
    },
}

impl From<ScheduleError> for SimError {
    fn from(ScheduleError(reason): ScheduleError) -> Self {
        SimError::Layout(reason)
    }
}

impl SimError {
    /// An [`SimError::Io`] for `path`.
    pub fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        SimError::Io { path: path.into(), source }
    }

    /// An [`SimError::Input`] for `file`.
    pub fn input(file: impl ToString, message: impl Into<String>) -> Self {
        SimError::Input { file: file.to_string(), message: message.into() }
    }
}

/// Most bytes of a configuration: far above any real one, and read in no time.
const CONFIG_BYTES: u64 = 1 << 20;

/// Text of a configuration file.
///
/// # Errors
/// [`SimError::Io`], also for what is too large to be a configuration.
pub fn read_text(path: &Path) -> Result<String, SimError> {
    input::read_text(path, CONFIG_BYTES).map_err(|e| SimError::io(path, e))
}

/// Text of a table, a log or a trace.
///
/// # Errors
/// [`SimError::Io`].
pub fn read_table(path: &Path) -> Result<String, SimError> {
    input::read_text(path, input::TEXT_BYTES).map_err(|e| SimError::io(path, e))
}
