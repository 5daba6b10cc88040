//! Delayed per-tensor scaling (the report's section 3.3.2 compares with it; Transformer Engine's
//! recipe): the scale of a cast follows from what the steps before found.
//!
//! All casts of a step at one [`CastSite`] use one scale, and each notes the largest magnitude that
//! it met. What a step found is its largest, so neither the order of micro-batches nor a cast that
//! a backward repeats changes a bit. [`AmaxHistory`](crate::train::AmaxHistory) keeps the histories
//! between steps.

use std::cell::RefCell;
use std::collections::BTreeMap;

use fathom_numerics::formats::Format;

use crate::Tensor;
use crate::backend::{Backend, Result};
use crate::model::params::ParamId;
use crate::ops::quantize_delayed::QuantizeDelayed;
use crate::precision::Delayed;

/// Which side of a Linear's products an operand stands on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    /// What fprop multiplies, and wgrad again.
    Activation,
    /// What dgrad multiplies, and wgrad again.
    Gradient,
}

/// A cast that has a history: that of an operand which a Linear reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct CastSite {
    /// The Linear's weight; of Linears that read the same operand, one.
    pub weight: ParamId,
    /// Whether it is what fprop multiplies, or what dgrad does.
    pub side: Side,
}

/// The scales of a step, and what its casts find.
#[derive(Debug)]
pub struct StepScales<B: Backend> {
    recipe: Delayed,
    /// F32 \[1\] each.
    scales: BTreeMap<CastSite, B::Buffer>,
    /// A history of one step for the op, whose output is then this cast's amax.
    blank: B::Buffer,
    /// The amax of each cast so far, F32 \[1\].
    found: RefCell<Vec<(CastSite, B::Buffer)>>,
}

impl<B: Backend> StepScales<B> {
    /// Brings the scales of a step to the backend.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn new(
        backend: &B,
        recipe: Delayed,
        scales: impl Iterator<Item = (CastSite, f32)>,
    ) -> Result<StepScales<B>> {
        let upload = |value: f32| backend.upload(Tensor::from_vec(&[1], vec![value]));
        let scales = scales.map(|(site, scale)| Ok((site, upload(scale)?))).collect::<Result<_>>();
        let (scales, blank) = (scales?, upload(0.0)?);
        Ok(StepScales { recipe, scales, blank, found: RefCell::default() })
    }

    /// Casts `x` \[rows, columns\] by the scale of its site: codes and their scale \[1, 1\].
    pub(super) fn cast(
        &self,
        backend: &B,
        site: CastSite,
        format: Format,
        x: &B::Buffer,
    ) -> Result<[B::Buffer; 2]> {
        let Delayed { margin, amax, .. } = self.recipe;
        let op = QuantizeDelayed { format, margin, amax };
        let scale = &self.scales[&site];
        let [q, scale, amax, _] = backend.quantize_delayed(&op, x, &self.blank, scale)?;
        self.found.borrow_mut().push((site, amax));
        Ok([q, scale])
    }

    /// The largest magnitude that the step met at each site.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn found(self, backend: &B) -> Result<BTreeMap<CastSite, f32>> {
        let mut largest = BTreeMap::new();
        for (site, amax) in self.found.into_inner() {
            let amax = backend.download(&amax)?.as_slice::<f32>()[0];
            let so_far = largest.entry(site).or_insert(0.0f32);
            *so_far = so_far.max(amax);
        }
        Ok(largest)
    }
}
