//! From what is known of the routing to a policy and what it attains with any number of slots.
//!
//! The policy is chosen for the machine, not for the budget: on the documents set aside for the
//! choice, at an eighth, a quarter and half of the experts. So a larger budget never means another
//! policy, and more memory never predicts slower.

use super::{CurveSource, PlanError, PlanRequest, RoutingSource};
use crate::planning::cache::Throttle;
use crate::planning::cost;
use crate::planning::policy::PolicyConfig;
use crate::planning::profile::ProfileBody;
use crate::planning::simulator::Outcome;
use crate::planning::stack_distance::HitCurve;
use crate::planning::stats::RoutingStats;
use crate::planning::validation::{Reading, SHARES, Split};

/// Misses that the default policy admits, where there is no trace to count them on: 2% on the
/// built-in model, 10% on a synthetic one of 512 experts.
const DEFAULT_ADMITS_PER_MISS: f64 = 0.1;
/// Slots, in 16ths of the experts, at which the chosen policy is simulated; lines in between.
const GRID: [usize; 8] = [1, 2, 3, 4, 6, 8, 12, 16];
pub(super) struct Fitted<'a> {
    pub policy: PolicyConfig,
    pub throttle: Option<Throttle>,
    /// `[layer]` of this policy.
    pub curves: Vec<HitCurve>,
    /// `[layer]` experts copied per token, by slots.
    pub admits: Vec<Vec<f64>>,
    /// `[layer]` experts by picks, the most picked first; empty if nothing is known.
    pub hottest: Vec<Vec<u16>>,
    pub from: CurveSource,
    pub split: Option<Split<'a>>,
}

pub(super) fn fit<'a>(request: &PlanRequest<'a>) -> Result<Fitted<'a>, PlanError> {
    let f = request.footprint;
    let throttle = request.hardware.gpu.is_some().then(|| {
        let bytes = cost::promotion_bytes_per_token(f, request.hardware);
        Throttle::of_bytes(bytes, f.expert_bytes, f.num_layers)
    });
    let (curves, hottest, from, split) = known(request)?;
    let mut fitted = Fitted {
        policy: request.policy.unwrap_or(PolicyConfig::LfuDecay {
            half_life_tokens: default_half_life(f.num_experts),
            margin_picks: finite(cost::pay_back_picks(request.hardware)),
        }),
        throttle,
        admits: Vec::new(),
        curves,
        hottest,
        from,
        split,
    };
    match &fitted.split {
        None => fitted.admits = assumed_admits(&fitted, f.num_experts_per_tok),
        Some(split) => {
            fitted.policy = match request.policy {
                Some(forced) => forced,
                None => choose(request, &fitted, split),
            };
            let (curves, admits) = attained(request, &fitted, split);
            (fitted.curves, fitted.admits) = (curves, admits);
        }
    }
    Ok(fitted)
}

/// Without a trace the policy cannot be chosen by trial. Of many experts each is picked seldom, and
/// it takes longer to know the good ones: 128 and 512 tokens did best on the built-in model of 64
/// experts, 2048 on a synthetic one of 512.
fn default_half_life(num_experts: usize) -> f64 {
    (4.0 * num_experts as f64).clamp(128.0, 2048.0)
}

/// JSON has no infinity; no cache ever sees so many picks.
fn finite(picks: f64) -> f64 {
    picks.min(1e9)
}

/// What the candidates on offer are.
fn candidates(request: &PlanRequest) -> Vec<PolicyConfig> {
    let pay_back = finite(cost::pay_back_picks(request.hardware));
    let mut all = vec![
        PolicyConfig::Lru,
        PolicyConfig::Static,
        PolicyConfig::LruPinned { pinned_share: 0.5 },
        PolicyConfig::LruThreshold {
            min_picks: 1.5,
            half_life_tokens: 64.0,
        },
        PolicyConfig::LeastStale,
    ];
    for half_life_tokens in [32.0, 128.0, 512.0, 2048.0] {
        for margin_picks in [0.0, pay_back] {
            all.push(PolicyConfig::LfuDecay {
                half_life_tokens,
                margin_picks,
            });
        }
    }
    all
}

/// The candidate with the least predicted time, over an eighth, a quarter and half of the experts.
/// Each decodes what follows prompts, is held to the byte budget, and pays for its copies: where RAM is the
/// limit, a policy that hits a little less with a tenth of LRU's copies is the faster one.
fn choose(request: &PlanRequest, fitted: &Fitted, split: &Split) -> PolicyConfig {
    let f = request.footprint;
    let candidates = candidates(request);
    let time = |config: &PolicyConfig| -> f64 {
        let at = |share: &f64| {
            let slots = vec![slots_of(*share, f.num_experts); f.num_layers];
            let outcome = split.run(
                Reading::Prompted,
                *config,
                fitted.throttle,
                f,
                &slots,
                &fitted.hottest,
            );
            time_of(request, &outcome)
        };
        SHARES.iter().map(at).sum()
    };
    let timed = candidates.iter().map(|config| (time(config), *config));
    let best = timed.min_by(|(a, _), (b, _)| a.total_cmp(b));
    best.expect("there are candidates").1
}

/// Milliseconds of a token that depend on the policy; misses alone where no GPU uses hits.
pub(super) fn time_of(request: &PlanRequest, outcome: &Outcome) -> f64 {
    let (f, hardware) = (request.footprint, request.hardware);
    if hardware.gpu.is_none() {
        return 1.0 - outcome.hit_rate();
    }
    let layers = outcome.layers.iter();
    let experts: f64 = layers
        .map(|l| cost::expert_layer_ms(f, hardware, l.hit_rate()))
        .sum();
    let picks_per_token = (f.num_layers * f.num_experts_per_tok) as f64;
    let tokens = (outcome.hits() + outcome.misses()) as f64 / picks_per_token;
    let moved = outcome.moved_bytes(f.expert_bytes) as f64 / tokens.max(1.0);
    experts + moved / (hardware.cpu.dram_read_gb_s.value * 1e6)
}

