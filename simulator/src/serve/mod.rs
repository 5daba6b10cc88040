//! Serving: requests on pools of GPUs that read prompts and decode.
//!
//! The road of a run:
//!
//! 1. [`config`] is what is asked, [`read`] reads it from TOML with errors at file, line and key;
//! 2. [`layout`] says how a pool cuts the model, [`memory`] what a GPU of it holds;
//! 3. [`ops`] asks the model's code for the ops of an iteration, [`kernels`] times them as the
//!    parts of a layer by the number of tokens, [`iteration`] overlaps parts and exchanges;
//! 4. [`balance`] draws how unevenly experts are used, [`eplb`] places their copies;
//! 5. [`requests`] come from distributions or traces; [`engine`] plays arrivals, iterations of the
//!    [`mod@unit`]s and the caches' way between pools; [`metrics`] measures;
//! 6. [`run`] puts all of it together and reports, [`page`] as HTML; [`plan`] sizes pools for a
//!    load under a service level and tries layouts against each other.
//!
//! Nothing here trains: it shares the kernel and network models with a step, and no more.

pub mod balance;
pub mod config;
pub mod draws;
pub mod engine;
pub mod eplb;
pub mod iteration;
pub mod kernels;
pub mod layout;
pub mod memory;
pub mod metrics;
pub mod ops;
pub mod page;
pub mod plan;
pub mod read;
pub mod requests;
pub mod run;
pub mod unit;
