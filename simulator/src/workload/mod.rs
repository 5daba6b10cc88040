//! The workload: what a step consists of, as op records of the model's own code.
//!
//! A layer's ops come from an [`OpSource`]: the model run on the recording backend, or a file that
//! it wrote. The source is asked for a model of one layer of every kind, once for a layout, and
//! what it records becomes the kernels of every kind of layer ([`LayerKernels`], by
//! [`crate::lowering`]). Nothing here invents an op; what the model's code does not lay out
//! (context parallelism, sequence parallelism beside tensor parallelism) is put on top and said so
//! in place.

pub mod load;
pub mod lowering;
pub mod parallel;

use std::io::BufRead;
use std::path::{Path, PathBuf};

use fathom_trace::{Component, OpClass, OpRecord, Phase, jsonl};
use serde::Serialize;

use self::lowering::{Kernel, Lowering};
use crate::config::{Precision, Recompute};
use crate::error::SimError;
use crate::times::LayerKind;
use fathom_config::{ModelConfig, MoeConfig};

/// How a layer is cut and fed on one rank.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerContext {
    /// Sequences of a micro-batch.
    pub micro_batch: u64,
    /// Tokens of a sequence, before context parallelism cuts it.
    pub seq_len: u64,
    /// How many ranks share out each product.
    pub tp: u64,
    /// How many ranks share out a sequence.
    pub cp: u64,
    /// How many ranks share out the experts.
    pub ep: u64,
    /// Arithmetic of the GEMMs.
    pub precision: Precision,
    /// What is recomputed in the backward instead of kept.
    pub recompute: Recompute,
    /// Whether what is kept of SwiGLU and attention is cast for it ([`crate::config::Stack`]).
    pub kept_in_fp8: bool,
    /// Routed load of this rank relative to the mean: of the forward and of the backward chunk.
    pub load: (f64, f64),
}

impl LayerContext {
    /// One sequence of `tokens` in DeepSeek-V3's training: FP8, selective recomputation, no tensor
    /// or context parallelism, balanced experts on `ep` ranks.
    pub fn of_tokens(tokens: u64, ep: u64) -> LayerContext {
        LayerContext {
            micro_batch: 1,
            seq_len: tokens,
            tp: 1,
            cp: 1,
            ep,
            precision: Precision::Fp8,
            recompute: Recompute::Selective,
            kept_in_fp8: true,
            load: (1.0, 1.0),
        }
    }

    /// Tokens that this rank's attention sees (before tensor parallelism cuts the norms' share).
    pub fn tokens(&self) -> u64 {
        (self.micro_batch * self.seq_len).div_ceil(self.cp)
    }
}

/// Probability that of `drawn` distinct items out of `all`, none is among `marked`.
pub fn miss_probability(all: u64, marked: u64, drawn: u64) -> f64 {
    if marked + drawn > all {
        return 0.0;
    }
    (0..drawn).map(|i| (all - marked - i) as f64 / (all - i) as f64).product()
}

/// Probability that a token of `moe` visits a place that holds `experts` consecutive experts, whole
/// groups or a part of one, when groups and experts are drawn evenly.
pub fn visit_probability(moe: &MoeConfig, experts: u64) -> f64 {
    let sizes = [moe.n_routed_experts, moe.n_group.max(1), moe.topk_group.max(1), moe.top_k];
    let [all, groups, limited, k] = sizes.map(|n| n as u64);
    let per_group = all / groups;
    let candidates = per_group * limited;
    if experts < per_group {
        let chosen = limited as f64 / groups as f64;
        return chosen * (1.0 - miss_probability(candidates, experts, k));
    }
    // `held` groups of the place; `j` of them among the chosen ones with hypergeometric
    // probability.
    let held = (experts / per_group).min(groups);
    let choose = |n: u64, r: u64| -> f64 {
        if r > n { 0.0 } else { (0..r).map(|i| (n - i) as f64 / (r - i) as f64).product() }
    };
    (0..=held.min(limited))
        .map(|j| {
            let chance =
                choose(held, j) * choose(groups - held, limited - j) / choose(groups, limited);
            chance * (1.0 - miss_probability(candidates, j * per_group, k))
        })
        .sum()
}

