//! How a pool cuts the model, checked; and its iterations' times.

use super::config::{Pool, ServeScenario};
use super::iteration::{ExchangeKind, IterationModel};
use super::kernels::{Cores, Cut, PartTable};
use super::ops::InferenceOps;
use crate::error::SimError;
use crate::kernel_time::{Constants, KernelModel};
use crate::workload::dispatch_token_bytes;

/// What a pool is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Its units read prompts and hand their caches on.
    Prefill,
    /// Its units write tokens from caches that others made.
    Decode,
    /// Its units do both.
    Unified,
}

impl Role {
    /// The pool's key.
    pub fn name(self) -> &'static str {
        match self {
            Role::Prefill => "prefill",
            Role::Decode => "decode",
            Role::Unified => "unified",
        }
    }
}

/// The numbers that follow from a pool and a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// How many ranks share out each product.
    pub tp: u64,
    /// Ranks of the expert group.
    pub ep: u64,
    /// Experts that a GPU holds, copies counted.
    pub expert_slots: u64,
    /// Logical experts: the shared one among them where it is routed.
    pub experts: u64,
    /// Experts that a token is sent to.
    pub choices: u64,
}

impl Layout {
    /// The layout of `pool`, or what is wrong with it.
    ///
    /// # Errors
    /// [`SimError::Layout`] naming the pool's key, what was expected and what was found.
    pub fn of(s: &ServeScenario, pool: &Pool, role: Role) -> Result<Layout, SimError> {
        let name = role.name();
        let refuse =
            |key: &str, message: String| Err(SimError::Layout(format!("{name}.{key}: {message}")));
        let Pool { gpus, tp, .. } = *pool;
        let per_node = s.cluster.gpus_per_node;
        if gpus % tp != 0 {
            return refuse("tp", format!("expected a divisor of the {gpus} gpus, found {tp}"));
        }
        if tp > per_node || !(s.model.heads as u64).is_multiple_of(tp) {
            let heads = s.model.heads;
            return refuse(
                "tp",
                format!(
                    "expected a divisor of the {heads} heads up to the {per_node} GPUs of a node, found {tp}"
                ),
            );
        }
        if gpus > per_node && gpus % per_node != 0 {
            return refuse("gpus", format!("expected whole nodes of {per_node}, found {gpus}"));
        }
        let Some(moe) = &s.model.moe else {
            return match pool.ep {
                Some(ep) if ep != 1 => {
                    refuse("ep", format!("{} has no experts, found {ep}", s.model.name))
                }
                _ => Ok(Layout { tp, ep: 1, expert_slots: 0, experts: 0, choices: 0 }),
            };
        };
        let ep = pool.ep.unwrap_or(gpus);
        if ep != 1 && ep != gpus {
            return refuse("ep", format!("expected 1 or all {gpus} gpus of a unit, found {ep}"));
        }
        let shared = u64::from(s.experts.shared_is_routed && moe.n_shared_experts > 0);
        let experts = moe.n_routed_experts as u64 + shared;
        let slots = pool.expert_slots.unwrap_or_else(|| experts.div_ceil(ep));
        if slots * ep < experts {
            return refuse(
                "expert_slots",
                format!(
                    "expected at least {} for {experts} experts on {ep} ranks, found {slots}",
                    experts.div_ceil(ep)
                ),
            );
        }
        Ok(Layout { tp, ep, expert_slots: slots, experts, choices: moe.top_k as u64 + shared })
    }
}

/// The iterations of `pool`; `source` gives their ops.
///
/// # Errors
/// Those of the layout and of the source.
pub fn iteration_model(
    s: &ServeScenario,
    pool: &Pool,
    role: Role,
    source: &dyn InferenceOps,
    constants: Constants,
) -> Result<IterationModel, SimError> {
    let layout = Layout::of(s, pool, role)?;
    let prefill = role != Role::Decode;
    let exchange = pool.exchange.unwrap_or(if prefill {
        ExchangeKind::Normal
    } else {
        ExchangeKind::LowLatency
    });
    let holds_sms = exchange == ExchangeKind::Normal && pool.micro_batches > 1 && layout.ep > 1;
    let (gpu, wishes) = (&s.cluster.gpu, &s.what_if);
    let gpu = if holds_sms {
        KernelModel::beside_communication(gpu, constants, wishes, pool.comm_sms)
    } else {
        KernelModel::alone(gpu, constants, wishes)
    };
    let cut = Cut {
        tp: layout.tp,
        ep: layout.ep,
        expert_slots: layout.expert_slots,
        choices: layout.choices,
        shared_is_routed: s.experts.shared_is_routed,
        precision: s.precision,
        prefill,
    };
    let drafts = if prefill { 0 } else { s.mtp.drafts };
    let drafted = s.mtp.drafts.min(if role == Role::Prefill { 0 } else { u64::MAX });
    Ok(IterationModel {
        table: PartTable::new(source, &s.model, &s.cluster, &gpu, &cut)?,
        cores: Cores::new(&gpu, &s.model, layout.tp, drafted, s.memory.element_bytes),
        model: s.model.clone(),
        cluster: s.cluster.clone(),
        constants,
        ep: layout.ep,
        tp: layout.tp,
        choices: layout.choices,
        micro_batches: pool.micro_batches,
        exchange,
        comm_sms: pool.comm_sms,
        dispatch_bytes: dispatch_token_bytes(&s.model, s.precision),
        run_tokens: s.experts.run_tokens,
        drafts,
        host_s: pool.host_s,
    })
}
