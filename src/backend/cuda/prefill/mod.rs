//! A chunk of tokens: everything on the GPU, missing experts streaming over PCIe as it gets there.
//!
//! Experts that are not in VRAM pass through a ring of staging buffers, a group of neighbouring
//! experts at a time: first gate and up of all groups of a layer, then down. A second stream copies
//! as far ahead as the ring allows, so that the bus never waits for the kernels; with a few thousand
//! tokens the bus bounds the speed. The memory for it, a few hundred MB, is borrowed from expert
//! slots, whose experts come back afterwards.
//!
//! In a prompt's last chunk slots may change to what the prompt taught, without any more copies over
//! PCIe: see [`renew`].

mod chunk;
mod places;
mod renew;

use std::ops::Range;

use super::abi::ExpertLayout;
use super::device::{Buffer, Device, Event, Pinned, Stream};
use super::store::ExpertStore;
use super::weights::DenseWeights;
use super::{Cuda, CudaOptions};
use crate::backend::{ModelShape, OnRenewing, Result, Routing};
use chunk::Chunk;
use places::{Places, stride};
use renew::{Renewal, Renewing, most_kept};

/// Tokens of the largest chunk, if memory allows: the more, the fewer times all experts cross the
/// bus.
const MAX_TOKENS: usize = 4096;

/// Experts whose matrices are copied and computed together.
const GROUP_EXPERTS: usize = 64;

/// Groups under way. Three keep the bus busy; more ride out layers with long mixers.
const RING: usize = 5;

pub struct Prefill {
    tokens: usize,
    multiprocessors: usize,
    places: Places,
    /// `[layers, 2, E + 1]`: addresses of blobs for gate and up, and for down
    blobs: Buffer,
    host_blobs: Pinned<u64>,
    /// `[layers, E + 1]`: addresses of units
    units: Buffer,
    embeddings: Pinned<f32>,
    /// `[layers, tokens, k]`
    host_ids: Pinned<i32>,
    host_weights: Pinned<f32>,
    ready: Vec<Event>,
    free: Vec<Event>,
    /// A layer's routing is on the host
    routed: Event,
    /// Experts of a layer that can be kept for slots
    kept: usize,
    expert_hidden_stride: usize,
    group_bytes: usize,
    /// The workspace, where it is not borrowed
    own: Option<Buffer>,
}

/// Experts `first .. first + count` of a layer, computed by one launch.
struct Group {
    first: usize,
    count: usize,
    /// The ring buffers of their missing ones, for gate and up, and for down
    ring: Option<[usize; 2]>,
}

impl Prefill {
    pub fn new(
        device: &Device,
        shape: &ModelShape,
        store: &ExpertStore,
        shared_layout: &ExpertLayout,
        dense: &DenseWeights,
        options: &CudaOptions,
        stream: &Stream,
    ) -> Result<Self> {
        let layouts = [&store.layout, shared_layout];
        let (layers, experts) = (shape.num_layers(), shape.moe.num_experts);
        let k = shape.moe.num_experts_per_tok;
        let up_bytes = store.layout.down_offset;
        let down_bytes = store.layout.blob_bytes - up_bytes;
        let group = GROUP_EXPERTS.min(experts);
        let group_bytes = group * (up_bytes.max(down_bytes) as usize);
        let kept = most_kept(experts);
        let areas = [RING * group_bytes, kept * store.layout.blob_bytes as usize];
        // A chunk takes at most a quarter of the budget.
        let budget = options.vram_bytes.unwrap_or(device.facts().total_bytes) as usize / 4;
        let mut tokens = options.prefill_tokens.unwrap_or(MAX_TOKENS).max(1);
        if options.prefill_tokens.is_none() {
            while tokens > 256 && Places::new(shape, layouts, tokens, areas).bytes > budget {
                tokens /= 2;
            }
        }
        let mut units = Vec::with_capacity(layers * (experts + 1));
        for (layer, dense) in store.layers.iter().zip(&dense.layers) {
            let stride = 4 * store.layout.num_units as u64;
            units.extend((0..experts as u64).map(|e| layer.units + e * stride));
            units.push(dense.shared_units);
        }
        let events = || {
            (0..RING)
                .map(|_| device.new_event())
                .collect::<Result<Vec<_>>>()
        };
        Ok(Prefill {
            tokens,
            multiprocessors: device.facts().multiprocessors as usize,
            places: Places::new(shape, layouts, tokens, areas),
            blobs: device.alloc(8 * layers * 2 * (experts + 1), stream)?,
            host_blobs: device.alloc_host(layers * 2 * (experts + 1))?,
            units: device.upload(&units, stream)?,
            embeddings: device.alloc_host(tokens * shape.hidden_size)?,
            host_ids: device.alloc_host(layers * tokens * k)?,
            host_weights: device.alloc_host(layers * tokens * k)?,
            ready: events()?,
            free: events()?,
            routed: device.new_event()?,
            kept,
            expert_hidden_stride: stride(layouts),
            group_bytes,
            own: None,
        })
    }

