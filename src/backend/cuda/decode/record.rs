//! The kernels of a step, in order: what the graph is made of.

use std::cell::Cell;
use std::ops::Range;

use super::super::abi::Linear;
use super::super::device::args;
use super::super::geometry;
use super::super::state::{LayerState, StateLayout};
use super::super::weights::{Head, Mixer};
use super::{Decode, Kind, Model, RouterScratch, Wanted};
use crate::backend::Result;

impl Decode {
    /// Final norm and output head; the logits stay on the device. Where the head is in RAM, only the
    /// last hidden state to the host.
    pub(super) fn record_head(&self, model: &Model, hidden: u64) -> Result<()> {
        let none = Linear::default();
        let (dense, eps) = (&model.dense, model.shape.rms_norm_eps);
        let lm_head = match &dense.lm_head {
            Head::Vram(linear) => *linear,
            Head::Ram { .. } => {
                let to = self.host_hidden.pointer(0).cast::<u8>();
                // SAFETY: `[hidden_size]` on both sides, as long as this struct.
                return unsafe {
                    (model.stream).copy_to_host(to, hidden, 4 * model.shape.hidden_size)
                };
            }
        };
        // SAFETY: arguments are those of the kernel; `logits` is `[vocab_size]` and lives as long as
        // this struct.
        unsafe {
            model.stream.launch(
                "decode_norm_linear",
                geometry::norm_linear([&lm_head, &none, &none], self.resident_blocks),
                args![
                    self.step,
                    hidden,
                    dense.norm,
                    eps,
                    lm_head,
                    none,
                    none,
                    self.logits,
                    0u64,
                    0u64,
                    0i32
                ],
                true,
            )
        }
    }

    /// The device's logits to the host; none where the head is in RAM.
    pub(super) fn record_logits(&self, model: &Model) -> Result<()> {
        if let Head::Ram { .. } = model.dense.lm_head {
            return Ok(());
        }
        let to = self.host_logits.pointer(0).cast::<u8>();
        let bytes = 4 * model.shape.vocab_size;
        // SAFETY: both are `[vocab_size]` and live as long as this struct.
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
        let launch = |name, geometry, args, overlap| match only {
            [_, ..] if !only.contains(&name) => Ok(()),
            // There is nothing before the first kernel of a graph that it could overlap with.
            // SAFETY: see above.
            _ => unsafe { stream.launch(name, geometry, args, overlap && !first.replace(false)) },
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
                    launch(
                        "decode_norm_linear",
                        geometry::norm_linear([&net.qkvz, &net.ba, &none], self.resident_blocks),
                        args![
                            self.step,
                            self.hidden,
                            layer.input_norm,
                            eps,
                            net.qkvz,
                            net.ba,
                            none,
                            ring,
                            self.projected[1],
                            0u64,
                            taps
                        ],
                        true,
                    )?;
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
                    launch(
                        "decode_delta_out",
                        geometry::linear_add(&net.out),
                        args![
                            self.step,
                            self.mixed,
                            ring,
                            taps,
                            rows,
                            net.norm,
                            eps,
                            heads.0,
                            heads.1,
                            dims.0,
                            dims.1,
                            net.out,
                            self.hidden
                        ],
                        true,
                    )?;
                }
                (Mixer::Attention(net), LayerState::Attention(cache)) => {
                    let s = &shape.attention;
                    launch(
                        "decode_norm_linear",
                        geometry::norm_linear([&net.q, &net.k, &net.v], self.resident_blocks),
                        args![
                            self.step,
                            self.hidden,
                            layer.input_norm,
                            eps,
                            net.q,
                            net.k,
                            net.v,
                            self.projected[0],
                            self.projected[1],
                            self.projected[2],
                            0i32
                        ],
                        true,
                    )?;
                    launch(
                        "decode_attention",
                        geometry::attention(s, &self.attention, cache.format == 1),
                        args![
                            self.step,
                            self.projected[0],
                            self.projected[1],
                            self.projected[2],
                            net.q_norm,
                            net.k_norm,
                            eps,
                            dense.inverse_frequencies,
                            s.rotary_dim as i32,
                            *cache,
                            s.num_attention_heads as i32,
                            s.num_key_value_heads as i32,
                            s.head_dim as i32,
                            self.attention.splits as i32,
                            self.attention_partial,
                            self.attention_counters,
                            self.mixed
                        ],
                        true,
                    )?;
                    launch(
                        "decode_linear_add",
                        geometry::linear_add(&net.out),
                        args![self.mixed, net.out, self.hidden],
                        true,
                    )?;
                }
                _ => unreachable!("states are made for this model"),
            }
            launch(
                "decode_router",
                geometry::router(&layer.router, &layer.shared_gate, true),
                router_args(
                    index,
                    self.router,
                    self.handoffs.at(index),
                    self.handoff_x.at(index * dim),
                ),
                true,
            )?;
            if let (Some(side), true, true) = (&self.side, kind.hybrid, only.is_empty())
                && let Some(next) = dense.layers.get(index + 1)
            {
                // The GPU has time: it will wait for the CPU.
                stream.record(&side.fork)?;
                side.stream.wait(&side.fork)?;
                let args = router_args(index + 1, self.ahead, self.predicted.at(index + 1), 0);
                let geometry = geometry::router(&next.router, &next.shared_gate, false);
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
                        self.cpu_out.at(index * dim),
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
            self.record_head(model, self.hidden)?;
        }
        match kind.wanted {
            Wanted::Nothing => Ok(()),
            Wanted::Logits => self.record_logits(model),
            Wanted::Best => self.best.record(self.logits, &model.stream),
        }
    }
}
