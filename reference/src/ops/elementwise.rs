//! Ops that move or add elements: `add`, `cast`, `concat_columns`, `gather_rows`,
//! `scatter_add_rows`. Each sum and each conversion is rounded once, to nearest even.

use fathom_trace::{DType, OpClass, TensorMeta};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::example::{Example, shape};
use super::real::{FLOATS, Real, compute_dtype, in_real, loaded, stored};
use super::{Op, OpError, Role, input, optional, rules};
use crate::Tensor;

/// `y = (a + b) + c`, the sums in F32 (F64), rounded to `out` once.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Add {
    /// Element type of `y`.
    pub out: DType,
}

/// `y` is `x` in another element type.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Cast {
    /// Element type of `y`.
    pub out: DType,
}

/// `y` \[t, columns of a, b and c side by side\], one element type.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ConcatColumns {}

/// `y` is columns `offset .. offset + width` of `x`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SliceColumns {
    /// First column.
    pub offset: usize,
    /// How many.
    pub width: usize,
}

/// Row t of `y` is row `ids[t]` of `table`: an embedding.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GatherRows {
    /// Element type of `y`.
    pub out: DType,
}

/// Row `ids[t]` of the result gets row t of `x` added, t ascending, from `acc`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ScatterAddRows {
    /// Element type of the result; the sums are rounded to it once.
    pub out: DType,
}

/// The rule for a conversion: F32 to any, BF16 to F32, F64 to F32, and back to itself.
fn castable(op: &'static str, from: DType, to: DType) -> Result<(), OpError> {
    let widens = from == DType::F32 && to == DType::F64;
    stored(op, to, if widens { DType::F64 } else { compute_dtype(from) })
}

fn elements(tensor: &TensorMeta) -> u64 {
    tensor.shape.iter().map(|&d| d as u64).product()
}

impl Op for Add {
    const NAME: &'static str = "add";
    const INPUTS: &'static [Role] = &[input("a"), input("b"), optional("c")];
    const OUTPUTS: &'static [&'static str] = &["y"];
    const CLASS: OpClass = OpClass::Stream;

    fn example() -> Example {
        let (t, columns) = (3, 5);
        let x = || shape![t, columns];
        Example::new(Add { out: DType::BF16 })
            .input("a", DType::BF16, x())
            .input("b", DType::BF16, x())
            .input("c", DType::BF16, x())
            .output("y", x())
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(a), b, c] = inputs else { unreachable!("mandatory") };
        rules::dtype(a, FLOATS)?;
        let compute = compute_dtype(a.dtype);
        for other in [b, c].into_iter().flatten() {
            loaded(other, compute)?;
            rules::shape(other, &a.shape)?;
        }
        stored(Self::NAME, self.out, compute)?;
        Ok(vec![rules::meta("y", self.out, &a.shape)])
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        let a = inputs[0].as_ref().expect("mandatory");
        elements(a) * (inputs.iter().flatten().count() as u64 - 1)
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let mut inputs = inputs.into_iter().flatten();
        let a = inputs.next().expect("mandatory");
        let shape = a.shape().to_vec();
        Ok(in_real!(a.dtype(), R => {
            let mut sum = match a.dtype() {
                DType::BF16 => R::load(&a).into_owned(),
                _ => a.into_vec::<R>(),
            };
            for other in inputs {
                sum.iter_mut().zip(&*R::load(&other)).for_each(|(s, &o)| *s += o);
            }
            vec![R::store(sum, &shape, self.out)]
        }))
    }
}

impl Op for Cast {
    const NAME: &'static str = "cast";
    const INPUTS: &'static [Role] = &[input("x")];
    const OUTPUTS: &'static [&'static str] = &["y"];
    const CLASS: OpClass = OpClass::Stream;

    fn example() -> Example {
        let (t, columns) = (3, 5);
        Example::new(Cast { out: DType::BF16 })
            .input("x", DType::F32, shape![t, columns])
            .output("y", shape![t, columns])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(x)] = inputs else { unreachable!("mandatory") };
        rules::dtype(x, FLOATS)?;
        castable(Self::NAME, x.dtype, self.out)?;
        Ok(vec![rules::meta("y", self.out, &x.shape)])
    }

    fn flops(&self, _inputs: &[Option<TensorMeta>]) -> u64 {
        0
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let x = inputs.into_iter().flatten().next().expect("mandatory");
        if x.dtype() == self.out {
            return Ok(vec![x]);
        }
        let wider = if self.out == DType::F64 { DType::F64 } else { x.dtype() };
        Ok(in_real!(wider, R => vec![R::store(R::load(&x).into_owned(), x.shape(), self.out)]))
    }
}

