//! Auxiliary-loss-free balance: the rule that moves the selection biases, and load statistics.
//!
//! Source: arXiv 2408.15664; DeepSeek-V3 report, section 2.1.2.

use crate::Tensor;
use crate::backend::{Backend, Result};
use crate::model::{Model, Params, convert};

/// How far the fullest expert is above the mean: largest load over mean load, less one (MaxVio of
/// arXiv 2408.15664, section 4); 0 where there is no load.
pub fn max_violation(loads: &[u64]) -> f64 {
    let total: u64 = loads.iter().sum();
    let max = loads.iter().copied().max().unwrap_or(0);
    if total == 0 { 0.0 } else { max as f64 * loads.len() as f64 / total as f64 - 1.0 }
}

/// Moves each expert's bias by `gamma`: up where its load is below the mean, down where it is
/// above, not at all where it is the mean.
pub fn move_biases(biases: &mut [f32], loads: &[u64], gamma: f32) {
    assert_eq!(biases.len(), loads.len(), "one load a bias");
    let total: u64 = loads.iter().sum();
    for (bias, &load) in biases.iter_mut().zip(loads) {
        // Against the mean in whole numbers: load * experts against the total.
        match (load * loads.len() as u64).cmp(&total) {
            std::cmp::Ordering::Less => *bias += gamma,
            std::cmp::Ordering::Greater => *bias -= gamma,
            std::cmp::Ordering::Equal => {}
        }
    }
}

impl Model {
    /// Ends a step's routing: moves the selection bias of every layer in `loads` (layer, rows of
    /// each expert over the whole step) by `gamma`.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn move_biases<B: Backend>(
        &self,
        backend: &B,
        params: &mut Params<B>,
        loads: &[(usize, Vec<u64>)],
        gamma: f32,
    ) -> Result<()> {
        let layers = self.layers.iter().chain(self.mtp.iter().map(|m| &m.layer));
        for layer in layers {
            let Some(moe) = &layer.mlp.moe else { continue };
            let Some((_, loads)) = loads.iter().find(|(index, _)| *index == layer.index) else {
                continue;
            };
            let buffer = &mut params.buffers[moe.bias.0];
            let tensor = convert(backend.download(buffer)?, fathom_trace::DType::F32);
            let shape = tensor.shape().to_vec();
            let mut biases = tensor.into_vec::<f32>();
            move_biases(&mut biases, loads, gamma);
            let tensor = convert(Tensor::from_vec(&shape, biases), self.recipe.master());
            *buffer = backend.upload(tensor)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn biases_follow_the_sign_of_the_difference_to_the_mean() {
        let mut biases = [0.5, 0.5, 0.5];
        move_biases(&mut biases, &[1, 2, 3], 0.25);
        assert_eq!(biases, [0.75, 0.5, 0.25]);
        assert_eq!(max_violation(&[1, 2, 3]), 0.5);
        assert_eq!(max_violation(&[]), 0.0);
    }
}
