//! What delayed scaling remembers of the steps done: at every cast site the amax of each of the
//! last steps, the newest first, and the scale that follows from them.

use std::collections::BTreeMap;

use fathom_numerics::formats::Format;
use fathom_numerics::quant::delayed::DelayedScaling;
use fathom_trace::DType;

use super::TrainError;
use super::taken::Taken;
use crate::Tensor;
use crate::backend::{Backend, Result};
use crate::layers::delayed::{CastSite, Side, StepScales};
use crate::model::{Model, ParamId, ParamKind, ParamSpec};
use crate::precision::{Delayed, Fp8Recipe, Mode};

/// The histories of a run's casts.
#[derive(Clone, Debug, PartialEq)]
pub struct AmaxHistory {
    recipe: Delayed,
    gradient_format: Format,
    sites: BTreeMap<CastSite, SiteHistory>,
}

/// The history of one site.
#[derive(Clone, Debug, PartialEq)]
struct SiteHistory {
    /// The amax of each of the last steps, the newest first; 0 before the run.
    amax: Vec<f32>,
    /// What the next step's casts multiply by.
    scale: f32,
}

/// Both sides of a Linear, in the order in which a checkpoint has them.
const SIDES: [Side; 2] = [Side::Activation, Side::Gradient];

impl AmaxHistory {
    /// The histories of a run at its beginning: zeros, and scales of 1. None where the recipe's
    /// scales are not delayed.
    pub fn new(model: &Model) -> Option<AmaxHistory> {
        let Fp8Recipe { delayed, gradient_format, .. } = model.recipe.fp8.clone();
        let recipe = delayed.filter(|_| model.recipe.mode == Mode::Fp8)?;
        let blank = SiteHistory { amax: vec![0.0; recipe.history], scale: 1.0 };
        let sites =
            weights(model).flat_map(|(weight, _)| SIDES.map(|side| CastSite { weight, side }));
        let sites = sites.map(|site| (site, blank.clone())).collect();
        Some(AmaxHistory { recipe, gradient_format, sites })
    }

    /// The scales of the step to come.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn begin<B: Backend>(&self, backend: &B) -> Result<StepScales<B>> {
        let scales = self.sites.iter().map(|(site, of)| (*site, of.scale));
        StepScales::new(backend, self.recipe, scales)
    }

    /// Takes in what a step found. A site that had no cast stays as it is.
    pub fn end(&mut self, found: &BTreeMap<CastSite, f32>) {
        let Delayed { margin, amax: algorithm, .. } = self.recipe;
        for (site, &amax) in found {
            let format = match site.side {
                Side::Activation => Format::E4M3,
                Side::Gradient => self.gradient_format,
            };
            let scaling = DelayedScaling { format, margin: margin.into(), algorithm };
            let of = self.sites.get_mut(site).expect("casts are of known sites");
            of.scale = scaling.next_scale(&mut of.amax, amax, of.scale);
        }
    }

    /// The histories by name: `amax/NAME`, F32 \[2, steps + 1\] of each Linear's weight: of the
    /// activation and of the gradient the scale, then the amaxes.
    pub(super) fn save(&self, model: &Model) -> Vec<(String, Tensor)> {
        let shape = self.shape();
        let tensor = |(weight, spec): (ParamId, &ParamSpec)| {
            let rows = SIDES.iter().flat_map(|&side| {
                let of = &self.sites[&CastSite { weight, side }];
                std::iter::once(of.scale).chain(of.amax.iter().copied())
            });
            (format!("{KIND}/{}", spec.name), Tensor::from_vec(&shape, rows.collect()))
        };
        weights(model).map(tensor).collect()
    }

    /// Takes the histories of a checkpoint.
    pub(super) fn restore(
        &mut self,
        model: &Model,
        taken: &mut Taken<'_>,
    ) -> std::result::Result<(), TrainError> {
        let shape = self.shape();
        for (weight, spec) in weights(model) {
            let tensor = taken.take_shaped(KIND, spec, DType::F32, &shape)?;
            for (side, row) in SIDES.into_iter().zip(tensor.as_slice::<f32>().chunks(shape[1])) {
                let of = SiteHistory { scale: row[0], amax: row[1..].to_vec() };
                self.sites.insert(CastSite { weight, side }, of);
            }
        }
        Ok(())
    }

    fn shape(&self) -> [usize; 2] {
        [SIDES.len(), 1 + self.recipe.history]
    }
}

/// What the histories are called in a checkpoint, before a parameter's name.
const KIND: &str = "amax";

/// The weights of the model's Linears.
fn weights(model: &Model) -> impl Iterator<Item = (ParamId, &ParamSpec)> {
    let product = |spec: &ParamSpec| matches!(spec.kind, ParamKind::Linear | ParamKind::Experts);
    let all = model.specs.iter().enumerate().map(|(i, spec)| (ParamId(i), spec));
    all.filter(move |(_, spec)| product(spec))
}

#[cfg(test)]
mod tests {
    use super::*;
    use fathom_numerics::quant::delayed::AmaxAlgorithm;

    /// A history of two steps by hand: E4M3's largest value is 448, E5M2's 57344.
    #[test]
    fn the_scale_follows_from_the_last_steps() {
        let of = |side| CastSite { weight: ParamId(0), side };
        let (x, dy) = (of(Side::Activation), of(Side::Gradient));
        let blank = SiteHistory { amax: vec![0.0; 2], scale: 1.0 };
        let mut history = AmaxHistory {
            recipe: Delayed { history: 2, margin: 1, amax: AmaxAlgorithm::Max },
            gradient_format: Format::E5M2,
            sites: [x, dy].map(|site| (site, blank.clone())).into(),
        };
        let mut after = |amax_x: f32, amax_dy: f32| {
            history.end(&BTreeMap::from([(x, amax_x), (dy, amax_dy)]));
            let read = |site| (history.sites[&site].amax.clone(), history.sites[&site].scale);
            [read(x), read(dy)]
        };
        // 448 / 7 / 2 and 57344 / 14 / 2.
        assert_eq!(after(7.0, 14.0), [(vec![7.0, 0.0], 32.0), (vec![14.0, 0.0], 2048.0)]);
        // The largest of the two steps counts.
        assert_eq!(after(3.5, 28.0), [(vec![3.5, 7.0], 32.0), (vec![28.0, 14.0], 1024.0)]);
        // The first step is forgotten; a step of zeros leaves what the other gives.
        assert_eq!(after(0.0, 0.0), [(vec![0.0, 3.5], 64.0), (vec![0.0, 28.0], 1024.0)]);
        // Nothing but zeros: the scale stays.
        assert_eq!(after(0.0, 0.0), [(vec![0.0, 0.0], 64.0), (vec![0.0, 0.0], 1024.0)]);
    }
}
