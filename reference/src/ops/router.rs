//! The router: affinities, group-limited top-k with a selection bias, gate values; its gradient.
//!
//! For every token, from `logits` \[t, experts\] (F32 or F64):
//!
//! 1. `scores = sigmoid(logits)` (or a softmax: maximum subtracted, fixed-tree sum, division).
//! 2. Selection only: `biased = scores + bias`. A group's score is the sum of its `group_top` best
//!    biased scores, largest first; the `topk_group` best groups stay, experts of the others count
//!    as -inf. The `top_k` best biased scores are chosen, best first; ties go to the lowest index.
//! 3. Gate values from the scores without bias: `w_j = s_j / (sum + 1e-20)` (sum over the chosen in
//!    order of choice) where `normalize`, then times `scale`.
//!
//! Gradient: through the gate values, plus `dscores` where a balance loss gave one.
//! Source: arXiv 2412.19437, equations 12 to 16; 2408.15664 for the bias.

use fathom_config::Score;
use fathom_trace::{DType, OpClass, TensorMeta};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Tensor;
use crate::op::compute_type::{REALS, Real, in_real, maximum, tree_sum};
use crate::op::example::{Example, shape};
use crate::op::{Op, OpError, Role, input, optional, rules};

/// Chooses `top_k` experts a token from its logits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Router {
    /// Experts a token.
    pub top_k: usize,
    /// Groups that the experts form; 1 for no group limit.
    pub n_group: usize,
    /// Groups that a token may reach.
    pub topk_group: usize,
    /// Best experts of a group whose biased scores make its score.
    pub group_top: usize,
    /// How logits become affinities.
    pub score: Score,
    /// Whether gate values are divided by their sum.
    pub normalize: bool,
    /// Multiplied onto the gate values.
    pub scale: f64,
}

/// Gradient of [`Router`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RouterBackward {
    /// How logits became affinities.
    pub score: Score,
    /// Whether gate values were divided by their sum.
    pub normalize: bool,
    /// Multiplied onto the gate values.
    pub scale: f64,
}

/// Indices of the `k` largest, largest first; ties to the lowest index, NaN last.
pub(super) fn top<R: Real>(values: &[R], k: usize) -> Vec<usize> {
    let mut best: Vec<usize> = Vec::with_capacity(k + 1);
    for (i, &value) in values.iter().enumerate() {
        let beats = |&b: &usize| value > values[b] || (values[b].is_nan() && !value.is_nan());
        let place = best.iter().position(beats).unwrap_or(best.len());
        if place < k {
            best.insert(place, i);
            best.truncate(k);
        }
    }
    best
}

impl Router {
    fn choose<R: Real>(&self, biased: &mut [R]) -> Vec<usize> {
        if self.n_group > 1 {
            let width = biased.len() / self.n_group;
            let group_score = |group: &[R]| {
                let best = top(group, self.group_top);
                best.iter().fold(R::ZERO, |sum, &i| sum + group[i])
            };
            let groups: Vec<R> = biased.chunks(width).map(group_score).collect();
            let kept = top(&groups, self.topk_group);
            for (g, group) in biased.chunks_mut(width).enumerate() {
                if !kept.contains(&g) {
                    group.fill(R::NEG_INFINITY);
                }
            }
        }
        top(biased, self.top_k)
    }
}

fn scores<R: Real>(logits: &[R], score: Score) -> Vec<R> {
    let mut scores = logits.to_vec();
    match score {
        Score::Sigmoid => R::sigmoid_slice(&mut scores),
        Score::Softmax => {
            let m = scores.iter().fold(R::NEG_INFINITY, |m, &x| maximum(m, x));
            scores.iter_mut().for_each(|x| *x -= m);
            R::exp_slice(&mut scores);
            let sum = tree_sum(scores.len(), |i| scores[i]);
            scores.iter_mut().for_each(|x| *x = *x / sum);
        }
    }
    scores
}

