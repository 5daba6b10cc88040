//! Tokens to the ranks and rows of their experts, and back.
//!
//! - `dispatch_plan`: `indices` \[t, top_k\] to `rows` \[t top_k\] (slot of each row: rows are
//!   ordered by expert, then by slot; slot = token * top_k + choice), `inverse` \[t top_k\] (row of
//!   each slot) and `counts` \[experts\]. An index of -1 (dropped) takes the last rows, which no
//!   expert owns.
//! - `dispatch`: row r is the row of `x` of the token of slot `rows[r]`; with `slots` row r is
//!   element `rows[r]` of `x` \[t, top_k\]. Also the backward of `combine`. Bits are only moved.
//! - `dispatch_codes`: `dispatch` of FP8 codes and of the scales of each row, in one go.
//! - `combine`: token t is the sum of its rows in order of choice, F32 (F64) adds, one rounding to
//!   `out`; with `slots` element (t, j) is its row's. Also the backward of `dispatch`.
//!
//! `group` is the expert-parallel group; each rank holds `experts / size` experts and receives
//! `received` rows: by expert, then by rank, then by slot. With one rank the exchange is the
//! identity, and only then can a backend alone compute it; `exchange::backend` executes it for
//! several. A token goes once to each rank that it needs (`copies_sent` in all), as DeepEP does it.

use fathom_trace::{DType, Group, GroupKind, OpClass, TensorMeta};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::collective;
use crate::Tensor;
use crate::op::compute_type::{FLOATS, Real, compute_dtype, in_real, stored};
use crate::op::example::{Example, shape};
use crate::op::{Op, OpError, Role, input, rules};

/// Far more experts than a layer has: `counts` is as long as the parameter says.
const MAX_EXPERTS: usize = 1 << 24;

/// Orders slots by expert.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DispatchPlan {
    /// Experts on all ranks.
    pub experts: usize,
}

/// Brings tokens to rows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Dispatch {
    /// Choices a token.
    pub top_k: usize,
    /// Rows that this rank's experts receive.
    pub received: usize,
    /// Copies of tokens that leave this rank.
    pub copies_sent: usize,
    /// Whether `x` has one element a slot instead of one row a token.
    pub slots: bool,
    /// The expert-parallel ranks.
    pub group: Group,
    /// Rows that each rank of the group sends to each expert, \[rank\]\[expert\], where ranks
    /// exchange them: a value of the run, which neither case files nor records hold. Else empty.
    #[serde(skip)]
    pub sent: Vec<Vec<usize>>,
}

/// Brings the codes of tokens and their scales to rows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DispatchCodes {
    /// Choices a token.
    pub top_k: usize,
    /// Rows that this rank's experts receive.
    pub received: usize,
    /// Copies of tokens that leave this rank.
    pub copies_sent: usize,
    /// The expert-parallel ranks.
    pub group: Group,
    /// As [`Dispatch::sent`].
    #[serde(skip)]
    pub sent: Vec<Vec<usize>>,
}

/// Sums rows into tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Combine {
    /// Choices a token.
    pub top_k: usize,
    /// Tokens of this rank.
    pub tokens: usize,
    /// Copies of partial sums that leave this rank.
    pub copies_sent: usize,
    /// Whether `y` has one element a row, and each slot gets its own.
    pub slots: bool,
    /// Element type of the result.
    pub out: DType,
    /// The expert-parallel ranks.
    pub group: Group,
    /// Rows that each rank of the group sends to each expert, \[rank\]\[expert\], where ranks
    /// exchange them: a value of the run, which neither case files nor records hold. Else empty.
    #[serde(skip)]
    pub sent: Vec<Vec<usize>>,
}

