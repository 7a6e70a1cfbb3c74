//! Predicted against measured, term by term: where a prediction is off.
//!
//! A step is seen from the CPU that drives the GPU ([`DecodeSplit`]), a prediction from the bytes
//! that move; terms are put together where one clock covers several.

use super::record::{ContextRun, DecodeSplit, Prediction};
use super::stats;

/// Part of the time of one decode token.
#[derive(Clone, Debug, PartialEq)]
pub struct ComparedTerm {
    pub name: &'static str,
    pub predicted_ms: f64,
    pub measured_ms: f64,
}

/// Of predicted terms, those that pass while the CPU computes experts and the GPU its own.
const EXPERTS: [&str; 4] = [
    "experts in VRAM",
    "waiting for experts in RAM",
    "promotions",
    "experts from disk",
];

/// The terms of a context whose prediction and measurement are both split; else nothing.
pub fn compare(context: &ContextRun) -> Vec<ComparedTerm> {
    let (Some(prediction), Some(split)) = (&context.prediction, median_split(context)) else {
        return Vec::new();
    };
    let sum = |inside: &dyn Fn(&str) -> bool| -> f64 {
        let terms = prediction.terms.iter().filter(|t| inside(&t.name));
        terms.map(|t| t.ms_per_token).sum()
    };
    let gpu_ms = split.wait_gpu_ms + split.tail_ms;
    let term = |name, predicted_ms, measured_ms| ComparedTerm {
        name,
        predicted_ms,
        measured_ms,
    };
    let launch = term("launch", 0.0, split.launch_ms);
    // With all experts in VRAM nothing is handed over, and the GPU's time covers them too.
    if split.experts_cpu + split.experts_pcie == 0.0 {
        return vec![launch, term("GPU", sum(&|_| true), gpu_ms)];
    }
    vec![
        launch,
        term("GPU", sum(&|name| !EXPERTS.contains(&name)), gpu_ms),
        term(
            "experts",
            sum(&|name| EXPERTS.contains(&name)),
            split.cpu_experts_ms,
        ),
    ]
}

/// Predicted ms of a token, all terms.
pub fn predicted_ms(prediction: &Prediction) -> f64 {
    prediction.terms.iter().map(|t| t.ms_per_token).sum()
}

/// Each part's median over the repetitions.
fn median_split(context: &ContextRun) -> Option<DecodeSplit> {
    let splits: Vec<DecodeSplit> = (context.repetitions.iter())
        .filter_map(|r| r.decode_split)
        .collect();
    let median = |of: fn(&DecodeSplit) -> f64| {
        let values: Vec<f64> = splits.iter().map(of).collect();
        stats::percentile(&values, 50.0)
    };
    Some(DecodeSplit {
        steps: splits.iter().map(|s| s.steps).sum(),
        launch_ms: median(|s| s.launch_ms)?,
        wait_gpu_ms: median(|s| s.wait_gpu_ms)?,
        cpu_experts_ms: median(|s| s.cpu_experts_ms)?,
        tail_ms: median(|s| s.tail_ms)?,
        experts_cpu: median(|s| s.experts_cpu)?,
        experts_vram: median(|s| s.experts_vram)?,
        experts_pcie: median(|s| s.experts_pcie)?,
    })
}

#[cfg(test)]
mod tests {
    use super::super::record::{PredictionTerm, Repetition};
    use super::*;

    fn context(experts_cpu: f64) -> ContextRun {
        let names = [
            ("dense weights", 1.0),
            ("lm_head", 0.25),
            ("handoffs", 0.5),
            ("experts in VRAM", 0.75),
            ("waiting for experts in RAM", 2.0),
        ];
        let terms = names.map(|(name, ms_per_token)| PredictionTerm {
            name: name.into(),
            ms_per_token,
        });
        let split = DecodeSplit {
            steps: 10,
            launch_ms: 0.125,
            wait_gpu_ms: 1.5,
            cpu_experts_ms: 2.5,
            tail_ms: 0.5,
            experts_cpu,
            ..DecodeSplit::default()
        };
        ContextRun {
            prediction: Some(Prediction {
                decode_tok_s: 1e3 / 4.5,
                prefill_tok_s: None,
                terms: terms.into(),
            }),
            repetitions: vec![Repetition {
                decode_split: Some(split),
                ..Repetition::default()
            }],
            ..ContextRun::default()
        }
    }

    #[test]
    fn every_predicted_millisecond_stands_in_one_term() {
        let context = context(40.0);
        let terms = compare(&context);
        let of = |name: &str| terms.iter().find(|t| t.name == name).unwrap();
        assert_eq!((of("GPU").predicted_ms, of("GPU").measured_ms), (1.75, 2.0));
        assert_eq!(of("experts").predicted_ms, 2.75);
        let total: f64 = terms.iter().map(|t| t.predicted_ms).sum();
        assert_eq!(total, predicted_ms(context.prediction.as_ref().unwrap()));
    }

    #[test]
    fn with_all_experts_in_vram_the_gpu_has_the_whole_time() {
        let terms = compare(&context(0.0));
        assert_eq!(terms.len(), 2);
        assert_eq!(terms[1].predicted_ms, 4.5);
        let unpredicted = ContextRun {
            prediction: None,
            ..context(0.0)
        };
        assert_eq!(compare(&unpredicted), []);
    }
}
