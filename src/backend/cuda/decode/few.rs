//! A few consecutive tokens of one sequence in one step, some of which may be taken back.
//!
//! The step leaves the states of delta nets as they are, but keeps what went into them; those of the tokens
//! that are kept are then carried out. Keys and values need no such thing: what lies behind the position is
//! never read.

use super::super::abi::{MAX_BATCH, Step};
use super::super::arena::Arena;
use super::super::device::{Stream, args};
use super::super::geometry;
use super::super::state::{LayerState, StateLayout};
use super::super::weights::{DeltaNet, Mixer};
use super::dense::Call;
use super::{Decode, Model};
use crate::backend::{MixerKind, ModelShape, Result};

/// What went into the delta nets of a step, layer by layer; addresses are the device's.
pub struct Buffers {
    /// `[layers of delta nets, MAX_BATCH, qkvz_rows]`
    qkvz: u64,
    /// `[layers of delta nets, MAX_BATCH, ba_rows]`
    ba: u64,
    /// Of each layer, how many delta nets come before it
    index: Vec<usize>,
    layer_bytes: [usize; 2],
}

impl Buffers {
    /// Room for a step of [`MAX_BATCH`] tokens.
    ///
    /// # Errors
    /// If the device's memory is short.
    pub fn new(arena: &mut Arena, shape: &ModelShape, stream: &Stream) -> Result<Self> {
        let is_net = |kind: &MixerKind| *kind == MixerKind::GatedDeltaNet;
        let mut nets = 0;
        let mut index = Vec::new();
        for kind in &shape.mixers {
            index.push(nets);
            nets += usize::from(is_net(kind));
        }
        let rows = [shape.delta_net.qkvz_rows(), shape.delta_net.ba_rows()];
        let layer_bytes = rows.map(|rows| 4 * MAX_BATCH * rows);
        Ok(Buffers {
            qkvz: arena.alloc(nets * layer_bytes[0], stream)?,
            ba: arena.alloc(nets * layer_bytes[1], stream)?,
            index,
            layer_bytes,
        })
    }

    /// Projections of a layer's tokens: qkvz and ba.
    pub fn of_layer(&self, layer: usize) -> [u64; 2] {
        let at = |base: u64, bytes: usize| base + (self.index[layer] * bytes) as u64;
        [
            at(self.qkvz, self.layer_bytes[0]),
            at(self.ba, self.layer_bytes[1]),
        ]
    }
}

impl Decode {
    /// The delta rule of a layer on the projections of `tokens`; `out` is 0 where its outputs are not
    /// wanted, `keeps` tells whether the state goes on.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn delta_net_few(
        &self,
        model: &Model,
        layer: usize,
        net: &DeltaNet,
        [ring, memory]: [u64; 2],
        out: u64,
        tokens: usize,
        keeps: bool,
    ) -> Call {
        let s = &model.shape.delta_net;
        let [qkvz, ba] = self.few.of_layer(layer);
        let args = args![
            self.step,
            ring,
            s.conv_kernel_dim as i32,
            s.qkvz_rows() as i32,
            qkvz,
            ba,
            net.conv,
            net.negative_a,
            net.dt_bias,
            memory,
            out,
            s.num_key_heads as i32,
            s.num_value_heads as i32,
            s.key_head_dim as i32,
            s.value_head_dim as i32,
            tokens as i32,
            keeps as i32
        ];
        ("decode_delta_net_few", geometry::delta_net(s), args)
    }

    /// Of the last step, which was one of few tokens, keeps the first `tokens`: the states are then as if
    /// only these had been fed. The caller counts the position on, after this has been called.
    ///
    /// # Errors
    /// If the driver reports one; the sequence is lost then.
    pub fn keep(&mut self, model: &Model, layout: &StateLayout, tokens: usize) -> Result<()> {
        assert!(tokens <= MAX_BATCH);
        let nets = model.shape.mixers.contains(&MixerKind::GatedDeltaNet);
        if tokens == 0 || !nets {
            return Ok(());
        }
        let known = |(kept, _): &(usize, _)| *kept == tokens;
        let index = match self.keep_graphs.iter().position(known) {
            Some(index) => index,
            None => {
                let graph = (model.stream).capture(|| self.record_keep(model, layout, tokens))?;
                self.keep_graphs.push((tokens, graph));
                self.keep_graphs.len() - 1
            }
        };
        // SAFETY: recorded for states of this layout, and the step points at one.
        unsafe { model.stream.launch_graph(&self.keep_graphs[index].1) }
    }

    fn record_keep(&self, model: &Model, layout: &StateLayout, tokens: usize) -> Result<()> {
        let s = &model.shape.delta_net;
        let mut first = true;
        let mut launch = |(name, geometry, args): Call| {
            let overlap = !std::mem::replace(&mut first, false);
            // SAFETY: arguments are those of the kernels; buffers are this struct's, places are in a
            // state of this layout, which the step names.
            unsafe { model.stream.launch(name, geometry, args, overlap) }
        };
        for (index, layer) in model.dense.layers.iter().enumerate() {
            let (Mixer::DeltaNet(net), &LayerState::DeltaNet { ring, memory }) =
                (&layer.mixer, &layout.layers[index])
            else {
                continue;
            };
            launch(self.delta_net_few(model, index, net, [ring, memory], 0, tokens, true))?;
            let [qkvz, _] = self.few.of_layer(index);
            launch((
                "decode_keep_ring",
                geometry::keep_ring(s, tokens),
                args![
                    self.step,
                    qkvz,
                    ring,
                    s.conv_kernel_dim as i32,
                    s.qkvz_rows() as i32,
                    tokens as i32
                ],
            ))?;
        }
        Ok(())
    }

    /// Where the step of a token lies.
    pub(super) fn step_of(&self, token: usize) -> u64 {
        self.step + (token * size_of::<Step>()) as u64
    }
}
