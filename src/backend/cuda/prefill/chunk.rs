//! The kernels of one chunk, layer by layer.

use super::super::abi::Linear;
use super::super::decode::Model;
use super::super::device::{Args, Geometry, Stream, args};
use super::super::geometry;
use super::super::slots::Slots;
use super::super::state::{LayerState, StatePool};
use super::super::variants;
use super::super::weights::Mixer;
use super::{Admitting, Group, Prefill};
use crate::backend::Result;
use crate::planning::Precision;
use crate::planning::execution::Workspace;

/// Ring buffers in the order of their use.
pub struct Uses {
    /// Layer, group and part of each
    pub all: Vec<(usize, usize, usize)>,
    /// How many have their copies under way
    pub sent: usize,
    /// How many have the kernels that read them under way
    pub computed: usize,
}

impl Uses {
    pub fn new(groups: &[Vec<Group>]) -> Self {
        let mut all = Vec::new();
        for (layer, groups) in groups.iter().enumerate() {
            for part in 0..2 {
                let streamed = (0..groups.len()).filter(|&g| groups[g].ring.is_some());
                all.extend(streamed.map(|group| (layer, group, part)));
            }
        }
        Uses {
            all,
            sent: 0,
            computed: 0,
        }
    }
}

/// What a chunk works with, apart from the workers that compute experts in RAM.
#[derive(Clone, Copy)]
pub struct Parts<'a> {
    pub prefill: &'a Prefill,
    pub model: &'a Model,
    pub states: &'a StatePool,
    pub slots: &'a Slots,
    pub copies: &'a Stream,
}

/// One chunk on its way.
pub struct Chunk<'a> {
    pub cuda: Parts<'a>,
    pub places: &'a Workspace,
    pub base: u64,
    pub tokens: usize,
    /// Of the prompt's longest chunk, for which the workspace is laid out
    pub chunk_tokens: usize,
    pub position: usize,
}

