//! The model's code as the serving simulator's source of op records: prefill is the forward of a
//! micro-batch, decode the absorbed form, both on the backend that records.

use fathom_config::ModelConfig;
use fathom_reference::backend::Load;
use fathom_reference::model::workload::{Workload, record, record_decode};
use fathom_reference::parallel::Parallel;
use fathom_reference::precision::{Mode, Recipe};
use fathom_simulator::SimError;
use fathom_simulator::config::Precision;
use fathom_simulator::serve::ops::{InferenceOps, Iteration};
use fathom_trace::{OpRecord, Phase};

/// Records what the model does when it serves, on the backend that computes nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct InferenceCode;

impl InferenceOps for InferenceCode {
    fn prefill(&self, it: &Iteration) -> Result<Vec<OpRecord>, SimError> {
        // No module drafts while a prompt is read.
        let config = ModelConfig { mtp_depth: 0, ..it.model.clone() };
        let workload = Workload {
            sequences: 1,
            sequence_length: it.tokens as usize,
            micro_batches: 1,
            load: Load::Balanced,
        };
        let records = record(&config, &recipe(it), parallel(it), 0, &workload);
        let records = records.map_err(|e| refused(&config, &e))?;
        Ok(records.into_iter().filter(|r| r.phase == Phase::F).collect())
    }

    fn decode(&self, it: &Iteration) -> Result<Vec<OpRecord>, SimError> {
        let tokens = it.tokens as usize;
        let records = record_decode(&it.model, &recipe(it), parallel(it), tokens, Load::Balanced);
        records.map_err(|e| refused(&it.model, &e))
    }
}

fn refused(model: &ModelConfig, e: &dyn std::fmt::Display) -> SimError {
    SimError::Layout(format!("{} as a model that serves: {e}", model.name))
}

fn parallel(it: &Iteration) -> Parallel {
    Parallel { tp: it.tp as usize, pp: 1, ep: it.ep as usize, dp: it.ep as usize, cp: 1 }
}

/// Nothing is kept for a backward.
fn recipe(it: &Iteration) -> Recipe {
    Recipe::new(match it.precision {
        Precision::Bf16 => Mode::Bf16,
        Precision::Fp8
        | Precision::Fp8Tensor
        | Precision::Mxfp8
        | Precision::Nvfp4
        | Precision::Mxfp4 => Mode::Fp8,
    })
}
