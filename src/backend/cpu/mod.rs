//! The `cpu` backend: own SIMD kernels, chosen at run time, over repacked weights.
//!
//! Results are the same bits for any number of threads, and for any split of a sequence into
//! chunks: work is divided by output rows, and every sum has a fixed order.

// Kernels index several small arrays of registers in step; iterators would hide which.
#![allow(clippy::needless_range_loop)]

pub mod activations;
pub mod attention;
mod byte_rows;
pub mod conv;
pub mod delta_rule;
mod dense;
pub(crate) mod experts;
mod fill;
mod gated_attention;
mod gated_delta_net;
mod integer_blocks;
pub mod isa;
pub mod kv_cache;
mod layer;
pub mod layout;
pub mod linear;
pub mod load;
mod math;
pub mod measure;
pub(crate) mod memory;
#[cfg(target_arch = "x86_64")]
mod nf4_amx;
mod nf4_f32;
mod nf4_integers;
pub mod offload;
pub mod rms_norm;
pub(crate) mod rope;
pub mod router;
mod shares;
mod simd;
pub mod threads;
mod topology;

use std::ops::Range;
use std::time::Instant;

use activations::{Activations, Integers};
use experts::Expert;
use gated_delta_net::DeltaNetState;
use isa::Isa;
use kv_cache::KvCache;
use layer::{Layer, Mixer, layer_requests, one_plus};
use linear::{Linear, Panels, add_product};
use load::Request;
use threads::Pool;

use super::tally::Tally;
use super::{
    Backend, BackendError, BackendFacts, KvDtype, LoadRates, MixerKind, ModelShape, ModelWeights,
    Result, Routing, SharedPage,
};
use crate::formats::Matrix;

/// How NF4 weights are multiplied. Routers and other small matrices are always exact.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CpuPrecision {
    /// Exactly dequantised weights, f32 arithmetic
    F32,
    /// 14-bit weights and activations, exact sums per block: 0.007% error; where errors grow most,
    /// in the projections of the delta net, [`Integers::Wide`]: 0.001%
    #[default]
    Int16,
    /// 8-bit weights and activations: 1% error
    Int8,
}

impl CpuPrecision {
    pub fn name(self) -> &'static str {
        match self {
            CpuPrecision::F32 => "f32",
            CpuPrecision::Int16 => "int16",
            CpuPrecision::Int8 => "int8",
        }
    }
}

#[derive(Clone, Debug, Default)]
pub struct CpuOptions {
    /// Workers; one per usable physical core if not given
    pub threads: Option<usize>,
    pub precision: CpuPrecision,
    pub kv_dtype: KvDtype,
}

/// Called while loading with the stored bytes packed so far, and in all.
pub type Progress<'a> = &'a dyn Fn(usize, usize);

pub struct Cpu {
    shape: ModelShape,
    isa: Isa,
    precision: CpuPrecision,
    kv_dtype: KvDtype,
    pool: Pool,
    embed_tokens: Matrix,
    layers: Vec<Layer>,
    /// `[D]`, 1 + w
    norm: Vec<f32>,
    lm_head: Linear,
    load: LoadRates,
    /// Bytes of states
    states: Tally,
    scratch: Scratch,
}

/// Buffers of a chunk, kept so that decode allocates nothing of size.
#[derive(Default)]
struct Scratch {
    /// 0, 1, 2, ..: as many as the largest chunk had tokens
    all_tokens: Vec<u32>,
    x: Activations,
    projected: Panels,
    mixed: Vec<f32>,
    mixed_x: Activations,
    attention: gated_attention::Buffers,
    experts: experts::Buffers,
    gates: Vec<f32>,
    logits: Vec<f32>,
}

/// Activations `[tokens, hidden_size]`.
pub struct Hidden {
    tokens: usize,
    data: Vec<f32>,
}

/// One sequence.
#[derive(Clone)]
pub struct State {
    layers: Vec<LayerState>,
}

#[derive(Clone)]
enum LayerState {
    DeltaNet(DeltaNetState),
    Attention(KvCache),
}

impl Cpu {
    /// Packs `weights` for this machine, with all workers.
    ///
    /// # Errors
    /// If memory or threads are short, or [`isa::ISA_VARIABLE`] names what this machine lacks.
    pub fn new(
        shape: ModelShape,
        weights: &ModelWeights,
        options: CpuOptions,
        progress: Progress,
    ) -> Result<Cpu> {
        Cpu::with_isa(Isa::detect()?, shape, weights, options, progress)
    }

