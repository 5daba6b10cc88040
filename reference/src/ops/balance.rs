//! Auxiliary losses that balance the experts' load, each with its gradient for the affinities.
//!
//! For every segment of T tokens: `p_it = s_it / sum_j s_jt`, `P_i = mean_t p_it`,
//! `f_i = experts / (top_k T) * (tokens that have i among the top_k of s)`, loss
//! `weight * sum_i f_i P_i`; f is a constant for the gradient. The segments are the sequences
//! (DeepSeek-V3's complementary sequence-wise loss, whose top-k uses neither bias nor groups), or
//! the whole micro-batch (batch-wise). With `indices` \[t, top_k\] f counts the choices that
//! routing made instead: the classic expert-level loss of V2. With `devices` the experts form that
//! many equal blocks, whose f is averaged and P summed: V2's device-level loss. Sums run over
//! tokens in order. Sources: arXiv 2412.19437, equations 17 to 20; 2405.04434, section 2.2.3.

use fathom_trace::{DType, OpClass, TensorMeta};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::attention::spans;
use super::router::top;
use crate::Tensor;
use crate::op::compute_type::{REALS, Real, in_real, tree_sum};
use crate::op::example::{Example, shape};
use crate::op::{Op, OpError, Role, input, optional, rules};

/// A balance loss and its gradient.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BalanceLoss {
    /// Experts a token.
    pub top_k: usize,
    /// Multiplied onto each segment's loss: alpha over the segments of the whole step.
    pub weight: f64,
    /// Lengths of the segments.
    pub segments: Vec<usize>,
    /// Blocks of experts that are balanced as one; the number of experts for each by itself.
    pub devices: usize,
}

impl Op for BalanceLoss {
    const NAME: &'static str = "balance_loss";
    const INPUTS: &'static [Role] = &[input("scores"), optional("indices")];
    const OUTPUTS: &'static [&'static str] = &["loss", "dscores"];
    const CLASS: OpClass = OpClass::Row;

    fn example() -> Example {
        let (t, experts, top_k, segments) = (4, 4, 2, 2);
        Example::new(BalanceLoss { top_k, weight: 0.5, segments: vec![3, 1], devices: 2 })
            .positive("scores", DType::F32, shape![t, experts])
            .indices("indices", shape![t, top_k], &[0, 2, 1, 0, 3, 2, 0, 1])
            .output("loss", shape![segments])
            .output("dscores", shape![t, experts])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(scores), indices] = inputs else { unreachable!("mandatory") };
        rules::dtype(scores, REALS)?;
        rules::rank(scores, 2, "[t, experts]")?;
        if let Some(indices) = indices {
            rules::dtype(indices, &[DType::I32])?;
            rules::shape(indices, &[scores.shape[0], self.top_k])?;
        }
        let (t, experts) = (scores.shape[0], scores.shape[1]);
        let split: usize = self.segments.iter().sum();
        if split != t || experts == 0 || self.devices == 0 || experts % self.devices != 0 {
            let message = format!(
                "segments {:?} must add up to t = {t}, devices {} divide experts {experts}",
                self.segments, self.devices
            );
            return Err(OpError::Undefined { op: Self::NAME, message });
        }
        Ok(vec![
            rules::meta("loss", scores.dtype, &[self.segments.len()]),
            rules::meta("dscores", scores.dtype, &scores.shape),
        ])
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        8 * inputs[0].as_ref().expect("mandatory").shape.iter().product::<usize>() as u64
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [Some(scores), indices] = &inputs[..] else { unreachable!("mandatory") };
        let indices = indices.as_ref().map(|indices| indices.as_slice::<i32>());
        let experts = scores.shape()[1];
        Ok(in_real!(scores.dtype(), R => {
            let all = scores.as_slice::<R>();
            let mut dscores = vec![R::ZERO; all.len()];
            let mut losses = Vec::with_capacity(self.segments.len());
            for (start, length) in spans(&self.segments) {
                let own = start * experts..(start + length) * experts;
                let all = &all[own.clone()];
                let counts = match indices {
                    Some(indices) => {
                        let slots = start * self.top_k..(start + length) * self.top_k;
                        chosen(&indices[slots], experts)?
                    }
                    None => self.own_choice(all, experts),
                };
                losses.push(self.segment(all, &counts, &mut dscores[own]));
            }
            let n = losses.len();
            vec![
                R::store(losses, &[n], scores.dtype()),
                R::store(dscores, scores.shape(), scores.dtype()),
            ]
        }))
    }
}

