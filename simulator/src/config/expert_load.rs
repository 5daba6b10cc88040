//! How unevenly tokens fall on experts, as a scenario says it; [`crate::load`] draws from it.

use serde::{Deserialize, Serialize};

/// How unevenly tokens fall on experts: TOML table `[expert_load]`. Balanced by default.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ExpertLoad {
    /// Standard deviation of a rank's tokens relative to the mean, independent by rank, layer and
    /// micro-batch.
    pub deviation: f64,
    /// Seed of the draws.
    pub seed: u64,
    /// File of a routing trace instead of draws, beside the scenario's file; its formats are those
    /// of [`crate::load::RoutingTrace`]. Layers and micro-batches that it lacks take the next
    /// smaller ones that it has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace: Option<String>,
}

impl Default for ExpertLoad {
    fn default() -> Self {
        ExpertLoad { deviation: 0.0, seed: 1, trace: None }
    }
}