    /// [`new`](Cpu::new) with a chosen instruction set.
    ///
    /// # Errors
    /// As for [`new`](Cpu::new).
    pub fn with_isa(
        isa: Isa,
        shape: ModelShape,
        weights: &ModelWeights,
        options: CpuOptions,
        progress: Progress,
    ) -> Result<Cpu> {
        let mut pool = Pool::new(options.threads)?;
        let requests: Vec<Vec<Request>> = weights
            .layers
            .iter()
            .map(|layer| layer_requests(layer, options.precision))
            .collect();
        let head_request = [(&weights.lm_head, options.precision)];
        let bytes = |requests: &[Request]| -> usize {
            requests.iter().map(|(m, _)| m.stored_bytes()).sum()
        };
        let total = requests.iter().map(|r| bytes(r)).sum::<usize>() + bytes(&head_request);
        let mut done = 0;
        progress(done, total);

        let mut layers = Vec::with_capacity(weights.layers.len());
        let (clock, start) = (load::Clock::default(), Instant::now());
        for (i, (layer, now)) in weights.layers.iter().zip(&requests).enumerate() {
            // The disk works on the next layer while this one is packed.
            let next = requests.get(i + 1).map_or(&head_request[..], |next| next);
            next.iter().for_each(|(matrix, _)| matrix.read_ahead());
            let linears = load::load_timed(&mut pool, now, &clock)?;
            layers.push(Layer::new(&shape, layer, linears));
            done += bytes(now);
            progress(done, total);
        }
        let lm_head = load::load_timed(&mut pool, &head_request, &clock)?
            .pop()
            .expect("one request, one matrix");
        progress(total, total);
        let (read_seconds, pack_seconds) = clock.seconds(pool.threads());
        let load = LoadRates {
            bytes: total as u64,
            seconds: start.elapsed().as_secs_f64(),
            read_seconds,
            pack_seconds,
        };
        Ok(Cpu {
            shape,
            isa,
            precision: options.precision,
            kv_dtype: options.kv_dtype,
            pool,
            embed_tokens: weights.embed_tokens.detached(),
            layers,
            norm: one_plus(&weights.norm),
            lm_head,
            load,
            states: Tally::default(),
            scratch: Scratch::default(),
        })
    }

    /// Workers, the calling thread included.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Bytes of weights that one decoded token reads, whatever its experts.
    pub fn weight_bytes_per_token(&self) -> usize {
        let k = self.shape.moe.num_experts_per_tok;
        let layers = self.layers.iter();
        let layers =
            layers.map(|l| l.dense_bytes() + k * l.experts.first().map_or(0, |e| e.bytes()));
        layers.sum::<usize>() + self.lm_head.bytes()
    }

    /// Bytes of all packed weights.
    pub fn weight_bytes(&self) -> usize {
        let experts = |l: &Layer| l.experts.iter().map(Expert::bytes).sum::<usize>();
        let layers = self.layers.iter().map(|l| l.dense_bytes() + experts(l));
        layers.sum::<usize>() + self.lm_head.bytes()
    }
}

/// Sequences whose next tokens are computed together.
const MAX_TOGETHER: usize = 8;

/// `rms_norm` of rows `rows` of `hidden`, ready for matrices.
#[allow(clippy::too_many_arguments)]
fn normed(
    pool: &mut Pool,
    isa: Isa,
    hidden: &Hidden,
    rows: Range<usize>,
    scale: &[f32],
    eps: f32,
    integers: Option<Integers>,
    x: &mut Activations,
) -> Result<()> {
    let dim = scale.len();
    x.fill(pool, isa, rows.len(), dim, integers, &|t, out| {
        let row = (rows.start + t) * dim;
        rms_norm::rms_norm(isa, &hidden.data[row..row + dim], scale, eps, out);
    })
}

impl Scratch {
    fn prepare(&mut self, tokens: usize) {
        let have = self.all_tokens.len();
        self.all_tokens.extend(have as u32..tokens.max(have) as u32);
    }
}

impl Backend for Cpu {
    type Hidden = Hidden;
    type State = State;

    fn facts(&self) -> BackendFacts {
        BackendFacts {
            name: "cpu".into(),
            kernels: Some(format!(
                "{}, {}, {} KV",
                self.isa.name(),
                self.precision.name(),
                self.kv_dtype
            )),
            threads: self.threads(),
        }
    }

    /// In chunks of 512 each expert of a large model meets ten tokens, too few to make up for
    /// reading it. More tokens want more memory for their activations: a 32nd of the weights'.
    fn prefill_chunk(&self) -> usize {
        let shape = &self.shape;
        let wide = [
            shape.delta_net.qkvz_rows() + 2 * shape.delta_net.value_dim(),
            shape.attention.q_proj_rows() + 2 * shape.attention.o_proj_cols(),
            (shape.moe.num_experts_per_tok + 1) * 2 * shape.moe.moe_intermediate_size,
            8 * shape.hidden_size,
        ];
        let bytes_per_token = size_of::<f32>() * wide.iter().sum::<usize>();
        let tokens = self.weight_bytes() / 32 / bytes_per_token;
        (tokens / 512 * 512).clamp(512, 2048)
    }

