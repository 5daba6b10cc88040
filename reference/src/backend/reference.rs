//! The backend that computes: every op by the arithmetic of its own file, on host tensors.

use fathom_trace::DType;

use super::{Backend, Result};
use crate::{DynOp, Tensor};

/// Plain Rust on the CPU, in the exact arithmetic of the op table.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reference;

impl Backend for Reference {
    type Buffer = Tensor;

    fn name(&self) -> String {
        "reference".to_owned()
    }

    fn execute(&self, op: &dyn DynOp, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>> {
        Ok(op.run(inputs)?)
    }

    fn upload(&self, tensor: Tensor) -> Result<Tensor> {
        Ok(tensor)
    }

    fn download(&self, buffer: &Tensor) -> Result<Tensor> {
        Ok(buffer.clone())
    }

    fn dtype(&self, buffer: &Tensor) -> DType {
        buffer.dtype()
    }

    fn shape(&self, buffer: &Tensor) -> Vec<usize> {
        buffer.shape().to_vec()
    }
}
