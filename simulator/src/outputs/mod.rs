//! Outputs: dollars, failures, timelines, the report page, and the comparison with published
//! figures.

pub mod cost;
pub mod interval;
pub mod page;
pub mod perfetto;
pub mod reliability;
pub mod report;
pub mod validate;