    /// The most tokens of a chunk.
    pub fn max_tokens(&self) -> usize {
        self.tokens
    }

    /// Bytes of the workspace.
    pub fn workspace_bytes(&self) -> usize {
        self.places.bytes
    }

    /// Takes memory of its own, where there are too few slots to borrow from.
    pub fn own_workspace(&mut self, device: &Device, stream: &Stream) -> Result<()> {
        if self.own.is_none() {
            self.own = Some(device.alloc(self.places.bytes, stream)?);
        }
        Ok(())
    }

    pub fn drop_workspace(&mut self) {
        self.own = None;
    }

    /// What the router chose in `layer`, once that is on the host.
    fn routing(&self, layer: usize, tokens: usize, k: usize) -> Routing {
        let start = layer * self.tokens * k;
        let range = start..start + tokens * k;
        let ids = &self.host_ids.as_slice()[range.clone()];
        Routing {
            num_experts_per_tok: k,
            topk_ids: ids.iter().map(|&id| id as u16).collect(),
            topk_weights: self.host_weights.as_slice()[range].to_vec(),
        }
    }
}

impl Cuda {
    /// A chunk of any length, in pieces that fit the workspace. With `renews` slots may change in the
    /// last of them.
    pub(super) fn prefill_all(
        &mut self,
        ids: &[u32],
        rows: Range<usize>,
        renews: bool,
        on_routing: &mut OnRenewing<'_>,
    ) -> Result<Vec<f32>> {
        let size = self.prefill.tokens;
        self.finish_slots()?;
        let (base, mut borrowed) = match &self.prefill.own {
            Some(buffer) => (buffer.address(), Vec::new()),
            None => self.model.store.borrow(self.prefill.workspace_bytes()),
        };
        if !borrowed.is_empty() {
            self.model.store.publish(&self.model.stream)?;
        }
        let mut logits = Vec::with_capacity(rows.len() * self.model.shape.vocab_size);
        let mut renewed = false;
        for (i, piece) in ids.chunks(size).enumerate() {
            let first = i * size;
            let last = first + piece.len() == ids.len();
            let inside = |row: usize| row.clamp(first, first + piece.len()) - first;
            let rows = inside(rows.start)..inside(rows.end);
            let renewals =
                self.prefill_chunk_at(base, piece, rows, &mut logits, renews && last, on_routing)?;
            renewed |= !renewals.is_empty();
            self.note_renewals(&renewals, &mut borrowed);
        }
        for &(slot, (layer, expert)) in &borrowed {
            self.model
                .store
                .fetch(layer, expert, slot, &self.model.stream)?;
        }
        if renewed || !borrowed.is_empty() {
            self.model.store.publish(&self.model.stream)?;
            self.model.stream.synchronize()?;
        }
        Ok(logits)
    }

