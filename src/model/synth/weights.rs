//! The tensors of a synthetic model, in the published NF4 layout, and what each is filled with.
//!
//! Nothing is quantised: codes are drawn as those of normal weights are distributed, scales from
//! random bytes. Structure is in the bf16 matrices and in one scale per NF4 matrix.
//!
//! The hidden state is kept in two halves. Embeddings live in the first: tokens that are alike
//! have embeddings that are, and so they get the same experts. The second starts at zero and holds
//! only what mixers and experts write, which changes with the context. A router reads both, and
//! how much of each is the locality: near 1 experts repeat as subjects and words of a text do; at
//! 0 they are as good as drawn at random. What a layer writes is small enough that all layers
//! together leave the embedding the larger part of the residual stream.

use std::sync::{Arc, LazyLock};

use half::bf16;
use rayon::prelude::*;

use super::random::{Stream, normal_quantiles};
use super::topics::Topics;
use super::{SynthError, TOKENIZER_SIZE};
use crate::backend::{MixerKind, ModelShape};
use crate::formats::Dtype;
use crate::formats::nf4::dynamic_map::DYNAMIC_MAP;
use crate::formats::nf4::{BLOCKSIZE, CODE_BOOK, STATE_SUFFIX, quantize as nf4};
use crate::formats::writer::Planned;

/// Variance that all layers together add to a residual stream that starts with 1.
const RESIDUAL_VARIANCE: f64 = 0.25;

/// Standard deviation of a router's logits.
const ROUTER_STD: f64 = 1.5;

/// Standard deviation of the output's logits, beside those of the tokens' frequencies. They come
/// from the context's half: followed a token from the last one alone, greedy text would soon go
/// round in circles, and experts would be hit as no real text hits them.
const LOGIT_STD: f64 = 2.0;

/// What the last token adds to its own logit: without it some greedy texts end in one word repeated.
const REPEAT_LOGIT: f64 = -2.0;

/// The first element of every embedding: in it the head adds the log-frequency of tokens, so that
/// generated text repeats tokens as text does.
const CONSTANT: f32 = 2.0;

/// Standard deviation of what goes into the silu behind the delta net's convolution. Where silu is
/// nearly linear its results have no common direction that would draw all tokens to some experts.
const CONV_STD: f32 = 0.5;

/// Root mean square of silu(x), and of silu(x) times an independent y, for normal x and y.
const SILU_RMS: f64 = 0.6;

/// Bytes that one thread fills at a time.
const PIECE: usize = 1 << 18;

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
    /// Pairs of NF4 codes
    Codes(Stream),
    /// Rows of bf16
    Rows(Rows),
}

/// A bf16 matrix whose rows can be made one by one.
struct Rows {
    stream: Stream,
    width: usize,
    kind: RowKind,
}

enum RowKind {
    Normal {
        std: f32,
    },
    Embedding(Arc<Embedding>),
    Router(Halves),
    Head {
        halves: Halves,
        embedding: Arc<Embedding>,
        /// How much of its own embedding is in a token's row, less than 0
        repeat: f32,
    },
}

/// The token's half of all embeddings.
struct Embedding {
    stream: Stream,
    topics: Topics,
    topic_share: f32,
}

impl Embedding {
    /// Adds `share` times the embedding of a token to `out`, `[hidden_size / 2]`.
    fn add(&self, token: usize, share: f32, out: &mut [f32]) {
        let has_topic = self.topics.add(token, share * self.topic_share.sqrt(), out);
        let rest = if has_topic {
            1.0 - self.topic_share
        } else {
            1.0
        };
        let share = share * rest.sqrt();
        let own = self.stream.normal((token * out.len()) as u64);
        out.iter_mut().zip(own).for_each(|(to, v)| *to += share * v);
    }
}

/// Standard deviations of weights that read the halves of the hidden state.
struct Halves {
    token: f32,
    context: f32,
}

impl Halves {
    fn fill(&self, normal: impl Iterator<Item = f32>, out: &mut [f32]) {
        let half = out.len() / 2;
        for (i, (to, v)) in out.iter_mut().zip(normal).enumerate() {
            *to = v * if i < half { self.token } else { self.context };
        }
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
            Content::Codes(stream) => {
                let pairs: &[u8; 256] = &CODE_PAIRS;
                out.par_chunks_mut(PIECE)
                    .enumerate()
                    .for_each(|(i, piece)| {
                        stream.bytes((i * PIECE / 8) as u64, piece);
                        piece.iter_mut().for_each(|b| *b = pairs[usize::from(*b)]);
                    });
            }
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
        let half = self.width / 2;
        match &self.kind {
            RowKind::Normal { std } => {
                out.iter_mut().zip(own).for_each(|(to, v)| *to = std * v);
            }
            RowKind::Embedding(embedding) => {
                out.fill(0.0);
                embedding.add(row, 1.0, &mut out[..half]);
                out[0] = CONSTANT;
            }
            RowKind::Router(halves) => {
                halves.fill(own, out);
                out[0] = 0.0;
            }
            RowKind::Head {
                halves,
                embedding,
                repeat,
            } => {
                halves.fill(own, out);
                // Other tokens are never generated.
                if row < TOKENIZER_SIZE {
                    embedding.add(row, *repeat, &mut out[..half]);
                }
                out[0] = log_frequency(row) / CONSTANT;
            }
        }
    }
}

