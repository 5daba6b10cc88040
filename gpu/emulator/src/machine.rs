//! Runs grids.
use std::sync::Arc;

use crate::error::Error;
use crate::launch::{Launch, LaunchReport};
use crate::lower::Code;

pub(crate) fn run(l: &[Launch<'_>], codes: &[Arc<Code>]) -> Result<Vec<LaunchReport>, Error> {
    debug_assert_eq!(l.len(), codes.len());
    Ok(l.iter().map(|_| LaunchReport::default()).collect())
}
