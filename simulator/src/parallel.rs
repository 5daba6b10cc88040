//! Which layers a pipeline stage holds, and which layouts are legal.

use crate::config::Scenario;
use crate::error::SimError;
use crate::times::{LayerKind, StepTimes};

/// A layer as placed: its kind, and its index among the transformer layers (0 for embedding and head).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlacedLayer {
    /// Kind.
    pub kind: LayerKind,
    /// Index of the transformer layer, from 0; prediction modules count on after the last layer.
    pub index: u64,
}

/// The layers of every pipeline stage, shallow to deep.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// By stage, then in order. Stage 0 opens with the embedding; the last ends with the head and MTP.
    pub stages: Vec<Vec<PlacedLayer>>,
    /// Ranks of the pipeline.
    pub ranks: usize,
}

/// The cost side: seconds of every part of a step of `scenario` as placed.
pub trait CostModel {
    /// Times for the event engine; stages and layers in the order of `placement`.
    fn step_times(&self, scenario: &Scenario, placement: &Placement)
    -> Result<StepTimes, SimError>;
}