/// Zipf's law over the tokens of the tokenizer, which lists them by frequency after the single
/// bytes; others, which have no text, are never generated.
fn log_frequency(token: usize) -> f32 {
    const FIRST_WORD: usize = 259;
    match token {
        TOKENIZER_SIZE.. => -40.0,
        FIRST_WORD.. => -((10 + token - FIRST_WORD) as f32 / 10.0).ln(),
        _ => log_frequency(1000),
    }
}

/// Two NF4 codes for each value of a byte: with random bytes, those of normal weights in blocks of
/// 64, whose largest is 2.4 standard deviations on average.
///
/// All sixteen codes equally often would be nearly as normal, but with a mean of 0.05 standard
/// deviations, and that is enough to make all tokens alike after some thirty layers.
static CODE_PAIRS: LazyLock<[u8; 256]> = LazyLock::new(|| {
    const ABSMAX: f32 = 2.4;
    let codes = normal_quantiles::<256>().map(|z| {
        let distance = |code: &usize| (CODE_BOOK[*code] - z / ABSMAX).abs();
        let nearest = (0..16).min_by(|a, b| distance(a).total_cmp(&distance(b)));
        nearest.expect("there are sixteen") as u8
    });
    // The other nibble takes the same codes in an order that has little to do with the first.
    std::array::from_fn(|i| codes[i] << 4 | codes[usize::from((i as u8).reverse_bits())])
});

/// Root mean square of the codes' values.
fn code_rms() -> f64 {
    let value = |pair: &u8| f64::from(CODE_BOOK[usize::from(pair >> 4)]);
    let sum: f64 = CODE_PAIRS.iter().map(|pair| value(pair).powi(2)).sum();
    (sum / CODE_PAIRS.len() as f64).sqrt()
}

/// All weights of a model of that shape.
///
/// - `depth`: layers of the whole model, where `shape` is the first few of it
///
/// # Errors
/// If this build has no built-in model.
pub fn weights(
    shape: &ModelShape,
    depth: usize,
    seed: u64,
    locality: f64,
) -> Result<Vec<Weight>, SynthError> {
    let mut maker = Maker {
        shape,
        seed,
        locality,
        written_std: (RESIDUAL_VARIANCE / (3.0 * depth as f64)).sqrt(),
        quant_map: le_bytes(&CODE_BOOK),
        nested_quant_map: le_bytes(&*DYNAMIC_MAP),
        weights: Vec::new(),
    };
    let (vocab, hidden) = (shape.vocab_size, shape.hidden_size);
    let embedding = Arc::new(Embedding {
        stream: Stream::new(seed, "embedding"),
        topics: Topics::new(seed, hidden / 2)?,
        topic_share: locality as f32,
    });
    let embed_tokens = RowKind::Embedding(Arc::clone(&embedding));
    maker.rows("model.embed_tokens.weight", vocab, embed_tokens);
    maker.head(embedding);
    maker.norm("model.norm.weight", hidden);
    for layer in 0..shape.num_layers() {
        maker.layer(layer);
    }
    Ok(maker.weights)
}

struct Maker<'a> {
    shape: &'a ModelShape,
    seed: u64,
    locality: f64,
    /// Standard deviation of what each of a layer's three writers adds to the residual stream:
    /// the mixer, the experts, the shared expert
    written_std: f64,
    quant_map: Arc<[u8]>,
    nested_quant_map: Arc<[u8]>,
    weights: Vec<Weight>,
}

