//! What the cost model says of a run, from its placement and flags.

use crate::commands::args::ComputeArgs;
use crate::commands::load;
use crate::planning::PolicyConfig;
use crate::planning::cost::{self, DecodeSituation, PrefillSituation};
use crate::planning::execution::PrefillSettings;
use crate::planning::footprint::{Footprint, KvDtype};
use crate::planning::hardware::Hardware;
use crate::planning::placement::{self, Placement};
use crate::report::record::{Prediction, PredictionTerm};

/// What a prediction takes from the plan and the flags.
pub struct Situation {
    /// `[layer]`
    hit_rates: Vec<f64>,
    promotions_per_token: f64,
    kv_dtype: KvDtype,
    head: placement::Tier,
    slots: usize,
    prefill: PrefillSettings,
}

/// What a run did at one context.
#[derive(Clone, Copy)]
pub struct Lengths {
    pub prompt_tokens: usize,
    pub generated_tokens: usize,
}

impl Lengths {
    /// Tokens that a decode step sees, in the middle of the generated ones.
    pub fn seen(self) -> usize {
        self.prompt_tokens + self.generated_tokens / 2
    }
}

impl Situation {
    /// Everything from RAM.
    pub fn on_cpu(num_layers: usize) -> Self {
        Situation {
            hit_rates: vec![0.0; num_layers],
            promotions_per_token: 0.0,
            kv_dtype: KvDtype::F16,
            head: placement::Tier::Vram,
            slots: 0,
            prefill: PrefillSettings::default(),
        }
    }
}

pub fn situation(compute: &ComputeArgs, placement: &Placement) -> Situation {
    let (share, promoted) = match compute.policy {
        _ if compute.cpu_moe => (0.0, 0.0),
        Some(forced) if forced != placement.policy => forced_policy(forced, placement),
        _ => (1.0, placement.decode.promotion_h2d_bytes_per_token),
    };
    let hit_rates = placement.expected_hit_rates.iter();
    let hit_rates = hit_rates.map(|rate| (rate * share).min(1.0)).collect();
    let promotions_per_token = promoted / placement.expert_bytes.max(1) as f64;
    Situation {
        hit_rates,
        promotions_per_token,
        kv_dtype: compute
            .kv_dtype
            .map_or(placement.kv_dtype, load::planned_kv),
        head: placement.head,
        slots: match compute.cpu_moe {
            true => 0,
            false => placement.total_slots(),
        },
        prefill: compute.prefill.settings(),
    }
}

/// Of a policy in place of the planned one: its hits as a share of the planned one's, and the bytes that it
/// moves per token, both on held-out text if the plan has such; else the hits of the plan, and nothing moved.
fn forced_policy(forced: PolicyConfig, placement: &Placement) -> (f64, f64) {
    let scores = placement.validation.iter().flat_map(|v| &v.scores);
    let planned = scores.clone().find(|score| score.chosen);
    let other = scores.clone().find(|score| score.policy == forced.label());
    match (planned, other) {
        (Some(planned), Some(other)) => (
            other.expert_hit_rate / planned.expert_hit_rate.max(f64::MIN_POSITIVE),
            other.h2d_bytes_per_token,
        ),
        _ => (1.0, 0.0),
    }
}

/// Prefill of the prompt, and decode in the middle of what is generated after it.
pub fn predict(
    footprint: &Footprint,
    machine: &Hardware,
    lengths: Lengths,
    at: &Situation,
) -> Prediction {
    let decode = cost::decode(
        footprint,
        machine,
        &DecodeSituation {
            ctx_tokens: lengths.seen() as u64,
            kv_dtype: at.kv_dtype,
            head: at.head,
            hit_rates: &at.hit_rates,
            promotions_per_token: at.promotions_per_token,
            disk_share: 0.0,
        },
    );
    let prefill = PrefillSituation {
        prompt_tokens: lengths.prompt_tokens as u64,
        slots: at.slots,
        settings: at.prefill,
    };
    let prefill = cost::prefill(footprint, machine, prefill);
    let terms = decode.terms.into_iter();
    Prediction {
        decode_tok_s: decode.tok_s,
        prefill_tok_s: Some(prefill.tok_s),
        terms: terms
            .map(|t| PredictionTerm {
                name: t.name,
                ms_per_token: t.ms,
            })
            .collect(),
    }
}
