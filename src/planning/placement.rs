//! What goes where: the body of placement.json.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::cache::{ExpertCache, Throttle};
use super::cost::{DecodePrediction, PrefillPrediction};
use super::footprint::{Footprint, KvDtype};
use super::hardware::Basis;
use super::knapsack::Solution;
use super::policy::{LayerSlots, PolicyConfig};
use super::validation::Validation;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    Vram,
    Ram,
    Disk,
}

/// One line of the memory table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryItem {
    pub component: String,
    pub tier: Tier,
    pub bytes: u64,
}

/// What the hit rates were taken from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CurveSource {
    /// Nothing known of this text: what others measured on a model of many experts.
    Published,
    Profile,
    /// The training part of a trace.
    Trace,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Placement {
    pub vram_budget_bytes: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ram_budget_bytes: Option<u64>,
    pub ctx_tokens: u64,
    /// Sequences in VRAM at once, of `ctx_tokens` each.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub sequences: u64,
    pub kv_dtype: KvDtype,
    /// Where the output matrix is: VRAM, or RAM if that pays.
    #[serde(default = "Tier::vram")]
    pub head: Tier,
    /// Size of one slot.
    pub expert_bytes: u64,
    pub num_experts: usize,
    pub memory: Vec<MemoryItem>,
    pub policy: PolicyConfig,
    /// What promotions may take of the bus; absent: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub throttle: Option<Throttle>,
    pub layers: Vec<LayerSlots>,
    /// Per layer, for these slots and this policy.
    pub expected_hit_rates: Vec<f64>,
    pub curves_from: CurveSource,
    pub solution: Solution,
    /// The machine the prediction is for.
    pub hardware: String,
    pub hardware_basis: Basis,
    pub decode: DecodePrediction,
    pub prefill: PrefillPrediction,
    /// What other budgets would give, ascending.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub budget_curve: Vec<BudgetPoint>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation: Option<Validation>,
}

fn one() -> u64 {
    1
}

fn is_one(sequences: &u64) -> bool {
    *sequences == 1
}

/// A placement that does not describe this model.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum PlacementError {
    #[error("placement: {what} is {found}, the model has {expected}; make a plan for this model")]
    OtherModel {
        what: &'static str,
        found: usize,
        expected: usize,
    },
    #[error("placement: layer {layer}: {reason}; make the plan again")]
    Layer { layer: usize, reason: String },
}

/// What one budget would give, everything else being equal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BudgetPoint {
    pub vram_budget_bytes: u64,
    pub kv_dtype: KvDtype,
    pub head: Tier,
    pub expert_slots: usize,
    pub expert_hit_rate: f64,
    pub decode_tok_s: f64,
    pub prefill_tok_s: f64,
}

impl Tier {
    fn vram() -> Self {
        Tier::Vram
    }

    pub fn name(self) -> &'static str {
        match self {
            Tier::Vram => "VRAM",
            Tier::Ram => "RAM",
            Tier::Disk => "disk",
        }
    }
}

impl Placement {
    pub fn bytes_in(&self, tier: Tier) -> u64 {
        let items = self.memory.iter().filter(|i| i.tier == tier);
        items.map(|i| i.bytes).sum()
    }

    /// The caches of all layers, as they start.
    pub fn cache(&self) -> ExpertCache {
        let throttle = self.throttle.unwrap_or(Throttle::NONE);
        ExpertCache::build(self.policy, self.num_experts, &self.layers, throttle)
    }

    pub fn total_slots(&self) -> usize {
        self.layers.iter().map(|l| l.slots).sum()
    }

    /// Experts of a layer that are in VRAM from the start, hottest first.
    pub fn planned_experts(&self, layer: usize) -> impl Iterator<Item = u16> + '_ {
        let layer = &self.layers[layer];
        layer
            .pinned_experts
            .iter()
            .chain(&layer.initial_experts)
            .copied()
    }

    /// Whether the policy can be built for a model of this size; a file may say anything.
    ///
    /// # Errors
    /// What differs from the model, or which layer contradicts itself.
    pub fn check(&self, model: &Footprint) -> Result<(), PlacementError> {
        for (what, found, expected) in [
            ("the number of layers", self.layers.len(), model.num_layers),
            ("the number of experts", self.num_experts, model.num_experts),
            (
                "an expert's size in bytes",
                self.expert_bytes as usize,
                model.expert_bytes as usize,
            ),
        ] {
            if found != expected {
                return Err(PlacementError::OtherModel {
                    what,
                    found,
                    expected,
                });
            }
        }
        for (layer, slots) in self.layers.iter().enumerate() {
            let wrong = |reason| Err(PlacementError::Layer { layer, reason });
            let planned: Vec<u16> = self.planned_experts(layer).collect();
            if slots.slots > self.num_experts {
                return wrong(format!(
                    "{} slots for {} experts",
                    slots.slots, self.num_experts
                ));
            }
            if planned.len() > slots.slots {
                return wrong(format!(
                    "{} experts in {} slots",
                    planned.len(),
                    slots.slots
                ));
            }
            let mut seen = vec![false; self.num_experts];
            for expert in planned {
                match seen.get_mut(usize::from(expert)) {
                    None => return wrong(format!("there is no expert {expert}")),
                    Some(true) => return wrong(format!("expert {expert} is named twice")),
                    Some(new) => *new = true,
                }
            }
        }
        Ok(())
    }
}
