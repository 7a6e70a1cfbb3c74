//! What is reported, each with the formula that is printed beside it.

use super::record::{ContextRun, Repetition, prediction_error};
use super::stats::{self, Summary};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Better {
    Higher,
    Lower,
}

/// One number per repetition.
#[derive(Debug)]
pub struct Metric {
    /// Name in CSV files and tables; ends in its unit where it has one.
    pub key: &'static str,
    /// Name in charts, without the unit.
    pub label: &'static str,
    pub unit: &'static str,
    pub formula: &'static str,
    pub better: Better,
    value: fn(&Repetition) -> Option<f64>,
}

pub static DECODE_TOK_S: Metric = Metric {
    key: "decode_tok_s",
    label: "Decode",
    unit: "tok/s",
    formula: "1000 (generated_tokens - 1) / sum(itl_ms)",
    better: Better::Higher,
    value: |r| positive(r.decode_tok_s),
};

pub static PREFILL_TOK_S: Metric = Metric {
    key: "prefill_tok_s",
    label: "Prefill",
    unit: "tok/s",
    formula: "prompt_tokens / time from the first prompt token in to the logits of the last out",
    better: Better::Higher,
    value: |r| positive(r.prefill_tok_s),
};

pub static TTFT_MS: Metric = Metric {
    key: "ttft_ms",
    label: "Time to first token",
    unit: "ms",
    formula: "time from the prompt's ids to the first generated token",
    better: Better::Lower,
    value: |r| positive(r.ttft_ms),
};

pub static TPOT_MS: Metric = Metric {
    key: "tpot_ms",
    label: "Time per output token",
    unit: "ms",
    formula: "(e2e_ms - ttft_ms) / (generated_tokens - 1)",
    better: Better::Lower,
    value: |r| match r.generated_tokens {
        0 | 1 => None,
        n => positive((r.e2e_ms - r.ttft_ms) / (n - 1) as f64),
    },
};

pub static ITL_P50_MS: Metric = Metric {
    key: "itl_ms_p50",
    label: "Inter-token latency, p50",
    unit: "ms",
    formula: "50th percentile of the times between tokens of a repetition",
    better: Better::Lower,
    value: |r| stats::percentile(&r.itl_ms, 50.0),
};

pub static ITL_P90_MS: Metric = Metric {
    key: "itl_ms_p90",
    label: "Inter-token latency, p90",
    unit: "ms",
    formula: "90th percentile of the times between tokens of a repetition",
    better: Better::Lower,
    value: |r| stats::percentile(&r.itl_ms, 90.0),
};

pub static ITL_P99_MS: Metric = Metric {
    key: "itl_ms_p99",
    label: "Inter-token latency, p99",
    unit: "ms",
    formula: "99th percentile of the times between tokens of a repetition",
    better: Better::Lower,
    value: |r| stats::percentile(&r.itl_ms, 99.0),
};

pub static E2E_MS: Metric = Metric {
    key: "e2e_ms",
    label: "End to end",
    unit: "ms",
    formula: "time from the prompt's ids to the last generated token",
    better: Better::Lower,
    value: |r| positive(r.e2e_ms),
};

pub static EXPERT_HIT_RATE: Metric = Metric {
    key: "expert_hit_rate",
    label: "Expert hit rate",
    unit: "",
    formula: "hits / (hits + misses); an access is one expert of one token in one layer",
    better: Better::Higher,
    value: |r| {
        let accesses = r.experts.hits + r.experts.misses;
        (accesses > 0).then(|| r.experts.hits as f64 / accesses as f64)
    },
};

pub static H2D_BYTES_PER_TOKEN: Metric = Metric {
    key: "h2d_bytes_per_token",
    label: "Experts over PCIe",
    unit: "bytes/token",
    formula: "bytes of experts over PCIe in decode steps, copied or read in place / steps",
    better: Better::Lower,
    value: |r| {
        // The last token is not fed.
        let fed = r.generated_tokens.saturating_sub(1) as u64;
        match (r.experts.h2d_bytes, r.decode_split.map_or(fed, |s| s.steps)) {
            (0, _) | (_, 0) => None,
            (bytes, steps) => Some(bytes as f64 / steps as f64),
        }
    },
};

pub static ENERGY_PER_TOKEN_J: Metric = Metric {
    key: "gpu_energy_per_token_j",
    label: "GPU energy",
    unit: "J/token",
    formula: "energy the GPU drew / generated_tokens",
    better: Better::Lower,
    value: |r| match r.generated_tokens {
        0 => None,
        n => r.gpu_energy_j.map(|joule| joule / n as f64),
    },
};

