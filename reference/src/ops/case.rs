//! A case - an op with its inputs - and the engines that compute it.

use std::collections::BTreeMap;

use fathom_trace::TensorMeta;

use super::{DynOp, OpError, metas};
use crate::Tensor;

/// Outputs by role.
pub type Outputs = BTreeMap<String, Tensor>;

/// An op with its inputs: all that an engine needs to compute.
#[derive(Debug)]
pub struct Case {
    /// The op with its parameters.
    pub op: Box<dyn DynOp>,
    /// Inputs by role.
    pub inputs: BTreeMap<String, Tensor>,
}

impl Case {
    /// The inputs in the order of the op's roles.
    ///
    /// # Errors
    /// [`OpError::Unexpected`] for a tensor that is no input of the op.
    pub fn ordered_inputs(&self) -> Result<Vec<Option<Tensor>>, OpError> {
        let roles = self.op.inputs();
        if let Some(role) = self.inputs.keys().find(|k| roles.iter().all(|r| r.name != **k)) {
            return Err(OpError::Unexpected {
                role: role.clone(),
                op: self.op.name(),
                expected: roles.iter().map(|r| r.name).collect(),
            });
        }
        Ok(roles.iter().map(|r| self.inputs.get(r.name).cloned()).collect())
    }

    /// What comes out: roles, dtypes and shapes.
    ///
    /// # Errors
    /// As [`super::Op::infer`].
    pub fn infer(&self) -> Result<Vec<TensorMeta>, OpError> {
        self.op.infer(&metas(self.op.inputs(), &self.ordered_inputs()?))
    }
}

/// Whatever computes a case: the reference, a GPU, the emulated driver, a hypothesis.
pub trait Engine {
    /// A short name for tables and errors.
    fn name(&self) -> String;

    /// Computes the case's outputs.
    ///
    /// # Errors
    /// [`EngineError`] where the case is wrong or the engine cannot run it.
    fn run(&self, case: &Case) -> Result<Outputs, EngineError>;
}

/// Why an engine gave no outputs.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The case itself is wrong.
    #[error(transparent)]
    Op(#[from] OpError),
    /// The engine has no implementation of the op, or lacks what it needs to run it.
    #[error("{engine} cannot run {op}: {reason}")]
    Unsupported {
        /// The engine.
        engine: String,
        /// The op.
        op: String,
        /// What is missing and how to get it.
        reason: String,
    },
    /// The engine failed while it ran.
    #[error("{engine} failed on {op}: {reason}")]
    Failed {
        /// The engine.
        engine: String,
        /// The op.
        op: String,
        /// What it reported.
        reason: String,
    },
}

/// The reference: every op by the arithmetic of its own file.
#[derive(Clone, Copy, Debug, Default)]
pub struct ReferenceEngine;

impl Engine for ReferenceEngine {
    fn name(&self) -> String {
        "reference".to_owned()
    }

    fn run(&self, case: &Case) -> Result<Outputs, EngineError> {
        let outputs = case.op.run(case.ordered_inputs()?)?;
        Ok(case.op.outputs().iter().map(|r| (*r).to_owned()).zip(outputs).collect())
    }
}
