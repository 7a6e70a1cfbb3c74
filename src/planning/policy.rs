//! Which experts of a layer stay in VRAM.
//!
//! One object decides, in the simulator and at run time: what was simulated is what runs. A policy
//! knows slots and picks, not bytes or devices; who drives it does the copying.

use serde::{Deserialize, Serialize};

use super::trace::Record;

/// Copy `expert` into `slot`, over `evicted` if the slot was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Admit {
    pub expert: u16,
    pub slot: u16,
    pub evicted: Option<u16>,
}

/// The expert caches of all layers.
pub trait Policy: Send {
    fn name(&self) -> String;

    /// The slot that holds `expert` now; none is a miss.
    fn slot(&self, layer: usize, expert: u16) -> Option<u16>;

    /// Tells what one token picked in `layer` (distinct, best first), after all picks have been
    /// looked up with [`Policy::slot`], and appends what to copy before the next token.
    fn access(&mut self, layer: usize, topk_ids: &[u16], admits: &mut Vec<Admit>);
}

/// A policy by name and parameters, as placement.json has it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "snake_case")]
pub enum PolicyConfig {
    /// The planned experts, and no others, ever.
    Static,
    /// Every miss is admitted; the expert picked longest ago leaves. Pinned experts stay.
    Lru,
    /// A miss is admitted if it was picked more often than some resident, the past counting half
    /// every `half_life_tokens`. Pinned experts stay.
    LfuDecay { half_life_tokens: f64 },
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
            PolicyConfig::LfuDecay { .. } => "lfu_decay",
        }
    }

    /// A layer of `slots`, filled from `hottest` as the policy would have it.
    pub fn fill(&self, slots: usize, hottest: &[u16]) -> LayerSlots {
        let experts = hottest[..slots.min(hottest.len())].to_vec();
        let (pinned_experts, initial_experts) = match self {
            PolicyConfig::Static => (experts, Vec::new()),
            _ => (Vec::new(), experts),
        };
        LayerSlots {
            slots,
            pinned_experts,
            initial_experts,
        }
    }

    /// # Panics
    /// If a layer names experts that are not there, or more than it has slots.
    pub fn build(&self, num_experts: usize, layers: &[LayerSlots]) -> Box<dyn Policy> {
        match *self {
            PolicyConfig::Static => {
                let pinned = |l: &LayerSlots| LruLayer::new(num_experts, l, false);
                Box::new(Lru {
                    name: self.name(),
                    layers: layers.iter().map(pinned).collect(),
                })
            }
            PolicyConfig::Lru => {
                let dynamic = |l: &LayerSlots| LruLayer::new(num_experts, l, true);
                Box::new(Lru {
                    name: self.name(),
                    layers: layers.iter().map(dynamic).collect(),
                })
            }
            PolicyConfig::LfuDecay { half_life_tokens } => {
                let growth = 0.5f64.powf(-1.0 / half_life_tokens.max(1.0));
                let layer = |l: &LayerSlots| LfuLayer::new(num_experts, l, growth);
                Box::new(LfuDecay(layers.iter().map(layer).collect()))
            }
        }
    }
}

/// Which expert is in which slot; pinned ones take the first slots.
#[derive(Debug)]
struct SlotMap {
    slot_of: Vec<Option<u16>>,
    expert_in: Vec<Option<u16>>,
    pinned: usize,
}

impl SlotMap {
    fn new(num_experts: usize, layer: &LayerSlots) -> Self {
        let mut map = SlotMap {
            slot_of: vec![None; num_experts],
            expert_in: vec![None; layer.slots],
            pinned: layer.pinned_experts.len(),
        };
        let content = layer.pinned_experts.iter().chain(&layer.initial_experts);
        for (slot, &expert) in (0..).zip(content) {
            map.place(expert, slot);
        }
        map
    }

    fn place(&mut self, expert: u16, slot: u16) -> Admit {
        let evicted = self.expert_in[usize::from(slot)].replace(expert);
        if let Some(old) = evicted {
            self.slot_of[usize::from(old)] = None;
        }
        self.slot_of[usize::from(expert)] = Some(slot);
        Admit {
            expert,
            slot,
            evicted,
        }
    }

    fn slot(&self, expert: u16) -> Option<u16> {
        self.slot_of[usize::from(expert)]
    }

