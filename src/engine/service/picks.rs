//! What the router picked: for one request, and since the start.

use super::{LayerRouting, RoutingSummary};
use crate::backend::Routing;
use crate::engine::Engine;

/// `[layer][expert]` picks of the router.
pub(super) type Picks = Vec<Vec<u64>>;

pub(super) fn no_picks(engine: &Engine) -> Picks {
    vec![vec![0; engine.shape().moe.num_experts]; engine.shape().num_layers()]
}

pub(super) fn count(picks: &mut Picks, layer: usize, routing: &Routing) {
    for &expert in &routing.topk_ids {
        picks[layer][usize::from(expert)] += 1;
    }
}

pub(super) fn summary(picks: &Picks) -> RoutingSummary {
    let of_layer = |picks: &Vec<u64>| {
        let total: u64 = picks.iter().sum();
        let mut used: Vec<(usize, u64)> = picks.iter().copied().enumerate().collect();
        used.retain(|&(_, n)| n > 0);
        used.sort_by_key(|&(expert, n)| (std::cmp::Reverse(n), expert));
        LayerRouting {
            picks: total,
            distinct_experts: used.len(),
            entropy_bits: entropy_bits(picks),
            top_experts: used.into_iter().take(8).collect(),
        }
    };
    RoutingSummary {
        layers: picks.iter().map(of_layer).collect(),
    }
}

/// Shannon entropy of a distribution given by counts.
pub fn entropy_bits(counts: &[u64]) -> f64 {
    let total: u64 = counts.iter().sum();
    let share = |&n: &u64| n as f64 / total.max(1) as f64;
    let of = |p: f64| if p > 0.0 { -p * p.log2() } else { 0.0 };
    counts.iter().map(share).map(of).sum()
}