impl Op for ConcatColumns {
    const NAME: &'static str = "concat_columns";
    const INPUTS: &'static [Role] = &[input("a"), input("b"), optional("c")];
    const OUTPUTS: &'static [&'static str] = &["y"];
    const CLASS: OpClass = OpClass::Stream;

    fn example() -> Example {
        let (t, a, b, c) = (2, 3, 1, 4);
        Example::new(ConcatColumns {})
            .input("a", DType::BF16, shape![t, a])
            .input("b", DType::BF16, shape![t, b])
            .input("c", DType::BF16, shape![t, c])
            .output("y", shape![t, a + b + c])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(a), ..] = inputs else { unreachable!("mandatory") };
        let mut columns = 0;
        for part in inputs.iter().flatten() {
            rules::dtype(part, &[a.dtype])?;
            rules::rank(part, 2, "[t, columns]")?;
            rules::shape(part, &[a.shape[0], part.shape[1]])?;
            columns += part.shape[1];
        }
        Ok(vec![rules::meta("y", a.dtype, &[a.shape[0], columns])])
    }

    fn flops(&self, _inputs: &[Option<TensorMeta>]) -> u64 {
        0
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let parts: Vec<Tensor> = inputs.into_iter().flatten().collect();
        let (dtype, t) = (parts[0].dtype(), parts[0].shape()[0]);
        let columns: usize = parts.iter().map(|p| p.shape()[1]).sum();
        let mut y = Vec::with_capacity(t * columns * dtype.size());
        for row in 0..t {
            for part in &parts {
                let width = part.shape()[1] * dtype.size();
                y.extend_from_slice(&part.bytes()[row * width..][..width]);
            }
        }
        Ok(vec![Tensor::from_bytes(dtype, &[t, columns], &y)])
    }
}

impl Op for SliceColumns {
    const NAME: &'static str = "slice_columns";
    const INPUTS: &'static [Role] = &[input("x")];
    const OUTPUTS: &'static [&'static str] = &["y"];
    const CLASS: OpClass = OpClass::Stream;

    fn example() -> Example {
        let (t, columns, width) = (2, 7, 3);
        Example::new(SliceColumns { offset: 2, width })
            .input("x", DType::BF16, shape![t, columns])
            .output("y", shape![t, width])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(x)] = inputs else { unreachable!("mandatory") };
        rules::rank(x, 2, "[t, columns]")?;
        if x.shape[1] < self.offset + self.width {
            let expected = format!("[t, columns], columns >= {} + {}", self.offset, self.width);
            return Err(OpError::Shape { role: "x".into(), expected, found: x.shape.clone() });
        }
        Ok(vec![rules::meta("y", x.dtype, &[x.shape[0], self.width])])
    }

    fn flops(&self, _inputs: &[Option<TensorMeta>]) -> u64 {
        0
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [Some(x)] = &inputs[..] else { unreachable!("mandatory") };
        let (t, size) = (x.shape()[0], x.dtype().size());
        let mut y = Vec::with_capacity(t * self.width * size);
        for row in x.bytes().chunks((x.shape()[1] * size).max(1)) {
            y.extend_from_slice(&row[self.offset * size..][..self.width * size]);
        }
        Ok(vec![Tensor::from_bytes(x.dtype(), &[t, self.width], &y)])
    }
}

/// The ids as row numbers, each checked against the table's height.
fn row_ids(op: &'static str, ids: &Tensor, height: usize) -> Result<Vec<usize>, OpError> {
    let row = |(t, &id): (usize, &i32)| {
        usize::try_from(id).ok().filter(|&id| id < height).ok_or_else(|| OpError::Undefined {
            op,
            message: format!("id {id} at position {t} is outside the table of {height} rows"),
        })
    };
    ids.as_slice::<i32>().iter().enumerate().map(row).collect()
}

