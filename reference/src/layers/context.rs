//! What every part of a layer is given: the backend, the weights in the form that ops take, and
//! the rows of the micro-batch.

use std::cell::RefCell;
use std::rc::Rc;

use fathom_trace::{Component, DType, Group, Phase};

use crate::backend::{Backend, Place, Result};
use crate::layers::delayed::StepScales;
use crate::layers::operand::Weight;
use crate::layers::parts::Context;
use crate::model::params::ParamId;
use crate::ops::collective::AllReduce;
use crate::precision::{Mode, Recipe};

/// The weights of a step, by [`ParamId`], in the forms that ops take.
#[derive(Debug)]
pub struct Weights<B: Backend> {
    /// Master precision: embedding, norms, gate, biases; none of what only products read, where
    /// those masters were let go.
    pub master: Vec<Option<B::Buffer>>,
    /// As GEMMs read them: Linears, experts, head; the others as they are.
    pub operands: Vec<Weight<B>>,
    /// Scales from the steps before, where the recipe's are delayed and the step is one of
    /// training; elsewhere a cast's scale follows from what it casts.
    pub delayed: Option<StepScales<B>>,
}

/// The gradient accumulators of a shard, by [`ParamId`].
#[derive(Clone, Debug)]
pub struct Gradients<B: Backend> {
    /// `None` where a parameter has no gradient, or while an op holds it.
    pub buffers: Vec<Option<B::Buffer>>,
}

impl<B: Backend> Default for Gradients<B> {
    fn default() -> Self {
        Gradients { buffers: Vec::new() }
    }
}

impl<B: Backend> Weights<B> {
    /// The output head in the form in which the loss reads it.
    pub fn head(&self, id: ParamId) -> &B::Buffer {
        match &self.operands[id.0] {
            Weight::Plain(head) => head,
            Weight::Codes { .. } => self.of_master(id),
        }
    }

    /// A parameter in master precision.
    ///
    /// # Panics
    /// Where it was let go.
    pub fn of_master(&self, id: ParamId) -> &B::Buffer {
        self.master[id.0].as_ref().expect("a parameter that is read in master precision is kept")
    }
}

/// The rows (tokens) that a part works on.
#[derive(Clone, Debug)]
pub struct Rows<B: Backend> {
    /// Lengths of the segments; attention stays inside a segment.
    pub segments: Vec<usize>,
    /// Position of each row, I32 \[t\].
    pub positions: B::Buffer,
    /// Cosines \[positions, rotated / 2\].
    pub cos: B::Buffer,
    /// Sines \[positions, rotated / 2\].
    pub sin: B::Buffer,
    /// Where the rows are those of parts of sequences: how these join.
    pub context: Option<Rc<Context<B>>>,
}

impl<B: Backend> Rows<B> {
    /// Rows in all.
    pub fn len(&self) -> usize {
        self.segments.iter().sum()
    }

    /// Lengths of the segments that attention and balance losses are over: whole ones, also where
    /// the rows are parts of them.
    pub fn whole_segments(&self) -> &[usize] {
        self.context.as_ref().map_or(&self.segments, |context| &context.segments)
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Which auxiliary loss balances the experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BalanceKind {
    /// Over each sequence, by the experts of highest affinity: DeepSeek-V3's complementary loss.
    Sequence,
    /// The same over the micro-batch: V3's batch-wise comparison.
    Batch,
    /// Over each sequence, by the experts that routing chose: V2's expert-level loss.
    Expert,
    /// As `Expert` for equal blocks of experts: V2's device-level loss.
    Device {
        /// How many blocks the experts form.
        devices: usize,
    },
}

/// Room for tokens on a device, as V2 was trained; without it no token is dropped.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Capacity {
    /// Blocks of experts that share their room.
    pub devices: usize,
    /// Room of a block over its even share of the micro-batch's slots; V2: 1.
    pub factor: f64,
    /// Sequences of the micro-batch that lose no token, in ascending order; V2: a tenth.
    #[serde(default)]
    pub exempt: Vec<usize>,
}

impl Capacity {
    /// The same for the sequences longer than `depth` of those that `lengths` lists, counted anew.
    pub fn of_longer_than(&self, depth: usize, lengths: &[usize]) -> Capacity {
        let left = lengths.iter().enumerate().filter(|&(_, &length)| length > depth);
        let exempt = left.enumerate().filter(|(_, (old, _))| self.exempt.contains(old));
        Capacity { exempt: exempt.map(|(new, _)| new).collect(), ..*self }
    }
}

/// A balance loss.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Balance {
    /// Over which tokens it is taken, and by which experts.
    pub kind: BalanceKind,
    /// Weight of each segment's loss: alpha over the segments (sequences, or micro-batches) of the
    /// whole step.
    pub weight: f64,
}

