//! From logits to a token: greedy, temperature, top-p; and the rejection step of speculative
//! decoding.
//!
//! Probabilities are `exp((l_i - max l) / T)` with the F32 `exp` of `fathom-numerics`, added in F64
//! over ascending ids, so they are the same on every machine. Top-p keeps the fewest most probable
//! tokens (ties: the lower id) whose share reaches p. A draw is number `position` of a Philox
//! stream of (seed, purpose).

use fathom_numerics::elementary::exp_slice;
use fathom_numerics::philox::Philox;
use serde::{Deserialize, Serialize};

/// How tokens are chosen; the default is greedy.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sampling {
    /// Temperature that logits are divided by; 0: always the most probable token (ties: the lowest
    /// id).
    pub temperature: f64,
    /// Nucleus sampling: share of the probability that the kept tokens reach, above 0 to 1.
    pub top_p: f64,
    /// Seed of the draws; a draw depends on it, its purpose and the token's position only.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling { temperature: 0.0, top_p: 1.0, seed: 0 }
    }
}

/// What a draw is for: the stream of its random numbers.
#[derive(Clone, Copy, Debug)]
pub(super) enum Purpose {
    /// A token of the model's distribution.
    Sample = 1,
    /// A draft of an MTP module's.
    Draft = 2,
    /// Whether a draft is accepted.
    Accept = 3,
    /// The token in place of a rejected draft.
    Residual = 4,
}

impl Sampling {
    /// Whether the most probable token is always taken.
    pub fn greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// Number `position` for `purpose`: uniform in \[0, 1), a multiple of 2^-53.
    fn uniform(&self, purpose: Purpose, position: usize) -> f64 {
        let words = Philox::new(self.seed, purpose as u64).block(position as u64);
        let bits = (u64::from(words[0]) << 32) | u64::from(words[1]);
        (bits >> 11) as f64 * 2f64.powi(-53)
    }

    /// The probability of each token, given its logit: zero for those that are never drawn.
    ///
    /// # Panics
    /// Where there are no logits.
    pub fn distribution(&self, logits: &[f32]) -> Vec<f64> {
        let best = argmax(logits);
        if self.greedy() {
            let mut one = vec![0.0; logits.len()];
            one[best] = 1.0;
            return one;
        }
        let (top, temperature) = (logits[best], self.temperature as f32);
        let mut weights: Vec<f32> = logits.iter().map(|&l| (l - top) / temperature).collect();
        exp_slice(&mut weights);
        let mut p: Vec<f64> = weights.into_iter().map(f64::from).collect();
        if self.top_p < 1.0 {
            let mut order: Vec<usize> = (0..p.len()).collect();
            order.sort_by(|&a, &b| p[b].total_cmp(&p[a]).then(a.cmp(&b)));
            let (total, mut share) = (p.iter().sum::<f64>(), 0.0);
            let kept = order.iter().take_while(|&&id| {
                let before = share;
                share += p[id];
                before < self.top_p * total
            });
            let kept = kept.count();
            order[kept..].iter().for_each(|&id| p[id] = 0.0);
        }
        let total: f64 = p.iter().sum();
        p.iter_mut().for_each(|p| *p /= total);
        p
    }

    /// Draws a token by the inverse of the cumulative distribution over ascending ids.
    pub(super) fn draw(&self, p: &[f64], purpose: Purpose, position: usize) -> u32 {
        let mut left = self.uniform(purpose, position) * p.iter().sum::<f64>();
        let mut last = 0;
        for (id, &p) in p.iter().enumerate().filter(|(_, p)| **p > 0.0) {
            last = id;
            left -= p;
            if left < 0.0 {
                break;
            }
        }
        last as u32
    }