impl Op for Router {
    const NAME: &'static str = "router";
    const INPUTS: &'static [Role] = &[input("logits"), optional("bias")];
    const OUTPUTS: &'static [&'static str] = &["scores", "indices", "weights"];
    const CLASS: OpClass = OpClass::Routing;

    fn example() -> Example {
        let (t, experts, top_k) = (3, 8, 2);
        Example::new(Router {
            top_k,
            n_group: 2,
            topk_group: 1,
            group_top: 2,
            score: Score::Sigmoid,
            normalize: true,
            scale: 2.5,
        })
        .input("logits", DType::F32, shape![t, experts])
        .input("bias", DType::F32, shape![experts])
        .output("scores", shape![t, experts])
        .output("indices", shape![t, top_k])
        .output("weights", shape![t, top_k])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(logits), bias] = inputs else { unreachable!("mandatory") };
        rules::dtype(logits, REALS)?;
        rules::rank(logits, 2, "[t, experts]")?;
        let (t, experts) = (logits.shape[0], logits.shape[1]);
        if let Some(bias) = bias {
            rules::dtype(bias, &[logits.dtype])?;
            rules::shape(bias, &[experts])?;
        }
        let reachable = experts / self.n_group.max(1) * self.topk_group.min(self.n_group);
        let group = experts.checked_div(self.n_group).unwrap_or(0);
        if experts == 0
            || group * self.n_group != experts
            || self.top_k > reachable
            || self.group_top > group
        {
            let message = format!(
                "{experts} experts in {} groups (best {} of each), of which {} are reachable, \
                 cannot give {} a token",
                self.n_group, self.group_top, self.topk_group, self.top_k
            );
            return Err(OpError::Undefined { op: Self::NAME, message });
        }
        Ok(vec![
            rules::meta("scores", logits.dtype, &[t, experts]),
            rules::meta("indices", DType::I32, &[t, self.top_k]),
            rules::meta("weights", logits.dtype, &[t, self.top_k]),
        ])
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        let logits = inputs[0].as_ref().expect("mandatory");
        6 * (logits.shape[0] * logits.shape[1]) as u64
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [Some(logits), bias] = &inputs[..] else { unreachable!("mandatory") };
        let (t, experts) = (logits.shape()[0], logits.shape()[1]);
        let dtype = logits.dtype();
        Ok(in_real!(dtype, R => {
            let bias = bias.as_ref().map(|b| R::load(b));
            let mut all = Vec::with_capacity(t * experts);
            let mut indices = Vec::with_capacity(t * self.top_k);
            let mut weights = Vec::with_capacity(t * self.top_k);
            for logits in logits.as_slice::<R>().chunks(experts) {
                let scores = scores(logits, self.score);
                let mut biased = scores.clone();
                if let Some(bias) = &bias {
                    biased.iter_mut().zip(&**bias).for_each(|(s, &b)| *s += b);
                }
                let chosen = self.choose(&mut biased);
                let mut sum = R::ONE;
                if self.normalize {
                    sum = chosen.iter().fold(R::ZERO, |sum, &i| sum + scores[i]);
                    sum += R::from_f64(1e-20);
                }
                let gate = |&i: &usize| (scores[i] / sum) * R::from_f64(self.scale);
                weights.extend(chosen.iter().map(gate));
                indices.extend(chosen.iter().map(|&i| i as i32));
                all.extend(scores);
            }
            vec![
                R::store(all, &[t, experts], dtype),
                Tensor::from_vec(&[t, self.top_k], indices),
                R::store(weights, &[t, self.top_k], dtype),
            ]
        }))
    }
}

