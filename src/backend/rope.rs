//! Rotary embedding as config.json describes it: frequencies, and how they are stretched for contexts
//! longer than those of training.

use std::f64::consts::PI;

/// Base of the frequencies and how they are scaled.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    pub theta: f64,
    pub scaling: RopeScaling,
}

#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    None,
    /// Every frequency divided by the factor
    Linear(f64),
    Yarn(Yarn),
}

/// YaRN: high frequencies stay, low ones are divided by `factor`, a ramp lies between.
///
/// Source: arXiv:2309.00071; transformers 4.57.6 and 5.24, `_compute_yarn_parameters`.
#[derive(Clone, Debug, PartialEq)]
pub struct Yarn {
    pub factor: f64,
    /// Tokens of context in training
    pub original_max_position_embeddings: f64,
    /// Multiplies cosines and sines
    pub attention_factor: f64,
    /// Rotations over the original context above which a frequency stays
    pub beta_fast: f64,
    /// Rotations below which it is divided by the whole factor
    pub beta_slow: f64,
    /// The ramp begins and ends at whole dimensions
    pub truncate: bool,
}

impl Rope {
    /// Unscaled.
    pub const fn plain(theta: f64) -> Self {
        Rope {
            theta,
            scaling: RopeScaling::None,
        }
    }

    /// Angle per position of pairs `0..rotary_dim / 2`, in f32 as transformers has them:
    /// `1 / theta^(2j / rotary_dim)` where nothing is scaled.
    pub fn inverse_frequencies(&self, rotary_dim: usize) -> Vec<f32> {
        let theta = self.theta as f32;
        let period = |j: usize| theta.powf((2 * j) as f32 / rotary_dim as f32);
        let periods = (0..rotary_dim / 2).map(period);
        match &self.scaling {
            RopeScaling::None => periods.map(|p| 1.0 / p).collect(),
            RopeScaling::Linear(factor) => periods.map(|p| 1.0 / p / *factor as f32).collect(),
            RopeScaling::Yarn(yarn) => {
                let (low, high) = yarn.ramp(self.theta, rotary_dim);
                let scaled = periods.enumerate().map(|(j, period)| {
                    let along = ((j as f64 - low) / (high - low)).clamp(0.0, 1.0) as f32;
                    let kept = 1.0 - along;
                    1.0 / (yarn.factor as f32 * period) * (1.0 - kept) + 1.0 / period * kept
                });
                scaled.collect()
            }
        }
    }

    /// What cosines and sines are multiplied by.
    pub fn attention_factor(&self) -> f32 {
        match &self.scaling {
            RopeScaling::Yarn(yarn) => yarn.attention_factor as f32,
            _ => 1.0,
        }
    }
}

impl Yarn {
    /// The pairs where the ramp begins and ends.
    fn ramp(&self, theta: f64, rotary_dim: usize) -> (f64, f64) {
        let dim = rotary_dim as f64;
        let pair = |rotations: f64| {
            let period = self.original_max_position_embeddings / (rotations * 2.0 * PI);
            dim * period.ln() / (2.0 * theta.ln())
        };
        let (low, high) = match self.truncate {
            true => (pair(self.beta_fast).floor(), pair(self.beta_slow).ceil()),
            false => (pair(self.beta_fast), pair(self.beta_slow)),
        };
        let (low, high) = (low.max(0.0), high.min(dim - 1.0));
        match low == high {
            true => (low, high + 0.001),
            false => (low, high),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Expected values: transformers 4.57.6 for the published head, by its library.
    #[test]
    fn yarn_has_the_frequencies_of_transformers() {
        let plain = Rope::plain(1e7).inverse_frequencies(64);
        let yarn = Rope {
            theta: 1e7,
            scaling: RopeScaling::Yarn(Yarn {
                factor: 4.0,
                original_max_position_embeddings: 262_144.0,
                attention_factor: 0.1 * 4f64.ln() + 1.0,
                beta_fast: 32.0,
                beta_slow: 1.0,
                truncate: true,
            }),
        };
        let scaled = yarn.inverse_frequencies(64);
        for (j, (scaled, plain)) in scaled.iter().zip(&plain).enumerate() {
            let expected = match j {
                0..=14 => 1.0,
                15..22 => 1.0 - 0.75 * (j - 14) as f32 / 8.0,
                _ => 0.25,
            };
            assert!((scaled / plain - expected).abs() < 1e-6, "pair {j}");
        }
        assert!((yarn.attention_factor() - 1.138_629_4).abs() < 1e-7);
    }
}
