//! Rotary position embedding of the last columns of every head, and its inverse.
//!
//! A row of `x` holds heads of `head_dim` columns; columns `start ..` of a head are rotated in
//! pairs by the angle whose cosine and sine stand in row `positions[t]` of the tables
//! \[positions, (head_dim - start) / 2\]: `y0 = x0 c - x1 s`, `y1 = x1 c + x0 s`, each product and
//! each sum rounded. Pairs are neighbours (`interleaved`, as the released checkpoints lie) or half
//! a rotation width apart. `inverse` negates the sine: the gradient. Source: arXiv 2104.09864.

use fathom_trace::{DType, OpClass, TensorMeta};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Tensor;
use crate::op::compute_type::{FLOATS, Real, compute_dtype, in_real};
use crate::op::example::{Example, shape};
use crate::op::{Op, OpError, Role, input, rules};

/// Rotation of the last columns of every head.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Rope {
    /// Columns of a head.
    pub head_dim: usize,
    /// First rotated column of a head.
    pub start: usize,
    /// Whether pairs are neighbours.
    pub interleaved: bool,
    /// Whether to rotate back.
    pub inverse: bool,
}

/// The rule for the tables and positions that rotating ops share.
pub(super) fn check_tables(
    rotated: usize,
    t: usize,
    compute: DType,
    [cos, sin, positions]: [&TensorMeta; 3],
) -> Result<(), OpError> {
    rules::dtype(cos, &[compute])?;
    rules::rank(cos, 2, "[positions, rotated / 2]")?;
    rules::shape(cos, &[cos.shape[0], rotated / 2])?;
    rules::dtype(sin, &[compute])?;
    rules::shape(sin, &cos.shape)?;
    rules::dtype(positions, &[DType::I32])?;
    rules::shape(positions, &[t])
}

/// Rotates one head's columns in place.
pub(super) fn rotate<R: Real>(x: &mut [R], cos: &[R], sin: &[R], interleaved: bool, inverse: bool) {
    let half = x.len() / 2;
    for i in 0..half {
        let (a, b) = if interleaved { (2 * i, 2 * i + 1) } else { (i, i + half) };
        let (c, s) = (cos[i], if inverse { -sin[i] } else { sin[i] });
        let (x0, x1) = (x[a], x[b]);
        x[a] = x0 * c - x1 * s;
        x[b] = x1 * c + x0 * s;
    }
}

/// The table's row for each token, checked against the table's length.
pub(super) fn table_rows(
    op: &'static str,
    positions: &Tensor,
    length: usize,
) -> Result<Vec<usize>, OpError> {
    let rows = positions.as_slice::<i32>().iter().map(|&p| usize::try_from(p).unwrap_or(length));
    let rows: Vec<usize> = rows.collect();
    match rows.iter().position(|&p| p >= length) {
        None => Ok(rows),
        Some(t) => Err(OpError::Undefined {
            op,
            message: format!(
                "position {} of token {t} is outside the table of {length} positions",
                positions.as_slice::<i32>()[t]
            ),
        }),
    }
}

impl Op for Rope {
    const NAME: &'static str = "rope";
    const INPUTS: &'static [Role] = &[input("x"), input("cos"), input("sin"), input("positions")];
    const OUTPUTS: &'static [&'static str] = &["y"];
    const CLASS: OpClass = OpClass::Rotation;

    fn example() -> Example {
        let (t, length, heads, head_dim, start) = (3, 5, 2, 6, 2);
        Example::new(Rope { head_dim, start, interleaved: true, inverse: false })
            .input("x", DType::BF16, shape![t, heads * head_dim])
            .input("cos", DType::F32, shape![length, (head_dim - start) / 2])
            .input("sin", DType::F32, shape![length, (head_dim - start) / 2])
            .indices("positions", shape![t], &[4, 0, 2])
            .output("y", shape![t, heads * head_dim])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(x), Some(cos), Some(sin), Some(positions)] = inputs else {
            unreachable!("mandatory")
        };
        rules::at_least_one(Self::NAME, "head_dim", self.head_dim)?;
        if self.start > self.head_dim {
            let message =
                format!("expected at most head_dim {}, found {}", self.head_dim, self.start);
            return Err(OpError::Params { op: Self::NAME, path: "start".into(), message });
        }
        rules::dtype(x, FLOATS)?;
        rules::rank(x, 2, "[t, heads * head_dim]")?;
        rules::rank(x, 2, "[t, heads * head_dim]")?;
        if !x.shape[1].is_multiple_of(self.head_dim) {
            let expected = format!("[t, heads * {}]", self.head_dim);
            return Err(OpError::Shape { role: "x".into(), expected, found: x.shape.clone() });
        }
        let rotated = self.head_dim - self.start;
        check_tables(rotated, x.shape[0], compute_dtype(x.dtype), [cos, sin, positions])?;
        Ok(vec![rules::meta("y", x.dtype, &x.shape)])
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        let x = inputs[0].as_ref().expect("mandatory");
        3 * (x.shape[0] * x.shape[1] / self.head_dim * (self.head_dim - self.start)) as u64
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [x, cos, sin, positions] = inputs.try_into().expect("four roles");
        let (x, cos, sin) =
            (x.expect("mandatory"), cos.expect("mandatory"), sin.expect("mandatory"));
        let rows = table_rows(Self::NAME, &positions.expect("mandatory"), cos.shape()[0])?;
        let (shape, dtype) = (x.shape().to_vec(), x.dtype());
        let half = cos.shape()[1];
        Ok(in_real!(dtype, R => {
            let (cos, sin) = (R::load(&cos), R::load(&sin));
            let mut y =
                if dtype == DType::BF16 { R::load(&x).into_owned() } else { x.into_vec::<R>() };
            y.par_chunks_mut(shape[1].max(1)).zip(rows).with_min_len(64).for_each(|(y, p)| {
                let (cos, sin) = (&cos[p * half..][..half], &sin[p * half..][..half]);
                for head in y.chunks_mut(self.head_dim) {
                    rotate(&mut head[self.start..], cos, sin, self.interleaved, self.inverse);
                }
            });
            vec![R::store(y, &shape, dtype)]
        }))
    }
}