impl Op for GatherRows {
    const NAME: &'static str = "gather_rows";
    const INPUTS: &'static [Role] = &[input("table"), input("ids")];
    const OUTPUTS: &'static [&'static str] = &["y"];
    const CLASS: OpClass = OpClass::Gather;

    fn example() -> Example {
        let (t, rows, columns) = (3, 4, 5);
        Example::new(GatherRows { out: DType::F32 })
            .input("table", DType::BF16, shape![rows, columns])
            .indices("ids", shape![t], &[3, 0, 3])
            .output("y", shape![t, columns])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(table), Some(ids)] = inputs else { unreachable!("mandatory") };
        rules::dtype(table, FLOATS)?;
        rules::rank(table, 2, "[rows, columns]")?;
        rules::dtype(ids, &[DType::I32])?;
        rules::rank(ids, 1, "[t]")?;
        castable(Self::NAME, table.dtype, self.out)?;
        Ok(vec![rules::meta("y", self.out, &[ids.shape[0], table.shape[1]])])
    }

    fn flops(&self, _inputs: &[Option<TensorMeta>]) -> u64 {
        0
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [Some(table), Some(ids)] = &inputs[..] else { unreachable!("mandatory") };
        let (height, width) = (table.shape()[0], table.shape()[1]);
        let ids = row_ids(Self::NAME, ids, height)?;
        let bytes = width * table.dtype().size();
        let mut y = Vec::with_capacity(ids.len() * bytes);
        for &id in &ids {
            y.extend_from_slice(&table.bytes()[id * bytes..][..bytes]);
        }
        let y = Tensor::from_bytes(table.dtype(), &[ids.len(), width], &y);
        Op::run(&Cast { out: self.out }, vec![Some(y)])
    }
}

impl Op for ScatterAddRows {
    const NAME: &'static str = "scatter_add_rows";
    const INPUTS: &'static [Role] = &[input("x"), input("ids"), input("acc")];
    const OUTPUTS: &'static [&'static str] = &["y"];
    const CLASS: OpClass = OpClass::Scatter;

    fn example() -> Example {
        let (t, rows, columns) = (3, 4, 5);
        Example::new(ScatterAddRows { out: DType::F32 })
            .input("x", DType::BF16, shape![t, columns])
            .indices("ids", shape![t], &[1, 3, 1])
            .input("acc", DType::F32, shape![rows, columns])
            .output("y", shape![rows, columns])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(x), Some(ids), Some(acc)] = inputs else { unreachable!("mandatory") };
        rules::dtype(x, FLOATS)?;
        rules::rank(x, 2, "[t, columns]")?;
        rules::dtype(ids, &[DType::I32])?;
        rules::shape(ids, &x.shape[..1])?;
        let compute = compute_dtype(x.dtype);
        loaded(acc, compute)?;
        rules::rank(acc, 2, "[rows, columns]")?;
        rules::shape(acc, &[acc.shape[0], x.shape[1]])?;
        stored(Self::NAME, self.out, compute)?;
        Ok(vec![rules::meta("y", self.out, &acc.shape)])
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        elements(inputs[0].as_ref().expect("mandatory"))
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [x, ids, acc] = inputs.try_into().expect("three roles");
        let (x, acc) = (x.expect("mandatory"), acc.expect("mandatory"));
        let (height, width) = (acc.shape()[0], acc.shape()[1]);
        let ids = row_ids(Self::NAME, &ids.expect("mandatory"), height)?;
        let compute = compute_dtype(x.dtype());
        Ok(in_real!(compute, R => {
            let mut y = if acc.dtype() == compute {
                acc.into_vec::<R>()
            } else {
                R::load(&acc).into_owned()
            };
            for (x, id) in R::load(&x).chunks(width.max(1)).zip(ids) {
                y[id * width..][..width].iter_mut().zip(x).for_each(|(y, &x)| *y += x);
            }
            vec![R::store(y, &[height, width], self.out)]
        }))
    }
}
