//! The head and its cross-entropy in one op: logits exist for 128 rows at a time only.
//!
//! Forward, for each row with a target (`targets[t] >= 0`): `z = x w^T` (product as in op `gemm`,
//! F32 or F64 result), `m = max z`, `lse = m + ln(sum exp(z - m))` (fixed tree),
//! `loss = lse - z_target`. A row without a target has loss 0 and takes no part in the gradient.
//!
//! Backward: the logits are computed again, `dz = (exp(z - lse) - [target]) * scale`, cast to the
//! operands' element type for the two products: `dx = dz w`, `dw = dw + dz^T x`. Where a segment
//! ends (`segments`), a new tensor-core group begins, as in op `gemm`.

use fathom_trace::{DType, OpClass, TensorMeta};
use ndarray::{ArrayView2, s};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::gemm::{Gemm, Layout};
use crate::Tensor;
use crate::op::compute_type::{
    FLOATS, Real, compute_dtype, in_real, maximum, stored, tree_sum_rows,
};
use crate::op::example::{Example, shape};
use crate::op::{Op, OpError, Role, input, rules};

/// Rows whose logits exist together.
const ROWS: usize = 128;

/// Head and cross-entropy, a loss a row.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CrossEntropy {}

/// Gradient of `scale` times the sum of [`CrossEntropy`]'s losses.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CrossEntropyBackward {
    /// Weight of each row: one over the number of predicted tokens of the whole step, say.
    pub scale: f64,
    /// Element type of `dx`.
    pub out: DType,
    /// Lengths of the sequences; only their ends matter.
    pub segments: Vec<usize>,
}

fn check(op: &'static str, inputs: &[Option<TensorMeta>]) -> Result<[usize; 3], OpError> {
    let [Some(x), Some(weight), Some(targets), ..] = inputs else { unreachable!("mandatory") };
    rules::dtype(x, FLOATS)?;
    rules::rank(x, 2, "[t, hidden]")?;
    rules::dtype(weight, &[x.dtype])?;
    rules::rank(weight, 2, "[vocab, hidden]")?;
    rules::shape(weight, &[weight.shape[0], x.shape[1]])?;
    rules::dtype(targets, &[DType::I32])?;
    rules::shape(targets, &x.shape[..1])?;
    if weight.shape[0] == 0 {
        return Err(OpError::Undefined { op, message: "the vocabulary is empty".into() });
    }
    Ok([x.shape[0], x.shape[1], weight.shape[0]])
}

/// The target of each row, `None` where there is none.
fn read_targets(
    op: &'static str,
    targets: &Tensor,
    vocab: usize,
) -> Result<Vec<Option<usize>>, OpError> {
    let target = |(t, &id): (usize, &i32)| match usize::try_from(id) {
        Err(_) => Ok(None),
        Ok(id) if id < vocab => Ok(Some(id)),
        Ok(id) => Err(OpError::Undefined {
            op,
            message: format!("target {id} at row {t} is outside the vocabulary of {vocab}"),
        }),
    };
    targets.as_slice::<i32>().iter().enumerate().map(target).collect()
}

/// `x w^T` for some rows, in the op's compute type.
fn logits<R: Real>(x: &Tensor, w: &Tensor, from: usize, to: usize) -> Result<Vec<R>, OpError> {
    if x.dtype() == DType::BF16 {
        let rows = rows_of(x, from, to);
        let gemm = Gemm { layout: Layout::Nt, out: DType::F32, segments: Vec::new() };
        let mut d = Op::run(&gemm, vec![Some(rows), Some(w.clone()), None])?;
        return Ok(d.remove(0).into_vec::<R>());
    }
    let rows: ArrayView2<'_, R> = x.matrix::<R>();
    Ok(R::gemm_new(rows.slice_move(s![from..to, ..]), w.matrix::<R>().reversed_axes()))
}

