//! A chunk of tokens: everything on the GPU, missing experts streaming over PCIe as it gets there.
//!
//! Experts that are not in VRAM pass through a ring of staging buffers, a group of neighbouring
//! experts at a time: first gate and up of all groups of a layer, then down. A second stream copies
//! as far ahead as the ring allows, so that the bus never waits for the kernels; with a few thousand
//! tokens the bus bounds the speed. The memory for it, a few hundred MB, is borrowed from expert
//! slots, whose experts come back afterwards.

use std::ops::Range;

use super::abi::{ExpertLayout, Linear};
use super::decode::Model;
use super::device::{Buffer, Device, Event, Geometry, Pinned, Stream, args};
use super::geometry::{self, MATMUL_SHARED_BYTES};
use super::state::LayerState;
use super::store::ExpertStore;
use super::weights::{DenseWeights, Mixer};
use super::{Cuda, CudaOptions};
use crate::backend::{ModelShape, Result, Routing};

/// Tokens of the largest chunk, if memory allows: the more, the fewer times all experts cross the
/// bus.
const MAX_TOKENS: usize = 4096;

/// Experts whose matrices are copied and computed together.
const GROUP_EXPERTS: usize = 64;

/// Groups under way. Three keep the bus busy; more ride out layers with long mixers.
const RING: usize = 5;

/// Buffers in the workspace start on this many bytes.
const ALIGN: usize = 256;

/// Where buffers lie in the workspace: offsets in bytes.
#[derive(Clone, Debug, Default)]
struct Places {
    hidden: usize,
    high: usize,
    low: usize,
    scale: usize,
    // Of a mixer
    projected: [usize; 3],
    conv: [usize; 5],
    mixed: usize,
    gated: usize,
    wide_high: usize,
    wide_low: usize,
    wide_scale: usize,
    // Of the experts
    normed: usize,
    logits: usize,
    topk_ids: usize,
    topk_weights: usize,
    gates: usize,
    counts: usize,
    offsets: usize,
    tiles: usize,
    tile_offsets: usize,
    rows: usize,
    positions: usize,
    expert_hidden: usize,
    expert_high: usize,
    expert_low: usize,
    expert_scale: usize,
    expert_out: usize,
    ring: usize,
    bytes: usize,
}

/// A bump allocator over offsets.
struct Bump(usize);

impl Bump {
    fn take(&mut self, bytes: usize) -> usize {
        let start = self.0;
        self.0 += bytes.next_multiple_of(ALIGN);
        start
    }

    fn floats(&mut self, count: usize) -> usize {
        self.take(4 * count)
    }
}