impl Maker<'_> {
    fn head(&mut self, embedding: Arc<Embedding>) {
        let writers = 3 * self.shape.num_layers();
        let (_, _, mean) = self.half_variances(writers);
        let half = self.shape.hidden_size as f64 / 2.0;
        let kind = RowKind::Head {
            halves: self.halves(writers, LOGIT_STD, 0.0),
            embedding,
            repeat: (REPEAT_LOGIT * mean.sqrt() / half) as f32,
        };
        self.rows("lm_head.weight", self.shape.vocab_size, kind);
    }

    fn layer(&mut self, layer: usize) {
        let hidden = self.shape.hidden_size;
        let prefix = format!("model.layers.{layer}");
        self.norm(&format!("{prefix}.input_layernorm.weight"), hidden);
        match self.shape.mixers[layer] {
            MixerKind::GatedDeltaNet => self.delta_net(&format!("{prefix}.linear_attn")),
            MixerKind::GatedAttention => self.attention(&format!("{prefix}.self_attn")),
        }
        self.norm(&format!("{prefix}.post_attention_layernorm.weight"), hidden);
        self.moe(layer, &format!("{prefix}.mlp"));
    }

    fn delta_net(&mut self, prefix: &str) {
        let net = self.shape.delta_net.clone();
        let hidden = self.shape.hidden_size;
        self.reader(&format!("{prefix}.in_proj_qkvz"), net.qkvz_rows(), hidden);
        self.reader(&format!("{prefix}.in_proj_ba"), net.ba_rows(), hidden);
        let kernel = net.conv_kernel_dim;
        let taps = RowKind::Normal {
            std: CONV_STD / (kernel as f32).sqrt(),
        };
        let conv_shape = [net.conv_dim(), 1, kernel];
        self.shaped_rows(&format!("{prefix}.conv1d.weight"), &conv_shape, taps);
        // Heads remember from one token to dozens.
        let heads = net.num_value_heads;
        self.ramp(&format!("{prefix}.A_log"), heads, -2.0, 1.0);
        self.ramp(&format!("{prefix}.dt_bias"), heads, -2.0, 0.0);
        self.ramp(
            &format!("{prefix}.norm.weight"),
            net.value_head_dim,
            1.0,
            1.0,
        );
        let out_proj = format!("{prefix}.out_proj");
        self.writer(&out_proj, hidden, net.value_dim(), SILU_RMS);
    }

    fn attention(&mut self, prefix: &str) {
        let attention = self.shape.attention.clone();
        let hidden = self.shape.hidden_size;
        self.reader(&format!("{prefix}.q_proj"), attention.q_proj_rows(), hidden);
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

    /// Rows whose logits get `locality` of their variance from the token, the rest from context.
    fn router(&mut self, layer: usize, name: &str) {
        let halves = self.halves(3 * layer + 1, ROUTER_STD, self.locality);
        self.rows(name, self.shape.moe.num_experts, RowKind::Router(halves));
    }

    /// Variance of the token's half, the context's and the whole after `writers` wrote to it.
    fn half_variances(&self, writers: usize) -> (f64, f64, f64) {
        let context = writers as f64 * self.written_std.powi(2);
        (1.0 + context, context, 0.5 + context)
    }

    /// Weights that make logits of the normed hidden state after `writers` wrote to it.
    ///
    /// - `std`: of the logits
    /// - `token_share`: of their variance, from the half of the token; the rest from the context's
    fn halves(&self, writers: usize, std: f64, token_share: f64) -> Halves {
        let (token, context, mean) = self.half_variances(writers);
        let half = self.shape.hidden_size as f64 / 2.0;
        let weight =
            |share: f64, variance: f64| (std * (share * mean / (variance * half)).sqrt()) as f32;
        Halves {
            token: weight(token_share, token),
            context: weight(1.0 - token_share, context),
        }
    }

    /// A matrix that reads a normed hidden state: outputs have variance 1.
    fn reader(&mut self, module: &str, rows: usize, cols: usize) {
        self.nf4(module, rows, cols, (1.0 / cols as f64).sqrt());
    }

    /// A matrix that writes to the residual stream, from inputs of that root mean square.
    fn writer(&mut self, module: &str, rows: usize, cols: usize, input_rms: f64) {
        let std = self.written_std / (input_rms * (cols as f64).sqrt());
        self.nf4(module, rows, cols, std);
    }

    fn nf4(&mut self, module: &str, rows: usize, cols: usize, std: f64) {
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
        let parts = nf4::parts(n, true).into_iter().map(|p| {
            let stream = Stream::new(self.seed, &format!("{name}{}", p.suffix));
            let content = match p.suffix {
                "" => Content::Codes(stream),
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

    /// A norm's weight, zero-centred: near 0, as training leaves it.
    fn norm(&mut self, name: &str, len: usize) {
        self.shaped_rows(name, &[len], RowKind::Normal { std: 0.02 });
    }

    /// `len` evenly spaced values.
    fn ramp(&mut self, name: &str, len: usize, from: f32, to: f32) {
        let step = (to - from) / (len - 1).max(1) as f32;
        let value = |i| bf16::from_f32(from + step * i as f32).to_le_bytes();
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