/// Rows `from..to` as a tensor of their own.
fn rows_of(x: &Tensor, from: usize, to: usize) -> Tensor {
    let width = x.shape()[1] * x.dtype().size();
    Tensor::from_bytes(x.dtype(), &[to - from, x.shape()[1]], &x.bytes()[from * width..to * width])
}

impl Op for CrossEntropy {
    const NAME: &'static str = "cross_entropy";
    const INPUTS: &'static [Role] = &[input("x"), input("weight"), input("targets")];
    const OUTPUTS: &'static [&'static str] = &["loss", "lse"];
    const CLASS: OpClass = OpClass::Loss;

    fn example() -> Example {
        let (t, hidden, vocab) = (3, 4, 5);
        Example::new(CrossEntropy {})
            .input("x", DType::BF16, shape![t, hidden])
            .input("weight", DType::BF16, shape![vocab, hidden])
            .indices("targets", shape![t], &[2, -1, 0])
            .output("loss", shape![t])
            .output("lse", shape![t])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [t, ..] = check(Self::NAME, inputs)?;
        let compute = compute_dtype(inputs[0].as_ref().expect("mandatory").dtype);
        Ok(["loss", "lse"].map(|role| rules::meta(role, compute, &[t])).to_vec())
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        let [t, hidden, vocab] = check(Self::NAME, inputs).expect("inferred");
        2 * t as u64 * hidden as u64 * vocab as u64
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [Some(x), Some(w), Some(targets)] = &inputs[..] else { unreachable!("mandatory") };
        let (t, vocab) = (x.shape()[0], w.shape()[0]);
        let targets = read_targets(Self::NAME, targets, vocab)?;
        let compute = compute_dtype(x.dtype());
        Ok(in_real!(compute, R => {
            let (mut loss, mut lse) = (vec![R::ZERO; t], vec![R::ZERO; t]);
            for from in (0..t).step_by(ROWS) {
                let to = (from + ROWS).min(t);
                let mut z = logits::<R>(x, w, from, to)?;
                let rows = z.par_chunks_mut(vocab).zip(&targets[from..to]);
                let out = loss[from..to].par_iter_mut().zip(&mut lse[from..to]);
                rows.zip(out).with_min_len(8).for_each(|((z, target), (loss, lse))| {
                    let own = target.map(|target| z[target]);
                    let m = z.iter().fold(R::NEG_INFINITY, |m, &z| maximum(m, z));
                    z.iter_mut().for_each(|z| *z -= m);
                    R::exp_slice(z);
                    *lse = m + tree_sum_rows([&*z], |[z]| z).natural_log();
                    *loss = own.map_or(R::ZERO, |own| *lse - own);
                });
            }
            vec![R::store(loss, &[t], compute), R::store(lse, &[t], compute)]
        }))
    }
}

