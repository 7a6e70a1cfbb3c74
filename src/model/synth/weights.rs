//! The tensors of a synthetic model, in the published NF4 layout, and what each is filled with.
//!
//! Nothing is quantised: codes are drawn as those of normal weights are distributed, scales from
//! random bytes. Structure is in the bf16 matrices, in one scale per NF4 matrix, and in codes that
//! are given instead of drawn.
//!
//! The hidden state is kept in four [`Regions`]: what the token is, what it says of the text's
//! subject, what layers write, which changes with the context, and what the text was about lately,
//! which one delta net [remembers](super::memory). A router reads the first and the last, as much
//! as its locality says, and the context for the rest. What a layer writes is small enough that all
//! layers together leave the embedding the larger part of the residual stream.

use std::ops::Range;
use std::sync::Arc;

use half::bf16;
use rayon::prelude::*;

use super::codes::{Codes, Given, PIECE, ZERO, code_rms};
use super::embedding::{CONSTANT, CONSTANTS, Embedding, SUBJECT_VARIANCE};
use super::random::Stream;
use super::regions::{Reading, Regions};
use super::topics::log_frequency;
use super::{SynthError, TOKENIZER_SIZE};
use crate::backend::{DeltaNetShape, MixerKind, ModelShape};
use crate::formats::Dtype;
use crate::formats::nf4::dynamic_map::DYNAMIC_MAP;
use crate::formats::nf4::{BLOCKSIZE, CODE_BOOK, STATE_SUFFIX, quantize as nf4};
use crate::formats::writer::Planned;
use crate::model::ModelConfig;
use crate::model::families::{Attention, Family, Norms};

/// Variance that all layers together add to a residual stream whose tokens start with 1.
const RESIDUAL_VARIANCE: f64 = 0.25;

/// Standard deviation of a router's logits.
const ROUTER_STD: f64 = 1.5;

/// How much of the local part of their variance comes from the token; the rest from the text.
const TOKEN_SHARE: f64 = 0.2;

/// Standard deviation of the output's logits, beside those of the tokens' frequencies. They come
/// from the context's half: followed a token from the last one alone, greedy text would soon go
/// round in circles, and experts would be hit as no real text hits them.
const LOGIT_STD: f64 = 2.0;

/// What the last token adds to its own logit: without it some greedy texts end in one word repeated.
const REPEAT_LOGIT: f64 = -2.0;

/// Standard deviation of what goes into the silu behind the delta net's convolution. Where silu is
/// nearly linear its results have no common direction that would draw all tokens to some experts.
const CONV_STD: f32 = 0.5;

/// So little of it that the silu behind it stays linear: its curvature gives all values a mean, and
/// after averaging them little else would be left.
const PLAIN_TAP: f32 = 0.2;

/// Root mean square of silu(x), and of silu(x) times an independent y, for normal x and y.
pub(super) const SILU_RMS: f64 = 0.6;

/// A weight of the model: one tensor, or the six of an NF4 matrix.
pub struct Weight {
    pub parts: Vec<Part>,
}

impl Weight {
    pub fn bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.tensor.len_bytes()).sum()
    }
}

/// A tensor and what it is filled with.
pub struct Part {
    pub tensor: Planned,
    content: Content,
}

enum Content {
    Bytes(Arc<[u8]>),
    Random(Stream),
    Codes(Codes),
    /// Rows of bf16
    Rows(Rows),
}

/// A bf16 matrix whose rows can be made one by one.
struct Rows {
    stream: Stream,
    width: usize,
    kind: RowKind,
}

pub(super) enum RowKind {
    Normal {
        std: f32,
    },
    /// Rows of a convolution; `plain` ones read the present alone, [`PLAIN_TAP`] of it.
    Taps {
        std: f32,
        plain: Vec<Range<usize>>,
    },
    Embedding(Arc<Embedding>),
    Router(Regions, Reading),
    Head {
        regions: Regions,
        reading: Reading,
        embedding: Arc<Embedding>,
        /// How much of its own embedding is in a token's row, less than 0
        repeat: f32,
    },
}

