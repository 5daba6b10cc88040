//! Helpers with which an op's `infer` states its dtype and shape rules.

use fathom_trace::{DType, TensorMeta};

use super::OpError;

/// The tensor has one of these dtypes.
///
/// # Errors
/// [`OpError::DType`].
pub fn dtype(tensor: &TensorMeta, expected: &[DType]) -> Result<(), OpError> {
    if expected.contains(&tensor.dtype) {
        return Ok(());
    }
    Err(OpError::DType {
        role: tensor.role.clone(),
        expected: expected.iter().map(|d| d.name()).collect::<Vec<_>>().join(" or "),
        found: tensor.dtype.to_string(),
    })
}

/// The tensor has exactly this shape.
///
/// # Errors
/// [`OpError::Shape`].
pub fn shape(tensor: &TensorMeta, expected: &[usize]) -> Result<(), OpError> {
    if tensor.shape == expected {
        return Ok(());
    }
    Err(OpError::Shape {
        role: tensor.role.clone(),
        expected: format!("{expected:?}"),
        found: tensor.shape.clone(),
    })
}

/// The tensor has this many dimensions; `words` names them, `[m, k]` for instance.
///
/// # Errors
/// [`OpError::Shape`].
pub fn rank(tensor: &TensorMeta, rank: usize, words: &str) -> Result<(), OpError> {
    if tensor.shape.len() == rank {
        return Ok(());
    }
    Err(OpError::Shape {
        role: tensor.role.clone(),
        expected: words.to_owned(),
        found: tensor.shape.clone(),
    })
}

/// A parameter that counts something is not 0.
///
/// # Errors
/// [`OpError::Params`].
pub fn at_least_one(op: &'static str, path: &str, value: usize) -> Result<(), OpError> {
    if value > 0 {
        return Ok(());
    }
    let message = "expected at least 1, found 0".to_owned();
    Err(OpError::Params { op, path: path.to_owned(), message })
}

/// The description of a tensor, for the outputs that an `infer` announces.
pub fn meta(role: &str, dtype: DType, shape: &[usize]) -> TensorMeta {
    TensorMeta { role: role.to_owned(), dtype, shape: shape.to_vec() }
}
