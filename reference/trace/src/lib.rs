//! The records by which the rooms talk: op records and kernel records, as versioned JSON Lines.
//!
//! This room depends on no other room of the workspace and knows no arithmetic.
#![forbid(unsafe_code)]
