//! Models of any shape with weights from a seed, and how far two executors agree on them.
#![allow(dead_code)] // each test binary uses its part

use half::bf16;
use moectl::backend::weights::{AttentionWeights, DeltaNetWeights, MoeWeights};
use moectl::backend::{
    AttentionShape, DeltaNetShape, Executor, ExpertWeights, LayerWeights, LogitRows, MixerKind,
    MixerWeights, ModelShape, ModelWeights, MoeShape, Rope, RopeScaling, Routing, Yarn,
};
use moectl::formats::matrix::DenseMatrix;
use moectl::formats::nf4::{Absmax, BLOCKSIZE, Nf4Matrix};
use moectl::formats::{Bytes, Dtype, Matrix};
use proptest::prelude::*;
use proptest::sample::select;
use proptest::strategy::ValueTree;
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};
use rand::{Rng, RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::One;

/// A model that was drawn.
#[derive(Clone, Debug)]
pub struct Drawn {
    pub shape: ModelShape,
    /// Of the routed experts, the shared one, and all other matrices
    pub forms: [Form; 3],
    pub seed: u64,
}

/// How a matrix is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    F32,
    Bf16,
    /// F32 where its weights are no whole number of blocks
    Nf4,
}

/// Numbers that models have, and now and then one that they don't.
fn usual(usual: &[usize], odd: &[usize]) -> impl Strategy<Value = usize> + use<> {
    prop_oneof![15 => select(usual.to_vec()), 1 => select(odd.to_vec())]
}

fn rope() -> impl Strategy<Value = Rope> {
    let yarn = Yarn {
        factor: 4.0,
        original_max_position_embeddings: 64.0,
        attention_factor: 1.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        truncate: true,
    };
    let scalings = [
        RopeScaling::None,
        RopeScaling::Linear(2.0),
        RopeScaling::Yarn(yarn),
    ];
    let theta = select(vec![1e3, 1e4, 1e7]);
    (theta, select(scalings.to_vec())).prop_map(|(theta, scaling)| Rope { theta, scaling })
}

fn attention() -> impl Strategy<Value = AttentionShape> {
    let heads = (1..=3usize, select(vec![1, 2, 3, 4, 7, 8, 9, 12]));
    let head_dim = usual(&[32, 64, 128, 256], &[16, 48, 80, 96, 512]);
    (heads, head_dim, select(vec![1, 2, 4, 8]), rope()).prop_map(
        |((num_key_value_heads, per_kv_head), head_dim, part, rope)| AttentionShape {
            num_attention_heads: num_key_value_heads * per_kv_head,
            num_key_value_heads,
            head_dim,
            rotary_dim: head_dim / part,
            rope,
        },
    )
}

fn delta_net() -> impl Strategy<Value = DeltaNetShape> {
    let heads = (1..=3usize, 1..=4usize);
    let dim = || usual(&[32, 64, 128], &[16, 48, 96, 160, 256]);
    let taps = usual(&[1, 2, 3, 4, 5, 8], &[9, 12]);
    (heads, dim(), dim(), taps).prop_map(
        |((num_key_heads, ratio), key_head_dim, value_head_dim, conv_kernel_dim)| DeltaNetShape {
            num_key_heads,
            num_value_heads: num_key_heads * ratio,
            key_head_dim,
            value_head_dim,
            conv_kernel_dim,
        },
    )
}

fn moe() -> impl Strategy<Value = MoeShape> {
    let experts = usual(&[1, 2, 5, 16, 33, 65, 130], &[600, 1024, 1025, 1100]);
    let per_token = usual(&[1, 2, 3, 8, 10, 32], &[33, 40]);
    let size = || usual(&[4, 32, 36, 64, 100, 128], &[1, 2, 7, 33, 66]);
    (experts, per_token, size(), size(), any::<bool>()).prop_map(
        |(num_experts, per_token, size, shared_size, norm_topk_prob)| MoeShape {
            num_experts,
            num_experts_per_tok: per_token.min(num_experts),
            moe_intermediate_size: size,
            shared_expert_intermediate_size: shared_size,
            norm_topk_prob,
        },
    )
}

fn mixers() -> impl Strategy<Value = Vec<MixerKind>> {
    let interval = 1..=3usize;
    (interval, 1..=3usize).prop_map(|(interval, layers)| {
        let kind = |i: usize| match (i + 1).is_multiple_of(interval) {
            true => MixerKind::GatedAttention,
            false => MixerKind::GatedDeltaNet,
        };
        (0..layers).map(kind).collect()
    })
}

fn drawn() -> impl Strategy<Value = Drawn> {
    let sizes = (
        select(vec![2, 33, 97, 300]),
        usual(
            &[32, 36, 64, 96, 128, 200],
            &[30, 33, 50, 256, 8200, 10_240],
        ),
        select(vec![1e-6f32, 1e-5, 1e-3]),
    );
    let form = || select(vec![Form::F32, Form::Bf16, Form::Nf4, Form::Nf4]);
    let forms = [form(), form(), form()];
    let blocks = (mixers(), attention(), delta_net(), moe());
    (sizes, blocks, forms, any::<u64>()).prop_map(
        |((vocab_size, hidden_size, rms_norm_eps), blocks, forms, seed)| {
            let (mixers, attention, delta_net, moe) = blocks;
            let shape = ModelShape {
                vocab_size,
                hidden_size,
                rms_norm_eps,
                mixers,
                attention,
                delta_net,
                moe,
            };
            Drawn { shape, forms, seed }
        },
    )
}

