//! Two backends in step: every op runs on both, and every output is compared bit for bit.
//!
//! What a model computes on it is what it computes on the first; the first output that differs
//! ends it, with the op and its place in the step. So a step's layers are compared op by op,
//! forward and backward, each op on inputs of which every bit agreed.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use fathom_reference::backend::{Backend, Place, Result};
use fathom_reference::{DynOp, EngineError, Tensor};
use fathom_trace::DType;

use crate::compare;

/// Two backends; the first is the contract, the second is held to it.
pub struct Lockstep<A, B> {
    contract: A,
    held: B,
    place: Cell<Place>,
    compared: Cell<Compared>,
    times: RefCell<BTreeMap<&'static str, OpTimes>>,
}

/// What has been compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Compared {
    /// How many calls of ops.
    pub calls: usize,
    /// Elements of their outputs.
    pub elements: usize,
}

/// What the calls of an op took by the clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpTimes {
    /// How many calls.
    pub calls: usize,
    /// On the contract.
    pub contract: Duration,
    /// On what is held to it, until its outputs were read.
    pub held: Duration,
}

impl<A: Backend, B: Backend> Lockstep<A, B> {
    /// Both in step, `held` held to `contract`.
    pub fn new(contract: A, held: B) -> Lockstep<A, B> {
        let (place, compared, times) = Default::default();
        Lockstep { contract, held, place, compared, times }
    }

    /// What has been compared so far.
    pub fn compared(&self) -> Compared {
        self.compared.get()
    }

    /// What each op's calls have taken, by its name, since they were last asked for.
    pub fn take_times(&self) -> BTreeMap<&'static str, OpTimes> {
        self.times.take()
    }

    /// Compares what both have of a tensor.
    fn same(&self, op: &str, name: &str, expected: &Tensor, found: &Tensor) -> Result<()> {
        let difference = compare::compare(name, [("contract", expected), ("kernel", found)]);
        if difference.mismatches == 0 {
            return Ok(());
        }
        let reason = format!("{}: {}", words(self.place.get()), difference.words());
        Err(EngineError::Failed { engine: self.held.name(), op: op.to_owned(), reason })
    }
}

/// `layer 0, attention, F, micro-batch 2`.
fn words(place: Place) -> String {
    let Place { layer, component, phase, micro_batch, .. } = place;
    let layer = layer.map_or("outside the layers".to_owned(), |layer| format!("layer {layer}"));
    let part = format!("{component:?}").to_lowercase();
    let batch = micro_batch.map_or(String::new(), |batch| format!(", micro-batch {batch}"));
    format!("{layer}, {part}, {phase:?}{batch}")
}

impl<A: Backend, B: Backend> Backend for Lockstep<A, B> {
    type Buffer = (A::Buffer, B::Buffer);

    fn name(&self) -> String {
        format!("{} beside {}", self.held.name(), self.contract.name())
    }

    fn execute(
        &self,
        op: &dyn DynOp,
        inputs: Vec<Option<Self::Buffer>>,
    ) -> Result<Vec<Self::Buffer>> {
        let (contract, held) = inputs.into_iter().map(Option::unzip).unzip();
        let begin = Instant::now();
        let expected = self.contract.execute(op, contract)?;
        let between = Instant::now();
        let found = self.held.execute(op, held)?;
        // A device computes behind the call, until somebody reads.
        let read = found.iter().map(|output| self.held.download(output));
        let read: Vec<Tensor> = read.collect::<Result<_>>()?;
        let end = Instant::now();
        let mut times = self.times.borrow_mut();
        let times = times.entry(op.name()).or_default();
        times.calls += 1;
        times.contract += between - begin;
        times.held += end - between;
        let mut compared = self.compared.get();
        compared.calls += 1;
        for ((role, expected), found) in op.outputs().iter().zip(&expected).zip(&read) {
            let expected = self.contract.download(expected)?;
            self.same(op.name(), role, &expected, found)?;
            compared.elements += expected.len();
        }
        self.compared.set(compared);
        Ok(expected.into_iter().zip(found).collect())
    }

    fn upload(&self, tensor: Tensor) -> Result<Self::Buffer> {
        Ok((self.contract.upload(tensor.clone())?, self.held.upload(tensor)?))
    }

    fn download(&self, buffer: &Self::Buffer) -> Result<Tensor> {
        let expected = self.contract.download(&buffer.0)?;
        let found = self.held.download(&buffer.1)?;
        self.same("download", "a tensor that the host reads", &expected, &found)?;
        Ok(expected)
    }

    fn zeros(&self, dtype: DType, shape: &[usize]) -> Result<Self::Buffer> {
        Ok((self.contract.zeros(dtype, shape)?, self.held.zeros(dtype, shape)?))
    }

    fn dtype(&self, buffer: &Self::Buffer) -> DType {
        self.contract.dtype(&buffer.0)
    }

    fn shape(&self, buffer: &Self::Buffer) -> Vec<usize> {
        self.contract.shape(&buffer.0)
    }

    fn fuses(&self) -> bool {
        self.held.fuses()
    }

    fn at(&self, place: Place) {
        self.place.set(place);
        self.contract.at(place);
        self.held.at(place);
    }
}

#[cfg(test)]
mod tests {
    use fathom_reference::backend::Reference;
    use fathom_reference::ops::add::Add;
    use fathom_reference::ops::cast::Cast;

    use super::*;

    /// The reference, but `add` gives its first input.
    struct Broken;

    impl Backend for Broken {
        type Buffer = <Reference as Backend>::Buffer;

        fn name(&self) -> String {
            "broken".to_owned()
        }

        fn execute(
            &self,
            op: &dyn DynOp,
            inputs: Vec<Option<Self::Buffer>>,
        ) -> Result<Vec<Self::Buffer>> {
            match op.name() {
                "add" => Ok(inputs.into_iter().take(1).flatten().collect()),
                _ => Reference.execute(op, inputs),
            }
        }

        fn upload(&self, tensor: Tensor) -> Result<Self::Buffer> {
            Reference.upload(tensor)
        }

        fn download(&self, buffer: &Self::Buffer) -> Result<Tensor> {
            Reference.download(buffer)
        }

        fn dtype(&self, buffer: &Self::Buffer) -> DType {
            Reference.dtype(buffer)
        }

        fn shape(&self, buffer: &Self::Buffer) -> Vec<usize> {
            Reference.shape(buffer)
        }
    }

    #[test]
    fn the_first_output_that_differs_is_named_with_its_place() {
        let both = Lockstep::new(Reference, Broken);
        let x = both.upload(Tensor::from_vec(&[3], vec![0.0f32, -1.5, 2.0])).unwrap();
        let low = both.cast(&Cast { out: DType::BF16 }, &x).unwrap();
        assert_eq!(both.compared(), Compared { calls: 1, elements: 3 });
        both.at(Place { layer: Some(2), micro_batch: Some(1), ..Place::default() });
        let error = both.add(&Add { out: DType::F32 }, &x, &low, None).unwrap_err().to_string();
        for part in [
            "broken",
            "layer 2, optimizer, F, micro-batch 1",
            "y: 2 of 3 elements differ",
            "first at [1]: contract 0xc0400000, kernel 0xbfc00000",
        ] {
            assert!(error.contains(part), "no '{part}' in {error}");
        }
        assert_eq!(both.compared().calls, 1);
    }
}