impl RowKind {
    pub(super) fn taps(net: &DeltaNetShape, plain: Vec<Range<usize>>) -> Self {
        let std = CONV_STD / (net.conv_kernel_dim as f32).sqrt();
        RowKind::Taps { std, plain }
    }
}

impl Part {
    /// Whether the bytes need no generator: code books, scales of scales, states.
    pub fn is_constant(&self) -> bool {
        matches!(self.content, Content::Bytes(_))
    }

    /// Fills `out`, the whole tensor, on all threads of the current pool.
    pub fn fill(&self, out: &mut [u8]) {
        match &self.content {
            Content::Bytes(bytes) => out.copy_from_slice(bytes),
            Content::Random(stream) => out
                .par_chunks_mut(PIECE)
                .enumerate()
                .for_each(|(i, piece)| stream.bytes((i * PIECE / 8) as u64, piece)),
            Content::Codes(codes) => codes.fill(out),
            Content::Rows(rows) => {
                let rows_per_piece = (PIECE / (2 * rows.width)).max(1);
                out.par_chunks_mut(rows_per_piece * 2 * rows.width)
                    .enumerate()
                    .for_each(|(i, piece)| rows.fill(i * rows_per_piece, piece));
            }
        }
    }
}

impl Rows {
    fn fill(&self, first: usize, out: &mut [u8]) {
        let mut values = vec![0.0; self.width];
        for (row, out) in (first..).zip(out.chunks_exact_mut(2 * self.width)) {
            self.row(row, &mut values);
            for (to, value) in out.as_chunks_mut::<2>().0.iter_mut().zip(&values) {
                *to = bf16::from_f32(*value).to_le_bytes();
            }
        }
    }

    fn row(&self, row: usize, out: &mut [f32]) {
        let words = self.width.div_ceil(4) as u64;
        let own = self.stream.normal(row as u64 * words);
        match &self.kind {
            RowKind::Normal { std } => {
                out.iter_mut().zip(own).for_each(|(to, v)| *to = std * v);
            }
            RowKind::Taps { plain, .. } if plain.iter().any(|rows| rows.contains(&row)) => {
                out.fill(0.0);
                *out.last_mut().expect("a kernel has taps") = PLAIN_TAP;
            }
            RowKind::Taps { std, .. } => {
                out.iter_mut().zip(own).for_each(|(to, v)| *to = std * v);
            }
            RowKind::Embedding(embedding) => embedding.row(row, out),
            RowKind::Router(regions, reading) => {
                reading.fill(*regions, own, out);
                out[..CONSTANTS].fill(0.0);
            }
            RowKind::Head {
                regions,
                reading,
                embedding,
                repeat,
            } => {
                reading.fill(*regions, own, out);
                // Other tokens are never generated.
                if row < TOKENIZER_SIZE {
                    embedding.add_token(row, *repeat, out);
                }
                out[..CONSTANTS].fill(log_frequency(row) / (CONSTANTS as f32 * CONSTANT));
            }
        }
    }
}

/// All weights of such a model. Their names are those of Qwen3-Next, whatever the family, without
/// what the family does not have.
///
/// - `depth`: layers of the whole model, where `config` is of the first few of it
/// - `remembers`: the layer whose delta net [remembers](super::memory) the text
///
/// # Errors
/// If this build has no built-in model.
pub fn weights(
    config: &ModelConfig,
    depth: usize,
    seed: u64,
    locality: f64,
    remembers: Option<usize>,
) -> Result<Vec<Weight>, SynthError> {
    let shape = &config.shape;
    let mut maker = Maker {
        shape,
        family: config.family,
        seed,
        locality,
        regions: Regions::new(shape.hidden_size),
        remembers,
        written_std: (RESIDUAL_VARIANCE / (3.0 * depth as f64)).sqrt(),
        quant_map: le_bytes(&CODE_BOOK),
        nested_quant_map: le_bytes(&*DYNAMIC_MAP),
        weights: Vec::new(),
    };
    let (vocab, hidden) = (shape.vocab_size, shape.hidden_size);
    let embedding = Arc::new(Embedding::new(seed, maker.regions)?);
    let embed_tokens = RowKind::Embedding(Arc::clone(&embedding));
    maker.rows("model.embed_tokens.weight", vocab, embed_tokens);
    maker.head(embedding);
    maker.norm("model.norm.weight", hidden);
    for layer in 0..shape.num_layers() {
        maker.layer(layer);
    }
    Ok(maker.weights)
}