pub struct Prefill {
    tokens: usize,
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

impl Places {
    fn new(shape: &ModelShape, layouts: [&ExpertLayout; 2], tokens: usize, ring: usize) -> Self {
        let t = tokens;
        let dim = shape.hidden_size;
        let padded = dim.next_multiple_of(64);
        let (attention, net, moe) = (&shape.attention, &shape.delta_net, &shape.moe);
        let k = moe.num_experts_per_tok;
        let experts = moe.num_experts;
        let wide = net.value_dim().max(attention.o_proj_cols());
        let wide_padded = wide.next_multiple_of(64);
        let mut at = Bump(0);
        let mut p = Places {
            hidden: at.floats(t * dim),
            high: at.take(2 * t * padded),
            low: at.take(2 * t * padded),
            scale: at.floats(t),
            ..Places::default()
        };
        let start = at.0;

        p.projected = [
            at.floats(t * net.qkvz_rows().max(attention.q_proj_rows())),
            at.floats(t * net.ba_rows().max(attention.kv_rows())),
            at.floats(t * attention.kv_rows()),
        ];
        // Attention keeps its queries, two f16 and a scale per head, where the conv has its own.
        let query_bytes = 2 * t * attention.o_proj_cols();
        p.conv = [
            at.take((4 * t * net.key_dim()).max(query_bytes)),
            at.take((4 * t * net.key_dim()).max(query_bytes)),
            at.floats(t * net.value_dim()),
            at.floats(t * net.num_value_heads.max(attention.num_attention_heads)),
            at.floats(t * net.num_value_heads),
        ];
        p.mixed = at.floats(t * wide);
        p.gated = at.floats(t * net.value_dim());
        p.wide_high = at.take(2 * t * wide_padded);
        p.wide_low = at.take(2 * t * wide_padded);
        p.wide_scale = at.floats(t);
        let mixer_end = at.0;

        at.0 = start;
        let rows = t * (k + 1);
        let stride = stride(layouts);
        p.normed = at.floats(t * dim);
        p.logits = at.floats(t * (experts + 1));
        p.topk_ids = at.floats(t * k);
        p.topk_weights = at.floats(t * k);
        p.gates = at.floats(t);
        p.counts = at.floats(t.div_ceil(64) * experts);
        p.offsets = at.floats(experts + 2);
        p.tiles = at.take(16 * ((t * k).div_ceil(128) + experts + t.div_ceil(128)));
        p.tile_offsets = at.floats(experts + 2);
        p.rows = at.floats(rows);
        p.positions = at.floats(rows);
        p.expert_high = at.take(2 * rows * stride);
        p.expert_low = at.take(2 * rows * stride);
        p.expert_scale = at.floats(rows);
        // The products of down take the place of what gate and up gave, which was split by then.
        p.expert_hidden = at.0;
        p.expert_out = at.0;
        at.floats(rows * dim.max(stride));
        at.0 = at.0.max(mixer_end);
        p.ring = at.take(ring);
        p.bytes = at.0;
        p
    }
}

fn stride(layouts: [&ExpertLayout; 2]) -> usize {
    let intermediate = layouts.map(|l| l.intermediate as usize);
    intermediate[0].max(intermediate[1]).next_multiple_of(64)
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
        let ring = RING * group_bytes;
        // A chunk takes at most a quarter of the budget.
        let budget = options.vram_bytes.unwrap_or(device.facts().total_bytes) as usize / 4;
        let mut tokens = options.prefill_tokens.unwrap_or(MAX_TOKENS).max(1);
        if options.prefill_tokens.is_none() {
            while tokens > 256 && Places::new(shape, layouts, tokens, ring).bytes > budget {
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
            places: Places::new(shape, layouts, tokens, ring),
            blobs: device.alloc(8 * layers * 2 * (experts + 1), stream)?,
            host_blobs: device.alloc_host(layers * 2 * (experts + 1))?,
            units: device.upload(&units, stream)?,
            embeddings: device.alloc_host(tokens * shape.hidden_size)?,
            host_ids: device.alloc_host(layers * tokens * k)?,
            host_weights: device.alloc_host(layers * tokens * k)?,
            ready: events()?,
            free: events()?,
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
}

impl Cuda {
    /// A chunk of any length, in pieces that fit the workspace.
    pub(super) fn prefill_all(
        &mut self,
        ids: &[u32],
        rows: Range<usize>,
        on_routing: &mut dyn FnMut(usize, usize, &Routing),
    ) -> Result<Vec<f32>> {
        let size = self.prefill.tokens;
        let (base, borrowed) = match &self.prefill.own {
            Some(buffer) => (buffer.address(), Vec::new()),
            None => self.store.borrow(self.prefill.workspace_bytes()),
        };
        if !borrowed.is_empty() {
            self.store.publish(&self.stream)?;
        }
        let mut logits = Vec::with_capacity(rows.len() * self.shape.vocab_size);
        for (i, piece) in ids.chunks(size).enumerate() {
            let first = i * size;
            let inside = |row: usize| row.clamp(first, first + piece.len()) - first;
            let rows = inside(rows.start)..inside(rows.end);
            self.prefill_chunk_at(base, piece, rows, &mut logits, on_routing)?;
        }
        for &(slot, (layer, expert)) in &borrowed {
            self.store.fetch(layer, expert, slot, &self.stream)?;
        }
        if !borrowed.is_empty() {
            self.store.publish(&self.stream)?;
            self.stream.synchronize()?;
        }
        Ok(logits)
    }

    fn prefill_chunk_at(
        &mut self,
        base: u64,
        ids: &[u32],
        rows: Range<usize>,
        logits: &mut Vec<f32>,
        on_routing: &mut dyn FnMut(usize, usize, &Routing),
    ) -> Result<()> {
        let dim = self.shape.hidden_size;
        let position = self.state.position;
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
        chunk.run(&groups)?;
        for row in rows {
            let hidden = base + (self.prefill.places.hidden + 4 * row * dim) as u64;
            let model = Model {
                shape: &self.shape,
                dense: &self.dense,
                store: &self.store,
                shared_layout: self.shared_layout,
                stream: &self.stream,
            };
            logits.extend_from_slice(self.decode.head_of(&model, hidden)?);
        }
        self.stream.synchronize()?;
        self.copies.synchronize()?;
        self.state.position += ids.len();

        let k = self.shape.moe.num_experts_per_tok;
        let count = ids.len() * k;
        let mut routing = Routing {
            num_experts_per_tok: k,
            ..Routing::default()
        };
        for layer in 0..self.shape.num_layers() {
            let start = layer * self.prefill.tokens * k;
            let ids = &self.prefill.host_ids.as_slice()[start..start + count];
            let weights = &self.prefill.host_weights.as_slice()[start..start + count];
            routing.topk_ids.clear();
            routing.topk_ids.extend(ids.iter().map(|&id| id as u16));
            routing.topk_weights.clear();
            routing.topk_weights.extend(weights);
            on_routing(layer, position, &routing);
        }
        Ok(())
    }

    /// Cuts every layer's experts into groups, and says where each expert will be found.
    fn plan_groups(&mut self, base: u64) -> Result<Vec<Vec<Group>>> {
        let (layers, experts) = (self.shape.num_layers(), self.shape.moe.num_experts);
        let prefill = &mut self.prefill;
        let ring = base + prefill.places.ring as u64;
        let layout = self.store.layout;
        let (up_bytes, blob_bytes) = (layout.down_offset as u64, layout.blob_bytes as u64);
        let blobs = prefill.host_blobs.as_mut_slice();
        let mut all = Vec::with_capacity(layers);
        let mut used = 0;
        for layer in 0..layers {
            let table = &mut blobs[layer * 2 * (experts + 1)..(layer + 1) * 2 * (experts + 1)];
            let (up, down) = table.split_at_mut(experts + 1);
            let missing = |e: usize| self.store.resident(layer, e) == 0;
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
                    let resident = self.store.resident(layer, e);
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
                let shared = self.dense.layers[layer].shared_blob;
                (shared, shared)
            };
            all.push(groups);
        }
        let bytes = size_of_val(&*blobs);
        let from = blobs.as_ptr().cast();
        // SAFETY: both tables have this size; the host's changes after the chunk's last wait only.
        unsafe {
            self.stream
                .copy_to_device(prefill.blobs.address(), from, bytes)?
        };
        Ok(all)
    }
}

/// One chunk on its way.
struct Chunk<'a> {
    cuda: &'a Cuda,
    base: u64,
    tokens: usize,
    position: usize,
}

impl Chunk<'_> {
    fn at(&self, place: usize) -> u64 {
        self.base + place as u64
    }

