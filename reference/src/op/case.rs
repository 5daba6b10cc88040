//! A case - an op with its inputs - and the engines that compute it.

use std::collections::BTreeMap;

use fathom_trace::{DType, TensorMeta};

use super::{DynOp, OpError, Role, entry_of, metas};
use crate::Tensor;

/// What an op computed: its output tensors by role ([`super::Op::OUTPUTS`]).
pub type Outputs = BTreeMap<String, Tensor>;

/// An op with its inputs: all that an engine needs to compute.
#[derive(Debug)]
pub struct Case {
    /// The op with its parameters.
    pub op: Box<dyn DynOp>,
    /// Inputs by role ([`super::Op::INPUTS`]); an optional one may be absent.
    pub inputs: BTreeMap<String, Tensor>,
}

impl Case {
    /// The inputs in the order of the op's roles.
    ///
    /// # Errors
    /// [`OpError::Roles`] for tensors that are no input of the op.
    pub fn ordered_inputs(&self) -> Result<Vec<Option<Tensor>>, OpError> {
        let known: Vec<&str> = self.op.inputs().iter().map(|r| r.name).collect();
        let found = self.inputs.keys().map(String::as_str);
        let unknown: Vec<&str> = found.filter(|name| !known.contains(name)).collect();
        if !unknown.is_empty() {
            return Err(OpError::unknown_roles(self.op.name(), &unknown, &known));
        }
        Ok(known.iter().map(|name| self.inputs.get(*name).cloned()).collect())
    }

    /// The mandatory inputs that are absent, each with the dtype and shape that the op expects.
    pub fn absent_inputs(&self) -> Vec<String> {
        let roles = self.op.inputs();
        let found = roles.iter().map(|r| self.inputs.get(r.name).map(|t| t.meta(r.name)));
        expected_of_absent(&*self.op, &found.collect::<Vec<_>>())
    }

    /// What comes out: roles, dtypes and shapes.
    ///
    /// # Errors
    /// As [`super::Op::infer`].
    pub fn infer(&self) -> Result<Vec<TensorMeta>, OpError> {
        self.op.infer(&metas(self.op.inputs(), &self.ordered_inputs()?))
    }
}

/// The mandatory inputs that are absent, each with what the op expects there: its rules are asked
/// with something wrong in the input's place. Where a shape is not fixed by what is there, it
/// stands in the words of the rule or of the op's example.
pub(super) fn expected_of_absent(op: &dyn DynOp, inputs: &[Option<TensorMeta>]) -> Vec<String> {
    let absent = |(role, found): (&Role, &Option<_>)| !role.optional && found.is_none();
    let absent: Vec<bool> = op.inputs().iter().zip(inputs).map(absent).collect();
    let mut tried = inputs.to_vec();
    let mut said: Vec<[Option<String>; 2]> = vec![[None, None]; inputs.len()];
    for (i, role) in op.inputs().iter().enumerate().filter(|(i, _)| absent[*i]) {
        tried[i] = Some(TensorMeta { role: role.name.into(), dtype: DType::Bool, shape: vec![] });
    }
    let place = |role: &str| op.inputs().iter().position(|r| r.name == role).filter(|i| absent[*i]);
    // Each rule that is asked twice about the same tensor has no further answer.
    for _ in 0..3 * inputs.len() {
        match op.infer(&tried) {
            Err(OpError::DType { role, expected, .. }) => {
                let Some(i) = place(&role) else { break };
                let first = expected.split(" or ").next().and_then(DType::from_name);
                let (Some(input), Some(dtype)) = (&mut tried[i], first) else { break };
                input.dtype = dtype;
                said[i][0] = Some(expected);
            }
            Err(OpError::Shape { role, expected, .. }) => {
                let Some(i) = place(&role) else { break };
                let sizes = serde_json::from_str(&expected);
                said[i][1] = Some(expected);
                let (Some(input), Ok(sizes)) = (&mut tried[i], sizes) else { break };
                input.shape = sizes;
            }
            _ => break,
        }
    }
    let example = entry_of(op.name()).map(|entry| (entry.example)());
    let words = |(i, [dtype, shape]): (usize, &[Option<String>; 2])| {
        let name = op.inputs()[i].name;
        let like = example.as_ref().ok().map(|example| &example.inputs[i]);
        let dtype = dtype.clone().or(like.map(|l| format!("{} for instance", l.dtype)));
        let shape = shape.clone().or(like.map(|l| l.shape.words.to_owned()));
        let known: Vec<String> = [dtype, shape].into_iter().flatten().collect();
        format!("'{name}' ({})", known.join(", "))
    };
    said.iter().enumerate().filter(|(i, _)| absent[*i]).map(words).collect()
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
        /// [`Engine::name`].
        engine: String,
        /// The op's name.
        op: String,
        /// What is missing and how to get it.
        reason: String,
    },
    /// The engine failed while it ran.
    #[error("{engine} failed on {op}: {reason}")]
    Failed {
        /// [`Engine::name`].
        engine: String,
        /// The op's name.
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
