//! The kernels of a step, in order: what the graph is made of.

use std::cell::Cell;
use std::ops::Range;

use super::super::abi::{KvCache, Linear, MAX_BATCH};
use super::super::device::{Geometry, args};
use super::super::geometry;
use super::super::state::{LayerState, StateLayout};
use super::super::weights::{Attention, Head, Mixer};
use super::dense::{Call, Projections};
use super::{Decode, Kind, Model, RouterScratch, Wanted};
use crate::backend::Result;

impl Decode {
    /// Final norm and output head of the rows of `hidden`; the logits stay on the device. Where the head
    /// is in RAM, only the last hidden states to the host.
    pub(super) fn record_head(&self, model: &Model, hidden: u64, tokens: usize) -> Result<()> {
        let none = Linear::default();
        let (dense, eps) = (&model.dense, model.shape.rms_norm_eps);
        let lm_head = match &dense.lm_head {
            Head::Vram(linear) => *linear,
            Head::Ram { .. } => {
                let to = self.host_hidden.pointer(0).cast::<u8>();
                // SAFETY: `[tokens, hidden_size]` on both sides, as long as this struct.
                return unsafe {
                    (model.stream).copy_to_host(to, hidden, 4 * tokens * model.shape.hidden_size)
                };
            }
        };
        let to = Projections {
            norm: dense.norm,
            eps,
            linears: [&lm_head, &none, &none],
            outputs: [self.logits, 0, 0],
            ring_slots: 0,
        };
        let (name, geometry, args) = self.norm_linear(hidden, tokens, &to);
        // SAFETY: arguments are those of the kernel; `logits` is `[MAX_BATCH, vocab_size]` and lives as
        // long as this struct.
        unsafe { model.stream.launch(name, geometry, args, true) }
    }

    /// The device's logits to the host; none where the head is in RAM.
    pub(super) fn record_logits(&self, model: &Model, tokens: usize) -> Result<()> {
        if let Head::Ram { .. } = model.dense.lm_head {
            return Ok(());
        }
        let to = self.host_logits.pointer(0).cast::<u8>();
        let bytes = 4 * tokens * model.shape.vocab_size;
        // SAFETY: both are `[MAX_BATCH, vocab_size]` and live as long as this struct.
        unsafe { model.stream.copy_to_host(to, self.logits, bytes) }
    }

