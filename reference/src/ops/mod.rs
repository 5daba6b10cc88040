//! The table of ops. An op is defined once, in the file of its name: its parameters (the JSON of a
//! case file's `params`), the roles of its inputs and outputs with their dtype and shape rules, its
//! FLOPs and bytes, and its arithmetic.
//!
//! To add an op: copy a neighbour's file, declare it here (`mod`) and in the [`list`]. Table,
//! methods of `Backend`, record and replay, case files, `check`, `conform` and the simulator follow
//! from that; what is still missing (a page, a kernel) is named by a test that fails.

pub mod attention;
pub mod balance;
mod case;
pub mod codes;
pub mod collective;
pub mod cross_entropy;
pub mod dequantize;
pub mod dispatch;
pub mod drop_tokens;
pub mod elementwise;
mod error;
pub mod example;
pub mod gemm;
pub mod gemm_fp8;
pub mod grouped_gemm;
pub mod grouped_gemm_fp8;
pub mod latent;
pub(crate) mod list;
pub mod mla_kv;
pub mod mma;
pub mod optim;
mod params;
pub mod quantize_block;
pub mod quantize_tile;
pub mod quantize_weight;
pub mod real;
pub mod rms_norm;
pub mod rope;
pub mod router;
pub mod rules;
pub mod swiglu;
pub mod transpose_quantize;
pub mod wgrad_fp8;

use fathom_trace::{OpClass, TensorMeta};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::Tensor;
use list::for_each_op;

pub use case::{Case, Engine, EngineError, Outputs, ReferenceEngine};
pub use error::OpError;
pub use example::Example;
pub use params::Param;

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
    /// FLOPs and bytes for inputs that `infer` accepted and the outputs that it gave.
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

/// A row of the table.
pub struct OpEntry {
    /// As [`Op::NAME`].
    pub name: &'static str,
    /// As [`Op::INPUTS`].
    pub inputs: &'static [Role],
    /// As [`Op::OUTPUTS`].
    pub outputs: &'static [&'static str],
    /// As [`Op::example`].
    pub example: fn() -> Example,
    schema: fn() -> Value,
    parse: fn(&Value) -> Result<Box<dyn DynOp>, OpError>,
}

const fn entry<T: Op>() -> OpEntry {
    OpEntry {
        name: T::NAME,
        inputs: T::INPUTS,
        outputs: T::OUTPUTS,
        example: T::example,
        schema: params::schema::<T>,
        parse: parse::<T>,
    }
}

impl OpEntry {
    /// What the op is, in the words of its parameter struct.
    pub fn words(&self) -> String {
        params::sentence(&(self.schema)())
    }

    /// The parameters in the order in which they are written, parts of a nested one behind it.
    pub fn params(&self) -> Vec<Param> {
        params::describe(&(self.schema)(), &(self.example)().op.params(), self.parse)
    }
}

fn parse<T: Op>(params: &Value) -> Result<Box<dyn DynOp>, OpError> {
    params::check_keys(T::NAME, &params::schema::<T>(), params)?;
    params::check_sizes(T::NAME, params)?;
    let op: T = serde_path_to_error::deserialize(params).map_err(|e| OpError::Params {
        op: T::NAME,
        path: e.path().to_string(),
        message: e.inner().to_string(),
    })?;
    Ok(Box::new(op))
}

macro_rules! table {
    ($($name:ident($file:ident::$op:ident; $($inputs:tt)*) -> $outputs:literal;)*) => {
        /// Every op, in alphabetical order.
        pub const OPS: &[OpEntry] = &[$(entry::<$file::$op>()),*];
    };
}
for_each_op!(table);

/// The names of all ops.
pub fn op_names() -> Vec<&'static str> {
    OPS.iter().map(|e| e.name).collect()
}

/// The table's row of this name.
///
/// # Errors
/// [`OpError::Unknown`].
pub fn entry_of(name: &str) -> Result<&'static OpEntry, OpError> {
    let entry = OPS.iter().find(|e| e.name == name);
    entry.ok_or_else(|| OpError::Unknown { found: name.to_owned() })
}

/// The op of this name with these parameters.
///
/// # Errors
/// [`OpError::Unknown`], [`OpError::Keys`] and [`OpError::Params`].
pub fn op_from(name: &str, params: &Value) -> Result<Box<dyn DynOp>, OpError> {
    (entry_of(name)?.parse)(params)
}
