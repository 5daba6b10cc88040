//! A wrapper around any backend that shows every op call to a hook: what record, op traces and the
//! search for the first non-finite tensor stand on.

use std::cell::Cell;
use std::collections::BTreeMap;

use fathom_trace::{Group, OpRecord, TensorMeta};
use serde_json::Value;

use super::{Backend, Place, Result, passes_on};
use crate::{DynOp, OpError};

/// One op call, after it was executed.
pub struct Call<'a, B: Backend> {
    /// The backend that executed it: download a buffer to see its elements.
    pub backend: &'a B,
    /// The op with its parameters.
    pub op: &'a dyn DynOp,
    /// Inputs, one entry per role of the op in its order; none for an optional role that was left
    /// out.
    pub inputs: &'a [Option<B::Buffer>],
    /// Outputs, one per role of the op in its order.
    pub outputs: &'a [B::Buffer],
    /// Where in the step it stands.
    pub place: Place,
}

/// What a [`Recorder`] shows op calls to. A closure over a [`Call`] is one that sees every call.
pub trait Hook<B: Backend> {
    /// Called before an op is executed; says whether [`Hook::finished`] is to see the call. Where
    /// it is not, the recorder holds no input, and an op may write in place.
    ///
    /// # Errors
    /// An error becomes the op's, which then does not run.
    fn begins(
        &self,
        _backend: &B,
        _op: &dyn DynOp,
        _inputs: &[Option<B::Buffer>],
        _place: Place,
    ) -> Result<bool> {
        Ok(true)
    }

    /// Called after an op was executed.
    ///
    /// # Errors
    /// An error becomes the op's.
    fn finished(&self, call: &Call<'_, B>) -> Result<()>;
}

impl<B: Backend, F: Fn(&Call<'_, B>) -> Result<()>> Hook<B> for F {
    fn finished(&self, call: &Call<'_, B>) -> Result<()> {
        self(call)
    }
}

/// Executes on `inner` and shows every op call to a hook.
///
/// Inputs of calls that the hook wants stay alive until it has seen them, so an op that would write
/// in place copies.
pub struct Recorder<B, H> {
    inner: B,
    hook: H,
    place: Cell<Place>,
}

impl<B: Backend, F: Fn(&Call<'_, B>) -> Result<()>> Recorder<B, F> {
    /// Wraps `inner` and shows every call to `hook` once it was executed; an error of `hook`
    /// becomes the op's.
    pub fn new(inner: B, hook: F) -> Recorder<B, F> {
        Recorder::with_hook(inner, hook)
    }
}

impl<B: Backend, H: Hook<B>> Recorder<B, H> {
    /// Wraps `inner` with a hook that says itself which calls it is to see.
    pub fn with_hook(inner: B, hook: H) -> Recorder<B, H> {
        Recorder { inner, hook, place: Cell::default() }
    }

    /// The backend inside.
    pub fn inner(&self) -> &B {
        &self.inner
    }
}

impl<B: Backend, H: Hook<B>> Backend for Recorder<B, H> {
    type Buffer = B::Buffer;

    passes_on!(self => self.inner, B);

    fn execute(&self, op: &dyn DynOp, inputs: Vec<Option<B::Buffer>>) -> Result<Vec<B::Buffer>> {
        let place = self.place.get();
        if !self.hook.begins(&self.inner, op, &inputs, place)? {
            return self.inner.execute(op, inputs);
        }
        let outputs = self.inner.execute(op, inputs.clone())?;
        let (inputs, outputs_seen) = (&inputs[..], &outputs[..]);
        let backend = &self.inner;
        self.hook.finished(&Call { backend, op, inputs, outputs: outputs_seen, place })?;
        Ok(outputs)
    }

    fn at(&self, place: Place) {
        self.place.set(place);
        self.inner.at(place);
    }

    fn group_counts(&self, counts: &B::Buffer, group: Group) -> Result<Option<Vec<Vec<usize>>>> {
        self.inner.group_counts(counts, group)
    }
}

/// Role, dtype and shape of each input, `None` for an optional role that was left out; what
/// [`DynOp::infer`] and op records take.
pub fn input_metas<B: Backend>(
    backend: &B,
    op: &dyn DynOp,
    inputs: &[Option<B::Buffer>],
) -> Vec<Option<TensorMeta>> {
    let meta = |(role, buffer): (&crate::op::Role, &Option<B::Buffer>)| {
        buffer.as_ref().map(|buffer| TensorMeta {
            role: role.name.to_owned(),
            dtype: backend.dtype(buffer),
            shape: backend.shape(buffer),
        })
    };
    op.inputs().iter().zip(inputs).map(meta).collect()
}

/// The record of an op on inputs of these shapes: outputs, FLOPs and bytes follow from the op's own
/// rules. `seq` is its number in the trace, from 0.
///
/// # Errors
/// As [`DynOp::infer`].
pub fn op_record(
    op: &dyn DynOp,
    inputs: Vec<Option<TensorMeta>>,
    seq: u64,
    rank: usize,
    place: Place,
) -> Result<OpRecord, OpError> {
    let outputs = op.infer(&inputs)?;
    let cost = op.cost(&inputs, &outputs);
    let params: BTreeMap<String, Value> = match op.params() {
        Value::Object(map) => map.into_iter().collect(),
        _ => BTreeMap::new(),
    };
    let group: Option<Group> =
        params.get("group").and_then(|g| serde_json::from_value(g.clone()).ok());
    Ok(OpRecord {
        seq,
        step: place.step,
        rank,
        op: op.name().to_owned(),
        class: op.class(),
        params,
        inputs: inputs.into_iter().flatten().collect(),
        outputs,
        flops: cost.flops,
        bytes_read: cost.bytes_read,
        bytes_written: cost.bytes_written,
        bytes_sent: cost.bytes_sent,
        group,
        layer: place.layer,
        component: place.component,
        phase: place.phase,
        micro_batch: place.micro_batch,
    })
}
