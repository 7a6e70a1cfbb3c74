//! What remains of Least-Stale (arXiv:2602.03921) where every layer has slots of its own: a pick
//! refreshes nothing. The picks of the present token are safe; of the others the one that was admitted
//! first leaves, however recently it was picked.

use super::slot_map::SlotMap;
use super::{Admit, LayerPolicy, LayerSlots};

#[derive(Debug)]
pub(super) struct LeastStaleLayer {
    map: SlotMap,
    /// `[E]` when the expert came; later ones are larger.
    admitted: Vec<f32>,
    now: f32,
}

impl LeastStaleLayer {
    pub fn new(num_experts: usize, layer: &LayerSlots) -> Self {
        LeastStaleLayer {
            map: SlotMap::new(num_experts, layer),
            admitted: vec![0.0; num_experts],
            now: 0.0,
        }
    }

    /// Renumbers before f32 can no longer count.
    fn compact(&mut self) {
        let mut order: Vec<u16> = self.map.contents().iter().flatten().copied().collect();
        order.sort_by(|&a, &b| {
            let at = |e: u16| self.admitted[usize::from(e)];
            at(a).total_cmp(&at(b))
        });
        for (time, expert) in (1u16..).zip(order) {
            self.admitted[usize::from(expert)] = f32::from(time);
        }
        self.now = self.map.contents().len() as f32;
    }
}

impl LayerPolicy for LeastStaleLayer {
    fn map(&self) -> &SlotMap {
        &self.map
    }

    fn access(&mut self, topk_ids: &[u16], room: usize, admits: &mut Vec<Admit>) {
        if self.now > 1e7 {
            self.compact();
        }
        let mut left = room;
        for &expert in topk_ids {
            if left == 0 {
                break;
            }
            if self.map.slot(expert).is_some() {
                continue;
            }
            let age = |e: u16| match topk_ids.contains(&e) {
                true => f64::INFINITY,
                false => f64::from(self.admitted[usize::from(e)]),
            };
            match self.map.victim(age) {
                Some((slot, age)) if age < f64::INFINITY => {
                    admits.push(self.map.place(expert, slot));
                    self.now += 1.0;
                    self.admitted[usize::from(expert)] = self.now;
                    left -= 1;
                }
                _ => break,
            }
        }
    }

    fn worth(&self) -> Vec<f32> {
        self.admitted.clone()
    }

    fn restore(&mut self, contents: &[Option<u16>], worth: &[f32]) {
        self.map.set_contents(contents);
        self.admitted.copy_from_slice(worth);
        self.now = worth.iter().copied().fold(0.0, f32::max);
    }
}
