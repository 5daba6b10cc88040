//! Tables of the rotary embedding: cosines and sines of every position, with YaRN.
//!
//! Frequencies follow the checkpoints' own code: computed in F64, rounded to F32; the angle is the
//! F32 product of position and frequency; cosine and sine are those of `fathom-numerics`, times the
//! attention factor. In `f64` mode the same F32 values are widened.

use fathom_numerics::elementary;
use fathom_trace::DType;

use crate::Tensor;
use fathom_config::{AttentionConfig, ModelConfig, RopeConfig, Yarn};

/// `0.1 mscale ln(factor) + 1`: YaRN's attention temperature.
fn mscale(factor: f64, weight: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 }
}

/// What queries times keys are multiplied by before the softmax: one over the root of the width,
/// and the square of the temperature where the configuration puts it here (`mscale_all_dim`).
pub fn softmax_scale(config: &ModelConfig) -> f64 {
    let width = match config.attention {
        AttentionConfig::Mla { qk_nope_head_dim, qk_rope_head_dim, .. } => {
            qk_nope_head_dim + qk_rope_head_dim
        }
        AttentionConfig::Gqa { head_dim, .. } => head_dim,
    };
    let scale = (width as f64).powf(-0.5);
    match &config.rope.yarn {
        Some(Yarn { factor, mscale_all_dim: Some(weight), .. }) if *weight != 0.0 => {
            let m = mscale(*factor, *weight);
            scale * m * m
        }
        _ => scale,
    }
}

/// The frequency of each of the `dim / 2` rotated pairs, in radians a position, and YaRN's factor
/// (1 without it) by which cosines and sines are multiplied.
pub fn frequencies(rope: &RopeConfig, dim: usize) -> (Vec<f32>, f64) {
    let pair = |i: usize| rope.theta.powf((2 * i) as f64 / dim as f64) as f32;
    let half = dim / 2;
    let Some(yarn) = &rope.yarn else {
        return ((0..half).map(|i| 1.0 / pair(i)).collect(), 1.0);
    };
    let factor =
        yarn.attention_factor.unwrap_or_else(|| match (yarn.mscale, yarn.mscale_all_dim) {
            (Some(a), Some(b)) if a != 0.0 && b != 0.0 => {
                mscale(yarn.factor, a) / mscale(yarn.factor, b)
            }
            _ => mscale(yarn.factor, 1.0),
        });
    let original = yarn.original_max_position_embeddings as f64;
    let rotations = |n: f64| {
        let turns = (original / (n * 2.0 * std::f64::consts::PI)).ln();
        dim as f64 * turns / (2.0 * rope.theta.ln())
    };
    let (mut low, mut high) = (rotations(yarn.beta_fast), rotations(yarn.beta_slow));
    if yarn.truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    (low, high) = (low.max(0.0), high.min(dim as f64 - 1.0));
    if low == high {
        high += 0.001;
    }
    let frequency = |i: usize| {
        let ramp = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
        let keep = 1.0 - ramp;
        let interpolated = 1.0 / (yarn.factor as f32 * pair(i));
        interpolated * (1.0 - keep) + (1.0 / pair(i)) * keep
    };
    ((0..half).map(frequency).collect(), factor)
}

/// Cosines and sines \[positions, dim / 2\] for positions 0 and up, in `dtype` (F32 or F64).
pub fn tables(rope: &RopeConfig, dim: usize, positions: usize, dtype: DType) -> [Tensor; 2] {
    let (frequencies, factor) = frequencies(rope, dim);
    let angles = (0..positions).flat_map(|p| frequencies.iter().map(move |f| p as f32 * f));
    let mut sin: Vec<f32> = angles.collect();
    let mut cos = vec![0.0; sin.len()];
    elementary::sin_cos_slice(&mut sin, &mut cos);
    let shape = [positions, dim / 2];
    [cos, sin].map(|mut table| {
        table.iter_mut().for_each(|x| *x *= factor as f32);
        match dtype {
            DType::F64 => Tensor::from_vec(&shape, table.iter().map(|&x| f64::from(x)).collect()),
            _ => Tensor::from_vec(&shape, table),
        }
    })
}