    fn launch(
        &self,
        kernel: &'static str,
        geometry: Geometry,
        args: super::device::Args,
    ) -> Result<()> {
        // SAFETY: arguments are those of the kernels in `kernels/`, in order; addresses are in the
        // workspace, the model and the sequence, which outlive the wait at the chunk's end.
        unsafe { self.cuda.stream.launch(kernel, geometry, args, false) }
    }

    fn run(&self, groups: &[Vec<Group>]) -> Result<()> {
        let cuda = self.cuda;
        let stream = &cuda.stream;
        let dim = cuda.shape.hidden_size;
        let from = cuda.prefill.embeddings.pointer(0).cast();
        let hidden = self.at(cuda.prefill.places.hidden);
        // SAFETY: the embeddings stay as they are until the chunk's last wait.
        unsafe { stream.copy_to_device(hidden, from, 4 * self.tokens * dim)? };
        // Copies start once the workspace is ours: what came before may still use it.
        for event in &cuda.prefill.free {
            stream.record(event)?;
        }
        for (layer, groups) in groups.iter().enumerate() {
            self.mixer(layer)?;
            self.experts(layer, groups)?;
        }
        Ok(())
    }

    /// `x`, or its norm, as two f16 and a scale per row; the norm also in f32 if asked for.
    #[allow(clippy::too_many_arguments)]
    fn split(
        &self,
        x: u64,
        norm: u64,
        [high, low, scale]: [u64; 3],
        normed: u64,
        rows: usize,
        cols: usize,
    ) -> Result<()> {
        let eps = self.cuda.shape.rms_norm_eps;
        self.launch(
            "prefill_split",
            geometry::rows(rows.div_ceil(8), 256),
            args![
                x,
                norm,
                eps,
                high,
                low,
                scale,
                normed,
                rows as i32,
                cols as i32
            ],
        )
    }