impl Op for DispatchPlan {
    const NAME: &'static str = "dispatch_plan";
    const INPUTS: &'static [Role] = &[input("indices")];
    const OUTPUTS: &'static [&'static str] = &["rows", "inverse", "counts"];
    const CLASS: OpClass = OpClass::DispatchPlan;

    fn example() -> Example {
        let (t, top_k, experts) = (3, 2, 4);
        Example::new(DispatchPlan { experts })
            .indices("indices", shape![t, top_k], &[0, 2, 1, 0, 2, -1])
            .output("rows", shape![t * top_k])
            .output("inverse", shape![t * top_k])
            .output("counts", shape![experts])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(indices)] = inputs else { unreachable!("mandatory") };
        if self.experts > MAX_EXPERTS {
            let message = format!("expected at most {MAX_EXPERTS}, found {}", self.experts);
            return Err(OpError::Params { op: Self::NAME, path: "experts".into(), message });
        }
        rules::dtype(indices, &[DType::I32])?;
        rules::rank(indices, 2, "[t, top_k]")?;
        let slots = indices.shape[0] * indices.shape[1];
        Ok(vec![
            rules::meta("rows", DType::I32, &[slots]),
            rules::meta("inverse", DType::I32, &[slots]),
            rules::meta("counts", DType::I32, &[self.experts]),
        ])
    }

    fn flops(&self, _inputs: &[Option<TensorMeta>]) -> u64 {
        0
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [Some(indices)] = &inputs[..] else { unreachable!("mandatory") };
        let indices = indices.as_slice::<i32>();
        let mut counts = vec![0i32; self.experts + 1];
        for &i in indices {
            if i >= self.experts as i32 || i < -1 {
                let message = format!("index {i} is not -1 or one of {} experts", self.experts);
                return Err(OpError::Undefined { op: Self::NAME, message });
            }
            let owner = usize::try_from(i).unwrap_or(self.experts);
            counts[owner] += 1;
        }
        let mut next: Vec<i32> = counts
            .iter()
            .scan(0, |sum, &n| {
                *sum += n;
                Some(*sum - n)
            })
            .collect();
        let (mut rows, mut inverse) = (vec![0i32; indices.len()], vec![0i32; indices.len()]);
        for (slot, &i) in indices.iter().enumerate() {
            let row = &mut next[usize::try_from(i).unwrap_or(self.experts)];
            rows[*row as usize] = slot as i32;
            inverse[slot] = *row;
            *row += 1;
        }
        counts.truncate(self.experts);
        Ok(vec![
            Tensor::from_vec(&[rows.len()], rows),
            Tensor::from_vec(&[inverse.len()], inverse),
            Tensor::from_vec(&[self.experts], counts),
        ])
    }
}

fn index(op: &'static str, value: i32, length: usize) -> Result<usize, OpError> {
    usize::try_from(value).ok().filter(|&v| v < length).ok_or_else(|| OpError::Undefined {
        op,
        message: format!("index {value} is outside 0..{length}"),
    })
}

