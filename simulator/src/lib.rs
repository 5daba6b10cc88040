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

pub mod config;
mod cost_model;
mod engine;
pub mod error;
pub mod network;
mod outputs;
pub mod serve;
pub mod workload;

pub use config::hardware;
pub use cost_model::{calibrate, first_principles, kernel_time, kineto, times};
use engine::bound;
pub use engine::{chunk, events, exposure, memory, search, step};
pub use outputs::{cost, interval, perfetto, reliability, report, validate};
pub use workload::{load, lowering, parallel};

pub use error::SimError;

// The unit tests take their op records from the model's code, through the very bridge that the
// program uses.
#[cfg(test)]
extern crate self as fathom_simulator;
#[cfg(test)]
#[path = "../../conformance/src/model_code.rs"]
mod model_code;