/// How many tokens chose each expert.
fn chosen(indices: &[i32], experts: usize) -> Result<Vec<usize>, OpError> {
    let mut counts = vec![0; experts];
    for &i in indices {
        let Some(count) = usize::try_from(i).ok().and_then(|i| counts.get_mut(i)) else {
            let message = format!("expert {i} of {experts}");
            return Err(OpError::Undefined { op: BalanceLoss::NAME, message });
        };
        *count += 1;
    }
    Ok(counts)
}

impl BalanceLoss {
    /// How many tokens have each expert among the `top_k` of their affinities.
    fn own_choice<R: Real>(&self, scores: &[R], experts: usize) -> Vec<usize> {
        let mut counts = vec![0; experts];
        for s in scores.chunks(experts) {
            top(s, self.top_k).into_iter().for_each(|i| counts[i] += 1);
        }
        counts
    }

    fn segment<R: Real>(&self, scores: &[R], chosen: &[usize], dscores: &mut [R]) -> R {
        let experts = chosen.len();
        let tokens = scores.len() / experts;
        let share = experts / self.devices;
        let mut mean = vec![R::ZERO; experts];
        let mut sums = Vec::with_capacity(tokens);
        for s in scores.chunks(experts) {
            let sum = tree_sum(experts, |i| s[i]);
            mean.iter_mut().zip(s).for_each(|(m, &s)| *m += s / sum);
            sums.push(sum);
        }
        let t = R::from_f64(tokens as f64);
        // f of an expert's block: the mean over the block, as its P is the block's sum.
        let f: Vec<R> = (0..experts)
            .map(|i| {
                let block = i / share * share;
                let count: usize = chosen[block..block + share].iter().sum();
                let of = (self.top_k * tokens * share) as f64;
                R::from_f64(count as f64 * experts as f64 / of)
            })
            .collect();
        let weight = R::from_f64(self.weight);
        let loss = weight * tree_sum(experts, |i| f[i] * (mean[i] / t));
        for ((s, d), sum) in scores.chunks(experts).zip(dscores.chunks_mut(experts)).zip(sums) {
            let dot = tree_sum(experts, |i| f[i] * (s[i] / sum));
            for (d, &f) in d.iter_mut().zip(&f) {
                *d = (weight / t) * ((f - dot) / sum);
            }
        }
        loss
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_even_load_has_loss_weight_and_the_gradient_is_that_of_differences() {
        let even = BalanceLoss { top_k: 1, weight: 0.5, segments: vec![2], devices: 2 };
        let scores = Tensor::from_vec(&[2, 2], vec![0.75f64, 0.25, 0.25, 0.75]);
        let out = Op::run(&even, vec![Some(scores), None]).unwrap();
        assert_eq!(out[0].as_slice::<f64>(), [0.5]);
        // Both tokens with the first expert: f = (2, 0), P = (3/4, 1/4).
        let scores = Tensor::from_vec(&[2, 2], vec![0.75f64, 0.25, 0.75, 0.25]);
        let indices = Tensor::from_vec(&[2, 1], vec![0i32, 0]);
        let out = Op::run(&even, vec![Some(scores.clone()), Some(indices)]).unwrap();
        assert_eq!(out[0].as_slice::<f64>(), [0.75]);
        let strange = Tensor::from_vec(&[2, 1], vec![0i32, 2]);
        assert!(Op::run(&even, vec![Some(scores), Some(strange)]).is_err());
        let op = BalanceLoss { top_k: 2, weight: 0.3, segments: vec![2, 1], devices: 4 };
        let base: Vec<f64> = (0..12).map(|i| 0.1 + 0.07 * ((i * 7) % 12) as f64).collect();
        let loss = |s: &[f64]| {
            let out =
                Op::run(&op, vec![Some(Tensor::from_vec(&[3, 4], s.to_vec())), None]).unwrap();
            (out[0].as_slice::<f64>().iter().sum::<f64>(), out[1].clone())
        };
        let (_, gradient) = loss(&base);
        for i in 0..base.len() {
            let shifted = |h: f64| {
                let mut s = base.clone();
                s[i] += h;
                loss(&s).0
            };
            let difference = (shifted(1e-6) - shifted(-1e-6)) / 2e-6;
            assert!((difference - gradient.as_slice::<f64>()[i]).abs() < 1e-8);
        }
    }
}