    fn is_pinned(&self, expert: u16) -> bool {
        self.slot(expert)
            .is_some_and(|s| usize::from(s) < self.pinned)
    }

    /// The first empty slot, else the one whose expert `worth` values least; pinned ones excepted.
    fn victim(&self, worth: impl Fn(u16) -> f64) -> Option<(u16, f64)> {
        let mut least: Option<(u16, f64)> = None;
        for (slot, expert) in (0..).zip(&self.expert_in).skip(self.pinned) {
            let Some(expert) = *expert else {
                return Some((slot, f64::NEG_INFINITY));
            };
            let value = worth(expert);
            if least.is_none_or(|(_, lowest)| value < lowest) {
                least = Some((slot, value));
            }
        }
        least
    }
}

/// LRU with pinned experts; without dynamic slots, the static set.
struct Lru {
    name: &'static str,
    layers: Vec<LruLayer>,
}

struct LruLayer {
    map: SlotMap,
    /// Whether picks change the content.
    dynamic: bool,
    /// Slots by recency, a ring through `HEAD`: `[slots + 1]` each.
    newer: Vec<u16>,
    older: Vec<u16>,
    /// Scratch: a token's picks that move.
    picks: Vec<u16>,
}

impl LruLayer {
    fn new(num_experts: usize, layer: &LayerSlots, dynamic: bool) -> Self {
        let slots = layer.slots as u16;
        let mut this = LruLayer {
            map: SlotMap::new(num_experts, layer),
            dynamic,
            newer: (0..=slots).collect(),
            older: (0..=slots).collect(),
            picks: Vec::new(),
        };
        // Slot 0 becomes the newest: the hottest, and the last to go. Empty ones go first.
        for slot in (this.map.pinned as u16..slots).rev() {
            this.link_newest(slot);
        }
        this
    }

    /// The ring's anchor: its older neighbour is the newest slot, its newer one the oldest.
    fn head(&self) -> u16 {
        self.map.expert_in.len() as u16
    }

    fn link_newest(&mut self, slot: u16) {
        let (head, newest) = (self.head(), self.older[usize::from(self.head())]);
        self.older[usize::from(slot)] = newest;
        self.newer[usize::from(slot)] = head;
        self.newer[usize::from(newest)] = slot;
        self.older[usize::from(head)] = slot;
    }

    fn touch(&mut self, slot: u16) {
        let (newer, older) = (self.newer[usize::from(slot)], self.older[usize::from(slot)]);
        self.older[usize::from(newer)] = older;
        self.newer[usize::from(older)] = newer;
        self.link_newest(slot);
    }

    /// See `stack_distance`: the picks end on top, the best foremost, and evict none of their own.
    fn access(&mut self, topk_ids: &[u16], admits: &mut Vec<Admit>) {
        let room = self.map.expert_in.len() - self.map.pinned;
        if !self.dynamic || room == 0 {
            return;
        }
        let mut picks = std::mem::take(&mut self.picks);
        picks.clear();
        picks.extend(
            topk_ids
                .iter()
                .filter(|&&e| !self.map.is_pinned(e))
                .take(room),
        );
        // Residents first, so that the oldest slot is none of this token's while others are left.
        for &expert in &picks {
            if let Some(slot) = self.map.slot(expert) {
                self.touch(slot);
            }
        }
        for &expert in picks.iter().rev() {
            let slot = self.map.slot(expert).unwrap_or_else(|| {
                let oldest = self.newer[usize::from(self.head())];
                admits.push(self.map.place(expert, oldest));
                oldest
            });
            self.touch(slot);
        }
        self.picks = picks;
    }
}

impl Policy for Lru {
    fn name(&self) -> String {
        self.name.into()
    }

    fn slot(&self, layer: usize, expert: u16) -> Option<u16> {
        self.layers[layer].map.slot(expert)
    }

    fn access(&mut self, layer: usize, topk_ids: &[u16], admits: &mut Vec<Admit>) {
        self.layers[layer].access(topk_ids, admits);
    }
}

struct LfuDecay(Vec<LfuLayer>);

struct LfuLayer {
    map: SlotMap,
    /// Picks per expert, in units that grow as the past fades.
    score: Vec<f64>,
    unit: f64,
    growth: f64,
    /// Scratch: a token's misses.
    missed: Vec<u16>,
}