/// Hit curves and copies of the chosen policy, simulated on the documents of the choice.
fn attained(
    request: &PlanRequest,
    fitted: &Fitted,
    split: &Split,
) -> (Vec<HitCurve>, Vec<Vec<f64>>) {
    let f = request.footprint;
    let mut grid: Vec<usize> = GRID
        .iter()
        .map(|n| (n * f.num_experts).div_ceil(16))
        .collect();
    grid.dedup();
    let throttle = fitted.throttle;
    let run = |&slots: &usize| {
        let slots = vec![slots; f.num_layers];
        split.run(
            Reading::Decoded,
            fitted.policy,
            throttle,
            f,
            &slots,
            &fitted.hottest,
        )
    };
    let outcomes: Vec<Outcome> = grid.iter().map(run).collect();
    let tokens = split.selection_tokens().max(1) as f64;
    let curve = |layer: usize| {
        let rate = |o: &Outcome| o.layers[layer].hit_rate();
        let points = grid.iter().copied().zip(outcomes.iter().map(rate));
        HitCurve::through(points, f.num_experts)
    };
    let admits = |layer: usize| {
        let points: Vec<(usize, f64)> = grid
            .iter()
            .zip(&outcomes)
            .map(|(&n, o)| (n, o.layers[layer].admits as f64 / tokens))
            .collect();
        (0..=f.num_experts).map(|n| between(&points, n)).collect()
    };
    let layers = 0..f.num_layers;
    (
        layers.clone().map(curve).collect(),
        layers.map(admits).collect(),
    )
}

/// On straight lines through ascending points and the origin.
fn between(points: &[(usize, f64)], at: usize) -> f64 {
    let after = points.partition_point(|(n, _)| *n < at);
    let (low, from) = match after {
        0 => (0, 0.0),
        i => points[i - 1],
    };
    match points.get(after) {
        Some(&(high, to)) => from + (to - from) * (at - low) as f64 / (high - low).max(1) as f64,
        None => from,
    }
}

/// Copies per token where no trace tells them.
fn assumed_admits(fitted: &Fitted, num_experts_per_tok: usize) -> Vec<Vec<f64>> {
    let per_miss = match fitted.policy {
        PolicyConfig::Static => 0.0,
        PolicyConfig::LfuDecay { .. } | PolicyConfig::LruThreshold { .. } => {
            DEFAULT_ADMITS_PER_MISS
        }
        PolicyConfig::Lru | PolicyConfig::LruPinned { .. } | PolicyConfig::LeastStale => 1.0,
    };
    let limit = fitted.throttle.map_or(f64::INFINITY, |t| t.admits_per_step);
    let admits =
        |hit_rate: &f64| (per_miss * num_experts_per_tok as f64 * (1.0 - hit_rate)).min(limit);
    let of_layer = |curve: &HitCurve| {
        let mut by_slots: Vec<f64> = curve.as_slice().iter().map(admits).collect();
        // Nowhere to copy to.
        by_slots[0] = 0.0;
        by_slots
    };
    fitted.curves.iter().map(of_layer).collect()
}

pub(super) fn slots_of(share: f64, num_experts: usize) -> usize {
    (share * num_experts as f64).round() as usize
}

type Known<'a> = (Vec<HitCurve>, Vec<Vec<u16>>, CurveSource, Option<Split<'a>>);

/// LRU hit curves and hottest experts per layer; with a long enough trace, the uses of its parts.
fn known<'a>(request: &PlanRequest<'a>) -> Result<Known<'a>, PlanError> {
    let f = request.footprint;
    let expected = [f.num_layers, f.num_experts, f.num_experts_per_tok];
    let check = |source_name, found: [usize; 3]| match found == expected {
        true => Ok(()),
        false => Err(PlanError::OtherModel {
            source_name,
            found,
            expected,
        }),
    };
    let of_profile = |profile: &ProfileBody| {
        let hottest = (0..f.num_layers).map(|l| profile.hottest(l)).collect();
        (profile.hit_curves(), hottest)
    };
    match request.routing {
        RoutingSource::Unknown => {
            let curves = vec![HitCurve::published(f.num_experts); f.num_layers];
            let nothing = vec![Vec::new(); f.num_layers];
            Ok((curves, nothing, CurveSource::Published, None))
        }
        RoutingSource::Profile(profile) => {
            let p = profile;
            check(
                "the profile",
                [p.num_layers, p.num_experts, p.num_experts_per_tok],
            )?;
            profile.check()?;
            let (curves, hottest) = of_profile(profile);
            Ok((curves, hottest, CurveSource::Profile, None))
        }
        RoutingSource::Trace(trace) => {
            let h = trace.header();
            check(
                "the trace",
                [h.num_layers, h.num_experts, h.num_experts_per_tok].map(usize::from),
            )?;
            let split = Split::of(trace);
            let mut stats = RoutingStats::new(f.num_layers, f.num_experts, f.num_experts_per_tok);
            let training = split
                .as_ref()
                .map_or(trace.documents(), |s| s.training.clone());
            training.into_iter().flatten().for_each(|r| stats.push(r));
            let (curves, hottest) = of_profile(&stats.profile(Default::default()));
            Ok((curves, hottest, CurveSource::Trace, split))
        }
    }
}
