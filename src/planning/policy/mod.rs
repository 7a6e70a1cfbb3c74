//! Which experts of a layer stay in VRAM.
//!
//! One object decides, in the simulator and at run time: what was simulated is what runs. A policy
//! knows slots and picks, not bytes or devices; [`super::ExpertCache`] holds it to a byte budget,
//! and whoever drives that does the copying.

mod belady;
mod counter;
mod least_stale;
mod lfu;
mod lru;
mod slot_map;

use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub use belady::Clairvoyant;

use counter::DecayedPicks;
use least_stale::LeastStaleLayer;
use lfu::LfuLayer;
use lru::{Admission, LruLayer};
use slot_map::SlotMap;

/// Copy `expert` into `slot`, over `evicted` if the slot was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Admit {
    pub expert: u16,
    pub slot: u16,
    pub evicted: Option<u16>,
}

/// Experts of a layer that its slots may admit.
#[derive(Clone, Copy, Debug)]
pub struct Offer<'a> {
    pub at_most: usize,
    /// By expert, whether it is offered; `None` if all are
    pub experts: Option<&'a [bool]>,
}

impl Offer<'_> {
    /// Any experts.
    pub fn of_any(at_most: usize) -> Self {
        Offer {
            at_most,
            experts: None,
        }
    }

    pub fn has(&self, expert: u16) -> bool {
        self.experts
            .is_none_or(|offered| offered[usize::from(expert)])
    }
}

/// The expert caches of all layers.
pub trait Policy: Send {
    fn name(&self) -> String;

    /// The slot that holds `expert` now; none is a miss.
    fn slot(&self, layer: usize, expert: u16) -> Option<u16>;

    /// `[slots]` the expert in each slot of a layer.
    fn contents(&self, layer: usize) -> &[Option<u16>];

    /// Tells what one token picked in `layer` (distinct, best first), after all picks have been
    /// looked up with [`Policy::slot`], and appends what to copy before the next token: at most
    /// `room` experts. With room for none the policy learns and the slots stay as they are.
    fn access(&mut self, layer: usize, topk_ids: &[u16], room: usize, admits: &mut Vec<Admit>);

    /// What is told from here on belongs to another sequence.
    fn begin_sequence(&mut self) {}

    /// After picks that it only recorded, such as a prompt's: appends what to copy so that the slots
    /// hold what was picked most of the offered experts. Nothing for policies that go by the next pick
    /// alone.
    fn admit_prefill(&mut self, _layer: usize, _offer: Offer<'_>, _admits: &mut Vec<Admit>) {}

    /// What a restart must know of a layer; none for policies that cannot be stopped.
    fn state(&self, _layer: usize) -> Option<LayerState> {
        None
    }

    /// Goes on from [`Policy::state`] of a layer with the same slots and experts.
    fn restore(&mut self, _layer: usize, _state: &LayerState) {}
}

/// The content of a layer's slots and what its policy thinks of each expert.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerState {
    /// `[slots]`
    pub experts: Vec<Option<u16>>,
    /// `[E]` recency, picks or age, as the policy orders experts.
    pub worth: Vec<f32>,
}

/// A policy by name and parameters, as placement.json has it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "snake_case")]
pub enum PolicyConfig {
    /// The planned experts, and no others, ever.
    Static,
    /// Every miss is admitted; the expert picked longest ago leaves.
    Lru,
    /// LRU beside the hottest experts, which stay: this share of the slots.
    LruPinned { pinned_share: f64 },
    /// LRU that admits a miss only once it was picked this often, the past counting half every
    /// `half_life_tokens`.
    LruThreshold {
        min_picks: f64,
        half_life_tokens: f64,
    },
    /// A miss is admitted if it was picked more often than some resident, by more than
    /// `margin_picks`, the past counting half every `half_life_tokens`, and an eighth in each new
    /// sequence. The margin is the pay-back test: decayed picks are the picks to expect, so the copy
    /// must be worth fewer hits than it brings.
    LfuDecay {
        half_life_tokens: f64,
        #[serde(default)]
        margin_picks: f64,
    },
    /// Every miss is admitted; what was admitted first leaves, however recently it was picked.
    LeastStale,
}

/// The cache of one layer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerSlots {
    pub slots: usize,
    /// Never evicted, hottest first.
    pub pinned_experts: Vec<u16>,
    /// First content of the other slots, hottest first; they may also start empty.
    pub initial_experts: Vec<u16>,
}