    fn load_rates(&self) -> Option<LoadRates> {
        Some(self.load)
    }

    fn decode_read_bytes(&self, context: usize) -> Option<u64> {
        let net = &self.shape.delta_net;
        let attention = &self.shape.attention;
        let row = |heads| self.kv_dtype.bytes(heads, attention.head_dim);
        let of_layer = |mixer: &MixerKind| match mixer {
            MixerKind::GatedDeltaNet => size_of::<f32>() * net.value_dim() * net.key_head_dim,
            MixerKind::GatedAttention => 2 * row(attention.num_key_value_heads) * context,
        };
        let state: usize = self.shape.mixers.iter().map(of_layer).sum();
        Some((self.weight_bytes_per_token() + state) as u64)
    }

    fn shape(&self) -> &ModelShape {
        &self.shape
    }

    fn new_state(&self, max_tokens: usize) -> Result<State> {
        let shape = &self.shape;
        let layers = shape
            .mixers
            .iter()
            .map(|kind| match kind {
                MixerKind::GatedDeltaNet => {
                    LayerState::DeltaNet(DeltaNetState::new(&shape.delta_net, &self.states))
                }
                MixerKind::GatedAttention => LayerState::Attention(KvCache::new(
                    self.kv_dtype,
                    shape.attention.num_key_value_heads,
                    shape.attention.head_dim,
                    max_tokens,
                    &self.states,
                )),
            })
            .collect();
        Ok(State { layers })
    }

    fn truncate(&self, state: &mut State, tokens: usize) -> Result<()> {
        for layer in &mut state.layers {
            match layer {
                LayerState::Attention(cache) => cache.truncate(tokens),
                LayerState::DeltaNet(_) => unreachable!("only asked of models without delta nets"),
            }
        }
        Ok(())
    }

    fn state_bytes(&self, state: &State) -> (usize, Vec<SharedPage>) {
        let (mut own, mut pages) = (0, Vec::new());
        for layer in &state.layers {
            match layer {
                LayerState::DeltaNet(state) => own += state.bytes(),
                LayerState::Attention(cache) => pages.extend(cache.pages()),
            }
        }
        (own, pages)
    }

    fn held_bytes(&self) -> usize {
        self.states.bytes()
    }

    fn embed(&mut self, ids: &[u32]) -> Result<Hidden> {
        let dim = self.shape.hidden_size;
        let mut data = vec![0.0; ids.len() * dim];
        for (&id, row) in ids.iter().zip(data.chunks_exact_mut(dim)) {
            let id = id as usize;
            self.embed_tokens.dequantize_rows(id..id + 1, row);
        }
        Ok(Hidden {
            tokens: ids.len(),
            data,
        })
    }

    fn most_together(&self) -> usize {
        MAX_TOGETHER
    }

    /// More are spread over workers in another way, and their attention adds up in another order.
    fn most_consecutive(&self) -> usize {
        gated_attention::FEW_TOKENS
    }

    fn mixer(
        &mut self,
        layer: usize,
        hidden: &mut Hidden,
        states: &mut [&mut State],
    ) -> Result<()> {
        let Cpu {
            shape,
            isa,
            pool,
            layers,
            scratch,
            ..
        } = self;
        let (isa, eps, tokens) = (*isa, shape.rms_norm_eps, hidden.tokens);
        let layer_weights = &layers[layer];
        scratch.prepare(tokens);
        let Scratch {
            all_tokens,
            x,
            projected,
            mixed,
            mixed_x,
            attention,
            ..
        } = scratch;
        let scale = &layer_weights.input_norm;
        let (ins, out): (Vec<&Linear>, &Linear) = match &layer_weights.mixer {
            Mixer::DeltaNet(m) => (vec![&m.qkvz, &m.ba], &m.out),
            Mixer::Attention(m) => (vec![&m.q, &m.k, &m.v], &m.out),
        };
        let integers = ins.iter().find_map(|l| l.reads_integers());
        normed(pool, isa, hidden, 0..tokens, scale, eps, integers, x)?;
        projected.project(pool, isa, &ins, x.view(), all_tokens)?;
        mixed.resize(tokens * out.cols, 0.0);
        let each = tokens / states.len();
        assert_eq!(each * states.len(), tokens);
        for (i, state) in states.iter_mut().enumerate() {
            let projected = projected.from(i * each);
            let mixed = &mut mixed[i * each * out.cols..(i + 1) * each * out.cols];
            match (&layer_weights.mixer, &mut state.layers[layer]) {
                (Mixer::DeltaNet(m), LayerState::DeltaNet(s)) => {
                    let shape = &shape.delta_net;
                    m.mix(pool, isa, shape, eps, projected, each, s, mixed)?;
                }
                (Mixer::Attention(m), LayerState::Attention(cache)) => {
                    let needed = cache.len + each;
                    if needed > cache.capacity {
                        return Err(BackendError::ContextFull {
                            needed,
                            capacity: cache.capacity,
                        });
                    }
                    let shape = &shape.attention;
                    m.mix(
                        pool, isa, shape, eps, projected, each, cache, attention, mixed,
                    )?;
                }
                _ => unreachable!("states are made for this model"),
            }
        }
        mixed_x.fill(
            pool,
            isa,
            tokens,
            out.cols,
            out.reads_integers(),
            &|t, row| {
                row.copy_from_slice(&mixed[t * row.len()..(t + 1) * row.len()]);
            },
        )?;
        add_product(pool, isa, out, mixed_x.view(), all_tokens, &mut hidden.data)
    }

