//! The workload of a training step on one rank of any layout, without weights: the model run on
//! backend `meta`.

use std::cell::RefCell;
use std::collections::BTreeMap;

use fathom_trace::{Component, DType, Group, GroupKind, OpRecord, Phase};

use super::stage::Lane;
use super::step::{Batch, SequenceParts, StepSettings};
use super::{BuildError, Model, ParamKind};
use crate::EngineError;
use crate::backend::{Backend, Load, Meta, Place};
use crate::layers::Gradients;
use crate::ops::cast::Cast;
use crate::ops::collective::{AllGather, Recv, ReduceScatter, Send};
use crate::parallel::{self, Parallel};
use crate::precision::Recipe;
use fathom_config::ModelConfig;

/// The size of a step on one rank, and how its tokens are routed.
#[derive(Clone, Debug)]
pub struct Workload {
    /// Sequences of a micro-batch, of which this rank has a part each where cp is above 1.
    pub sequences: usize,
    /// Tokens of a sequence on this rank: its part, where cp is above 1.
    pub sequence_length: usize,
    /// Micro-batches of the step.
    pub micro_batches: usize,
    /// How tokens spread over experts.
    pub load: Load,
}

/// Why a workload cannot be recorded.
#[derive(Debug, thiserror::Error)]
pub enum WorkloadError {
    /// The layout does not fit.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// An op refused its shapes.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The step is beyond counting.
    #[error(transparent)]
    TooMuch(#[from] TooMuch),
}

/// A step with more tokens per micro-batch, layer calls or FLOPs than the integers of a record
/// hold.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a step of {found}: expected at most {expected}")]
pub struct TooMuch {
    expected: String,
    found: String,
}

/// Most tokens of a micro-batch on a rank.
const MOST_TOKENS: u128 = 1 << 24;

/// Most layers times micro-batches of a step, each of which is some hundred op calls.
const MOST_LAYER_CALLS: u128 = 1 << 20;

/// Refuses a step whose sizes would run over: `sequences` of `length` tokens a micro-batch, of
/// which there are `micro_batches`.
///
/// # Errors
/// [`TooMuch`].
pub fn countable(
    config: &ModelConfig,
    sequences: usize,
    length: usize,
    micro_batches: usize,
) -> Result<(), TooMuch> {
    let [sequences, length, micro_batches, layers] =
        [sequences, length, micro_batches, config.layers + config.mtp_depth].map(|n| n as u128);
    let tokens = sequences.saturating_mul(length);
    if tokens > MOST_TOKENS {
        let expected = format!("{MOST_TOKENS} tokens a micro-batch");
        return Err(TooMuch { expected, found: format!("{sequences} x {length} tokens") });
    }
    if layers.saturating_mul(micro_batches) > MOST_LAYER_CALLS {
        let expected = format!("{MOST_LAYER_CALLS} layers times micro-batches");
        let found = format!("{layers} layers and {micro_batches} micro-batches");
        return Err(TooMuch { expected, found });
    }
    // Forward and backward multiply a token by every weight that it uses, and by every token.
    let flop = tokens as f64
        * micro_batches as f64
        * (6.0 * config.active_at_most() as f64 + 12.0 * config.attention_width() * length as f64);
    if flop > 2f64.powi(62) {
        let expected = format!("{:.1e} FLOP", 2f64.powi(62));
        return Err(TooMuch { expected, found: format!("{flop:.1e} FLOP") });
    }
    Ok(())
}

/// Records a step: every micro-batch's F, B and W of this rank's layers, pipeline sends and
/// receives, and the reduction of the gradients.
///
/// # Errors
/// [`WorkloadError`].
pub fn record(
    config: &ModelConfig,
    recipe: &Recipe,
    parallel: Parallel,
    rank: usize,
    workload: &Workload,
) -> Result<Vec<OpRecord>, WorkloadError> {
    countable(config, workload.sequences, workload.sequence_length, workload.micro_batches)?;
    let model = Model::new(config, recipe.clone(), parallel, rank)?;
    let meta = Meta::new(rank, workload.load.clone());
    let params = model.shapes(&meta)?;
    let weights = model.weights(&meta, &params)?;
    let parts =
        SequenceParts { count: parallel.cp, length: workload.sequence_length * parallel.cp };
    let host = Batch::from_sequences(&vec![vec![0; parts.length]; workload.sequences]);
    let batch = model.parts(&meta, &host, parts)?.remove(0);
    let mut gradients = model.zero_gradients(&meta)?;
    for micro_batch in 0..workload.micro_batches {
        let settings = StepSettings {
            micro_batch: Some(micro_batch),
            ..StepSettings::of(&host, config.mtp_depth, 0.3)
        };
        let cell = RefCell::new(gradients);
        let lanes = [Lane { batch: &batch, settings: &settings, gradients: Some(&cell) }];
        let cx = model.cx(&meta, &weights, &batch.main.rows, &settings, Some(&cell));
        let boundary = [batch.main.rows.len(), config.hidden_size];
        let pipeline = parallel::group(parallel, GroupKind::Pp);
        let receive = |phase| {
            cx.at(None, Component::Pipeline, phase);
            let wire = meta.zeros(recipe.activation(), &boundary)?;
            meta.recv(&Recv { group: pipeline }, &wire).map(|x| vec![x])
        };
        let send = |phase, x: &[_]| {
            cx.at(None, Component::Pipeline, phase);
            meta.send(&Send { group: pipeline }, &x[0]).map(|_| ())
        };
        let (first, last) = (model.at.pp == 0, model.at.pp + 1 == parallel.pp);
        let x = (!first).then(|| receive(Phase::F)).transpose()?;
        let (y, kept) = model.stage_forward(&meta, &weights, &lanes, x)?;
        if !last {
            send(Phase::F, &y)?;
        }
        let dy = (!last).then(|| receive(Phase::B)).transpose()?;
        let dx = model.stage_backward(&meta, &weights, &lanes, kept, dy)?;
        if !first {
            send(Phase::B, &dx)?;
        }
        gradients = cell.into_inner();
    }
    reduce(&model, &meta, parallel, &gradients)?;
    Ok(meta.take_records())
}

/// Records an iteration of decoding on this rank: `tokens` new tokens through every layer in the
/// absorbed form, the head's logits, and each MTP module's draft for them. All tokens join one
/// empty cache: how long the caches of real requests are is for the reader of the records to put
/// in.
///
/// # Errors
/// [`WorkloadError`].
pub fn record_decode(
    config: &ModelConfig,
    recipe: &Recipe,
    parallel: Parallel,
    tokens: usize,
    load: Load,
) -> Result<Vec<OpRecord>, WorkloadError> {
    countable(config, 1, tokens, 1)?;
    let model = Model::new(config, recipe.clone(), parallel, 0)?;
    let meta = Meta::new(0, load);
    let params = model.shapes(&meta)?;
    let weights = model.weights(&meta, &params)?;
    // Casting the weights is no part of an iteration.
    meta.take_records();
    let ids = vec![0; tokens];
    let hidden = model.decode(&meta, &weights, &mut model.cache(), &ids)?;
    model.logits(&meta, &weights, &hidden)?;
    for module in 0..model.mtp.len() {
        let mut cache = model.draft_cache(module);
        let hidden = model.draft(&meta, &weights, module, &mut cache, (&hidden, &ids))?;
        model.logits(&meta, &weights, &hidden)?;
    }
    Ok(meta.take_records())
}

/// What one component of a step amounts to on a rank.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Share {
    /// Component of the model that the ops belong to.
    pub component: Component,
    /// How many ops were called.
    pub ops: usize,
    /// Floating-point operations of all of them.
    pub flops: u64,
    /// Bytes read and written.
    pub bytes: u64,
    /// Bytes that leave the rank.
    pub bytes_sent: u64,
}

