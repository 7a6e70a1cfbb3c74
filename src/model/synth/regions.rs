//! What lies where in the hidden state.

use std::ops::Range;

/// Quarters of the hidden state, each with something of its own.
#[derive(Clone, Copy)]
pub struct Regions {
    quarter: usize,
}

impl Regions {
    pub fn new(hidden_size: usize) -> Self {
        Regions {
            quarter: hidden_size / 4,
        }
    }

    pub fn len(self) -> usize {
        self.quarter
    }

    /// What the token is, from its embedding.
    pub fn token(self) -> Range<usize> {
        0..self.quarter
    }

    /// What the token says of the subject, from its embedding; small for frequent tokens.
    pub fn subject(self) -> Range<usize> {
        self.quarter..2 * self.quarter
    }

    /// Starts at zero; mixers and experts write it, as they write to the first two.
    pub fn context(self) -> Range<usize> {
        2 * self.quarter..3 * self.quarter
    }

    /// What the text was about in the last tokens; one delta net alone writes it.
    pub fn text(self) -> Range<usize> {
        3 * self.quarter..4 * self.quarter
    }
}

/// Standard deviations of a row's weights in each region; 0 where it does not read.
#[derive(Clone, Copy, Default)]
pub struct Reading {
    pub token: f32,
    pub context: f32,
    pub text: f32,
}

impl Reading {
    /// Fills a row of `[hidden_size]` from normal values.
    pub fn fill(self, regions: Regions, normal: impl Iterator<Item = f32>, out: &mut [f32]) {
        out.iter_mut().zip(normal).for_each(|(to, v)| *to = v);
        for (region, std) in [
            (regions.token(), self.token),
            (regions.subject(), 0.0),
            (regions.context(), self.context),
            (regions.text(), self.text),
        ] {
            out[region].iter_mut().for_each(|v| *v *= std);
        }
    }
}