/// What every part of a layer is given.
pub struct Cx<'a, B: Backend> {
    /// What executes the ops.
    pub backend: &'a B,
    /// Which element types the ops use, and what is kept for the backward.
    pub recipe: &'a Recipe,
    /// The weights of the step.
    pub weights: &'a Weights<B>,
    /// The tensor-parallel ranks.
    pub tp: Group,
    /// The balance losses of the MoE layers.
    pub balance: &'a [Balance],
    /// Room for tokens of the MoE layers, where it is limited.
    pub capacity: Option<Capacity>,
    /// The rows (tokens) to work on.
    pub rows: &'a Rows<B>,
    /// Optimizer step and micro-batch, for records.
    pub place: Place,
    /// Where weight-backwards add to; `None` outside training.
    pub gradients: Option<&'a RefCell<Gradients<B>>>,
}

impl<B: Backend> Cx<'_, B> {
    /// Tells the backend which layer, part and phase the following ops belong to, for records.
    pub fn at(&self, layer: Option<usize>, component: Component, phase: Phase) {
        self.backend.at(Place { layer, component, phase, ..self.place });
    }

    /// A parameter in master precision.
    pub fn master(&self, id: ParamId) -> &B::Buffer {
        self.weights.of_master(id)
    }

    /// A parameter as GEMMs read it.
    pub fn weight(&self, id: ParamId) -> &Weight<B> {
        &self.weights.operands[id.0]
    }

    /// The rows' segments where products run on tensor cores, which begin anew in each; empty in
    /// the plain modes, whose chains of fma run through.
    pub fn tensor_core_segments(&self) -> Vec<usize> {
        if self.recipe.mode == Mode::Bf16 { self.rows.segments.clone() } else { Vec::new() }
    }

    /// Sum over the tensor-parallel ranks.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn reduce_tp(&self, x: B::Buffer) -> Result<B::Buffer> {
        if self.tp.size == 1 {
            return Ok(x);
        }
        self.backend.all_reduce(&AllReduce { group: self.tp }, &x)
    }

    /// How many neighbouring lanes here are parts of one micro-batch.
    pub fn parts(&self) -> usize {
        self.rows.context.as_ref().map_or(1, |context| context.parts.len())
    }

    /// All rows of this rank's share of the heads, of the rows of its parts of a micro-batch.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn to_heads(&self, mut parts: Vec<B::Buffer>) -> Result<B::Buffer> {
        match &self.rows.context {
            None => Ok(parts.remove(0)),
            Some(context) => context.to_heads(self.backend, parts),
        }
    }

    /// The transpose of [`Cx::to_heads`].
    ///
    /// # Errors
    /// Those of the backend.
    pub fn to_parts(&self, whole: B::Buffer) -> Result<Vec<B::Buffer>> {
        match &self.rows.context {
            None => Ok(vec![whole]),
            Some(context) => context.to_parts(self.backend, whole),
        }
    }

    /// Element type of activations.
    pub fn activation(&self) -> DType {
        self.recipe.activation()
    }

    /// Replaces a gradient accumulator by what `add` makes of it; does nothing for a parameter
    /// without gradient.
    ///
    /// # Errors
    /// Those of `add`.
    ///
    /// # Panics
    /// In a forward-only context, and where `add` asks for the same accumulator.
    pub fn accumulate(
        &self,
        id: ParamId,
        add: impl FnOnce(B::Buffer) -> Result<B::Buffer>,
    ) -> Result<()> {
        let gradients = self.gradients.expect("weight-backward runs with accumulators");
        let Some(acc) = gradients.borrow_mut().buffers[id.0].take() else {
            return Ok(());
        };
        let sum = add(acc)?;
        gradients.borrow_mut().buffers[id.0] = Some(sum);
        Ok(())
    }
}