    fn router(&mut self, layer: usize, hidden: &Hidden) -> Result<Routing> {
        let Cpu {
            shape,
            isa,
            pool,
            layers,
            scratch,
            ..
        } = self;
        let (isa, tokens) = (*isa, hidden.tokens);
        let layer = &layers[layer];
        scratch.prepare(tokens);
        let Scratch {
            all_tokens,
            x,
            projected,
            logits,
            ..
        } = scratch;
        let (scale, eps) = (&layer.expert_norm, shape.rms_norm_eps);
        normed(pool, isa, hidden, 0..tokens, scale, eps, None, x)?;
        projected.project(pool, isa, &[&layer.router], x.view(), all_tokens)?;

        let experts = shape.moe.num_experts;
        let padded = router::padded_len(experts);
        logits.resize(tokens * padded, 0.0);
        pool.for_each_chunk(logits, padded, &|t, p| {
            projected.copy_rows(0, t, 0..experts, p);
            p[experts..].fill(f32::NEG_INFINITY);
            router::softmax(isa, p);
        })?;
        let k = shape.moe.num_experts_per_tok;
        let mut routing = Routing {
            num_experts_per_tok: k,
            topk_ids: Vec::with_capacity(tokens * k),
            topk_weights: Vec::with_capacity(tokens * k),
        };
        for p in logits.chunks_exact(padded) {
            router::push_top_k(&p[..experts], k, shape.moe.norm_topk_prob, &mut routing);
        }
        Ok(routing)
    }

    fn experts(&mut self, layer: usize, hidden: &mut Hidden, routing: &Routing) -> Result<()> {
        let Cpu {
            shape,
            isa,
            pool,
            layers,
            scratch,
            ..
        } = self;
        let (isa, tokens) = (*isa, hidden.tokens);
        let layer = &layers[layer];
        scratch.prepare(tokens);
        let Scratch {
            all_tokens,
            x,
            projected,
            experts,
            gates,
            ..
        } = scratch;
        let (scale, eps) = (&layer.expert_norm, shape.rms_norm_eps);
        let integers = std::iter::once(&layer.shared_expert)
            .chain(&layer.experts)
            .flat_map(|e| [&e.gate, &e.up])
            .find_map(|l| l.reads_integers());
        normed(pool, isa, hidden, 0..tokens, scale, eps, integers, x)?;
        projected.project(pool, isa, &[&layer.shared_gate], x.view(), all_tokens)?;
        gates.clear();
        gates.extend((0..tokens).map(|t| math::sigmoid_f32(projected.get(0, t, 0))));
        experts::add_experts(
            pool,
            isa,
            &layer.experts,
            &layer.shared_expert,
            routing,
            gates,
            x,
            all_tokens,
            experts,
            &mut hidden.data,
        )
    }

    fn head(&mut self, hidden: &Hidden, rows: Range<usize>) -> Result<Vec<f32>> {
        let Cpu {
            shape,
            isa,
            pool,
            norm,
            lm_head,
            scratch,
            ..
        } = self;
        let (isa, tokens, vocab) = (*isa, rows.len(), shape.vocab_size);
        scratch.prepare(tokens);
        let Scratch { all_tokens, x, .. } = scratch;
        let (eps, integers) = (shape.rms_norm_eps, lm_head.reads_integers());
        normed(pool, isa, hidden, rows, norm, eps, integers, x)?;
        let mut logits = vec![0.0; tokens * vocab];
        add_product(pool, isa, lm_head, x.view(), all_tokens, &mut logits)?;
        Ok(logits)
    }
}

#[cfg(test)]
pub(crate) mod tests;