impl Op for Dispatch {
    const NAME: &'static str = "dispatch";
    const INPUTS: &'static [Role] = &[input("x"), input("rows")];
    const OUTPUTS: &'static [&'static str] = &["y"];
    const CLASS: OpClass = OpClass::Dispatch;

    fn example() -> Example {
        let (t, columns, top_k, received) = (3, 4, 2, 6);
        let group = Group { kind: GroupKind::Ep, size: 1 };
        let sent = Vec::new();
        Example::new(Dispatch { top_k, received, copies_sent: 0, slots: false, group, sent })
            .input("x", DType::BF16, shape![t, columns])
            .indices("rows", shape![t * top_k], &[0, 3, 2, 1, 4, 5])
            .output("y", shape![received, columns])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(x), Some(rows)] = inputs else { unreachable!("mandatory") };
        rules::at_least_one(Self::NAME, "top_k", self.top_k)?;
        rules::rank(x, 2, "[t, columns]")?;
        rules::dtype(rows, &[DType::I32])?;
        rules::shape(rows, &[x.shape[0] * self.top_k])?;
        if self.slots {
            rules::shape(x, &[x.shape[0], self.top_k])?;
            return Ok(vec![rules::meta("y", x.dtype, &[self.received])]);
        }
        Ok(vec![rules::meta("y", x.dtype, &[self.received, x.shape[1]])])
    }

    fn flops(&self, _inputs: &[Option<TensorMeta>]) -> u64 {
        0
    }

    fn bytes_sent(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        let x = inputs[0].as_ref().expect("mandatory");
        let columns = if self.slots { 1 } else { x.shape[1] };
        (self.copies_sent * columns * x.dtype.size()) as u64
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [Some(x), Some(rows)] = &inputs[..] else { unreachable!("mandatory") };
        collective::alone(Self::NAME, self.group)?;
        let per = if self.slots { 1 } else { self.top_k };
        let length = if self.slots { x.len() } else { x.shape()[0] };
        let width = x.bytes().len() / length.max(1);
        let Some(rows) = rows.as_slice::<i32>().get(..self.received) else {
            let message = format!("received {} exceeds the {} rows", self.received, rows.len());
            return Err(OpError::Undefined { op: Self::NAME, message });
        };
        let sources: Vec<usize> = rows
            .iter()
            .map(|&slot| Ok(index(Self::NAME, slot, length * per)? / per))
            .collect::<Result<_, OpError>>()?;
        let whole = [self.received, x.shape()[1]];
        let shape = if self.slots { &whole[..1] } else { &whole[..] };
        let y = Tensor::filled(x.dtype(), shape, |y| {
            for (y, &row) in y.chunks_exact_mut(width.max(1)).zip(&sources) {
                y.copy_from_slice(&x.bytes()[row * width..][..width]);
            }
        });
        Ok(vec![y])
    }
}

impl DispatchCodes {
    /// What happens to the codes, and to the scales.
    pub fn each(&self) -> Dispatch {
        let DispatchCodes { top_k, received, copies_sent, group, .. } = *self;
        let sent = self.sent.clone();
        Dispatch { top_k, received, copies_sent, slots: false, group, sent }
    }
}

impl Op for DispatchCodes {
    const NAME: &'static str = "dispatch_codes";
    const INPUTS: &'static [Role] = &[input("q"), input("scale"), input("rows")];
    const OUTPUTS: &'static [&'static str] = &["to_q", "to_scale"];
    const CLASS: OpClass = OpClass::Dispatch;

    fn example() -> Example {
        let (t, columns, tiles, top_k, received) = (3, 8, 2, 2, 6);
        let group = Group { kind: GroupKind::Ep, size: 1 };
        let sent = Vec::new();
        Example::new(DispatchCodes { top_k, received, copies_sent: 0, group, sent })
            .input("q", DType::F8E4M3, shape![t, columns])
            .positive("scale", DType::F32, shape![t, tiles])
            .indices("rows", shape![t * top_k], &[0, 3, 2, 1, 4, 5])
            .output("to_q", shape![received, columns])
            .output("to_scale", shape![received, tiles])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(q), Some(scale), rows] = inputs else { unreachable!("mandatory") };
        rules::dtype(scale, &[DType::F32])?;
        rules::rank(scale, 2, "[t, tiles]")?;
        rules::shape(scale, &[*q.shape.first().unwrap_or(&0), scale.shape[1]])?;
        let moved = |x: &TensorMeta, role: &str| {
            let y = self.each().infer(&[Some(x.clone()), rows.clone()]);
            let mut y = y.map_err(|e| e.within(Self::NAME, ""))?;
            Ok(TensorMeta { role: role.to_owned(), ..y.remove(0) })
        };
        Ok(vec![moved(q, "to_q")?, moved(scale, "to_scale")?])
    }

    fn flops(&self, _inputs: &[Option<TensorMeta>]) -> u64 {
        0
    }

    fn bytes_sent(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        inputs[..2].iter().map(|x| self.each().bytes_sent(std::slice::from_ref(x))).sum()
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [q, scale, rows] = <[_; 3]>::try_from(inputs).expect("checked by the table");
        let mut q = Op::run(&self.each(), vec![q, rows.clone()])?;
        q.append(&mut Op::run(&self.each(), vec![scale, rows])?);
        Ok(q)
    }
}