/// A step's records summed up by component, in the order of the components.
pub fn by_component(records: &[OpRecord]) -> Vec<Share> {
    let mut shares = BTreeMap::new();
    for r in records {
        let component = r.component;
        let share = shares.entry(component).or_insert(Share {
            component,
            ops: 0,
            flops: 0,
            bytes: 0,
            bytes_sent: 0,
        });
        share.ops += 1;
        share.flops += r.flops;
        share.bytes += r.bytes_read + r.bytes_written;
        share.bytes_sent += r.bytes_sent;
    }
    shares.into_values().collect()
}

/// Records the reduction of the gradients and the gathering of the updated weights (ZeRO-1): over
/// the ranks that hold the same parameter.
fn reduce(
    model: &Model,
    meta: &Meta,
    parallel: Parallel,
    gradients: &Gradients<Meta>,
) -> Result<(), EngineError> {
    meta.at(Place { phase: Phase::W, ..Place::default() });
    let stage = parallel.dp * parallel.cp;
    for (spec, gradient) in model.specs.iter().zip(&gradients.buffers) {
        let size = match spec.kind {
            ParamKind::Experts => (stage * parallel.tp / parallel.ep).max(1),
            _ => stage,
        };
        let Some(gradient) = gradient.as_ref().filter(|_| size > 1) else { continue };
        let group = Group { kind: GroupKind::Dp, size };
        let share = meta.reduce_scatter(&ReduceScatter { group }, gradient)?;
        let weight = meta.cast(&Cast { out: DType::BF16 }, &share)?;
        meta.all_gather(&AllGather { group }, &weight)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::precision::Mode;

    /// The absorbed form by hand: a token's products but the key's and value's up-projection, which
    /// the absorbed products replace at the same cost.
    #[test]
    fn an_iteration_of_decoding_multiplies_by_every_active_weight() {
        let config = ModelConfig::preset("deepseek-v3").unwrap();
        let parallel = Parallel { tp: 1, pp: 1, ep: 64, dp: 64, cp: 1 };
        let recipe = Recipe::new(Mode::Fp8);
        let records = record_decode(&config, &recipe, parallel, 64, Load::Balanced).unwrap();
        let attends = |r: &&OpRecord| r.op == "attention_latent";
        assert_eq!(records.iter().filter(attends).count(), 62);
        assert!(records.iter().all(|r| r.phase == Phase::F));
        let flops: u64 = records.iter().filter(|r| !attends(r)).map(|r| r.flops).sum();
        let p = config.parameters();
        let moe = config.moe.unwrap();
        let module = config.attention_params()
            + config.moe_ffn_params(&moe, moe.top_k)
            + 2 * 7168 * 7168
            + p.embedding;
        let expected = 2.0 * 64.0 * (p.active + module) as f64;
        assert!((flops as f64 / expected - 1.0).abs() < 0.01, "{flops} against {expected}");
    }

    #[test]
    fn any_rank_of_the_large_model_is_recorded_without_weights() {
        let config = ModelConfig::preset("deepseek-v3").unwrap();
        let recipe = Recipe::new(Mode::Fp8);
        let parallel = Parallel { tp: 1, pp: 16, ep: 64, dp: 128, cp: 1 };
        let workload = Workload {
            sequences: 1,
            sequence_length: 4096,
            micro_batches: 1,
            load: Load::Balanced,
        };
        let world = parallel::world(parallel);
        for rank in [0, 700, world - 1] {
            let records = record(&config, &recipe, parallel, rank, &workload).unwrap();
            let sent = |op: &str| -> u64 {
                records.iter().filter(|r| r.op == op).map(|r| r.bytes_sent).sum()
            };
            // The first stage of 16 has the three dense layers only.
            let moe = rank != 0;
            assert!((sent("dispatch") > 0) == moe && (sent("combine") > 0) == moe);
            let experts = |r: &OpRecord| r.op == "grouped_gemm_fp8" && r.flops > 0;
            assert!(records.iter().any(experts) == moe);
            let phases = [Phase::F, Phase::B, Phase::W];
            assert!(phases.iter().all(|p| records.iter().any(|r| r.phase == *p)));
        }
        let whole = record(&config, &recipe, Parallel::default(), 0, &workload).unwrap();
        let flops: u64 = by_component(&whole).iter().map(|share| share.flops).sum();
        // The report's 250 GFLOP a token, then some 10 for the MTP module (a layer and a head), 7
        // for up-projections made again and 10 for the attention's scores, made again as well.
        let per_token = flops as f64 / 4096.0 / 1e9;
        assert!(per_token > 265.0 && per_token < 290.0, "{per_token} GFLOP a token");
        // Four ranks with a quarter of the sequence each do together what one does: each attends
        // with a quarter of the heads.
        let attention = |records: &[OpRecord]| -> u64 {
            records.iter().filter(|r| r.op.starts_with("attention")).map(|r| r.flops).sum()
        };
        let part = Workload { sequence_length: 1024, ..workload.clone() };
        let depth_0 = ModelConfig { mtp_depth: 0, ..config.clone() };
        let context = Parallel { cp: 4, ..Parallel::default() };
        let mut sum = 0;
        for rank in 0..4 {
            let records = record(&depth_0, &recipe, context, rank, &part).unwrap();
            sum += attention(&records);
            let exchanged = records.iter().filter(|r| r.op == "context_exchange");
            let forward = exchanged.filter(|r| r.layer == Some(7) && r.phase == Phase::F);
            // Per token queries, keys, values and results of three quarters of the heads, in BF16.
            let bytes = 1024 * 3 * (128 / 4) * (192 + 192 + 128 + 128) * 2;
            assert_eq!(forward.map(|r| r.bytes_sent).sum::<u64>(), bytes);
        }
        let whole = record(&depth_0, &recipe, Parallel::default(), 0, &workload).unwrap();
        assert_eq!(sum, attention(&whole));
        let split = Parallel { tp: 4, pp: 2, ep: 8, dp: 2, cp: 1 };
        let records = record(&config, &recipe, split, 9, &workload).unwrap();
        assert!(records.iter().any(|r| r.op == "all_reduce" && r.bytes_sent > 0));
        assert!(records.iter().any(|r| r.op == "recv"));
    }
}