/// So many models, always the same.
pub fn draw(count: usize) -> Vec<Drawn> {
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(Default::default(), rng);
    let mut one = || drawn().new_tree(&mut runner).unwrap().current();
    (0..count).map(|_| one()).collect()
}

/// Weights from a seed, of a size that keeps activations near one.
struct Weights(ChaCha8Rng);

impl Weights {
    fn values(&mut self, count: usize, least: f32, most: f32) -> Vec<f32> {
        (0..count)
            .map(|_| self.0.random_range(least..=most))
            .collect()
    }

    /// Rows whose products with values near one are near `gain`.
    fn matrix(&mut self, form: Form, rows: usize, cols: usize, gain: f32) -> Matrix {
        let bound = gain * (3.0 / cols as f32).sqrt();
        let count = rows * cols;
        let dtype = match form {
            Form::Nf4 if count.is_multiple_of(BLOCKSIZE) => {
                let mut packed = vec![0; count / 2];
                self.0.fill_bytes(&mut packed);
                let scales = self.values(count / BLOCKSIZE, 0.8 * bound, 1.2 * bound);
                let scales: Vec<u8> = scales.into_iter().flat_map(f32::to_le_bytes).collect();
                return Matrix::Nf4(Nf4Matrix {
                    packed: Bytes::from(packed),
                    absmax: Absmax::Plain(Bytes::from(scales)),
                    blocksize: BLOCKSIZE,
                    first: 0,
                    rows,
                    cols,
                });
            }
            Form::Bf16 => Dtype::Bf16,
            _ => Dtype::F32,
        };
        let values = self.values(count, -bound, bound).into_iter();
        let data: Vec<u8> = match dtype {
            Dtype::Bf16 => values
                .flat_map(|x| bf16::from_f32(x).to_le_bytes())
                .collect(),
            _ => values.flat_map(f32::to_le_bytes).collect(),
        };
        Matrix::Dense(DenseMatrix {
            data: Bytes::from(data),
            dtype,
            rows,
            cols,
        })
    }

    fn expert(&mut self, form: Form, hidden: usize, size: usize) -> ExpertWeights {
        ExpertWeights {
            gate_proj: self.matrix(form, size, hidden, 1.0),
            up_proj: self.matrix(form, size, hidden, 1.0),
            down_proj: self.matrix(form, hidden, size, 1.0),
        }
    }

    fn mixer(&mut self, shape: &ModelShape, kind: MixerKind, form: Form) -> MixerWeights {
        let hidden = shape.hidden_size;
        match kind {
            MixerKind::GatedDeltaNet => {
                let net = &shape.delta_net;
                let heads = net.num_value_heads;
                MixerWeights::GatedDeltaNet(Box::new(DeltaNetWeights {
                    in_proj_qkvz: self.matrix(form, net.qkvz_rows(), hidden, 1.0),
                    in_proj_ba: self.matrix(form, net.ba_rows(), hidden, 1.0),
                    conv1d: self.values(net.conv_dim() * net.conv_kernel_dim, -0.8, 0.8),
                    a_log: self.values(heads, -2.0, 1.0),
                    dt_bias: self.values(heads, -3.0, 0.5),
                    norm: self.values(net.value_head_dim, 0.7, 1.3),
                    out_proj: self.matrix(form, hidden, net.value_dim(), 1.0),
                }))
            }
            MixerKind::GatedAttention => {
                let s = &shape.attention;
                MixerWeights::GatedAttention(Box::new(AttentionWeights {
                    q_proj: self.matrix(form, s.q_proj_rows(), hidden, 1.0),
                    k_proj: self.matrix(form, s.kv_rows(), hidden, 1.0),
                    v_proj: self.matrix(form, s.kv_rows(), hidden, 1.0),
                    o_proj: self.matrix(form, hidden, s.o_proj_cols(), 1.0),
                    q_norm: self.values(s.head_dim, -0.3, 0.3),
                    k_norm: self.values(s.head_dim, -0.3, 0.3),
                }))
            }
        }
    }
}