/// Distinct tokens that arrive at one rank of the expert group, relative load included.
pub fn distinct_tokens(moe: &MoeConfig, ctx: &LayerContext, load: f64) -> f64 {
    let local = (moe.n_routed_experts as u64).div_ceil(ctx.ep).max(1);
    // With tensor parallelism the ranks of a tp group hold the same tokens once, cut by sequence.
    let tokens = (ctx.tokens() as f64 / ctx.tp as f64) * ctx.ep as f64;
    tokens * visit_probability(moe, local) * load
}

/// Bytes of a token on its way to the experts, without its routing: FP8 with an FP32 scale per 128,
/// or BF16. What is multiplied in FP4 travels as FP8.
pub fn dispatch_token_bytes(model: &ModelConfig, precision: Precision) -> f64 {
    let h = model.hidden_size as f64;
    if precision.is_quantised() {
        h + 4.0 * (model.hidden_size.div_ceil(128)) as f64
    } else {
        2.0 * h
    }
}

/// What a source of op records is asked: one micro-batch, forward and backward, of a model of one
/// layer of every kind, on a rank that holds all of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Question {
    /// One dense layer first where the model has any, one MoE layer, one prediction module.
    pub model: ModelConfig,
    /// How many ranks share out each product.
    pub tp: u64,
    /// Expert-parallel ranks, which lie along data parallelism.
    pub ep: u64,
    /// Sequences of the micro-batch.
    pub sequences: u64,
    /// Tokens of a sequence on this rank.
    pub seq_len: u64,
    /// Arithmetic of the GEMMs.
    pub precision: Precision,
    /// What is recomputed; [`Recompute::Full`] is asked for as `None`, since the lowering runs the
    /// forward again, [`Recompute::Alternate`] as `Selective`, since it runs the products again.
    pub recompute: Recompute,
    /// Whether what is kept of SwiGLU and attention is cast for it.
    pub kept_in_fp8: bool,
    /// Routed rows of this rank relative to the mean.
    pub load: f64,
}

/// Where op records come from.
pub trait OpSource: Send + Sync {
    /// The records of one micro-batch of the question's model, with layers numbered as in it.
    ///
    /// # Errors
    /// [`SimError::Layout`] where the model cannot be laid out so, [`SimError::Input`] for a file.
    fn record(&self, question: &Question) -> Result<Vec<OpRecord>, SimError>;

    /// Whether there is but one answer, whatever the question's tensor parallelism; a file's is.
    fn is_fixed(&self) -> bool {
        false
    }
}

/// Records of a file: one rank, as `fathom simulate --write-op-trace` or the recording backend
/// writes them.
#[derive(Debug, Clone)]
pub struct OpTrace {
    file: PathBuf,
    records: Vec<OpRecord>,
}

impl OpTrace {
    /// Reads a file of op records.
    ///
    /// # Errors
    /// [`SimError::Input`] with file and line.
    pub fn read(path: &Path) -> Result<OpTrace, SimError> {
        let file = fathom_trace::input::open(path).map_err(|e| SimError::io(path, e))?;
        OpTrace::parse(std::io::BufReader::new(file), path)
    }

    /// As [`OpTrace::read`], from text; `path` is only named in errors.
    ///
    /// # Errors
    /// [`SimError::Input`] with file and line.
    pub fn parse(input: impl BufRead, path: &Path) -> Result<OpTrace, SimError> {
        let records = jsonl::read(input, path);
        let records: Vec<OpRecord> =
            records.map_err(|e| SimError::input("op trace", e.to_string()))?;
        if let Some((i, what)) =
            records.iter().enumerate().find_map(|(i, r)| Some((i, out_of_proportion(r)?)))
        {
            let message = format!("record {i} ({}): {what}", records[i].op);
            return Err(SimError::input(path.display(), message));
        }
        Ok(OpTrace { file: path.to_owned(), records })
    }
}

