//! Capacity: slots that a device has no room for are dropped, as DeepSeek-V2 was trained.
//!
//! The experts form `devices` equal blocks. A device has room for
//! `floor(factor * t * top_k / devices)` slots (slot = token * top_k + choice). Slots of the
//! segments in `exempt` are always kept and take room first; of the others the device keeps those
//! of highest affinity, ties to the lowest slot, and drops the rest: their index becomes -1, which
//! `dispatch_plan` gives to no expert. Source: arXiv 2405.04434, section 2.2.4.

use std::cmp::Ordering;

use fathom_trace::{DType, OpClass, TensorMeta};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::attention::spans;
use crate::Tensor;
use crate::op::compute_type::{REALS, Real, in_real};
use crate::op::example::{Example, shape};
use crate::op::{Op, OpError, Role, input, rules};

/// Drops what devices have no room for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DropTokens {
    /// Blocks of experts that share their room; the number of experts for each by itself.
    pub devices: usize,
    /// Room of a device over its even share of the slots.
    pub factor: f64,
    /// Lengths of the segments (sequences).
    pub segments: Vec<usize>,
    /// Segments that lose no slot, in ascending order.
    pub exempt: Vec<usize>,
}

impl Op for DropTokens {
    const NAME: &'static str = "drop_tokens";
    const INPUTS: &'static [Role] = &[input("indices"), input("scores")];
    const OUTPUTS: &'static [&'static str] = &["indices", "dropped"];
    const CLASS: OpClass = OpClass::Stream;

    fn example() -> Example {
        let (t, top_k, experts, devices) = (4, 1, 4, 2);
        let (segments, exempt) = (vec![3, 1], vec![1]);
        Example::new(DropTokens { devices, factor: 0.5, segments, exempt })
            .indices("indices", shape![t, top_k], &[0, 1, 0, 3])
            .positive("scores", DType::F32, shape![t, experts])
            .output("indices", shape![t, top_k])
            .output("dropped", shape![devices])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(indices), Some(scores)] = inputs else { unreachable!("mandatory") };
        rules::dtype(indices, &[DType::I32])?;
        rules::rank(indices, 2, "[t, top_k]")?;
        rules::dtype(scores, REALS)?;
        rules::rank(scores, 2, "[t, experts]")?;
        let (t, experts) = (indices.shape[0], scores.shape[1]);
        rules::shape(scores, &[t, experts])?;
        let split: usize = self.segments.iter().sum();
        let exempt = self.exempt.iter().all(|&s| s < self.segments.len());
        let room = self.factor >= 0.0 && self.factor.is_finite();
        if split != t || self.devices == 0 || experts % self.devices != 0 || !exempt || !room {
            let message = format!(
                "segments {:?} must add up to t = {t}, exempt {:?} be among them, devices {} \
                 divide experts {experts}, factor {} be finite and not negative",
                self.segments, self.exempt, self.devices, self.factor
            );
            return Err(OpError::Undefined { op: Self::NAME, message });
        }
        Ok(vec![
            rules::meta("indices", DType::I32, &indices.shape),
            rules::meta("dropped", DType::I32, &[self.devices]),
        ])
    }

    fn flops(&self, _inputs: &[Option<TensorMeta>]) -> u64 {
        0
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [Some(indices), Some(scores)] = &inputs[..] else { unreachable!("mandatory") };
        let (top_k, experts) = (indices.shape()[1], scores.shape()[1]);
        let mut kept = indices.as_slice::<i32>().to_vec();
        let mut exempt = vec![false; indices.shape()[0]];
        for (segment, (start, length)) in spans(&self.segments).into_iter().enumerate() {
            exempt[start..start + length].fill(self.exempt.contains(&segment));
        }
        // The slots of each device, by affinity.
        let mut devices: Vec<Vec<(usize, f64)>> = vec![Vec::new(); self.devices];
        in_real!(scores.dtype(), R => {
            let scores = scores.as_slice::<R>();
            for (slot, &expert) in kept.iter().enumerate() {
                let Some(expert) = usize::try_from(expert).ok().filter(|&e| e < experts) else {
                    let message = format!("expert {expert} of {experts}");
                    return Err(OpError::Undefined { op: Self::NAME, message });
                };
                let affinity = scores[slot / top_k * experts + expert].to_f64();
                devices[expert / (experts / self.devices)].push((slot, affinity));
            }
        });
        let room = (self.factor * kept.len() as f64 / self.devices as f64).floor() as usize;
        let mut dropped = Vec::with_capacity(self.devices);
        for slots in &mut devices {
            slots.sort_by(|&(a, x), &(b, y)| {
                let first = exempt[b / top_k].cmp(&exempt[a / top_k]);
                let by_affinity = y.partial_cmp(&x).unwrap_or(Ordering::Equal);
                first.then(by_affinity).then(a.cmp(&b))
            });
            let beyond = slots.iter().skip(room).filter(|(slot, _)| !exempt[slot / top_k]);
            let mut count = 0;
            for &(slot, _) in beyond {
                kept[slot] = -1;
                count += 1;
            }
            dropped.push(count);
        }
        Ok(vec![
            Tensor::from_vec(indices.shape(), kept),
            Tensor::from_vec(&[self.devices], dropped),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drop(op: &DropTokens) -> (Vec<i32>, Vec<i32>) {
        let indices = Tensor::from_vec(&[4, 1], vec![0i32, 1, 0, 3]);
        let scores: Vec<f32> = (0..16).map(|i| [0.5, 0.25, 0.5, 0.75][i / 4]).collect();
        let scores = Tensor::from_vec(&[4, 4], scores);
        let out = Op::run(op, vec![Some(indices), Some(scores)]).unwrap();
        let values = |t: &Tensor| t.as_slice::<i32>().to_vec();
        (values(&out[0]), values(&out[1]))
    }

    #[test]
    fn the_lowest_affinities_are_dropped_and_ties_keep_the_lowest_slot() {
        let segments = vec![1, 3];
        let op = DropTokens { devices: 2, factor: 1.0, segments, exempt: Vec::new() };
        // Device 0 has room for two of three slots, device 1 for its one.
        assert_eq!(drop(&op), (vec![0, -1, 0, 3], vec![1, 0]));
        let half = DropTokens { factor: 0.5, ..op.clone() };
        assert_eq!(drop(&half), (vec![0, -1, -1, 3], vec![2, 0]));
        let exempt = DropTokens { exempt: vec![1], ..half };
        assert_eq!(drop(&exempt), (vec![-1, 1, 0, 3], vec![1, 0]));
        let none = DropTokens { factor: 0.0, ..op };
        assert_eq!(drop(&none), (vec![-1; 4], vec![3, 1]));
    }
}