pub(super) struct Maker<'a> {
    pub(super) shape: &'a ModelShape,
    family: &'static Family,
    seed: u64,
    locality: f64,
    pub(super) regions: Regions,
    /// The layer whose delta net remembers the text
    remembers: Option<usize>,
    /// Standard deviation of what each of a layer's three writers adds to the residual stream:
    /// the mixer, the experts, the shared expert
    pub(super) written_std: f64,
    quant_map: Arc<[u8]>,
    nested_quant_map: Arc<[u8]>,
    weights: Vec<Weight>,
}

impl Maker<'_> {
    fn head(&mut self, embedding: Arc<Embedding>) {
        let writers = 3 * self.shape.num_layers();
        let (_, _, mean) = self.variances(writers);
        let kind = RowKind::Head {
            regions: self.regions,
            reading: self.reading(writers, LOGIT_STD, [0.0, 1.0, 0.0]),
            embedding,
            repeat: (REPEAT_LOGIT * mean.sqrt() / self.regions.len() as f64) as f32,
        };
        self.rows("lm_head.weight", self.shape.vocab_size, kind);
    }

    fn layer(&mut self, layer: usize) {
        let hidden = self.shape.hidden_size;
        let prefix = format!("model.layers.{layer}");
        self.norm(&format!("{prefix}.input_layernorm.weight"), hidden);
        match self.shape.mixers[layer] {
            MixerKind::GatedDeltaNet => {
                self.delta_net(
                    &format!("{prefix}.linear_attn"),
                    self.remembers == Some(layer),
                );
            }
            MixerKind::GatedAttention => self.attention(&format!("{prefix}.self_attn")),
        }
        self.norm(&format!("{prefix}.post_attention_layernorm.weight"), hidden);
        self.moe(layer, &format!("{prefix}.mlp"));
    }

    fn delta_net(&mut self, prefix: &str, remembers: bool) {
        let net = self.shape.delta_net.clone();
        let hidden = self.shape.hidden_size;
        if remembers {
            self.remembering_delta_net(prefix);
        } else {
            self.reader(&format!("{prefix}.in_proj_qkvz"), net.qkvz_rows(), hidden);
            self.reader(&format!("{prefix}.in_proj_ba"), net.ba_rows(), hidden);
            self.convolution(prefix, RowKind::taps(&net, Vec::new()));
            self.decay(prefix, |_| None);
            let out_proj = format!("{prefix}.out_proj");
            self.writer(&out_proj, hidden, net.value_dim(), SILU_RMS);
        }
        self.values(&format!("{prefix}.norm.weight"), net.value_head_dim, |_| {
            1.0
        });
    }

    pub(super) fn convolution(&mut self, prefix: &str, taps: RowKind) {
        let net = &self.shape.delta_net;
        let shape = [net.conv_dim(), 1, net.conv_kernel_dim];
        self.shaped_rows(&format!("{prefix}.conv1d.weight"), &shape, taps);
    }

    /// Heads remember from one token to dozens, but for those whose `A_log` is given.
    pub(super) fn decay(&mut self, prefix: &str, given: impl Fn(usize) -> Option<f32>) {
        let heads = self.shape.delta_net.num_value_heads;
        let part = |head: usize| head as f32 / (heads - 1).max(1) as f32;
        let a_log = |head| given(head).unwrap_or(-2.0 + 3.0 * part(head));
        self.values(&format!("{prefix}.A_log"), heads, a_log);
        self.values(&format!("{prefix}.dt_bias"), heads, |head| {
            -2.0 + 2.0 * part(head)
        });
    }

    fn attention(&mut self, prefix: &str) {
        let attention = self.shape.attention.clone();
        let hidden = self.shape.hidden_size;
        let query_rows = match self.family.attention {
            Attention::Gated => attention.q_proj_rows(),
            Attention::Plain => attention.q_proj_rows() / 2,
        };
        self.reader(&format!("{prefix}.q_proj"), query_rows, hidden);
        self.reader(&format!("{prefix}.k_proj"), attention.kv_rows(), hidden);
        self.reader(&format!("{prefix}.v_proj"), attention.kv_rows(), hidden);
        self.norm(&format!("{prefix}.q_norm.weight"), attention.head_dim);
        self.norm(&format!("{prefix}.k_norm.weight"), attention.head_dim);
        // Means over the context are small, and should be: they are much alike for all tokens.
        let o_proj = format!("{prefix}.o_proj");
        self.writer(&o_proj, hidden, attention.o_proj_cols(), 1.0);
    }

    fn moe(&mut self, layer: usize, prefix: &str) {
        let moe = self.shape.moe.clone();
        self.router(layer, &format!("{prefix}.gate.weight"));
        // Independent outputs, each with a weight of about 1 / k.
        let share = SILU_RMS / (moe.num_experts_per_tok as f64).sqrt();
        for expert in 0..moe.num_experts {
            let prefix = format!("{prefix}.experts.{expert}");
            self.expert(&prefix, moe.moe_intermediate_size, share);
        }
        if !self.family.shared_expert {
            return;
        }
        let shared = format!("{prefix}.shared_expert");
        self.expert(&shared, moe.shared_expert_intermediate_size, SILU_RMS / 2.0);
        self.reader(&format!("{shared}_gate"), 1, self.shape.hidden_size);
    }

    fn expert(&mut self, prefix: &str, intermediate: usize, input_rms: f64) {
        let hidden = self.shape.hidden_size;
        self.reader(&format!("{prefix}.gate_proj"), intermediate, hidden);
        self.reader(&format!("{prefix}.up_proj"), intermediate, hidden);
        let down_proj = format!("{prefix}.down_proj");
        self.writer(&down_proj, hidden, intermediate, input_rms);
    }

    /// Rows whose logits get `locality` of their variance from the token and the text, the rest from
    /// the context.
    fn router(&mut self, layer: usize, name: &str) {
        let text = match self.remembers {
            Some(first) if first <= layer => 1.0 - TOKEN_SHARE,
            _ => 0.0,
        };
        let local = [1.0 - text, text].map(|share| share * self.locality);
        let shares = [local[0], 1.0 - self.locality, local[1]];
        let reading = self.reading(3 * layer + 1, ROUTER_STD, shares);
        let experts = self.shape.moe.num_experts;
        self.rows(name, experts, RowKind::Router(self.regions, reading));
    }

    /// Variance of an embedding, without its constants.
    pub(super) fn embedding_variance(&self) -> f64 {
        (1.0 + SUBJECT_VARIANCE) / 4.0
    }

    /// Variance of the token's region, the context's and the whole after `writers` wrote to it.
    fn variances(&self, writers: usize) -> (f64, f64, f64) {
        let context = writers as f64 * self.written_std.powi(2);
        let mean = self.embedding_variance() + 0.75 * context;
        (1.0 + context, context, mean)
    }

    /// Weights that make logits of the normed hidden state after `writers` wrote to it.
    ///
    /// - `std`: of the logits
    /// - `shares`: of their variance, from the token, the context and the text
    fn reading(&self, writers: usize, std: f64, shares: [f64; 3]) -> Reading {
        let (token, context, mean) = self.variances(writers);
        let len = self.regions.len() as f64;
        let weight = |share: f64, variance: f64| match share {
            0.0 => 0.0, // of a region that may be empty
            _ => (std * (share * mean / (variance * len)).sqrt()) as f32,
        };
        Reading {
            token: weight(shares[0], token),
            context: weight(shares[1], context),
            text: weight(shares[2], self.text_variance()),
        }
    }

    /// A matrix that reads a normed hidden state: outputs have variance 1.
    fn reader(&mut self, module: &str, rows: usize, cols: usize) {
        self.nf4(module, rows, cols, (1.0 / cols as f64).sqrt(), Vec::new());
    }

    /// A matrix that writes to the residual stream, from inputs of that root mean square, but not to
    /// the region of the text.
    fn writer(&mut self, module: &str, rows: usize, cols: usize, input_rms: f64) {
        let std = self.written_std / (input_rms * (cols as f64).sqrt());
        let quiet = Given {
            rows: self.regions.text(),
            cols: 0..cols,
            code: ZERO,
        };
        self.nf4(module, rows, cols, std, vec![quiet]);
    }

    /// - `std`: of the weights that are not `given`
    pub(super) fn nf4(
        &mut self,
        module: &str,
        rows: usize,
        cols: usize,
        std: f64,
        given: Vec<Given>,
    ) {
        let name = format!("{module}.weight");
        let n = rows * cols;
        let absmax = (std / code_rms()) as f32;
        // Scales of normal weights differ by some ten percent; all stay positive.
        let nested_absmax = vec![absmax / 4.0; n.div_ceil(BLOCKSIZE).div_ceil(256)];
        let mut state = nf4::state(Dtype::Bf16, &[rows, cols], true);
        if let Some(nested) = &mut state.nested {
            nested.nested_offset = f64::from(absmax);
        }
        let state = state.to_json().into_bytes();
        let part = |suffix: &str, dtype, shape: Vec<usize>, content| {
            let name = format!("{name}{suffix}");
            Part {
                tensor: Planned { name, dtype, shape },
                content,
            }
        };
        let mut given = Some(given);
        let parts = nf4::parts(n, true).into_iter().map(|p| {
            let stream = Stream::new(self.seed, &format!("{name}{}", p.suffix));
            let content = match p.suffix {
                "" => Content::Codes(Codes {
                    stream,
                    cols,
                    given: given.take().unwrap_or_default(),
                }),
                ".absmax" => Content::Random(stream),
                ".nested_absmax" => Content::Bytes(le_bytes(&nested_absmax)),
                ".quant_map" => Content::Bytes(Arc::clone(&self.quant_map)),
                ".nested_quant_map" => Content::Bytes(Arc::clone(&self.nested_quant_map)),
                other => unreachable!("NF4 has no part `{other}`"),
            };
            part(p.suffix, p.dtype, p.shape, content)
        });
        let mut parts: Vec<Part> = parts.collect();
        let len = state.len();
        let state = Content::Bytes(state.into());
        parts.push(part(STATE_SUFFIX, Dtype::U8, vec![len], state));
        self.weights.push(Weight { parts });
    }

    /// A norm's weight: where it is zero-centred near 0, as training leaves it.
    fn norm(&mut self, name: &str, len: usize) {
        if self.family.norms == Norms::Plain {
            return self.values(name, len, |_| 1.0);
        }
        self.shaped_rows(name, &[len], RowKind::Normal { std: 0.02 });
    }

    fn values(&mut self, name: &str, len: usize, value: impl Fn(usize) -> f32) {
        let value = |i| bf16::from_f32(value(i)).to_le_bytes();
        let bytes: Vec<u8> = (0..len).flat_map(value).collect();
        self.bf16(name, &[len], Content::Bytes(bytes.into()));
    }

    fn rows(&mut self, name: &str, rows: usize, kind: RowKind) {
        self.shaped_rows(name, &[rows, self.shape.hidden_size], kind);
    }

    fn shaped_rows(&mut self, name: &str, shape: &[usize], kind: RowKind) {
        let rows = Rows {
            stream: Stream::new(self.seed, name),
            width: shape[shape.len() - 1],
            kind,
        };
        self.bf16(name, shape, Content::Rows(rows));
    }

    fn bf16(&mut self, name: &str, shape: &[usize], content: Content) {
        let tensor = Planned {
            name: name.into(),
            dtype: Dtype::Bf16,
            shape: shape.to_vec(),
        };
        let parts = vec![Part { tensor, content }];
        self.weights.push(Weight { parts });
    }
}

fn le_bytes(values: &[f32]) -> Arc<[u8]> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}