/// Most of any one size of a record, and most elements or bytes: sums and products of what passes
/// stay countable.
const MOST: u64 = 1 << 24;
const MOST_BYTES: u64 = 1 << 48;

/// What of a record is larger than any GPU's work.
fn out_of_proportion(r: &OpRecord) -> Option<String> {
    for (what, bytes) in [("bytes_read", r.bytes_read), ("bytes_written", r.bytes_written)] {
        if bytes > MOST_BYTES {
            return Some(format!("{what} is {bytes}, expected at most {MOST_BYTES}"));
        }
    }
    for t in r.inputs.iter().chain(&r.outputs) {
        let elements = t.shape.iter().map(|&n| n as f64).product::<f64>();
        if elements > MOST_BYTES as f64 || t.shape.iter().any(|&n| n as u64 > MOST) {
            return Some(format!(
                "{} has shape {:?}, expected sizes up to {MOST}",
                t.role, t.shape
            ));
        }
    }
    if let Some(group) = r.group.filter(|g| g.size as u64 > MOST) {
        return Some(format!("a group of {}, expected at most {MOST}", group.size));
    }
    let sizes = r.params.iter().filter(|(key, _)| *key != "seed");
    let large = |(key, value): (&String, &serde_json::Value)| {
        let largest = largest(value);
        (largest > MOST).then(|| format!("{key} has {largest}, expected at most {MOST}"))
    };
    sizes.into_iter().find_map(large)
}

/// The largest whole number in a parameter.
fn largest(value: &serde_json::Value) -> u64 {
    match value {
        serde_json::Value::Number(n) => n.as_u64().unwrap_or(0),
        serde_json::Value::Array(items) => items.iter().map(largest).max().unwrap_or(0),
        serde_json::Value::Object(map) => map.values().map(largest).max().unwrap_or(0),
        _ => 0,
    }
}

/// Rows of the first tensor of a record.
fn rows(record: &OpRecord) -> u64 {
    record.inputs.first().and_then(|t| t.shape.first()).map_or(0, |&n| n as u64)
}

/// Whether a record is of a layer with routed experts.
fn is_routing(record: &OpRecord) -> bool {
    matches!(record.class, OpClass::Dispatch | OpClass::Combine | OpClass::Routing)
}

impl OpSource for OpTrace {
    fn is_fixed(&self) -> bool {
        true
    }

    /// The first layer of every kind that the file has, numbered as in the question.
    fn record(&self, q: &Question) -> Result<Vec<OpRecord>, SimError> {
        let refuse = |message: String| SimError::input(self.file.display(), message);
        let of = |layer: usize| self.records.iter().filter(move |r| r.layer == Some(layer));
        let mut layers: Vec<usize> = self.records.iter().filter_map(|r| r.layer).collect();
        layers.sort_unstable();
        layers.dedup();
        let is_mtp = |&l: &usize| of(l).any(|r| r.component == Component::Mtp);
        let is_moe = |&l: &usize| of(l).any(is_routing);
        let dense = layers.iter().copied().find(|l| !is_mtp(l) && !is_moe(l));
        let moe = layers.iter().copied().find(|l| !is_mtp(l) && is_moe(l));
        let mtp = layers.iter().copied().find(is_mtp);
        let n_dense = q.model.moe.map_or(q.model.layers, |m| m.first_dense);
        let wanted = [
            (n_dense > 0, "a dense layer", dense, 0),
            (q.model.layers > n_dense, "a layer with routed experts", moe, n_dense),
            (q.model.mtp_depth > 0, "a prediction module", mtp, q.model.layers),
        ];
        let first = self.records.iter().find_map(|r| r.micro_batch);
        let mut picked: Vec<OpRecord> =
            self.records.iter().filter(|r| r.layer.is_none()).cloned().collect();
        for (needed, what, found, index) in wanted {
            match found {
                Some(layer) if needed => {
                    picked.extend(of(layer).map(|r| OpRecord { layer: Some(index), ..r.clone() }))
                }
                None if needed => {
                    return Err(refuse(format!(
                        "no record of {what}, which {} has: record a rank that holds one",
                        q.model.name
                    )));
                }
                _ => {}
            }
        }
        picked.retain(|r| r.micro_batch == first);
        let tokens = q.sequences * q.seq_len;
        let norm =
            |r: &&OpRecord| lowering::FIRST.contains(&&*r.op) && r.layer.is_some_and(|l| l == 0);
        match picked.iter().find(norm).map(rows) {
            Some(found) if found != tokens => Err(refuse(format!(
                "recorded with {found} tokens a micro-batch, the scenario has {tokens} on a rank"
            ))),
            None => Err(refuse("no rms_norm of a first layer: not a record of a model".into())),
            _ => Ok(picked),
        }
    }
}

