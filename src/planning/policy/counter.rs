//! How often an expert was picked of late.

/// Picks per expert of a layer, the past counting half every half-life.
#[derive(Debug)]
pub(super) struct DecayedPicks {
    /// In units that grow as the past fades.
    score: Vec<f64>,
    unit: f64,
    growth: f64,
}

impl DecayedPicks {
    pub fn new(num_experts: usize, half_life_tokens: f64) -> Self {
        DecayedPicks {
            score: vec![0.0; num_experts],
            unit: 1.0,
            growth: 0.5f64.powf(-1.0 / half_life_tokens.max(1.0)),
        }
    }

    /// One token's picks.
    pub fn count(&mut self, topk_ids: &[u16]) {
        // Letting the unit grow is the decay of all scores at once.
        self.unit *= self.growth;
        if self.unit > 1e100 {
            self.score.iter_mut().for_each(|s| *s /= self.unit);
            self.unit = 1.0;
        }
        for &expert in topk_ids {
            self.score[usize::from(expert)] += self.unit;
        }
    }

    /// Lets all picks so far count for this much of what they did.
    pub fn fade(&mut self, to: f64) {
        self.unit /= to;
    }

    /// Decayed picks of an expert as of now.
    ///
    /// Also its picks to come, weighted by the same half-life, if routing goes on as it did: at a
    /// steady rate past and future have the same sum.
    pub fn picks(&self, expert: u16) -> f64 {
        self.score[usize::from(expert)] / self.unit
    }

    /// `[E]`
    pub fn all(&self) -> Vec<f32> {
        self.score.iter().map(|s| (s / self.unit) as f32).collect()
    }

    /// Forgets all picks.
    pub fn clear(&mut self) {
        self.unit = 1.0;
        self.score.fill(0.0);
    }

    pub fn set_all(&mut self, picks: &[f32]) {
        self.unit = 1.0;
        self.score = picks.iter().map(|&p| f64::from(p)).collect();
    }
}