impl Chunk<'_> {
    pub fn at(&self, place: usize) -> u64 {
        self.base + place as u64
    }

    /// Addresses of the f16 terms of a block's input and of their scales; 0 for a term that is absent.
    pub fn terms(&self, high: usize, low: Option<usize>, scale: usize) -> [u64; 3] {
        let low = low.map_or(0, |place| self.at(place));
        [self.at(high), low, self.at(scale)]
    }

    pub fn precision(&self) -> Precision {
        self.cuda.prefill.sizes.precision
    }

    fn multiprocessors(&self) -> usize {
        self.cuda.prefill.facts.multiprocessors as usize
    }

    /// Adds a kernel to the chunk's stream, and waits for it where kernels are timed.
    ///
    /// # Errors
    /// If the driver reports one.
    pub fn launch(&self, kernel: &'static str, geometry: Geometry, args: Args) -> Result<()> {
        let stream = &self.cuda.model.stream;
        // SAFETY: arguments are those of the kernels in `kernels/`, in order; addresses are in the
        // workspace, the model and the sequence, which outlive the wait at the chunk's end.
        let launch = || unsafe { stream.launch(kernel, geometry, args, false) };
        let Some(times) = &self.cuda.prefill.kernel_times else {
            return launch();
        };
        stream.record(&times.start)?;
        launch()?;
        stream.record(&times.end)?;
        stream.synchronize()?;
        let us = 1e3 * f64::from(times.end.ms_since(&times.start)?);
        times.add(kernel, us);
        Ok(())
    }

    /// All layers of the chunk; `groups`: of each layer.
    ///
    /// # Errors
    /// If the driver reports one.
    pub fn run(
        &self,
        groups: &[Vec<Group>],
        mut admitting: Option<&mut Admitting<'_>>,
    ) -> Result<()> {
        self.begin()?;
        let mut uses = Uses::new(groups);
        for layer in 0..groups.len() {
            self.mixer(layer)?;
            self.experts(layer, groups, &mut uses, admitting.as_deref_mut())?;
        }
        Ok(())
    }

    /// Brings the embeddings, and lets copies start: the workspace is ours.
    ///
    /// # Errors
    /// If the driver reports one.
    pub fn begin(&self) -> Result<()> {
        let cuda = self.cuda;
        let stream = &cuda.model.stream;
        let dim = cuda.model.shape.hidden_size;
        let from = cuda.prefill.host.embeddings.pointer(0).cast();
        let hidden = self.at(self.places.hidden);
        // SAFETY: the embeddings stay as they are until the chunk's last wait.
        unsafe { stream.copy_to_device(hidden, from, 4 * self.tokens * dim)? };
        // What came before may still use the workspace until here.
        for event in &cuda.prefill.free {
            stream.record(event)?;
        }
        Ok(())
    }

    /// `x`, or its norm, as two f16 and a scale per row; the norm also in f32 if asked for.
    ///
    /// # Errors
    /// If the driver reports one.
    #[allow(clippy::too_many_arguments)]
    pub fn split(
        &self,
        x: u64,
        norm: u64,
        [high, low, scale]: [u64; 3],
        normed: u64,
        rows: usize,
        cols: usize,
    ) -> Result<()> {
        let eps = self.cuda.model.shape.rms_norm_eps;
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
        let facts = &self.cuda.prefill.facts;
        let kernel =
            variants::prefill_linear(w.rows as usize, self.tokens, self.precision(), facts);
        self.launch(
            kernel.name,
            kernel.geometry,
            args![high, low, scale, self.tokens as i32, *w, out, add as i32],
        )
    }

    /// `hidden += mixer(rms_norm(hidden))`
    ///
    /// # Errors
    /// If the driver reports one.
    pub fn mixer(&self, index: usize) -> Result<()> {
        let cuda = self.cuda;
        let p = self.places;
        let shape = &cuda.model.shape;
        let layer = &cuda.model.dense.layers[index];
        let dim = shape.hidden_size;
        let (t, start) = (self.tokens as i32, self.position as i32);
        let eps = shape.rms_norm_eps;
        let hidden = self.at(p.hidden);
        let x = self.terms(p.high, p.low, p.scale);
        let wide = self.terms(p.wide_high, p.wide_low, p.wide_scale);
        let projected = p.projected.map(|place| self.at(place));
        let (mixed, gated) = (self.at(p.mixed), self.at(p.gated));
        self.split(hidden, layer.input_norm, x, 0, self.tokens, dim)?;
        match (&layer.mixer, &cuda.states.active().layers[index]) {
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
                self.delta_rule([q, k, v, decay, beta], memory, mixed)?;
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
                        cuda.model.dense.inverse_frequencies,
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
                let int8 = cache.format != 0;
                let facts = &cuda.prefill.facts;
                let attention =
                    variants::prefill_attention(s, self.tokens, int8, self.precision(), facts);
                self.launch(
                    attention.name,
                    attention.geometry,
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

    /// `normed = rms_norm(hidden)`: what a layer's experts and their router get.
    ///
    /// # Errors
    /// If the driver reports one.
    pub fn expert_norm(&self, index: usize) -> Result<()> {
        let cuda = self.cuda;
        let p = self.places;
        let norm = cuda.model.dense.layers[index].expert_norm;
        let x = self.terms(p.high, p.low, p.scale);
        let (hidden, normed) = (self.at(p.hidden), self.at(p.normed));
        self.split(
            hidden,
            norm,
            x,
            normed,
            self.tokens,
            cuda.model.shape.hidden_size,
        )
    }

    /// Router and choice of a layer, which are on their way to the host then.
    ///
    /// # Errors
    /// If the driver reports one.
    pub fn route(&self, index: usize) -> Result<()> {
        let cuda = self.cuda;
        let p = self.places;
        let shape = &cuda.model.shape;
        let layer = &cuda.model.dense.layers[index];
        let stream = &cuda.model.stream;
        let experts = shape.moe.num_experts;
        let k = shape.moe.num_experts_per_tok;
        let (t, e, top) = (self.tokens as i32, experts as i32, k as i32);
        let normed = self.at(p.normed);
        let logits = self.at(p.logits);
        self.launch(
            "prefill_router",
            geometry::prefill_router(experts, self.tokens, self.multiprocessors()),
            args![normed, layer.router, logits, t],
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
            args![
                logits,
                normed,
                layer.shared_gate,
                t,
                e,
                top,
                norm_topk,
                ids,
                weights,
                gates
            ],
        )?;
        let start = index * cuda.prefill.host.tokens * k;
        let bytes = 4 * self.tokens * k;
        let host_ids = cuda.prefill.host.ids.pointer(start).cast();
        let host_weights = cuda.prefill.host.weights.pointer(start).cast();
        // SAFETY: every layer has room for the largest chunk; read after the chunk's last wait, or after
        // that for the event.
        unsafe {
            stream.copy_to_host(host_ids, ids, bytes)?;
            stream.copy_to_host(host_weights, weights, bytes)?;
        }
        Ok(())
    }

    /// `hidden += sum_k weight_k * expert_k(rms_norm(hidden)) + shared expert`
    fn experts(
        &self,
        index: usize,
        groups: &[Vec<Group>],
        uses: &mut Uses,
        mut admitting: Option<&mut Admitting<'_>>,
    ) -> Result<()> {
        let cuda = self.cuda;
        let p = self.places;
        let shape = &cuda.model.shape;
        let stream = &cuda.model.stream;
        let dim = shape.hidden_size;
        let experts = shape.moe.num_experts;
        let k = shape.moe.num_experts_per_tok;
        let (t, e, top) = (self.tokens as i32, experts as i32, k as i32);
        let hidden = self.at(p.hidden);
        let x = self.terms(p.high, p.low, p.scale);
        let (ids, weights, gates) = (
            self.at(p.topk_ids),
            self.at(p.topk_weights),
            self.at(p.gates),
        );
        self.expert_norm(index)?;
        self.route(index)?;
        if admitting.is_some() {
            stream.record(&cuda.prefill.routed)?;
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

        let layout = cuda.model.store.layout;
        let shared = cuda.model.shared_layout;
        let stride = cuda.prefill.sizes.expert_stride();
        let all_rows = self.tokens * (k + 1);
        let h = self.at(p.expert_hidden);
        let split_h = self.terms(p.expert_high, p.expert_low, p.expert_scale);
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
        let facts = &cuda.prefill.facts;
        for part in 0..2 {
            if part == 1 {
                self.split(h, 0, split_h, 0, all_rows, stride)?;
            }
            let compute = |first: usize, count: usize, bound: usize| {
                let (first, count) = (first as i32, count as i32);
                if part == 0 {
                    let kernel =
                        variants::prefill_experts_up(stride, bound, self.precision(), facts);
                    self.launch(
                        kernel.name,
                        kernel.geometry,
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
                    let kernel = variants::prefill_experts_down(
                        dim,
                        self.tokens,
                        bound,
                        self.precision(),
                        facts,
                    );
                    self.launch(
                        kernel.name,
                        kernel.geometry,
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
            if let Some(admitting) = admitting.as_deref_mut().filter(|_| part == 0) {
                // The bus goes on while the host waits.
                self.stream_ahead(groups, uses)?;
                self.ask(index, &groups[index], admitting)?;
            }
            for group in &groups[index] {
                let buffer = group.ring.map(|buffers| buffers[part]);
                if let Some(buffer) = buffer {
                    self.stream_ahead(groups, uses)?;
                    stream.wait(&cuda.prefill.ready[buffer])?;
                }
                compute(group.first, group.count, tiles_bound(group.count, false))?;
                if let Some(buffer) = buffer {
                    if let Some(admitting) = admitting.as_deref() {
                        self.keep(group, part, buffer, admitting)?;
                    }
                    stream.record(&cuda.prefill.free[buffer])?;
                    uses.computed += 1;
                }
            }
        }
        if let Some(admitting) = admitting {
            self.move_in(admitting)?;
        }
        self.launch(
            "prefill_combine",
            geometry::prefill_combine(self.tokens),
            args![
                y, positions, weights, gates, hidden, t, top, 0i32, dim as i32, dim as i32
            ],
        )
    }
}
