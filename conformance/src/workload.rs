//! The model's code as the simulator's source of op records.
//!
//! The simulator asks for a model of one layer of every kind; the model is built with these sizes
//! and run on the backend that records, so that the work that is timed is the work that is trained.

use fathom_reference::backend::Load;
use fathom_reference::config::{AttentionConfig, ModelConfig, MoeConfig, MtpKind, RopeConfig};
use fathom_reference::model::workload::{Workload, record};
use fathom_reference::ops::router::Score;
use fathom_reference::parallel::Parallel;
use fathom_reference::precision::{Mode, Recipe};
use fathom_simulator::SimError;
use fathom_simulator::config::{Precision, Recompute};
use fathom_simulator::hardware::model::{Attention, Model, Moe};
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
        let recorded = record(&config(&q.model, q.tp), &recipe(q), parallel, 0, &workload);
        recorded.map_err(|e| SimError::Layout(format!("{} as a model: {e}", q.model.name)))
    }
}

/// The sizes of `model` as the model's code takes them. What tensor parallelism cannot split evenly
/// is padded: key-value heads are repeated, widths rounded up.
fn config(model: &Model, tp: u64) -> ModelConfig {
    let size = |n: u64| n as usize;
    let attention = match model.attention {
        Attention::Mla {
            q_lora_rank,
            kv_lora_rank,
            qk_nope_head_dim,
            qk_rope_head_dim,
            v_head_dim,
        } => AttentionConfig::Mla {
            q_lora_rank: (q_lora_rank > 0).then_some(size(q_lora_rank)),
            kv_lora_rank: size(kv_lora_rank),
            qk_nope_head_dim: size(qk_nope_head_dim),
            qk_rope_head_dim: size(qk_rope_head_dim),
            v_head_dim: size(v_head_dim),
        },
        Attention::Gqa { n_kv_heads, head_dim } => AttentionConfig::Gqa {
            kv_heads: size(n_kv_heads.next_multiple_of(tp)),
            head_dim: size(head_dim),
        },
    };
    ModelConfig {
        vocab_size: size(model.vocab_size),
        hidden_size: size(model.hidden),
        layers: size(model.n_layers),
        heads: size(model.n_heads),
        attention,
        intermediate_size: size(model.intermediate.next_multiple_of(tp)),
        moe: model.moe.map(|moe| experts(&moe, tp)),
        mtp_depth: size(model.n_mtp_layers),
        mtp_kind: MtpKind::Sequential,
        rope: RopeConfig { theta: 10000.0, interleaved: true, yarn: None },
        max_position_embeddings: 1 << 20,
        rms_norm_eps: 1e-6,
        tie_word_embeddings: model.tied_embeddings,
        initializer_range: 0.02,
        bos_token_id: None,
        eos_token_ids: Vec::new(),
    }
}

fn experts(moe: &Moe, tp: u64) -> MoeConfig {
    let size = |n: u64| n as usize;
    let per_group = moe.n_routed_experts / moe.n_expert_groups.max(1);
    MoeConfig {
        n_routed_experts: size(moe.n_routed_experts),
        n_shared_experts: size(moe.n_shared_experts),
        top_k: size(moe.n_activated_experts),
        intermediate_size: size(moe.moe_intermediate.next_multiple_of(tp)),
        n_group: size(moe.n_expert_groups),
        topk_group: size(moe.n_limited_groups),
        group_top: size(per_group.min(2)),
        routed_scaling_factor: 1.0,
        normalize: true,
        score: Score::Sigmoid,
        first_dense: size(moe.n_dense_layers),
    }
}

fn recipe(q: &Question) -> Recipe {
    let again = q.recompute != Recompute::None;
    Recipe {
        recompute_norms: again,
        recompute_up_projections: again,
        recompute_swiglu: again,
        ..Recipe::new(match q.precision {
            Precision::Fp8 => Mode::Fp8,
            Precision::Bf16 => Mode::Bf16,
        })
    }
}

/// The first rank's experts get `load` times the mean, the others share the rest.
fn load(q: &Question) -> Load {
    let Some(moe) = q.model.moe.filter(|_| q.load != 1.0 && q.ep > 1) else {
        return Load::Balanced;
    };
    let (experts, own) = (moe.n_routed_experts as f64, (moe.n_routed_experts / q.ep) as f64);
    let rest = ((experts - own * q.load) / (experts - own)).max(0.0);
    let share = |e: u64| if (e as f64) < own { q.load } else { rest };
    Load::Shares((0..moe.n_routed_experts).map(share).collect())
}