impl LfuLayer {
    fn new(num_experts: usize, layer: &LayerSlots, growth: f64) -> Self {
        LfuLayer {
            map: SlotMap::new(num_experts, layer),
            score: vec![0.0; num_experts],
            unit: 1.0,
            growth,
            missed: Vec::new(),
        }
    }

    fn access(&mut self, topk_ids: &[u16], admits: &mut Vec<Admit>) {
        // Letting the unit grow is the decay of all scores at once.
        self.unit *= self.growth;
        if self.unit > 1e100 {
            self.score.iter_mut().for_each(|s| *s /= self.unit);
            self.unit = 1.0;
        }
        for &expert in topk_ids {
            self.score[usize::from(expert)] += self.unit;
        }
        let score = |e: u16| self.score[usize::from(e)];
        self.missed.clear();
        self.missed
            .extend(topk_ids.iter().filter(|&&e| self.map.slot(e).is_none()));
        // The most wanted first, so that none is copied only to make room for the next.
        self.missed.sort_by(|&a, &b| score(b).total_cmp(&score(a)));
        for &expert in &self.missed {
            match self.map.victim(score) {
                Some((slot, least)) if least < score(expert) => {
                    admits.push(self.map.place(expert, slot));
                }
                _ => break,
            }
        }
    }
}

impl Policy for LfuDecay {
    fn name(&self) -> String {
        "lfu_decay".into()
    }

    fn slot(&self, layer: usize, expert: u16) -> Option<u16> {
        self.0[layer].map.slot(expert)
    }

    fn access(&mut self, layer: usize, topk_ids: &[u16], admits: &mut Vec<Admit>) {
        self.0[layer].access(topk_ids, admits);
    }
}

/// Belady's optimum: keeps what is picked again soonest. Knows one trace and can only replay it.
///
/// No policy has more hits on that trace from the same start: an upper bound to measure others by.
pub struct Clairvoyant(Vec<ClairvoyantLayer>);

struct ClairvoyantLayer {
    map: SlotMap,
    /// `[tokens, k]` the token that picks the same expert next, MAX if none.
    next_use: Vec<u32>,
    at: usize,
    /// `[E]` next use of each expert as of now.
    next_of: Vec<u32>,
}

impl Clairvoyant {
    /// Learns the future of every layer from `records`.
    pub fn new<'a>(
        num_experts: usize,
        num_experts_per_tok: usize,
        layers: &[LayerSlots],
        records: impl IntoIterator<Item = &'a Record>,
    ) -> Self {
        let mut picks: Vec<Vec<u16>> = vec![Vec::new(); layers.len()];
        for record in records {
            if let Record::Picks(p) = record {
                picks[usize::from(p.layer)].extend_from_slice(&p.topk_ids);
            }
        }
        let layer = |(slots, picks): (&LayerSlots, Vec<u16>)| {
            let mut next_of = vec![u32::MAX; num_experts];
            let mut next_use = vec![u32::MAX; picks.len()];
            for (i, &expert) in picks.iter().enumerate().rev() {
                next_use[i] = next_of[usize::from(expert)];
                next_of[usize::from(expert)] = (i / num_experts_per_tok) as u32;
            }
            ClairvoyantLayer {
                map: SlotMap::new(num_experts, slots),
                next_use,
                at: 0,
                next_of,
            }
        };
        Clairvoyant(layers.iter().zip(picks).map(layer).collect())
    }
}

impl Policy for Clairvoyant {
    fn name(&self) -> String {
        "belady".into()
    }

    fn slot(&self, layer: usize, expert: u16) -> Option<u16> {
        self.0[layer].map.slot(expert)
    }

    fn access(&mut self, layer: usize, topk_ids: &[u16], admits: &mut Vec<Admit>) {
        let layer = &mut self.0[layer];
        for &expert in topk_ids {
            layer.next_of[usize::from(expert)] = layer.next_use[layer.at];
            layer.at += 1;
        }
        let next = |e: u16| -f64::from(layer.next_of[usize::from(e)]);
        let mut missed: Vec<u16> = topk_ids
            .iter()
            .copied()
            .filter(|&e| layer.map.slot(e).is_none())
            .collect();
        missed.sort_by_key(|&e| layer.next_of[usize::from(e)]);
        for expert in missed {
            match layer.map.victim(next) {
                Some((slot, least)) if least < next(expert) => {
                    admits.push(layer.map.place(expert, slot));
                }
                _ => {}
            }
        }
    }
}
