//! The cluster simulator: hardware, network, kernel time, schedules, memory, events, reports.
//!
//! It replays op traces (`fathom-trace`) on a model of hardware; it never sees a tensor.
#![forbid(unsafe_code)]
