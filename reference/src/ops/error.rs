//! Why an op cannot run on what it was given: always which tensor, what was expected, what found.

/// Why an op cannot run on what it was given.
#[derive(Debug, thiserror::Error)]
pub enum OpError {
    /// No op has this name.
    #[error("unknown op '{found}'; known are {}", super::op_names().join(", "))]
    Unknown {
        /// The name given.
        found: String,
    },
    /// The parameters do not fit the op.
    #[error("params of {op}, at '{path}': {message}")]
    Params {
        /// The op.
        op: &'static str,
        /// Where in the JSON.
        path: String,
        /// What is wrong there.
        message: String,
    },
    /// An input is absent.
    #[error("tensor '{role}': {op} needs it, and it is absent")]
    Missing {
        /// The input's role.
        role: String,
        /// The op.
        op: &'static str,
    },
    /// A tensor is there that the op does not take.
    #[error("tensor '{role}': {op} has no such tensor; it has {}", expected.join(", "))]
    Unexpected {
        /// The tensor's name.
        role: String,
        /// The op.
        op: &'static str,
        /// The roles it knows.
        expected: Vec<&'static str>,
    },
    /// A tensor's element type is wrong.
    #[error("tensor '{role}': expected dtype {expected}, found {found}")]
    DType {
        /// The tensor's role.
        role: String,
        /// The dtype, or the choice of them.
        expected: String,
        /// The dtype it has.
        found: String,
    },
    /// A tensor's shape is wrong.
    #[error("tensor '{role}': expected shape {expected}, found {found:?}")]
    Shape {
        /// The tensor's role.
        role: String,
        /// The shape, in words where a dimension is free.
        expected: String,
        /// The shape it has.
        found: Vec<usize>,
    },
    /// The values or parameters ask for something that is not defined.
    #[error("{op}: {message}")]
    Undefined {
        /// The op.
        op: &'static str,
        /// What is not defined, and what to do instead.
        message: String,
    },
}