    /// Adds the kernels of some layers of a step to the stream, or those that `only` names, if it names
    /// any. The first layers come with the token's embedding, the last with the head.
    pub(super) fn record(
        &self,
        model: &Model,
        states: &StateLayout,
        kind: Kind,
        part: Range<usize>,
        only: &[&str],
    ) -> Result<()> {
        let Model {
            shape,
            dense,
            store,
            shared_layout,
            stream,
        } = model;
        let shared_layout = *shared_layout;
        let dim = shape.hidden_size;
        let eps = shape.rms_norm_eps;
        let layout = store.layout;
        let k = shape.moe.num_experts_per_tok;
        let none = Linear::default();
        // SAFETY, of all launches here: arguments are those of the kernels in `kernels/`, in order,
        // and addresses are of buffers that live as long as the graph: this struct's and the model's;
        // places are in states of this layout, one of which the step names.
        let first = Cell::new(true);
        let call = |(name, geometry, args): Call, overlap| match only {
            [_, ..] if !only.contains(&name) => Ok(()),
            // There is nothing before the first kernel of a graph that it could overlap with.
            // SAFETY: see above.
            _ => unsafe { stream.launch(name, geometry, args, overlap && !first.replace(false)) },
        };
        let tokens = kind.tokens;
        let launch = |name, geometry: Geometry, args, overlap| {
            call((name, geometry.for_tokens(tokens), args), overlap)
        };
        if part.start == 0 {
            launch(
                "decode_begin",
                geometry::begin(dim),
                args![
                    self.embedding.at(0),
                    self.host_step.at(0),
                    self.hidden,
                    self.step,
                    dim as i32
                ],
                false,
            )?;
        }
        let router_args = |index: usize, scratch: RouterScratch, handoff: u64, x: u64| {
            let (layer, layer_store) = (&dense.layers[index], &store.layers[index]);
            args![
                self.step,
                self.hidden,
                layer.expert_norm,
                eps,
                dim as i32,
                layer.router,
                layer.shared_gate,
                k as i32,
                shape.moe.norm_topk_prob as i32,
                scratch.logits,
                scratch.counter,
                store.device_table(index),
                layer_store.mapped,
                layout.blob_bytes,
                layer_store.units,
                layout.num_units,
                layer.shared_blob,
                layer.shared_units,
                self.split,
                scratch.decision,
                handoff,
                x,
                kind.hybrid as i32
            ]
        };
        let mut ahead = None;
        for index in part.clone() {
            let layer = &dense.layers[index];
            match (&layer.mixer, &states.layers[index]) {
                (Mixer::DeltaNet(net), &LayerState::DeltaNet { ring, memory }) => {
                    let s = &shape.delta_net;
                    let rows = s.qkvz_rows() as i32;
                    let taps = s.conv_kernel_dim as i32;
                    let heads = (s.num_key_heads as i32, s.num_value_heads as i32);
                    let dims = (s.key_head_dim as i32, s.value_head_dim as i32);
                    // Rings keep no more than a convolution needs: tokens that may be taken back go
                    // elsewhere.
                    let ([qkvz, ba], slots) = match kind.few {
                        true => (self.few.of_layer(index), 0),
                        false => ([ring, self.projected[1]], taps),
                    };
                    let to = Projections {
                        norm: layer.input_norm,
                        eps,
                        linears: [&net.qkvz, &net.ba, &none],
                        outputs: [qkvz, ba, 0],
                        ring_slots: slots,
                    };
                    call(self.norm_linear(self.hidden, tokens, &to), true)?;
                    if kind.few {
                        let places = [ring, memory];
                        let few = self
                            .delta_net_few(model, index, net, places, self.mixed, tokens, false);
                        call(few, true)?;
                    } else {
                        launch(
                            "decode_delta_net",
                            geometry::delta_net(s),
                            args![
                                self.step,
                                ring,
                                taps,
                                rows,
                                self.projected[1],
                                net.conv,
                                net.negative_a,
                                net.dt_bias,
                                memory,
                                self.mixed,
                                heads.0,
                                heads.1,
                                dims.0,
                                dims.1
                            ],
                            true,
                        )?;
                    }
                    let (norm, out) = (net.norm, &net.out);
                    let delta_out = self.delta_out(
                        s,
                        [qkvz, slots as u64],
                        norm,
                        eps,
                        out,
                        self.hidden,
                        tokens,
                    );
                    call(delta_out, true)?;
                }
                (Mixer::Attention(net), LayerState::Attention(cache)) => {
                    let to = Projections {
                        norm: layer.input_norm,
                        eps,
                        linears: [&net.q, &net.k, &net.v],
                        outputs: self.projected,
                        ring_slots: 0,
                    };
                    call(self.norm_linear(self.hidden, tokens, &to), true)?;
                    for call_of in self.attention(model, net, cache, kind) {
                        call(call_of, true)?;
                    }
                    let add = self.linear_add(self.mixed, &net.out, self.hidden, tokens);
                    call(add, true)?;
                }
                _ => unreachable!("states are made for this model"),
            }
            launch(
                "decode_router",
                geometry::router(&layer.router, &layer.shared_gate, true),
                router_args(
                    index,
                    self.router,
                    self.handoffs.at(index * MAX_BATCH),
                    self.handoff_x.at(index * MAX_BATCH * dim),
                ),
                true,
            )?;
            if let (Some(side), true, true) = (&self.side, kind.hybrid, only.is_empty())
                && let Some(next) = dense.layers.get(index + 1)
            {
                // The GPU has time: it will wait for the CPU.
                stream.record(&side.fork)?;
                side.stream.wait(&side.fork)?;
                let predicted = self.predicted.at((index + 1) * MAX_BATCH);
                let args = router_args(index + 1, self.ahead, predicted, 0);
                let geometry = geometry::router(&next.router, &next.shared_gate, false);
                let geometry = geometry.for_tokens(tokens);
                // SAFETY: as for `launch`.
                unsafe { side.stream.launch("decode_router", geometry, args, false)? };
                ahead = Some(side);
            }
            launch(
                "decode_experts_up",
                geometry::experts_up(shape, [&layout, &shared_layout]),
                args![
                    self.hidden,
                    layer.expert_norm,
                    eps,
                    dim as i32,
                    self.router.decision,
                    layout,
                    shared_layout,
                    self.expert_hidden,
                    self.expert_hidden_stride as i32
                ],
                true,
            )?;
            // Alone, the GPU adds to the residual stream at once; else it waits for the CPU first.
            let (out, add) = if kind.hybrid {
                (self.moe, 0i32)
            } else {
                (self.hidden, 1i32)
            };
            launch(
                "decode_experts_down",
                geometry::experts_down(dim),
                args![
                    self.expert_hidden,
                    self.expert_hidden_stride as i32,
                    k as i32,
                    self.router.decision,
                    layout,
                    shared_layout,
                    dim as i32,
                    out,
                    add
                ],
                true,
            )?;
            if kind.hybrid {
                if only.is_empty() {
                    // SAFETY: the flag lives as long as this struct.
                    unsafe { stream.wait_flag(self.done.at(index), 1)? };
                }
                launch(
                    "decode_combine",
                    geometry::combine(dim),
                    args![
                        self.moe,
                        self.cpu_out.at(index * tokens * dim),
                        self.done.at(index),
                        self.hidden,
                        dim as i32
                    ],
                    false,
                )?;
            }
        }
        // The last layer has none after it to look at: a part of it alone has no branch.
        if let Some(side) = ahead {
            side.stream.record(&side.join)?;
            stream.wait(&side.join)?;
        }
        if part.end < shape.num_layers() {
            return Ok(());
        }
        if kind.wanted != Wanted::Nothing {
            let from = self.hidden + (4 * kind.head_from * dim) as u64;
            self.record_head(model, from, tokens - kind.head_from)?;
        }
        match kind.wanted {
            Wanted::Nothing => Ok(()),
            Wanted::Logits => self.record_logits(model, tokens - kind.head_from),
            Wanted::Best => (self.best).record(self.logits, tokens - kind.head_from, &model.stream),
        }
    }

