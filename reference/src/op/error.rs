//! Why an op cannot run on what it was given: always which tensor, what was expected, what found.

use fathom_config::nearest;

/// Why an op cannot run on what it was given.
#[derive(Debug, thiserror::Error)]
pub enum OpError {
    /// No op has this name.
    #[error("unknown op '{found}'{}; known are {}", meant(found, known), known.join(", "))]
    Unknown {
        /// The name given.
        found: String,
        /// The names of all ops.
        known: Vec<&'static str>,
    },
    /// The parameters do not fit the op.
    #[error("params of {op}, at '{path}': {message}")]
    Params {
        /// The op's name.
        op: &'static str,
        /// Where in the JSON of the parameters, `shape.heads` for instance.
        path: String,
        /// What is wrong there.
        message: String,
    },
    /// Parameters are absent, or there are some that the op does not have.
    #[error("params of {op}: {}", both(missing, unknown))]
    Keys {
        /// The op's name.
        op: &'static str,
        /// The absent keys, each with its type.
        missing: Vec<String>,
        /// The keys that the op does not have, each with the one that may be meant.
        unknown: Vec<String>,
    },
    /// Inputs are absent, or there are tensors that the op does not take.
    #[error("tensors of {op}: {}", both(missing, unknown))]
    Roles {
        /// The op's name.
        op: &'static str,
        /// The absent roles, each with what the op expects there.
        missing: Vec<String>,
        /// The tensors that the op does not take, each with the role that may be meant, or with all
        /// roles there are.
        unknown: Vec<String>,
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
        /// The op's name.
        op: &'static str,
        /// What is not defined, and what to do instead.
        message: String,
    },
}

impl OpError {
    /// An input of this role is absent.
    pub(crate) fn missing(op: &'static str, role: &str) -> OpError {
        OpError::Roles { op, missing: vec![format!("'{role}'")], unknown: Vec::new() }
    }

    /// The error of an op that is a part of `op`, whose parameters stand at `part` of its own;
    /// among its own where that is empty.
    pub(crate) fn within(self, op: &'static str, part: &str) -> OpError {
        match self {
            OpError::Params { path, message, .. } => {
                let path = if part.is_empty() { path } else { format!("{part}.{path}") };
                OpError::Params { op, path, message }
            }
            OpError::Undefined { message, .. } => OpError::Undefined { op, message },
            other => other,
        }
    }

    /// There are tensors that the op does not have; `known` are those it has.
    pub fn unknown_roles(op: &'static str, found: &[&str], known: &[&str]) -> OpError {
        // Outputs stand among the names of a file with a prefix.
        let suffix = |name: &str| known.iter().find(|k| k.ends_with(&format!(".{name}"))).copied();
        let hint = |name: &&str| match suffix(name).or_else(|| nearest(name, known)) {
            Some(known) => format!("'{name}' (did you mean '{known}'?)"),
            None => format!("'{name}' (there are {})", known.join(", ")),
        };
        OpError::Roles { op, missing: Vec::new(), unknown: found.iter().map(hint).collect() }
    }
}

/// What is missing, then what is unknown.
fn both(missing: &[String], unknown: &[String]) -> String {
    let part = |word: &str, names: &[String]| match names {
        [] => None,
        names => Some(format!("{word} {}", names.join(", "))),
    };
    let parts = [part("missing", missing), part("unknown", unknown)];
    parts.into_iter().flatten().collect::<Vec<_>>().join("; ")
}

/// A question for the name that may be meant, or nothing.
fn meant(found: &str, known: &[&str]) -> String {
    nearest(found, known).map_or(String::new(), |name| format!(", did you mean '{name}'?"))
}