impl Op for CrossEntropyBackward {
    const NAME: &'static str = "cross_entropy_backward";
    const INPUTS: &'static [Role] =
        &[input("x"), input("weight"), input("targets"), input("lse"), input("acc")];
    const OUTPUTS: &'static [&'static str] = &["dx", "dw"];
    const CLASS: OpClass = OpClass::LossBackward;

    fn example() -> Example {
        let (t, hidden, vocab) = (3, 4, 5);
        Example::new(CrossEntropyBackward { scale: 0.5, out: DType::BF16, segments: vec![2, 1] })
            .input("x", DType::BF16, shape![t, hidden])
            .input("weight", DType::BF16, shape![vocab, hidden])
            .indices("targets", shape![t], &[2, -1, 0])
            .input("lse", DType::F32, shape![t])
            .input("acc", DType::F32, shape![vocab, hidden])
            .output("dx", shape![t, hidden])
            .output("dw", shape![vocab, hidden])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [t, hidden, vocab] = check(Self::NAME, inputs)?;
        let [Some(x), _, _, Some(lse), Some(acc)] = inputs else { unreachable!("mandatory") };
        let compute = compute_dtype(x.dtype);
        rules::dtype(lse, &[compute])?;
        rules::shape(lse, &[t])?;
        rules::dtype(acc, &[compute])?;
        rules::shape(acc, &[vocab, hidden])?;
        stored(Self::NAME, self.out, compute)?;
        if self.segments.iter().sum::<usize>() != t {
            let message = format!("segments {:?} must add up to t = {t}", self.segments);
            return Err(OpError::Undefined { op: Self::NAME, message });
        }
        Ok(vec![
            rules::meta("dx", self.out, &[t, hidden]),
            rules::meta("dw", compute, &[vocab, hidden]),
        ])
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        let [t, hidden, vocab] = check(Self::NAME, inputs).expect("inferred");
        6 * t as u64 * hidden as u64 * vocab as u64
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [x, w, targets, lse, acc] = inputs.try_into().expect("five roles");
        let (x, w, acc) = (x.expect("mandatory"), w.expect("mandatory"), acc.expect("mandatory"));
        let targets = read_targets(Self::NAME, &targets.expect("mandatory"), w.shape()[0])?;
        let lse = lse.expect("mandatory");
        in_real!(compute_dtype(x.dtype()), R => self.run_in::<R>(&x, &w, &targets, &lse, acc))
    }
}

impl CrossEntropyBackward {
    fn run_in<R: Real>(
        &self,
        x: &Tensor,
        w: &Tensor,
        targets: &[Option<usize>],
        lse: &Tensor,
        acc: Tensor,
    ) -> Result<Vec<Tensor>, OpError> {
        let (t, hidden, vocab) = (x.shape()[0], x.shape()[1], w.shape()[0]);
        let (compute, lse, scale) =
            (compute_dtype(x.dtype()), R::load(lse), R::from_f64(self.scale));
        let mut dx = Vec::with_capacity(t * hidden);
        let mut dw = acc;
        let ends = self.segments.iter().scan(0, |end, &n| {
            *end += n;
            Some((*end - n, *end))
        });
        for (start, end) in ends {
            for from in (start..end).step_by(ROWS) {
                let to = (from + ROWS).min(end);
                let mut z = logits::<R>(x, w, from, to)?;
                let rows = z.par_chunks_mut(vocab).zip(&targets[from..to]).zip(&lse[from..to]);
                rows.with_min_len(8).for_each(|((z, target), &lse)| {
                    let Some(target) = *target else {
                        return z.fill(R::ZERO);
                    };
                    z.iter_mut().for_each(|z| *z -= lse);
                    R::exp_slice(z);
                    z[target] -= R::ONE;
                    z.iter_mut().for_each(|z| *z *= scale);
                });
                if x.dtype() == DType::BF16 {
                    let dz = Some(R::store(z, &[to - from, vocab], DType::BF16));
                    let nn = Gemm { layout: Layout::Nn, out: DType::F32, segments: Vec::new() };
                    let part = Op::run(&nn, vec![dz.clone(), Some(w.clone()), None])?.remove(0);
                    dx.extend(part.into_vec::<R>());
                    let tn = Gemm { layout: Layout::Tn, ..nn };
                    let rows = Some(rows_of(x, from, to));
                    dw = Op::run(&tn, vec![dz, rows, Some(dw)])?.remove(0);
                    continue;
                }
                let dz = ArrayView2::from_shape((to - from, vocab), &z).expect("dense");
                dx.extend(R::gemm_new(dz, w.matrix::<R>()));
                let rows = x.matrix::<R>();
                let rows = rows.slice(s![from..to, ..]);
                R::gemm(dz.reversed_axes(), rows, dw.matrix_mut::<R>(), true);
            }
        }
        let dw = R::store(dw.into_vec::<R>(), &[vocab, hidden], compute);
        Ok(vec![R::store(dx, &[t, hidden], self.out), dw])
    }
}
