//! The tensors of a checkpoint, by parameter.

use std::collections::BTreeMap;

use fathom_trace::DType;

use super::TrainError;
use crate::Tensor;
use crate::checkpoint::training::Saved;
use crate::model::ParamSpec;

/// The tensors of a checkpoint, to be taken by parameter.
pub(super) struct Taken<'a>(BTreeMap<&'a str, &'a Tensor>);

impl<'a> Taken<'a> {
    pub fn new(saved: &'a Saved) -> Taken<'a> {
        Taken(saved.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect())
    }

    /// The tensor of a kind (`weights`, `first`, `second`, `average`) of a parameter.
    pub fn take(
        &mut self,
        kind: &str,
        spec: &ParamSpec,
        dtype: DType,
    ) -> Result<Tensor, TrainError> {
        self.take_shaped(kind, spec, dtype, &spec.shape)
    }

    /// As [`Taken::take`], of another shape than the parameter's.
    pub fn take_shaped(
        &mut self,
        kind: &str,
        spec: &ParamSpec,
        dtype: DType,
        shape: &[usize],
    ) -> Result<Tensor, TrainError> {
        let name = format!("{kind}/{}", spec.name);
        let setting = |found: String| TrainError::Setting {
            key: format!("the checkpoint's tensor '{name}'"),
            message: format!("expected {dtype} {shape:?} as this run needs it, found {found}"),
        };
        let found = self.0.remove(name.as_str()).ok_or_else(|| setting("none".into()))?;
        if found.dtype() != dtype || found.shape() != shape {
            return Err(setting(format!("{} {:?}", found.dtype(), found.shape())));
        }
        Ok(found.clone())
    }
}