impl Op for RouterBackward {
    const NAME: &'static str = "router_backward";
    const INPUTS: &'static [Role] =
        &[input("dweights"), input("scores"), input("indices"), optional("dscores")];
    const OUTPUTS: &'static [&'static str] = &["dlogits"];
    const CLASS: OpClass = OpClass::RoutingBackward;

    fn example() -> Example {
        let (t, experts, top_k) = (3, 8, 2);
        Example::new(RouterBackward { score: Score::Sigmoid, normalize: true, scale: 2.5 })
            .input("dweights", DType::F32, shape![t, top_k])
            .positive("scores", DType::F32, shape![t, experts])
            .indices("indices", shape![t, top_k], &[4, 6, 0, 3, 7, 5])
            .input("dscores", DType::F32, shape![t, experts])
            .output("dlogits", shape![t, experts])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(dweights), Some(scores), Some(indices), dscores] = inputs else {
            unreachable!("mandatory")
        };
        rules::dtype(scores, REALS)?;
        rules::rank(scores, 2, "[t, experts]")?;
        rules::dtype(dweights, &[scores.dtype])?;
        rules::rank(dweights, 2, "[t, top_k]")?;
        rules::shape(dweights, &[scores.shape[0], dweights.shape[1]])?;
        for tensor in [scores, dweights] {
            if tensor.shape[1] == 0 {
                rules::rank(tensor, 0, "[t, at least 1]")?;
            }
        }
        rules::dtype(indices, &[DType::I32])?;
        rules::shape(indices, &dweights.shape)?;
        if let Some(dscores) = dscores {
            rules::dtype(dscores, &[scores.dtype])?;
            rules::shape(dscores, &scores.shape)?;
        }
        Ok(vec![rules::meta("dlogits", scores.dtype, &scores.shape)])
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        let scores = inputs[1].as_ref().expect("mandatory");
        4 * (scores.shape[0] * scores.shape[1]) as u64
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [Some(dweights), Some(scores), Some(indices), dscores] = &inputs[..] else {
            unreachable!("mandatory")
        };
        let (experts, top_k) = (scores.shape()[1], indices.shape()[1]);
        let shape = scores.shape();
        let strange = |&&i: &&i32| usize::try_from(i).map_or(true, |i| i >= experts);
        if let Some(i) = indices.as_slice::<i32>().iter().find(strange) {
            let message = format!("expert {i} of {experts}");
            return Err(OpError::Undefined { op: Self::NAME, message });
        }
        Ok(in_real!(scores.dtype(), R => {
            let all = scores.as_slice::<R>();
            let mut dlogits = match dscores {
                Some(d) => d.as_slice::<R>().to_vec(),
                None => vec![R::ZERO; all.len()],
            };
            let chosen = indices.as_slice::<i32>().chunks(top_k);
            let tokens = dweights.as_slice::<R>().chunks(top_k).zip(chosen);
            for ((dw, chosen), (ds, s)) in
                tokens.zip(dlogits.chunks_mut(experts).zip(all.chunks(experts)))
            {
                self.token(dw, chosen, s, ds);
            }
            vec![R::store(dlogits, shape, scores.dtype())]
        }))
    }
}

impl RouterBackward {
    /// One token: `ds` holds the scores' other gradient and leaves as the logits' gradient.
    fn token<R: Real>(&self, dw: &[R], chosen: &[i32], s: &[R], ds: &mut [R]) {
        let scale = R::from_f64(self.scale);
        let (mut sum, mut inner) = (R::ONE, R::ZERO);
        if self.normalize {
            sum = chosen.iter().fold(R::ZERO, |sum, &i| sum + s[i as usize]);
            sum += R::from_f64(1e-20);
            for (&dw, &i) in dw.iter().zip(chosen) {
                inner += dw * (s[i as usize] / sum);
            }
        }
        for (&dw, &i) in dw.iter().zip(chosen) {
            ds[i as usize] += scale * ((dw - inner) / sum);
        }
        match self.score {
            Score::Sigmoid => {
                ds.iter_mut().zip(s).for_each(|(d, &s)| *d *= s * (R::ONE - s));
            }
            Score::Softmax => {
                let dot = tree_sum(s.len(), |i| ds[i] * s[i]);
                ds.iter_mut().zip(s).for_each(|(d, &s)| *d = s * (*d - dot));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_go_to_the_lowest_index_and_nan_is_last() {
        assert_eq!(top(&[1.0, 3.0, 3.0, 2.0, 3.0], 3), [1, 2, 4]);
        assert_eq!(top(&[f32::NAN, 0.5, 0.25], 2), [1, 2]);
    }

    #[test]
    fn the_bias_moves_the_choice_but_not_the_gate_values() {
        let op = Router {
            top_k: 1,
            n_group: 1,
            topk_group: 1,
            group_top: 1,
            score: Score::Sigmoid,
            normalize: false,
            scale: 2.0,
        };
        let logits = Tensor::from_vec(&[1, 2], vec![0.0f32, 1.0]);
        let bias = Tensor::from_vec(&[2], vec![1.0f32, 0.0]);
        let out = Op::run(&op, vec![Some(logits), Some(bias)]).unwrap();
        assert_eq!(out[1].as_slice::<i32>(), [0]);
        assert_eq!(out[2].as_slice::<f32>(), [1.0]);
    }
}