    /// Verifies a draft that was drawn from `q` where the model's distribution is `p`: the draft,
    /// or the token in its place. Either way the token has distribution `p`.
    ///
    /// The draft x is accepted with probability `min(1, p_x / q_x)`; else the token is drawn from
    /// `max(p - q, 0)`. Greedy distributions are single tokens, so the draft is accepted where it
    /// is the model's own choice. Source: arXiv 2211.17192, algorithm 1.
    pub(super) fn verify(&self, p: &[f64], q: &[f64], draft: u32, position: usize) -> (u32, bool) {
        let (p_x, q_x) = (p[draft as usize], q[draft as usize]);
        if self.uniform(Purpose::Accept, position) * q_x < p_x {
            return (draft, true);
        }
        let residual: Vec<f64> = p.iter().zip(q).map(|(p, q)| (p - q).max(0.0)).collect();
        (self.draw(&residual, Purpose::Residual, position), false)
    }
}

/// The largest logit; ties: the lowest id. NaN never wins.
fn argmax(logits: &[f32]) -> usize {
    let mut best = 0;
    for (id, logit) in logits.iter().enumerate() {
        if *logit > logits[best] || logits[best].is_nan() {
            best = id;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling(temperature: f64, top_p: f64, seed: u64) -> Sampling {
        Sampling { temperature, top_p, seed }
    }

    #[test]
    fn distributions() {
        let logits = [1.0f32, 3.0, 3.0, -2.0];
        assert_eq!(Sampling::default().distribution(&logits), [0.0, 1.0, 0.0, 0.0]);
        let p = sampling(1.0, 1.0, 0).distribution(&logits);
        let e: Vec<f64> = logits.iter().map(|&l| f64::from(l - 3.0).exp()).collect();
        let total = e.iter().sum::<f64>();
        // exp has an error below 2^-23.
        assert!(p.iter().zip(&e).all(|(p, e)| (p - e / total).abs() < 1e-6));
        let half = sampling(1.0, 0.5, 0).distribution(&logits);
        assert_eq!(half, [0.0, 0.5, 0.5, 0.0]);
        assert_eq!(sampling(1.0, 0.4, 0).distribution(&logits), [0.0, 1.0, 0.0, 0.0]);
        let cold = sampling(0.01, 1.0, 0).distribution(&logits);
        assert!(cold[0] < 1e-80 && cold[1] == cold[2]);
    }

    /// Draws follow p, and so do verified drafts, whatever q: chi-square below its 1 - 1e-6
    /// quantile.
    #[test]
    fn verified_drafts_have_the_models_distribution() {
        let p = [0.4, 0.0, 0.25, 0.2, 0.15];
        let n = 40_000;
        let chi = |counts: &[usize; 5]| {
            assert_eq!(counts[1], 0);
            let cells = counts.iter().zip(p).filter(|(_, p)| *p > 0.0);
            cells.map(|(&c, p)| (c as f64 - p * n as f64).powi(2) / (p * n as f64)).sum::<f64>()
        };
        let sampling = sampling(1.0, 1.0, 7);
        let mut plain = [0; 5];
        (0..n).for_each(|i| plain[sampling.draw(&p, Purpose::Sample, i) as usize] += 1);
        // Three degrees of freedom: P(chi2 > 30.7) = 1e-6.
        assert!(chi(&plain) < 30.7, "{plain:?}");
        for q in [[0.2; 5], [0.0, 0.5, 0.0, 0.5, 0.0], p, [0.1, 0.0, 0.4, 0.1, 0.4]] {
            let (mut counts, mut accepted) = ([0; 5], 0);
            for i in 0..n {
                let draft = sampling.draw(&q, Purpose::Draft, i);
                let (token, ok) = sampling.verify(&p, &q, draft, i);
                counts[token as usize] += 1;
                accepted += usize::from(ok);
            }
            assert!(chi(&counts) < 30.7, "{q:?}: {counts:?}");
            let overlap: f64 = p.iter().zip(q).map(|(p, q)| p.min(q)).sum();
            let bound = 5.0 * (overlap * (1.0 - overlap) / n as f64).sqrt() + 1e-12;
            assert!((accepted as f64 / n as f64 - overlap).abs() <= bound, "{q:?}: {accepted}");
        }
    }
}
