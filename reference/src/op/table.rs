//! The table of ops, drawn from the list.

use serde_json::Value;

use super::list::for_each_op;
use super::params::{self, Param};
use super::{DynOp, Example, Op, OpError, Role};

/// What generic code can ask of an op that it knows by name only: a row of [`OPS`].
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

pub(super) const fn entry<T: Op>() -> OpEntry {
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
        pub const OPS: &[OpEntry] = &[$(entry::<crate::ops::$file::$op>()),*];
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
    entry.ok_or_else(|| OpError::Unknown { found: name.to_owned(), known: op_names() })
}

/// The op of this name with these parameters.
///
/// # Errors
/// [`OpError::Unknown`], [`OpError::Keys`] and [`OpError::Params`].
pub fn op_from(name: &str, params: &Value) -> Result<Box<dyn DynOp>, OpError> {
    (entry_of(name)?.parse)(params)
}
