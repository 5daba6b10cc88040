//! Holding engines to the same bits: case files, suites, record and replay, diagnosis.
//!
//! It sees every engine; only the command line sees it.
#![forbid(unsafe_code)]