impl Drawn {
    pub fn weights(&self) -> ModelWeights {
        let Drawn { shape, forms, seed } = self;
        let mut w = Weights(ChaCha8Rng::seed_from_u64(*seed));
        let (hidden, moe) = (shape.hidden_size, &shape.moe);
        let [routed, shared, other] = *forms;
        let mut layer = |&kind: &MixerKind| LayerWeights {
            input_layernorm: w.values(hidden, -0.3, 0.3),
            mixer: w.mixer(shape, kind, other),
            post_attention_layernorm: w.values(hidden, -0.3, 0.3),
            moe: MoeWeights {
                // Apart enough that rounding seldom swaps two experts.
                gate: w.matrix(other, moe.num_experts, hidden, 2.0),
                experts: (0..moe.num_experts)
                    .map(|_| w.expert(routed, hidden, moe.moe_intermediate_size))
                    .collect(),
                shared_expert: w.expert(shared, hidden, moe.shared_expert_intermediate_size),
                shared_expert_gate: w.matrix(other, 1, hidden, 1.0),
            },
        };
        let layers = shape.mixers.iter().map(&mut layer).collect();
        ModelWeights {
            layers,
            embed_tokens: w.matrix(Form::F32, shape.vocab_size, hidden, 1.0),
            norm: w.values(hidden, -0.3, 0.3),
            lm_head: w.matrix(other, shape.vocab_size, hidden, 1.0),
        }
    }

    /// Ids to feed.
    pub fn ids(&self, count: usize) -> Vec<u32> {
        let vocab = self.shape.vocab_size as u64;
        (0..count as u64)
            .map(|i| ((self.seed % 1009 + i * i * 31 + 7 * i) % vocab) as u32)
            .collect()
    }
}

/// What a sequence gave for each token.
pub struct Answers {
    /// `[T, V]`
    logits: Vec<f32>,
    vocab: usize,
    /// `[layers]`
    routing: Vec<Routing>,
}

/// Feeds `first` tokens at once, then the others one by one.
///
/// # Errors
/// If the executor reports one.
pub fn answers(
    sequence: &mut One<impl Executor>,
    ids: &[u32],
    first: usize,
) -> moectl::backend::Result<Answers> {
    let mut answers = Answers {
        logits: Vec::new(),
        vocab: sequence.shape().vocab_size,
        routing: vec![Routing::default(); sequence.shape().num_layers()],
    };
    let (prompt, rest) = ids.split_at(first);
    for piece in std::iter::once(prompt).chain(rest.chunks(1)) {
        let routing = &mut answers.routing;
        let logits = sequence.forward(piece, LogitRows::All, &mut |layer, _, chosen| {
            routing[layer].num_experts_per_tok = chosen.num_experts_per_tok;
            routing[layer].topk_ids.extend(&chosen.topk_ids);
            routing[layer].topk_weights.extend(&chosen.topk_weights);
        })?;
        answers.logits.extend(logits);
    }
    Ok(answers)
}

/// How far two may be apart.
#[derive(Clone, Copy, Debug)]
pub struct Tolerance {
    /// Of a logit, of about one
    pub logits: f32,
    /// Relative gap of two experts' weights below which either may be taken
    pub tie: f64,
}

impl Answers {
    fn picks(&self, layer: usize, token: usize) -> Vec<(u16, f32)> {
        let routing = &self.routing[layer];
        let k = routing.num_experts_per_tok;
        let range = token * k..(token + 1) * k;
        let ids = routing.topk_ids[range.clone()].iter().copied();
        ids.zip(routing.topk_weights[range].iter().copied())
            .collect()
    }

    /// Whether two pick the same experts for a token; `None` if they differ where the router ties, by
    /// the relative gap of the weights at the boundary.
    fn same_experts(&self, other: &Answers, token: usize, tie: f64) -> Option<bool> {
        for layer in 0..self.routing.len() {
            let (a, b) = (self.picks(layer, token), other.picks(layer, token));
            let only = |a: &[(u16, f32)], b: &[(u16, f32)]| -> Vec<f32> {
                let alone = a.iter().filter(|x| b.iter().all(|y| y.0 != x.0));
                alone.map(|x| x.1).collect()
            };
            let mut tied = only(&a, &b);
            if tied.is_empty() {
                continue;
            }
            tied.extend(only(&b, &a));
            tied.sort_by(f32::total_cmp);
            let (least, most) = (tied[0], tied[tied.len() - 1]);
            let gap = f64::from(most - least) / f64::from(most);
            return if gap < tie { None } else { Some(false) };
        }
        Some(true)
    }

    /// Tokens up to the first for which the router ties and the two take different experts, and the
    /// largest difference of a logit of these.
    ///
    /// # Errors
    /// A logit that is not finite or differs by more than allowed; experts that differ without a tie.
    pub fn compare(
        &self,
        expected: &Answers,
        Tolerance { logits, tie }: Tolerance,
    ) -> Result<(usize, f32), String> {
        let mut worst = 0.0f32;
        let tokens = expected.logits.len() / expected.vocab;
        for token in 0..tokens {
            match self.same_experts(expected, token, tie) {
                None => return Ok((token, worst)),
                Some(false) => return Err(format!("token {token}: other experts")),
                Some(true) => {}
            }
            for i in token * self.vocab..(token + 1) * self.vocab {
                let diff = (self.logits[i] - expected.logits[i]).abs();
                if diff > logits || diff.is_nan() {
                    return Err(format!(
                        "token {token}: a logit is {}, not {}",
                        self.logits[i], expected.logits[i]
                    ));
                }
                worst = worst.max(diff);
            }
        }
        Ok((tokens, worst))
    }
}
