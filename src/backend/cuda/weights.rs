//! From the checkpoint's matrices to the device: dense weights in VRAM, experts in pinned RAM.

use super::abi::{self, ExpertLayout, Format};
use super::arena::Arena;
use super::device::{Device, Stream};
use super::store::{ExpertStore, LayerStore, blob_of, layout_of, units, units_of, weight_bytes};
use crate::backend::cpu::experts::Expert;
use crate::backend::cpu::layout::TILE_COLS;
use crate::backend::cpu::linear::{Linear, Weights};
use crate::backend::cpu::load::{self, Request};
use crate::backend::cpu::offload::{self, Offload};
use crate::backend::cpu::{CpuPrecision, Progress};
use crate::backend::{
    BackendError, ExpertWeights, LayerWeights, MixerWeights, ModelShape, ModelWeights, Result,
};

/// Everything of a model but its routed experts, on the device. Fields that end in nothing are
/// addresses of f32 vectors.
pub struct DenseWeights {
    pub layers: Vec<Layer>,
    /// `[D]`, 1 + w
    pub norm: u64,
    pub lm_head: Head,
    /// `[rotary_dim / 2]`
    pub inverse_frequencies: u64,
}

/// The output matrix.
pub enum Head {
    Vram(abi::Linear),
    /// Computed by the CPU, with the final norm before it
    Ram {
        linear: Linear,
        /// `[D]`, 1 + w
        norm: Vec<f32>,
    },
}

pub struct Layer {
    /// `[D]`, 1 + w
    pub input_norm: u64,
    pub mixer: Mixer,
    /// `[D]`, 1 + w
    pub expert_norm: u64,
    pub router: abi::Linear,
    pub shared_gate: abi::Linear,
    pub shared_blob: u64,
    pub shared_units: u64,
}

pub enum Mixer {
    DeltaNet(DeltaNet),
    Attention(Attention),
}

pub struct DeltaNet {
    pub qkvz: abi::Linear,
    pub ba: abi::Linear,
    pub out: abi::Linear,
    /// `[conv_dim, taps]`
    pub conv: u64,
    /// `[value_heads]`: -exp(A_log)
    pub negative_a: u64,
    pub dt_bias: u64,
    /// `[value_head_dim]`
    pub norm: u64,
}

pub struct Attention {
    pub q: abi::Linear,
    pub k: abi::Linear,
    pub v: abi::Linear,
    pub out: abi::Linear,
    /// `[head_dim]`, 1 + w
    pub q_norm: u64,
    pub k_norm: u64,
}

/// What [`load`] makes.
pub struct Loaded {
    pub dense: DenseWeights,
    pub store: ExpertStore,
    pub shared_layout: ExpertLayout,
}

/// Where loading puts things.
struct Loader<'a> {
    device: &'a Device,
    stream: &'a Stream,
    arena: &'a mut Arena,
    offload: &'a mut Offload,
    precision: CpuPrecision,
}

/// Packs and uploads a whole model.
///
/// # Errors
/// If memory is short on either side, or experts have forms that kernels don't read.
#[allow(clippy::too_many_arguments)]
pub fn load(
    device: &Device,
    stream: &Stream,
    arena: &mut Arena,
    offload: &mut Offload,
    shape: &ModelShape,
    weights: &ModelWeights,
    precision: CpuPrecision,
    head_in_ram: bool,
    progress: Progress,
) -> Result<Loaded> {
    let mut loader = Loader {
        device,
        stream,
        arena,
        offload,
        precision,
    };
    let layer_bytes = |layer: &LayerWeights| -> usize {
        let experts = (layer.moe.experts.iter()).flat_map(matrices);
        let bytes = experts
            .chain(dense_matrices(layer))
            .map(|m| m.stored_bytes());
        bytes.sum()
    };
    let total =
        (weights.layers.iter().map(layer_bytes)).sum::<usize>() + weights.lm_head.stored_bytes();
    let mut done = 0;
    progress(done, total);

    let mut layers = Vec::new();
    let mut stores = Vec::new();
    let mut layouts = None;
    for layer in &weights.layers {
        let (dense, store, pair) = loader.layer(layer, layouts)?;
        layouts = Some(pair);
        layers.push(dense);
        stores.push(store);
        done += layer_bytes(layer);
        progress(done, total);
    }
    let lm_head = match head_in_ram {
        true => Head::Ram {
            linear: loader.packed(&[&weights.lm_head])?.remove(0),
            norm: one_plus(&weights.norm),
        },
        false => Head::Vram(loader.linears(&[&weights.lm_head])?.remove(0)),
    };
    let attention = &shape.attention;
    let frequencies = attention.rope.inverse_frequencies(attention.rotary_dim);
    let dense = DenseWeights {
        layers,
        norm: loader.one_plus(&weights.norm)?,
        lm_head,
        inverse_frequencies: loader.vector(&frequencies)?,
    };
    progress(total, total);
    let no_layers = || BackendError::Other("the model has no layers".into());
    let (layout, shared_layout) = layouts.ok_or_else(no_layers)?;
    Ok(Loaded {
        dense,
        store: ExpertStore::new(device, layout, stores, stream)?,
        shared_layout,
    })
}

fn matrices(expert: &ExpertWeights) -> [&crate::formats::Matrix; 3] {
    [&expert.gate_proj, &expert.up_proj, &expert.down_proj]
}