    fn linear(&self, [high, low, scale]: [u64; 3], w: &Linear, out: u64, add: bool) -> Result<()> {
        self.launch(
            "prefill_linear",
            geometry::matmul(w.rows as usize, self.tokens),
            args![high, low, scale, self.tokens as i32, *w, out, add as i32],
        )
    }

    /// `hidden += mixer(rms_norm(hidden))`
    fn mixer(&self, index: usize) -> Result<()> {
        let cuda = self.cuda;
        let p = &cuda.prefill.places;
        let shape = &cuda.shape;
        let layer = &cuda.dense.layers[index];
        let dim = shape.hidden_size;
        let (t, start) = (self.tokens as i32, self.position as i32);
        let eps = shape.rms_norm_eps;
        let hidden = self.at(p.hidden);
        let x = [p.high, p.low, p.scale].map(|place| self.at(place));
        let wide = [p.wide_high, p.wide_low, p.wide_scale].map(|place| self.at(place));
        let projected = p.projected.map(|place| self.at(place));
        let (mixed, gated) = (self.at(p.mixed), self.at(p.gated));
        self.split(hidden, layer.input_norm, x, 0, self.tokens, dim)?;
        match (&layer.mixer, &cuda.state.layers[index]) {
            (Mixer::DeltaNet(net), &LayerState::DeltaNet { ring, memory }) => {
                let s = &shape.delta_net;
                let rows = s.qkvz_rows() as i32;
                let taps = s.conv_kernel_dim as i32;
                let heads = (s.num_key_heads as i32, s.num_value_heads as i32);
                let dims = (s.key_head_dim as i32, s.value_head_dim as i32);
                let [qkvz, ba, _] = projected;
                let [q, k, v, decay, beta] = p.conv.map(|place| self.at(place));
                self.linear(x, &net.qkvz, qkvz, false)?;
                self.linear(x, &net.ba, ba, false)?;
                self.launch(
                    "prefill_conv",
                    geometry::prefill_conv(s, self.tokens),
                    args![
                        qkvz,
                        ba,
                        ring,
                        taps,
                        start,
                        net.conv,
                        net.negative_a,
                        net.dt_bias,
                        q,
                        k,
                        v,
                        decay,
                        beta,
                        t,
                        heads.0,
                        heads.1,
                        dims.0,
                        dims.1,
                        taps
                    ],
                )?;
                self.launch(
                    "prefill_delta_rule",
                    geometry::prefill_delta_rule(s),
                    args![
                        q, k, v, decay, beta, memory, mixed, t, heads.0, heads.1, dims.0, dims.1
                    ],
                )?;
                self.launch(
                    "prefill_gated_norm",
                    geometry::rows((self.tokens * s.num_value_heads).div_ceil(8), 256),
                    args![
                        mixed, qkvz, net.norm, eps, gated, t, heads.0, heads.1, dims.0, dims.1
                    ],
                )?;
                self.launch(
                    "prefill_ring",
                    geometry::prefill_ring(s, self.tokens),
                    args![qkvz, ring, taps, start, t, rows],
                )?;
                self.split(gated, 0, wide, 0, self.tokens, s.value_dim())?;
                self.linear(wide, &net.out, hidden, true)
            }
            (Mixer::Attention(net), LayerState::Attention(cache)) => {
                let s = &shape.attention;
                let [q, k, v] = projected;
                self.linear(x, &net.q, q, false)?;
                self.linear(x, &net.k, k, false)?;
                self.linear(x, &net.v, v, false)?;
                let (q_high, q_low) = (self.at(p.conv[0]), self.at(p.conv[1]));
                let q_scales = self.at(p.conv[3]);
                let heads = (s.num_attention_heads as i32, s.num_key_value_heads as i32);
                let hd = s.head_dim as i32;
                self.launch(
                    "prefill_qkv",
                    geometry::prefill_qkv(s, self.tokens),
                    args![
                        q,
                        k,
                        v,
                        net.q_norm,
                        net.k_norm,
                        eps,
                        cuda.dense.inverse_frequencies,
                        s.rotary_dim as i32,
                        start,
                        t,
                        *cache,
                        q_high,
                        q_low,
                        q_scales,
                        heads.0,
                        heads.1,
                        hd
                    ],
                )?;
                self.launch(
                    "prefill_attention",
                    geometry::prefill_attention(s, self.tokens),
                    args![
                        q_high, q_low, q_scales, q, *cache, start, t, heads.0, heads.1, hd, mixed
                    ],
                )?;
                self.split(mixed, 0, wide, 0, self.tokens, s.o_proj_cols())?;
                self.linear(wide, &net.out, hidden, true)
            }
            _ => unreachable!("states are made for this model"),
        }
    }

