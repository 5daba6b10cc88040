//! What an op is: the trait that every file of [`crate::ops`] implements, the table of them all,
//! and what they share.
//!
//! - [`Op`] and [`DynOp`]: a definition, and the same behind a pointer for generic code.
//! - [`OPS`]: the table, drawn from the one list in `list.rs`.
//! - [`rules`], [`compute_type`], [`codes`], [`example`]: with what an op's file states its dtype
//!   and shape rules, computes, reads codes with scales, and shows a case of itself.
//! - [`Case`], [`Engine`]: an op with its inputs, and whatever computes it.

mod case;
pub mod codes;
pub mod compute_type;
mod error;
pub mod example;
pub(crate) mod list;
mod params;
pub mod rules;
mod table;

use fathom_trace::{OpClass, TensorMeta};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::Tensor;

pub use case::{Case, Engine, EngineError, Outputs, ReferenceEngine};
pub use error::OpError;
pub use example::Example;
pub use params::Param;
pub use table::{OPS, OpEntry, entry_of, op_from, op_names};

/// An input's place in an op.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Role {
    /// Name in case files and errors.
    pub name: &'static str,
    /// Whether the op may run without it.
    pub optional: bool,
}

/// An input that must be there.
pub const fn input(name: &'static str) -> Role {
    Role { name, optional: false }
}

/// An input that may be absent.
pub const fn optional(name: &'static str) -> Role {
    Role { name, optional: true }
}

/// What an op costs at least: the work of the textbook algorithm, each byte moved once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Floating-point operations; a multiply-add counts two.
    pub flops: u64,
    /// Bytes read from memory.
    pub bytes_read: u64,
    /// Bytes written to memory.
    pub bytes_written: u64,
    /// Bytes that leave the rank (collectives, sends).
    pub bytes_sent: u64,
}

/// An op's definition; the value holds its parameters.
pub trait Op:
    Serialize
    + DeserializeOwned
    + schemars::JsonSchema
    + Clone
    + std::fmt::Debug
    + Send
    + Sync
    + 'static
{
    /// Name in the table, in case files and traces.
    const NAME: &'static str;
    /// Inputs in order.
    const INPUTS: &'static [Role];
    /// Outputs in order.
    const OUTPUTS: &'static [&'static str];
    /// How it uses a GPU: what the simulator times it by.
    const CLASS: OpClass;

    /// A small complete case: `fathom case` shows it, the page on case files is drawn from it.
    fn example() -> Example;

    /// The dtype and shape rules: checks the inputs (one entry a role, in order) and says what
    /// comes out.
    ///
    /// # Errors
    /// [`OpError`] naming the tensor, what was expected and what was found.
    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError>;

    /// Floating-point operations for inputs that [`Op::infer`] accepted.
    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64;

    /// Bytes that leave the rank; 0 for everything but collectives and sends.
    fn bytes_sent(&self, _inputs: &[Option<TensorMeta>]) -> u64 {
        0
    }

    /// The arithmetic, on inputs that [`Op::infer`] accepted. Inputs come by value, so that an op
    /// may write into one that nobody else holds.
    ///
    /// # Errors
    /// [`OpError`] where values (not shapes) make the op undefined.
    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError>;
}

/// An op behind a pointer: what generic code handles.
pub trait DynOp: Send + Sync + std::fmt::Debug {
    /// As [`Op::NAME`].
    fn name(&self) -> &'static str;
    /// As [`Op::INPUTS`].
    fn inputs(&self) -> &'static [Role];
    /// As [`Op::OUTPUTS`].
    fn outputs(&self) -> &'static [&'static str];
    /// As [`Op::CLASS`].
    fn class(&self) -> OpClass;
    /// The parameters as they stand in a case file.
    fn params(&self) -> Value;
    /// As [`Op::infer`]; also refuses where a mandatory input is absent.
    ///
    /// # Errors
    /// As [`Op::infer`].
    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError>;
    /// Operations and bytes for inputs that `infer` accepted and the outputs that it gave.
    fn cost(&self, inputs: &[Option<TensorMeta>], outputs: &[TensorMeta]) -> Cost;
    /// Checks the inputs, then computes.
    ///
    /// # Errors
    /// As [`Op::infer`] and [`Op::run`].
    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError>;
    /// A copy behind a new pointer.
    fn boxed(&self) -> Box<dyn DynOp>;
    /// The concrete op, for a backend that has a kernel of its own for it.
    fn as_any(&self) -> &dyn std::any::Any;
}

impl<T: Op> DynOp for T {
    fn name(&self) -> &'static str {
        T::NAME
    }

    fn inputs(&self) -> &'static [Role] {
        T::INPUTS
    }

    fn outputs(&self) -> &'static [&'static str] {
        T::OUTPUTS
    }

    fn class(&self) -> OpClass {
        T::CLASS
    }

    fn params(&self) -> Value {
        serde_json::to_value(self).expect("parameters are plain data")
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        assert_eq!(inputs.len(), T::INPUTS.len(), "{}: one entry a role", T::NAME);
        let absent = |(role, found): &(&Role, &Option<_>)| found.is_none() && !role.optional;
        if T::INPUTS.iter().zip(inputs).any(|pair| absent(&pair)) {
            let missing = case::expected_of_absent(self, inputs);
            return Err(OpError::Roles { op: T::NAME, missing, unknown: Vec::new() });
        }
        Op::infer(self, inputs)
    }

    fn cost(&self, inputs: &[Option<TensorMeta>], outputs: &[TensorMeta]) -> Cost {
        Cost {
            flops: self.flops(inputs),
            bytes_read: inputs.iter().flatten().map(TensorMeta::bytes).sum(),
            bytes_written: outputs.iter().map(TensorMeta::bytes).sum(),
            bytes_sent: self.bytes_sent(inputs),
        }
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let expected = DynOp::infer(self, &metas(T::INPUTS, &inputs))?;
        let outputs = Op::run(self, inputs)?;
        let found = outputs.iter().zip(&expected).map(|(o, e)| o.meta(&e.role));
        debug_assert!(
            outputs.len() == expected.len() && found.eq(expected.iter().cloned()),
            "{}: the outputs are not what infer announced: {expected:?}",
            T::NAME,
        );
        Ok(outputs)
    }

    fn boxed(&self) -> Box<dyn DynOp> {
        Box::new(self.clone())
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

/// Role, dtype and shape of each input that is there.
fn metas(roles: &[Role], inputs: &[Option<Tensor>]) -> Vec<Option<TensorMeta>> {
    roles.iter().zip(inputs).map(|(r, t)| t.as_ref().map(|t| t.meta(r.name))).collect()
}