impl PolicyConfig {
    pub fn name(&self) -> &'static str {
        match self {
            PolicyConfig::Static => "static",
            PolicyConfig::Lru => "lru",
            PolicyConfig::LruPinned { .. } => "lru_pinned",
            PolicyConfig::LruThreshold { .. } => "lru_threshold",
            PolicyConfig::LfuDecay { .. } => "lfu_decay",
            PolicyConfig::LeastStale => "least_stale",
        }
    }

    /// Name and parameters: `lfu_decay 256 +1.1`.
    pub fn label(&self) -> String {
        let name = self.name();
        match self {
            PolicyConfig::LruPinned { pinned_share } => {
                format!("{name} {:.0}%", 100.0 * pinned_share)
            }
            PolicyConfig::LruThreshold {
                min_picks,
                half_life_tokens,
            } => format!("{name} {min_picks:.1} {half_life_tokens:.0}"),
            PolicyConfig::LfuDecay {
                half_life_tokens,
                margin_picks,
            } => format!("{name} {half_life_tokens:.0} +{margin_picks:.1}"),
            _ => name.into(),
        }
    }

    /// Whether slots ever change their content.
    pub fn is_dynamic(&self) -> bool {
        *self != PolicyConfig::Static
    }

    /// Whether what it only recorded, such as a prompt, can change slots: see [`Policy::admit_prefill`].
    pub fn admits_prefill(&self) -> bool {
        matches!(self, PolicyConfig::LfuDecay { .. })
    }

    /// A layer of `slots`, filled from `hottest` as the policy would have it.
    pub fn fill(&self, slots: usize, hottest: &[u16]) -> LayerSlots {
        let experts = &hottest[..slots.min(hottest.len())];
        let pinned = match self {
            PolicyConfig::Static => experts.len(),
            PolicyConfig::LruPinned { pinned_share } => {
                ((slots as f64 * pinned_share.clamp(0.0, 1.0)) as usize).min(experts.len())
            }
            _ => 0,
        };
        let (pinned, initial) = experts.split_at(pinned);
        LayerSlots {
            slots,
            pinned_experts: pinned.to_vec(),
            initial_experts: initial.to_vec(),
        }
    }

    /// # Panics
    /// If a layer names experts that are not there, or more than it has slots.
    pub fn build(&self, num_experts: usize, layers: &[LayerSlots]) -> Box<dyn Policy> {
        let lru = |admission: &dyn Fn() -> Admission| {
            let layer = |l| LruLayer::new(num_experts, l, admission());
            self.of_layers(layers.iter().map(layer).collect())
        };
        match *self {
            PolicyConfig::Static => lru(&|| Admission::Never),
            PolicyConfig::Lru | PolicyConfig::LruPinned { .. } => lru(&|| Admission::Always),
            PolicyConfig::LruThreshold {
                min_picks,
                half_life_tokens,
            } => lru(&|| {
                let picks = DecayedPicks::new(num_experts, half_life_tokens);
                Admission::Picked(min_picks, picks)
            }),
            PolicyConfig::LfuDecay {
                half_life_tokens,
                margin_picks,
            } => {
                let layer = |l| LfuLayer::new(num_experts, l, half_life_tokens, margin_picks);
                self.of_layers(layers.iter().map(layer).collect())
            }
            PolicyConfig::LeastStale => {
                let layer = |l| LeastStaleLayer::new(num_experts, l);
                self.of_layers(layers.iter().map(layer).collect())
            }
        }
    }

    fn of_layers<L: LayerPolicy + 'static>(&self, layers: Vec<L>) -> Box<dyn Policy> {
        Box::new(Layers {
            name: self.name(),
            layers,
        })
    }
}

/// By name, with the parameters that did best on the built-in corpora.
impl FromStr for PolicyConfig {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let all = [
            PolicyConfig::Static,
            PolicyConfig::Lru,
            PolicyConfig::LruPinned { pinned_share: 0.5 },
            PolicyConfig::LruThreshold {
                min_picks: 1.5,
                half_life_tokens: 64.0,
            },
            PolicyConfig::LfuDecay {
                half_life_tokens: 256.0,
                margin_picks: 0.0,
            },
            PolicyConfig::LeastStale,
        ];
        let found = all.iter().find(|config| config.name() == name);
        found.copied().ok_or_else(|| {
            let names: Vec<&str> = all.iter().map(|config| config.name()).collect();
            format!("expected one of {}", names.join(", "))
        })
    }
}

/// What a policy does in one layer; layers know nothing of one another.
trait LayerPolicy: Send {
    fn map(&self) -> &SlotMap;
    /// As [`Policy::access`].
    fn access(&mut self, topk_ids: &[u16], room: usize, admits: &mut Vec<Admit>);
    /// As [`Policy::begin_sequence`].
    fn begin_sequence(&mut self) {}
    /// As [`Policy::admit_prefill`].
    fn admit_prefill(&mut self, _offer: Offer<'_>, _admits: &mut Vec<Admit>) {}
    /// `[E]` as [`LayerState::worth`].
    fn worth(&self) -> Vec<f32>;
    fn restore(&mut self, contents: &[Option<u16>], worth: &[f32]);
}

struct Layers<L> {
    name: &'static str,
    layers: Vec<L>,
}

impl<L: LayerPolicy> Policy for Layers<L> {
    fn name(&self) -> String {
        self.name.into()
    }

    fn slot(&self, layer: usize, expert: u16) -> Option<u16> {
        self.layers[layer].map().slot(expert)
    }

    fn contents(&self, layer: usize) -> &[Option<u16>] {
        self.layers[layer].map().contents()
    }

    fn begin_sequence(&mut self) {
        self.layers.iter_mut().for_each(L::begin_sequence);
    }

    fn admit_prefill(&mut self, layer: usize, offer: Offer<'_>, admits: &mut Vec<Admit>) {
        self.layers[layer].admit_prefill(offer, admits);
    }

    fn access(&mut self, layer: usize, topk_ids: &[u16], room: usize, admits: &mut Vec<Admit>) {
        self.layers[layer].access(topk_ids, room, admits);
    }

    fn state(&self, layer: usize) -> Option<LayerState> {
        let layer = &self.layers[layer];
        Some(LayerState {
            experts: layer.map().contents().to_vec(),
            worth: layer.worth(),
        })
    }

    fn restore(&mut self, layer: usize, state: &LayerState) {
        self.layers[layer].restore(&state.experts, &state.worth);
    }
}
