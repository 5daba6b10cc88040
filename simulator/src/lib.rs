//! The cluster simulator: hardware, network, kernel time, schedules, memory, events, reports.
//!
//! It replays op traces (`fathom-trace`) on a model of hardware; it never sees a tensor. The road
//! of a step:
//!
//! 1. [`config`] reads a TOML file into a [`config::Scenario`] (model, cluster, layout, training);
//! 2. [`parallel`] refuses illegal layouts and says which layers a pipeline stage holds;
//! 3. the cost side ([`workload`], [`lowering`], [`kernel_time`], [`network`]) fills
//!    [`times::StepTimes`]: how long each part of each layer takes on the compute or the
//!    communication stream;
//! 4. `fathom_schedule` gives every rank its instruction stream;
//! 5. [`events`] plays the streams with those times: when each part ran, and where the time went;
//! 6. memory, cost, reliability and reports say what that means.
#![forbid(unsafe_code)]

pub mod calibrate;
pub mod chunk;
pub mod config;
pub mod cost;
pub mod error;
pub mod events;
pub mod first_principles;
pub mod hardware;
pub mod kernel_time;
pub mod load;
pub mod lowering;
pub mod memory;
pub mod network;
pub mod parallel;
pub mod perfetto;
pub mod reliability;
pub mod report;
pub mod search;
pub mod step;
pub mod times;
pub mod validate;
pub mod workload;

pub use error::SimError;

// The unit tests take their op records from the model's code, through the very bridge that the
// program uses.
#[cfg(test)]
extern crate self as fathom_simulator;
#[cfg(test)]
#[path = "../../conformance/src/workload.rs"]
mod model_code;
