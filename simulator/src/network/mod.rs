//! Network time: topologies, flows with max-min sharing, all-to-all, collectives, point-to-point.
//!
//! [`Fabric`] lays the links of a group of GPUs out and routes between them; [`flows`] shares the
//! links; [`alltoall`], [`low_latency`] and [`collectives`] say which flows an operation consists
//! of; [`topology`] counts switches and links.

pub mod alltoall;
pub mod collectives;
mod fabric;
pub mod flows;
pub mod low_latency;
pub mod topology;

pub use fabric::Fabric;