/// The kernels of every kind of layer, in one context.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerKernels {
    kinds: Vec<(LayerKind, Vec<Kernel>)>,
}

impl LayerKernels {
    /// The kernels of a layer of `kind`, in the order of its ops; none where the model has no such
    /// layer.
    pub fn of(&self, kind: LayerKind) -> &[Kernel] {
        self.kinds.iter().find(|(k, _)| *k == kind).map_or(&[], |(_, kernels)| kernels)
    }

    /// Every kernel with the kind of its layer.
    pub fn all(&self) -> impl Iterator<Item = (LayerKind, &Kernel)> {
        self.kinds.iter().flat_map(|(kind, kernels)| kernels.iter().map(|k| (*kind, k)))
    }

    /// Asks `source` for the layers of `model` and lowers what it records.
    ///
    /// # Errors
    /// Those of the source, and ops that no training step has.
    pub fn record(
        source: &dyn OpSource,
        model: &ModelConfig,
        ctx: &LayerContext,
    ) -> Result<LayerKernels, SimError> {
        let recorded = Recorded::ask(source, model, ctx)?;
        let lowering = Lowering { model, ctx };
        let mut kinds = Vec::new();
        for kind in [
            LayerKind::Embedding,
            LayerKind::Dense,
            LayerKind::Moe,
            LayerKind::Mtp,
            LayerKind::Head,
        ] {
            kinds.push((kind, lowering.kernels(kind, &recorded.of(kind))?));
        }
        Ok(LayerKernels { kinds })
    }
}

/// The records of a model cut to one layer of every kind, and which of its layers is which.
pub struct Recorded {
    records: Vec<OpRecord>,
    tokens: u64,
    /// Index of the layer of each kind in the cut model; none where it has none.
    moe: Option<usize>,
    mtp: Option<usize>,
    dense: Option<usize>,
}

/// `model` with one layer of every kind.
fn cut(model: &ModelConfig) -> ModelConfig {
    let dense = model.moe.map_or(model.layers, |m| m.first_dense.min(model.layers));
    let (has_dense, has_moe) = (dense.min(1), (model.layers - dense).min(1));
    // A prediction module's layer is of the last layer's kind.
    let moe = model.moe.filter(|_| has_moe > 0 || model.mtp_depth > 0);
    ModelConfig {
        layers: has_dense + has_moe,
        mtp_depth: model.mtp_depth.min(1),
        moe: moe.map(|m| MoeConfig { first_dense: has_dense, ..m }),
        ..model.clone()
    }
}