    /// `hidden += sum_k weight_k * expert_k(rms_norm(hidden)) + shared expert`
    fn experts(&self, index: usize, groups: &[Group]) -> Result<()> {
        let cuda = self.cuda;
        let p = &cuda.prefill.places;
        let shape = &cuda.shape;
        let layer = &cuda.dense.layers[index];
        let stream = &cuda.stream;
        let dim = shape.hidden_size;
        let experts = shape.moe.num_experts;
        let k = shape.moe.num_experts_per_tok;
        let (t, e, top) = (self.tokens as i32, experts as i32, k as i32);
        let hidden = self.at(p.hidden);
        let x = [p.high, p.low, p.scale].map(|place| self.at(place));
        let normed = self.at(p.normed);
        self.split(hidden, layer.expert_norm, x, normed, self.tokens, dim)?;
        let logits = self.at(p.logits);
        self.launch(
            "prefill_router",
            geometry::prefill_router(experts, self.tokens),
            args![normed, layer.router, layer.shared_gate, logits, t],
        )?;
        let norm_topk = shape.moe.norm_topk_prob as i32;
        let (ids, weights, gates) = (
            self.at(p.topk_ids),
            self.at(p.topk_weights),
            self.at(p.gates),
        );
        self.launch(
            "prefill_topk",
            geometry::rows(self.tokens.div_ceil(8), 256),
            args![logits, t, e, top, norm_topk, ids, weights, gates],
        )?;
        let start = index * cuda.prefill.tokens * k;
        let bytes = 4 * self.tokens * k;
        let host_ids = cuda.prefill.host_ids.pointer(start).cast();
        let host_weights = cuda.prefill.host_weights.pointer(start).cast();
        // SAFETY: every layer has room for the largest chunk; read after the chunk's last wait.
        unsafe {
            stream.copy_to_host(host_ids, ids, bytes)?;
            stream.copy_to_host(host_weights, weights, bytes)?;
        }
        let (counts, offsets) = (self.at(p.counts), self.at(p.offsets));
        let (tiles, tile_offsets) = (self.at(p.tiles), self.at(p.tile_offsets));
        let (rows, positions) = (self.at(p.rows), self.at(p.positions));
        let chunks = geometry::prefill_group(experts, self.tokens);
        self.launch("prefill_group_count", chunks, args![ids, t, top, e, counts])?;
        self.launch(
            "prefill_group_scan",
            geometry::rows(1, 1024),
            args![counts, t, top, e, offsets, tiles, tile_offsets],
        )?;
        self.launch(
            "prefill_group_scatter",
            chunks,
            args![ids, t, top, e, counts, rows, positions],
        )?;

        let layout = cuda.store.layout;
        let shared = cuda.shared_layout;
        let stride = cuda.prefill.expert_hidden_stride;
        let all_rows = self.tokens * (k + 1);
        let h = self.at(p.expert_hidden);
        let split_h = [p.expert_high, p.expert_low, p.expert_scale].map(|place| self.at(place));
        let y = self.at(p.expert_out);
        let units = cuda.prefill.units.at(8 * index * (experts + 1));
        let table = |part: usize| {
            cuda.prefill
                .blobs
                .at(8 * (2 * index + part) * (experts + 1))
        };
        let tiles_bound = |count: usize, with_shared: bool| {
            let picks = self.tokens * k.min(count);
            let shared = if with_shared {
                self.tokens.div_ceil(128)
            } else {
                0
            };
            picks.div_ceil(128) + count + shared
        };
        for part in 0..2 {
            if part == 1 {
                self.split(h, 0, split_h, 0, all_rows, stride)?;
            }
            let compute = |first: usize, count: usize, bound: usize| {
                let (first, count) = (first as i32, count as i32);
                if part == 0 {
                    self.launch(
                        "prefill_experts_up",
                        geometry::tiles(stride.div_ceil(128), bound, MATMUL_SHARED_BYTES),
                        args![
                            x[0],
                            x[1],
                            x[2],
                            rows,
                            tiles,
                            tile_offsets,
                            table(0),
                            units,
                            layout,
                            shared,
                            e,
                            dim as i32,
                            first,
                            count,
                            h,
                            stride as i32
                        ],
                    )
                } else {
                    self.launch(
                        "prefill_experts_down",
                        geometry::tiles(dim.div_ceil(256), bound, MATMUL_SHARED_BYTES),
                        args![
                            split_h[0],
                            split_h[1],
                            split_h[2],
                            tiles,
                            tile_offsets,
                            table(1),
                            units,
                            layout,
                            shared,
                            e,
                            dim as i32,
                            stride as i32,
                            first,
                            count,
                            0i32,
                            dim as i32,
                            y
                        ],
                    )
                }
            };
            // The shared expert, always there, gives the bus a head start.
            compute(experts, 1, self.tokens.div_ceil(128))?;
            for group in groups {
                let buffer = group.ring.map(|buffers| buffers[part]);
                if let Some(buffer) = buffer {
                    self.stream_in(index, group, part, buffer)?;
                    stream.wait(&cuda.prefill.ready[buffer])?;
                }
                compute(group.first, group.count, tiles_bound(group.count, false))?;
                if let Some(buffer) = buffer {
                    stream.record(&cuda.prefill.free[buffer])?;
                }
            }
        }
        self.launch(
            "prefill_combine",
            geometry::prefill_combine(self.tokens),
            args![
                y, positions, weights, gates, hidden, t, top, 0i32, dim as i32, dim as i32
            ],
        )
    }

