//! What a GPU of a pool holds: weights, buffers, and pages of keys and values in the rest.

use fathom_config::AttentionConfig;
use serde::Serialize;

use super::config::{Pool, ServeScenario};
use super::layout::Layout;

/// Context, libraries, graphs.
const RUNTIME_BYTES: f64 = 3e9;

/// Bytes of one GPU of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct PoolMemory {
    /// Attention, dense and shared parts, norms, embedding and head.
    pub weights: f64,
    /// Routed experts, copies counted.
    pub experts: f64,
    /// Exchange buffers and activations of an iteration.
    pub buffers: f64,
    /// Context and libraries.
    pub runtime: f64,
    /// Left for pages; negative where the rest does not fit.
    pub pages_bytes: f64,
    /// Bytes of keys and values a token on this GPU.
    pub bytes_per_token: f64,
    /// Pages that fit.
    pub pages: u64,
    /// The GPU's memory.
    pub capacity: f64,
}

/// The memory of a GPU of `pool`.
pub(super) fn memory(s: &ServeScenario, pool: &Pool, layout: &Layout, decodes: bool) -> PoolMemory {
    let m = &s.model;
    let element = s.precision.element_bytes();
    let tp = layout.tp as f64;
    let drafted = if decodes { s.mtp.drafts.min(m.mtp_depth as u64) } else { 0 };
    let layers = m.layers as f64 + drafted as f64;
    let (h, vocabulary) = (m.hidden_size as f64, m.vocab_size as f64);
    let tables = if m.tie_word_embeddings { 1.0 } else { 2.0 };
    let mut weights = layers * (m.attention_params() as f64 * element / tp)
        + layers * 2.0 * m.norm_params() as f64
        + tables * 2.0 * h * vocabulary / tp
        + drafted as f64 * 2.0 * h * h * element;
    let mut experts = 0.0;
    match &m.moe {
        Some(moe) => {
            let dense = moe.first_dense.min(m.layers) as f64;
            let routed = layers - dense;
            let expert = 3.0 * h * moe.intermediate_size as f64 * element;
            let split = if layout.ep > 1 { 1.0 } else { tp };
            weights += dense * m.dense_ffn_params() as f64 * element / tp
                + routed * 4.0 * h * moe.n_routed_experts as f64;
            if !s.experts.shared_is_routed {
                weights += routed * moe.n_shared_experts as f64 * expert / split;
            }
            experts = routed * layout.expert_slots as f64 * expert / split;
        }
        None => weights += layers * m.dense_ffn_params() as f64 * element / tp,
    }
    // Tokens of an iteration: hidden states in and out, rows of the experts in FP8 and BF16.
    let tokens = if decodes { pool.max_batch * (drafted + 1) } else { pool.chunk_tokens } as f64;
    let rows = tokens / tp * layout.choices as f64;
    let buffers = tokens * 6.0 * 2.0 * h + if layout.ep > 1 { rows * 5.0 * h } else { 0.0 };
    let bytes_per_token = kv_bytes(s, tp) * layers / m.layers as f64;
    let capacity = s.cluster.gpu.memory_bytes as f64;
    let usable = capacity * (1.0 - s.memory.headroom);
    let pages_bytes = usable - weights - experts - buffers - RUNTIME_BYTES;
    let page = bytes_per_token * s.memory.page_tokens as f64;
    let pages = (pages_bytes / page).max(0.0) as u64;
    PoolMemory {
        weights,
        experts,
        buffers,
        runtime: RUNTIME_BYTES,
        pages_bytes,
        bytes_per_token,
        pages,
        capacity,
    }
}

/// Bytes of keys and values a token on one rank: heads are cut by `tp`, a latent is not.
fn kv_bytes(s: &ServeScenario, tp: f64) -> f64 {
    let elements = s.model.kv_bytes_per_token(1) as f64;
    let cut = match s.model.attention {
        AttentionConfig::Mla { .. } => 1.0,
        AttentionConfig::Gqa { kv_heads, .. } => tp.min(kv_heads as f64),
    };
    elements * s.memory.element_bytes / cut
}

impl PoolMemory {
    /// What is wrong, for people; `None` where the pool can hold at least one request of `tokens`.
    pub fn complaint(&self, what: &str, page_tokens: u64, tokens: f64) -> Option<String> {
        let gb = |b: f64| format!("{:.1}", b / 1e9);
        if self.pages_bytes <= 0.0 {
            let need = self.weights + self.experts + self.buffers + self.runtime;
            return Some(format!(
                "{what} does not fit: {} GB of weights, {} of experts, {} of buffers, {} of runtime make {} of {} GB; try more gpus a unit, a larger tp or a smaller batch",
                gb(self.weights),
                gb(self.experts),
                gb(self.buffers),
                gb(self.runtime),
                gb(need),
                gb(self.capacity)
            ));
        }
        let held = (self.pages * page_tokens) as f64;
        (held < tokens).then(|| {
            format!("{what} does not fit: pages for {held:.0} tokens, a request has {tokens:.0}")
        })
    }
}
