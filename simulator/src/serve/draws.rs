//! Random numbers by (seed, stream, counter): a draw does not depend on what was drawn before it.

use crate::load::mix;

/// A source of draws.
#[derive(Debug, Clone, Copy)]
pub struct Draws {
    seed: u64,
}

impl Draws {
    /// The draws of `seed`.
    pub fn new(seed: u64) -> Draws {
        Draws { seed: mix(seed) }
    }

    /// Uniform in the open interval from 0 to 1.
    pub fn uniform(&self, stream: u64, counter: u64) -> f64 {
        let bits = mix(mix(self.seed ^ mix(stream)) ^ counter) >> 11;
        (bits as f64 + 0.5) / (1u64 << 53) as f64
    }

    /// Standard normal (Box and Muller 1958).
    pub fn normal(&self, stream: u64, counter: u64) -> f64 {
        let (u, v) = (self.uniform(stream, 2 * counter), self.uniform(stream, 2 * counter + 1));
        (-2.0 * u.ln()).sqrt() * (2.0 * std::f64::consts::PI * v).cos()
    }

    /// Exponential with mean 1.
    pub fn exponential(&self, stream: u64, counter: u64) -> f64 {
        -self.uniform(stream, counter).ln()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Means and variances of 100,000 draws, within five standard errors.
    #[test]
    fn moments_are_those_of_the_distributions() {
        let (draws, n) = (Draws::new(3), 100_000u64);
        let moments = |f: &dyn Fn(u64) -> f64| {
            let mean = (0..n).map(f).sum::<f64>() / n as f64;
            (mean, (0..n).map(|i| (f(i) - mean).powi(2)).sum::<f64>() / n as f64)
        };
        for (name, (mean, variance), expected) in [
            ("uniform", moments(&|i| draws.uniform(1, i)), (0.5, 1.0 / 12.0)),
            ("normal", moments(&|i| draws.normal(2, i)), (0.0, 1.0)),
            ("exponential", moments(&|i| draws.exponential(3, i)), (1.0, 1.0)),
        ] {
            assert!((mean - expected.0).abs() < 0.016, "{name}: mean {mean}");
            assert!((variance - expected.1).abs() < 0.045, "{name}: variance {variance}");
        }
    }
}