    /// Copies the missing experts of a group into a ring buffer: gate and up, or down.
    fn stream_in(&self, layer: usize, group: &Group, part: usize, buffer: usize) -> Result<()> {
        let cuda = self.cuda;
        let copies = &cuda.copies;
        let layout = &cuda.store.layout;
        let (up_bytes, blob_bytes) = (layout.down_offset as usize, layout.blob_bytes as usize);
        let (offset, width) = match part {
            0 => (0, up_bytes),
            _ => (up_bytes, blob_bytes - up_bytes),
        };
        let ring = self.at(cuda.prefill.places.ring) + (buffer * cuda.prefill.group_bytes) as u64;
        copies.wait(&cuda.prefill.free[buffer])?;
        let missing = |e: usize| cuda.store.resident(layer, e) == 0;
        let mut expert = group.first;
        let end = group.first + group.count;
        while expert < end {
            let run = (expert..end).take_while(|&e| missing(e)).count();
            if run > 0 {
                let (from, _) = cuda.store.blob(layer, expert);
                let to = ring + ((expert - group.first) * width) as u64;
                // SAFETY: `run` blobs follow each other in the store, and the buffer has room for
                // all experts of the group.
                unsafe {
                    copies.copy_rows_to_device(to, from.add(offset), width, blob_bytes, run)?;
                }
            }
            expert += run.max(1);
        }
        copies.record(&cuda.prefill.ready[buffer])
    }
}