/// The matrices of a layer that are not routed experts, in the order [`Loader::layer`] takes them.
fn dense_matrices(layer: &LayerWeights) -> Vec<&crate::formats::Matrix> {
    let mut all = match &layer.mixer {
        MixerWeights::GatedDeltaNet(m) => vec![&m.in_proj_qkvz, &m.in_proj_ba, &m.out_proj],
        MixerWeights::GatedAttention(m) => vec![&m.q_proj, &m.k_proj, &m.v_proj, &m.o_proj],
    };
    all.push(&layer.moe.gate);
    all.push(&layer.moe.shared_expert_gate);
    all.extend(matrices(&layer.moe.shared_expert));
    all
}

type Layouts = (ExpertLayout, ExpertLayout);

impl Loader<'_> {
    fn layer(
        &mut self,
        weights: &LayerWeights,
        layouts: Option<Layouts>,
    ) -> Result<(Layer, LayerStore, Layouts)> {
        let all = dense_matrices(weights);
        let (dense, shared) = all.split_at(all.len() - 3);
        let mut linears = self.linears(dense)?.into_iter();
        let mut next = || linears.next().expect("a matrix for each request");
        let mixer = match &weights.mixer {
            MixerWeights::GatedDeltaNet(m) => {
                let negative_a: Vec<f32> = m.a_log.iter().map(|a| -a.exp()).collect();
                Mixer::DeltaNet(DeltaNet {
                    qkvz: next(),
                    ba: next(),
                    out: next(),
                    conv: self.vector(&m.conv1d)?,
                    negative_a: self.vector(&negative_a)?,
                    dt_bias: self.vector(&m.dt_bias)?,
                    norm: self.vector(&m.norm)?,
                })
            }
            MixerWeights::GatedAttention(m) => Mixer::Attention(Attention {
                q: next(),
                k: next(),
                v: next(),
                out: next(),
                q_norm: self.one_plus(&m.q_norm)?,
                k_norm: self.one_plus(&m.k_norm)?,
            }),
        };
        let (router, shared_gate) = (next(), next());
        let shared = self.expert(shared)?;
        let shared_layout = layout_of(&shared)?;
        let loaded =
            offload::load_layer(self.offload.pool(), &weights.moe.experts, self.precision)?;
        let first = loaded.experts.first();
        let first = first.ok_or_else(|| BackendError::Other("a layer has no experts".into()))?;
        let layout = match layouts {
            Some((layout, shared)) if shared == shared_layout => layout,
            Some(_) => return Err(BackendError::Other("shared experts differ in form".into())),
            None => layout_of(first)?,
        };
        let store = LayerStore::new(self.device, self.arena, loaded, &layout, self.stream)?;
        let layer = Layer {
            input_norm: self.one_plus(&weights.input_layernorm)?,
            mixer,
            expert_norm: self.one_plus(&weights.post_attention_layernorm)?,
            router,
            shared_gate,
            shared_blob: self.arena.upload(&blob_of(&shared), self.stream)?,
            shared_units: self.arena.upload(&units_of(&shared), self.stream)?,
        };
        Ok((layer, store, (layout, shared_layout)))
    }

    fn expert(&mut self, matrices: &[&crate::formats::Matrix]) -> Result<Expert> {
        let mut linears = self.packed(matrices)?.into_iter();
        let mut next = || linears.next().expect("a matrix for each request");
        Ok(Expert {
            gate: next(),
            up: next(),
            down: next(),
        })
    }

    fn packed(&mut self, matrices: &[&crate::formats::Matrix]) -> Result<Vec<Linear>> {
        let requests: Vec<Request> = matrices.iter().map(|&m| (m, CpuPrecision::Int16)).collect();
        load::load(self.offload.pool(), &requests)
    }

    fn linears(&mut self, matrices: &[&crate::formats::Matrix]) -> Result<Vec<abi::Linear>> {
        let packed = self.packed(matrices)?;
        packed.iter().map(|linear| self.upload(linear)).collect()
    }

    fn upload(&mut self, linear: &Linear) -> Result<abi::Linear> {
        let format = match &linear.weights {
            Weights::Nf4Int16(_) => Format::Nf4Tiles,
            Weights::Bf16(_) => Format::Bf16Rows,
            Weights::F32(_) => Format::F32Rows,
            Weights::Nf4F32(_) => unreachable!("tiles were asked for in int16"),
        };
        let units = units(linear);
        let units = match units.is_empty() {
            true => 0,
            false => self.arena.upload(units, self.stream)?,
        };
        Ok(abi::Linear {
            weights: self.arena.upload(weight_bytes(linear), self.stream)?,
            units,
            rows: linear.rows as i32,
            cols: linear.cols as i32,
            kblocks: linear.cols.div_ceil(TILE_COLS) as i32,
            format: format as i32,
        })
    }

    fn vector(&mut self, values: &[f32]) -> Result<u64> {
        self.arena.upload(values, self.stream)
    }

    fn one_plus(&mut self, w: &[f32]) -> Result<u64> {
        self.vector(&one_plus(w))
    }
}

/// Zero-centred norm weights as factors.
fn one_plus(w: &[f32]) -> Vec<f32> {
    w.iter().map(|w| 1.0 + w).collect()
}
