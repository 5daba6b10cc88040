//! The backend that computes nothing: it checks shapes and records what would be done.
//!
//! Where a value decides a shape (how many rows an expert gets), it is drawn from a stated load
//! distribution. Any rank of any layout runs this way, without weights and without memory.

use std::cell::{Cell, RefCell};
use std::ops::Range;

use fathom_trace::{DType, OpRecord, TensorMeta};

use super::record::{input_metas, op_record};
use super::{Backend, Place, Result};
use crate::{DynOp, EngineError, Tensor};

/// How the slots (tokens times choices) of a micro-batch spread over the routed experts.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Load {
    /// Every expert gets the same, give or take one row.
    #[default]
    Balanced,
    /// Expert e gets a share in proportion to entry e (one entry per expert, over all ranks).
    Shares(Vec<f64>),
}

/// A tensor without elements: what shape rules, FLOPs and bytes need of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetaBuffer {
    /// Element type, which gives the bytes of an element.
    pub dtype: DType,
    /// Length of each dimension, the slowest first.
    pub shape: Vec<usize>,
}

/// Backend `meta`: checks an op's inputs by its rules and records it instead of executing it.
#[derive(Debug, Default)]
pub struct Meta {
    rank: usize,
    load: Load,
    place: Cell<Place>,
    records: RefCell<Vec<OpRecord>>,
}

impl Meta {
    /// A recording backend that speaks for `rank`.
    pub fn new(rank: usize, load: Load) -> Meta {
        Meta { rank, load, ..Meta::default() }
    }

    /// What was recorded since the last call; the numbering begins anew.
    pub fn take_records(&self) -> Vec<OpRecord> {
        self.records.take()
    }
}

impl Backend for Meta {
    type Buffer = MetaBuffer;

    fn name(&self) -> String {
        "meta".to_owned()
    }

    fn execute(&self, op: &dyn DynOp, inputs: Vec<Option<MetaBuffer>>) -> Result<Vec<MetaBuffer>> {
        let metas = input_metas(self, op, &inputs);
        let mut records = self.records.borrow_mut();
        let seq = records.len() as u64;
        let record = op_record(op, metas, seq, self.rank, self.place.get())?;
        let buffer = |o: &TensorMeta| MetaBuffer { dtype: o.dtype, shape: o.shape.clone() };
        let buffers = record.outputs.iter().map(buffer).collect();
        records.push(record);
        Ok(buffers)
    }

    fn upload(&self, tensor: Tensor) -> Result<MetaBuffer> {
        Ok(MetaBuffer { dtype: tensor.dtype(), shape: tensor.shape().to_vec() })
    }

    fn download(&self, buffer: &MetaBuffer) -> Result<Tensor> {
        Err(EngineError::Unsupported {
            engine: self.name(),
            op: "download".to_owned(),
            reason: format!("a {} {:?} has no elements here", buffer.dtype, buffer.shape),
        })
    }

    fn zeros(&self, dtype: DType, shape: &[usize]) -> Result<MetaBuffer> {
        Ok(MetaBuffer { dtype, shape: shape.to_vec() })
    }

    fn dtype(&self, buffer: &MetaBuffer) -> DType {
        buffer.dtype
    }

    fn shape(&self, buffer: &MetaBuffer) -> Vec<usize> {
        buffer.shape.clone()
    }

    fn at(&self, place: Place) {
        self.place.set(place);
    }

    fn expert_counts(
        &self,
        counts: &MetaBuffer,
        local: Range<usize>,
        slots: usize,
    ) -> Result<Vec<usize>> {
        let experts = counts.shape[0];
        let shares = match &self.load {
            Load::Balanced => vec![1.0; experts],
            Load::Shares(shares) => shares.clone(),
        };
        if shares.len() != experts {
            return Err(EngineError::Failed {
                engine: self.name(),
                op: "expert_counts".to_owned(),
                reason: format!("{} shares for {experts} experts", shares.len()),
            });
        }
        // Rounded cumulative shares: the counts add up to the slots.
        let total: f64 = shares.iter().sum();
        let mut sum = 0.0;
        let mut bounds = vec![0];
        for share in shares {
            sum += share;
            bounds.push((slots as f64 * sum / total).round() as usize);
        }
        Ok(local.map(|e| bounds[e + 1] - bounds[e]).collect())
    }
}