impl Op for Combine {
    const NAME: &'static str = "combine";
    const INPUTS: &'static [Role] = &[input("y"), input("inverse")];
    const OUTPUTS: &'static [&'static str] = &["x"];
    const CLASS: OpClass = OpClass::Combine;

    fn example() -> Example {
        let (rows, columns, tokens, top_k) = (6, 4, 3, 2);
        let group = Group { kind: GroupKind::Ep, size: 1 };
        Example::new(Combine {
            top_k,
            tokens,
            copies_sent: 0,
            slots: false,
            out: DType::BF16,
            group,
            sent: Vec::new(),
        })
        .input("y", DType::BF16, shape![rows, columns])
        .indices("inverse", shape![tokens * top_k], &[0, 3, 2, 1, 4, 5])
        .output("x", shape![tokens, columns])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(y), Some(inverse)] = inputs else { unreachable!("mandatory") };
        rules::at_least_one(Self::NAME, "top_k", self.top_k)?;
        rules::dtype(y, FLOATS)?;
        stored(Self::NAME, self.out, compute_dtype(y.dtype))?;
        rules::dtype(inverse, &[DType::I32])?;
        rules::shape(inverse, &[self.tokens * self.top_k])?;
        if self.slots {
            rules::rank(y, 1, "[rows]")?;
            return Ok(vec![rules::meta("x", self.out, &[self.tokens, self.top_k])]);
        }
        rules::rank(y, 2, "[rows, columns]")?;
        Ok(vec![rules::meta("x", self.out, &[self.tokens, y.shape[1]])])
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        let y = inputs[0].as_ref().expect("mandatory");
        if self.slots { 0 } else { y.shape.iter().product::<usize>() as u64 }
    }

    fn bytes_sent(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        let y = inputs[0].as_ref().expect("mandatory");
        let columns = if self.slots { 1 } else { y.shape[1] };
        (self.copies_sent * columns * y.dtype.size()) as u64
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [Some(y), Some(inverse)] = &inputs[..] else { unreachable!("mandatory") };
        collective::alone(Self::NAME, self.group)?;
        let rows = y.shape()[0];
        let inverse = inverse.as_slice::<i32>();
        let columns = if self.slots { 1 } else { y.shape()[1] };
        let per = if self.slots { 1 } else { self.top_k };
        Ok(in_real!(y.dtype(), R => {
            let y = R::load(y);
            let mut x = vec![R::ZERO; self.tokens * self.top_k / per * columns];
            for (x, slots) in x.chunks_mut(columns.max(1)).zip(inverse.chunks(per)) {
                for &row in slots {
                    // A dropped slot's row lies behind the last that was received.
                    let row = index(Self::NAME, row, inverse.len())?;
                    if row < rows {
                        let y = &y[row * columns..][..columns];
                        x.iter_mut().zip(y).for_each(|(x, &y)| *x += y);
                    }
                }
            }
            let width = if self.slots { self.top_k } else { columns };
            vec![R::store(x, &[self.tokens, width], self.out)]
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Backend, Reference};

    /// Codes and scales go where each would go alone, and as many bytes leave the rank.
    #[test]
    fn codes_are_dispatched_as_two_tensors_are() {
        let case = DispatchCodes::example().case();
        let op: &DispatchCodes = case.op.as_any().downcast_ref().unwrap();
        let inputs = case.ordered_inputs().unwrap();
        let [Some(q), Some(scale), Some(rows)] = &inputs[..] else { panic!("all are given") };
        let [to_q, to_scale] = Reference.dispatch_codes(op, q, scale, rows).unwrap();
        for (x, found) in [(q, to_q), (scale, to_scale)] {
            let expected = Reference.dispatch(&op.each(), x, rows).unwrap();
            assert!(found.shape() == expected.shape() && found.bytes() == expected.bytes());
        }
        let sending = DispatchCodes { copies_sent: 5, ..op.clone() };
        let metas: Vec<_> = inputs.iter().map(|x| x.as_ref().map(|x| x.meta("x"))).collect();
        assert_eq!(Op::bytes_sent(&sending, &metas), 5 * (8 + 2 * 4));
    }
}