/// All of them, in the order of tables.
pub static METRICS: [&Metric; 11] = [
    &DECODE_TOK_S,
    &PREFILL_TOK_S,
    &TTFT_MS,
    &TPOT_MS,
    &ITL_P50_MS,
    &ITL_P90_MS,
    &ITL_P99_MS,
    &E2E_MS,
    &EXPERT_HIT_RATE,
    &H2D_BYTES_PER_TOKEN,
    &ENERGY_PER_TOKEN_J,
];

/// The ones a regression is judged by; the others follow from them.
pub static HEADLINES: [&Metric; 4] = [&DECODE_TOK_S, &PREFILL_TOK_S, &TTFT_MS, &ITL_P99_MS];

/// Measured once per run, not per repetition.
pub const PEAK_RSS: (&str, &str) = (
    "peak_rss_bytes",
    "most RAM the process held at once (VmHWM), mapped files included",
);
pub const PEAK_VRAM: (&str, &str) = (
    "peak_vram_bytes",
    "largest GPU memory use the driver reported while the run was sampled",
);

impl Metric {
    /// One value per repetition that has one.
    pub fn values(&self, context: &ContextRun) -> Vec<f64> {
        context.repetitions.iter().filter_map(self.value).collect()
    }

    pub fn summary(&self, context: &ContextRun) -> Option<Summary> {
        Summary::of(&self.values(context))
    }

    pub fn of(&self, repetition: &Repetition) -> Option<f64> {
        (self.value)(repetition)
    }

    /// How much worse `new` is than `base`, as a share of `base`; negative if better.
    pub fn worsening(&self, base: f64, new: f64) -> f64 {
        match self.better {
            Better::Higher => (base - new) / base,
            Better::Lower => (new - base) / base,
        }
    }
}

/// A rate of a run too short to have one is absent, not zero.
fn positive(value: f64) -> Option<f64> {
    (value.is_finite() && value > 0.0).then_some(value)
}

impl ContextRun {
    /// Fills in the errors from the prediction and the medians of the repetitions.
    pub fn compare_prediction(&mut self) {
        let prediction = self.prediction.as_ref();
        let error = |predicted: Option<f64>, metric: &Metric| {
            Some(prediction_error(predicted?, metric.summary(self)?.median))
        };
        let decode = error(prediction.map(|p| p.decode_tok_s), &DECODE_TOK_S);
        let prefill = error(prediction.and_then(|p| p.prefill_tok_s), &PREFILL_TOK_S);
        (self.prediction_error, self.prefill_prediction_error) = (decode, prefill);
    }
}

#[cfg(test)]
mod tests {
    use super::super::record::ExpertCounts;
    use super::*;

    fn repetition() -> Repetition {
        Repetition {
            prompt_tokens: 100,
            generated_tokens: 5,
            ttft_ms: 200.0,
            itl_ms: vec![10.0, 20.0, 30.0, 40.0],
            prefill_tok_s: 500.0,
            decode_tok_s: 40.0,
            e2e_ms: 300.0,
            experts: ExpertCounts {
                hits: 30,
                misses: 10,
                moved_bytes: 0,
                h2d_bytes: 2100,
                ..ExpertCounts::default()
            },
            decode_split: None,
            gpu_energy_j: Some(10.0),
            output_sha256: String::new(),
            cached_tokens: None,
        }
    }

    #[test]
    fn formulas_hold_on_a_small_example() {
        let r = repetition();
        assert_eq!(TPOT_MS.of(&r), Some(25.0));
        assert_eq!(ITL_P50_MS.of(&r), Some(25.0));
        assert_eq!(EXPERT_HIT_RATE.of(&r), Some(0.75));
        assert_eq!(H2D_BYTES_PER_TOKEN.of(&r), Some(525.0));
        assert_eq!(ENERGY_PER_TOKEN_J.of(&r), Some(2.0));
    }

    #[test]
    fn a_single_token_has_no_decode_figures() {
        let r = Repetition {
            generated_tokens: 1,
            itl_ms: vec![],
            decode_tok_s: 0.0,
            ..repetition()
        };
        assert_eq!(TPOT_MS.of(&r), None);
        assert_eq!(ITL_P99_MS.of(&r), None);
        assert_eq!(DECODE_TOK_S.of(&r), None);
    }

    #[test]
    fn worse_means_slower_or_longer() {
        assert_eq!(DECODE_TOK_S.worsening(100.0, 90.0), 0.1);
        assert_eq!(TTFT_MS.worsening(100.0, 90.0), -0.1);
    }

    #[test]
    fn keys_are_unique() {
        let mut keys: Vec<_> = METRICS.iter().map(|m| m.key).collect();
        keys.sort_unstable();
        keys.dedup();
        assert_eq!(keys.len(), METRICS.len());
    }
}