impl Recorded {
    /// Asks `source` for the layers of `model`.
    ///
    /// Attention and dense FFN are recorded with the context's tensor parallelism; the routed half
    /// of a MoE layer runs on each rank's own part of the sequence, its experts uncut. A rank of a
    /// context-parallel group has its part of every sequence.
    ///
    /// # Errors
    /// Those of the source.
    pub fn ask(
        source: &dyn OpSource,
        model: &ModelConfig,
        ctx: &LayerContext,
    ) -> Result<Self, SimError> {
        let small = cut(model);
        let ask = |tp: u64, seq_len: u64, load: f64| {
            source.record(&Question {
                model: small.clone(),
                tp,
                ep: ctx.ep,
                sequences: ctx.micro_batch,
                seq_len,
                precision: ctx.precision,
                recompute: match ctx.recompute {
                    Recompute::Full => Recompute::None,
                    Recompute::Alternate => Recompute::Selective,
                    other => other,
                },
                kept_in_fp8: ctx.kept_in_fp8,
                load,
            })
        };
        let (own, part) = (ctx.seq_len / ctx.cp, ctx.seq_len / ctx.cp / ctx.tp);
        let dense = small.moe.map_or(small.layers, |m| m.first_dense);
        // A MoE layer's routed half runs on each rank's own part of the sequence, its attention on
        // the whole of it.
        let routed = |r: &OpRecord| {
            let cut =
                matches!(r.component, Component::Dispatch | Component::Mlp | Component::Combine);
            cut && r.layer.is_some_and(|l| l >= dense)
        };
        let mut records = Vec::new();
        let mut add = |load: f64, phases: &[Phase]| -> Result<(), SimError> {
            let of = |r: &OpRecord| phases.contains(&r.phase);
            let all = ask(ctx.tp, own, load)?;
            if ctx.tp > 1 && small.moe.is_some() && !source.is_fixed() {
                records.extend(all.into_iter().filter(|r| of(r) && !routed(r)));
                let part = ask(1, part, load)?;
                records.extend(part.into_iter().filter(|r| of(r) && routed(r)));
            } else {
                records.extend(all.into_iter().filter(of));
            }
            Ok(())
        };
        // Forward and backward chunk may have different loads: each is asked for with its own.
        if ctx.load.0 == ctx.load.1 || small.moe.is_none() {
            add(ctx.load.0, &[Phase::F, Phase::B, Phase::W])?;
        } else {
            add(ctx.load.0, &[Phase::F])?;
            add(ctx.load.1, &[Phase::B, Phase::W])?;
        }
        Ok(Recorded {
            records,
            tokens: ctx.tokens(),
            dense: (dense > 0).then_some(0),
            moe: (small.layers > dense).then_some(dense),
            mtp: (small.mtp_depth > 0).then_some(small.layers),
        })
    }

    /// The records of a layer of `kind`. A prediction module's own pass of embedding and head has
    /// fewer rows than the main model's.
    pub fn of(&self, kind: LayerKind) -> Vec<&OpRecord> {
        let main = |r: &&OpRecord| r.layer.is_none() && rows_of(r) == self.tokens;
        let layer = |index: Option<usize>| {
            self.records.iter().filter(move |r| index.is_some() && r.layer == index)
        };
        let outside = |component: Component| {
            self.records.iter().filter(main).filter(move |r| r.component == component).collect()
        };
        match kind {
            LayerKind::Embedding => outside(Component::Embedding),
            LayerKind::Head => outside(Component::Head),
            LayerKind::Dense => layer(self.dense).collect(),
            LayerKind::Moe => layer(self.moe).collect(),
            LayerKind::Mtp => {
                let own = |r: &&OpRecord| {
                    let shared = matches!(r.component, Component::Embedding | Component::Head);
                    shared && r.layer.is_none() && rows_of(r) < self.tokens
                };
                let own = self.records.iter().filter(own).filter(|_| self.mtp.is_some());
                layer(self.mtp).chain(own).collect()
            }
        }
    }

    /// All records, for writing them into a file.
    pub fn records(&self) -> &[OpRecord] {
        &self.records
    }
}

/// Tokens that an op of embedding or head works on.
fn rows_of(record: &OpRecord) -> u64 {
    match record.class {
        // The table comes first.
        OpClass::Gather => {
            record.outputs.first().and_then(|t| t.shape.first()).map_or(0, |&n| n as u64)
        }
        _ => rows(record),
    }
}
