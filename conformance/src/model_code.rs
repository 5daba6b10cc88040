//! The model's code as the simulator's source of op records.
//!
//! The simulator asks for a model of one layer of every kind; the model is built with these sizes
//! and run on the backend that records, so that the work that is timed is the work that is trained.

use fathom_config::{AttentionConfig, ModelConfig};
use fathom_reference::backend::Load;
use fathom_reference::model::workload::{Workload, record};
use fathom_reference::parallel::Parallel;
use fathom_reference::precision::{Mode, Recipe};
use fathom_simulator::SimError;
use fathom_simulator::config::{Precision, Recompute};
use fathom_simulator::workload::{OpSource, Question};
use fathom_trace::OpRecord;

/// Records what the model does, on the backend that computes nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct ModelCode;

impl OpSource for ModelCode {
    fn record(&self, q: &Question) -> Result<Vec<OpRecord>, SimError> {
        let size = |n: u64| n as usize;
        let parallel = Parallel { tp: size(q.tp), pp: 1, ep: size(q.ep), dp: size(q.ep), cp: 1 };
        let workload = Workload {
            sequences: size(q.sequences),
            sequence_length: size(q.seq_len),
            micro_batches: 1,
            load: load(q),
        };
        let recorded = record(&config(&q.model, size(q.tp)), &recipe(q), parallel, 0, &workload);
        recorded.map_err(|e| SimError::Layout(format!("{} as a model: {e}", q.model.name)))
    }
}

/// The model that is recorded. What tensor parallelism cannot split evenly is padded: key-value
/// heads are repeated, widths rounded up.
fn config(model: &ModelConfig, tp: usize) -> ModelConfig {
    let mut config = model.clone();
    config.intermediate_size = config.intermediate_size.next_multiple_of(tp);
    if let Some(moe) = &mut config.moe {
        moe.intermediate_size = moe.intermediate_size.next_multiple_of(tp);
    }
    if let AttentionConfig::Gqa { kv_heads, .. } = &mut config.attention {
        *kv_heads = kv_heads.next_multiple_of(tp);
    }
    config
}

fn recipe(q: &Question) -> Recipe {
    let again = q.recompute != Recompute::None;
    Recipe {
        recompute_norms: again,
        recompute_up_projections: again,
        recompute_swiglu: again,
        keep_swiglu_input_fp8: q.kept_in_fp8 && q.precision.is_quantised(),
        keep_attention_output_e5m6: q.kept_in_fp8 && q.precision.is_quantised(),
        ..Recipe::new(match q.precision {
            Precision::Bf16 => Mode::Bf16,
            // The same ops; the simulator knows how wide their operands are.
            Precision::Fp8
            | Precision::Fp8Tensor
            | Precision::Mxfp8
            | Precision::Nvfp4
            | Precision::Mxfp4 => Mode::Fp8,
        })
    }
}

/// The first rank's experts get `load` times the mean, the others share the rest.
fn load(q: &Question) -> Load {
    let Some(moe) = q.model.moe.filter(|_| q.load != 1.0 && q.ep > 1) else {
        return Load::Balanced;
    };
    let own = (moe.n_routed_experts as u64 / q.ep) as f64;
    let experts = moe.n_routed_experts as f64;
    let rest = ((experts - own * q.load) / (experts - own)).max(0.0);
    let share = |e: usize| if (e as f64) < own { q.load } else { rest };
    Load::Shares((0..moe.n_routed_experts).map(share).collect())
}