    fn prefill_chunk_at(
        &mut self,
        base: u64,
        ids: &[u32],
        rows: Range<usize>,
        logits: &mut Vec<f32>,
        renews: bool,
        on_routing: &mut OnRenewing<'_>,
    ) -> Result<Vec<Renewal>> {
        let dim = self.model.shape.hidden_size;
        let position = self.states.active().position;
        // The last chunk's copies from here are done: every chunk ends with a wait.
        let embeddings = &mut self.prefill.embeddings.as_mut_slice()[..ids.len() * dim];
        for (&id, out) in ids.iter().zip(embeddings.chunks_exact_mut(dim)) {
            let id = id as usize;
            self.embed_tokens.dequantize_rows(id..id + 1, out);
        }
        let groups = self.plan_groups(base)?;
        let chunk = Chunk {
            cuda: self,
            base,
            tokens: ids.len(),
            position,
        };
        let mut renewing = renews.then(|| Renewing::new(on_routing));
        chunk.run(&groups, renewing.as_mut())?;
        let renewals = renewing.map(|renewing| renewing.renewals);
        for row in rows {
            let hidden = base + (self.prefill.places.hidden + 4 * row * dim) as u64;
            let row = (self.decode).head_of(&self.model, &mut self.offload, hidden)?;
            logits.extend_from_slice(row);
        }
        self.model.stream.synchronize()?;
        self.copies.synchronize()?;
        self.states.active_mut().position += ids.len();

        if let Some(renewals) = renewals {
            return Ok(renewals);
        }
        let k = self.model.shape.moe.num_experts_per_tok;
        for layer in 0..self.model.shape.num_layers() {
            let routing = self.prefill.routing(layer, ids.len(), k);
            on_routing(layer, position, &routing, 0);
        }
        Ok(Vec::new())
    }

    /// Cuts every layer's experts into groups, and says where each expert will be found.
    fn plan_groups(&mut self, base: u64) -> Result<Vec<Vec<Group>>> {
        let (layers, experts) = (
            self.model.shape.num_layers(),
            self.model.shape.moe.num_experts,
        );
        let prefill = &mut self.prefill;
        let ring = base + prefill.places.ring as u64;
        let layout = self.model.store.layout;
        let (up_bytes, blob_bytes) = (layout.down_offset as u64, layout.blob_bytes as u64);
        let blobs = prefill.host_blobs.as_mut_slice();
        let mut all = Vec::with_capacity(layers);
        let mut used = 0;
        for layer in 0..layers {
            let table = &mut blobs[layer * 2 * (experts + 1)..(layer + 1) * 2 * (experts + 1)];
            let (up, down) = table.split_at_mut(experts + 1);
            let missing = |e: usize| self.model.store.resident(layer, e) == 0;
            let size = match (0..experts).any(missing) {
                true => GROUP_EXPERTS,
                false => experts,
            };
            let mut groups: Vec<Group> = (0..experts)
                .step_by(size)
                .map(|first| Group {
                    first,
                    count: size.min(experts - first),
                    ring: None,
                })
                .collect();
            // Ring buffers go round in the order of use: gate and up of all groups, then down.
            for part in 0..2 {
                for group in &mut groups {
                    if (group.first..group.first + group.count).any(missing) {
                        group.ring.get_or_insert([0; 2])[part] = used % RING;
                        used += 1;
                    }
                }
            }
            for group in &groups {
                for e in group.first..group.first + group.count {
                    let resident = self.model.store.resident(layer, e);
                    (up[e], down[e]) = match group.ring {
                        Some(buffers) if resident == 0 => {
                            let buffer = buffers.map(|b| ring + (b * prefill.group_bytes) as u64);
                            let i = (e - group.first) as u64;
                            let down_at = buffer[1] + i * (blob_bytes - up_bytes);
                            (buffer[0] + i * up_bytes, down_at.wrapping_sub(up_bytes))
                        }
                        _ => (resident, resident),
                    };
                }
            }
            (up[experts], down[experts]) = {
                let shared = self.model.dense.layers[layer].shared_blob;
                (shared, shared)
            };
            all.push(groups);
        }
        let bytes = size_of_val(&*blobs);
        let from = blobs.as_ptr().cast();
        // SAFETY: both tables have this size; the host's changes after the chunk's last wait only.
        unsafe {
            self.model
                .stream
                .copy_to_device(prefill.blobs.address(), from, bytes)?
        };
        Ok(all)
    }
}