    /// Attention of all tokens of a step: at once, or where each sees the one before it, one by one.
    fn attention(&self, model: &Model, net: &Attention, cache: &KvCache, kind: Kind) -> Vec<Call> {
        let Model { shape, dense, .. } = model;
        let s = &shape.attention;
        let geometry = geometry::attention(s, &self.attention, cache.format == 1);
        let row = |base: u64, token: usize, floats: usize| base + (4 * token * floats) as u64;
        let call = |token: usize, tokens: usize| {
            let args = args![
                self.step_of(token),
                row(self.projected[0], token, s.q_proj_rows()),
                row(self.projected[1], token, s.kv_rows()),
                row(self.projected[2], token, s.kv_rows()),
                net.q_norm,
                net.k_norm,
                shape.rms_norm_eps,
                dense.inverse_frequencies,
                s.rotary_dim as i32,
                *cache,
                s.num_attention_heads as i32,
                s.num_key_value_heads as i32,
                s.head_dim as i32,
                self.attention.splits as i32,
                self.attention_partial,
                self.attention_counters,
                row(self.mixed, token, s.o_proj_cols())
            ];
            ("decode_attention", geometry.for_tokens(tokens), args)
        };
        match kind.few {
            true => (0..kind.tokens).map(|token| call(token, 1)).collect(),
            false => vec![call(0, kind.tokens)],
        }
    }
}
