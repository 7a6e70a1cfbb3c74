//! What the experts did in the last minute: samples of counts, and differences between them.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::engine::service::{ExpertsReport, entropy_bits};

/// From one sample to the next.
pub const SAMPLE_EVERY: Duration = Duration::from_secs(5);
const KEPT: usize = 12;

/// Samples of the last minute.
#[derive(Default)]
pub struct History {
    samples: Mutex<VecDeque<Sample>>,
}

struct Sample {
    at: Instant,
    report: ExpertsReport,
    speed: Speed,
}

/// Sums over finished requests.
#[derive(Clone, Copy, Debug, Default)]
pub struct Speed {
    pub prefill_tokens: f64,
    pub prefill_s: f64,
    /// After each request's first token
    pub decode_tokens: f64,
    pub decode_s: f64,
}

/// What happened in some time.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Activity {
    pub seconds: f64,
    pub prompt_tokens: u64,
    pub generated_tokens: u64,
    /// While decoding, of requests that finished
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decode_tok_s: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefill_tok_s: Option<f64>,
    /// Of decode picks, where there are expert slots
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hit_rate: Option<f64>,
    pub promoted_bytes: u64,
    pub h2d_bytes: u64,
    pub layers: Vec<LayerActivity>,
}

#[derive(Clone, Debug, Default, Serialize)]
pub struct LayerActivity {
    pub layer: usize,
    /// Of the router, prefill included
    pub picks: u64,
    pub hits: u64,
    pub misses: u64,
    /// Experts copied into slots
    pub promotions: u64,
    /// Where decode picks were computed; the shares sum to 1
    pub vram_share: f64,
    pub pcie_share: f64,
    pub cpu_share: f64,
    /// Of the picks' distribution over experts
    pub entropy_bits: f64,
}

impl History {
    /// Keeps a sample; the oldest beyond a minute go.
    pub fn add(&self, report: ExpertsReport, speed: Speed) {
        let mut samples = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
        samples.push_back(Sample {
            at: Instant::now(),
            report,
            speed,
        });
        while samples.len() > KEPT {
            samples.pop_front();
        }
    }

    /// What happened since the oldest sample, and the picks of each expert since then.
    pub fn last_minute(&self, now: &ExpertsReport, speed: Speed) -> (Activity, Vec<Vec<u64>>) {
        let samples = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
        match samples.front() {
            None => (Activity::default(), now.picks.clone()),
            Some(first) => {
                let seconds = first.at.elapsed().as_secs_f64();
                activity(seconds, &first.report, now, first.speed, speed)
            }
        }
    }
}

/// What happened since the start.
pub fn since_start(seconds: f64, now: &ExpertsReport, speed: Speed) -> Activity {
    let nothing = ExpertsReport::default();
    activity(seconds, &nothing, now, Speed::default(), speed).0
}

/// The difference between two reports; an earlier one that knows fewer layers counts as zero there.
fn activity(
    seconds: f64,
    before: &ExpertsReport,
    now: &ExpertsReport,
    speed_before: Speed,
    speed: Speed,
) -> (Activity, Vec<Vec<u64>>) {
    let mut heat = Vec::new();
    let mut layers = Vec::new();
    let (mut hits, mut misses) = (0, 0);
    for (layer, picks) in now.picks.iter().enumerate() {
        let earlier = before.picks.get(layer);
        let earlier = |expert: usize| earlier.map_or(0, |picks| picks[expert]);
        let picks: Vec<u64> = (picks.iter().enumerate())
            .map(|(expert, &n)| n.saturating_sub(earlier(expert)))
            .collect();
        let counts = now.counts.get(layer).copied().unwrap_or_default();
        let old = before.counts.get(layer).copied().unwrap_or_default();
        let places = now.places.get(layer).copied().unwrap_or_default();
        let old_places = before.places.get(layer).copied().unwrap_or_default();
        let places: Vec<u64> = (places.iter().zip(old_places))
            .map(|(&now, old)| now.saturating_sub(old))
            .collect();
        let placed: u64 = places.iter().sum();
        let share = |n: u64| n as f64 / placed.max(1) as f64;
        let of_layer = LayerActivity {
            layer,
            picks: picks.iter().sum(),
            hits: counts.hits.saturating_sub(old.hits),
            misses: counts.misses.saturating_sub(old.misses),
            promotions: counts.admits.saturating_sub(old.admits),
            vram_share: share(places[0]),
            pcie_share: share(places[2]),
            // Without a GPU the CPU computes all.
            cpu_share: if placed == 0 { 1.0 } else { share(places[1]) },
            entropy_bits: entropy_bits(&picks),
        };
        hits += of_layer.hits;
        misses += of_layer.misses;
        layers.push(of_layer);
        heat.push(picks);
    }
    let rate = |tokens: f64, s: f64| (s > 0.0 && tokens > 0.0).then(|| tokens / s);
    let all = Activity {
        seconds,
        prompt_tokens: now.prompt_tokens.saturating_sub(before.prompt_tokens),
        generated_tokens: now.generated_tokens.saturating_sub(before.generated_tokens),
        decode_tok_s: rate(
            speed.decode_tokens - speed_before.decode_tokens,
            speed.decode_s - speed_before.decode_s,
        ),
        prefill_tok_s: rate(
            speed.prefill_tokens - speed_before.prefill_tokens,
            speed.prefill_s - speed_before.prefill_s,
        ),
        hit_rate: (hits + misses > 0).then(|| hits as f64 / (hits + misses) as f64),
        promoted_bytes: now.promoted_bytes.saturating_sub(before.promoted_bytes),
        h2d_bytes: now.h2d_bytes.saturating_sub(before.h2d_bytes),
        layers,
    };
    (all, heat)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::planning::LayerCounts;

    fn report(picks: &[u64], hits: u64) -> ExpertsReport {
        ExpertsReport {
            picks: vec![picks.to_vec()],
            counts: vec![LayerCounts {
                hits,
                misses: 10,
                admits: 2,
            }],
            places: vec![[hits, 6, 4]],
            generated_tokens: hits,
            ..ExpertsReport::default()
        }
    }

    #[test]
    fn the_last_minute_is_what_came_after_its_first_sample() {
        let history = History::default();
        history.add(report(&[5, 5], 10), Speed::default());
        let speed = Speed {
            decode_tokens: 30.0,
            decode_s: 2.0,
            ..Speed::default()
        };
        let (minute, heat) = history.last_minute(&report(&[9, 5], 40), speed);
        assert_eq!(heat, [[4, 0]]);
        assert_eq!(minute.generated_tokens, 30);
        assert_eq!(minute.decode_tok_s, Some(15.0));
        assert_eq!(minute.hit_rate, Some(1.0));
        let layer = &minute.layers[0];
        assert_eq!((layer.hits, layer.misses, layer.promotions), (30, 0, 0));
        assert_eq!(layer.vram_share, 1.0);
        assert_eq!(layer.entropy_bits, 0.0);
        let start = since_start(1.0, &report(&[8, 8], 30), Speed::default());
        assert_eq!(start.hit_rate, Some(0.75));
        assert_eq!(start.layers[0].entropy_bits, 1.0);
        assert_eq!(start.layers[0].cpu_share, 0.15);
    }
}
