//! Holding engines to the same bits: case files, suites, record and replay, diagnosis.
//!
//! - [`case_file`]: reading and writing cases, the project's common test format.
//! - [`compare`]: two tensors, bit by bit.
//! - [`check`]: whole folders of case files against an engine.
//!
//! It sees every engine; only the command line sees it.
#![forbid(unsafe_code)]

pub mod case_file;
pub mod check;
pub mod compare;
