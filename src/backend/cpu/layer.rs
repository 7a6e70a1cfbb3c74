//! One layer's weights in the kernels' form, and the order in which they are packed.

use super::CpuPrecision;
use super::activations::Integers;
use super::experts::Expert;
use super::gated_attention::Attention;
use super::gated_delta_net::DeltaNet;
use super::linear::Linear;
use super::load::Request;
use crate::backend::{ExpertWeights, LayerWeights, MixerWeights, ModelShape};

pub struct Layer {
    /// `[D]`, 1 + w
    pub input_norm: Vec<f32>,
    pub mixer: Mixer,
    /// `[D]`, 1 + w
    pub expert_norm: Vec<f32>,
    pub router: Linear,
    pub experts: Vec<Expert>,
    pub shared_expert: Expert,
    pub shared_gate: Linear,
}

pub enum Mixer {
    DeltaNet(Box<DeltaNet>),
    Attention(Box<Attention>),
}

impl Layer {
    /// Bytes of what every token reads.
    pub fn dense_bytes(&self) -> usize {
        let mixer = match &self.mixer {
            Mixer::DeltaNet(m) => m.qkvz.bytes() + m.ba.bytes() + m.out.bytes(),
            Mixer::Attention(m) => m.q.bytes() + m.k.bytes() + m.v.bytes() + m.out.bytes(),
        };
        mixer + self.router.bytes() + self.shared_gate.bytes() + self.shared_expert.bytes()
    }
}

/// All matrices of a layer, in the order [`Layer::new`] takes them.
pub fn layer_requests(layer: &LayerWeights, precision: CpuPrecision) -> Vec<Request<'_>> {
    let exact = CpuPrecision::F32;
    let mut requests = match &layer.mixer {
        MixerWeights::GatedDeltaNet(m) => vec![
            (&m.in_proj_qkvz, precision),
            (&m.in_proj_ba, exact),
            (&m.out_proj, precision),
        ],
        MixerWeights::GatedAttention(m) => vec![
            (&m.q_proj, precision),
            (&m.k_proj, precision),
            (&m.v_proj, precision),
            (&m.o_proj, precision),
        ],
    };
    let moe = &layer.moe;
    requests.push((&moe.gate, exact));
    requests.push((&moe.shared_expert_gate, exact));
    for expert in std::iter::once(&moe.shared_expert).chain(&moe.experts) {
        let ExpertWeights {
            gate_proj,
            up_proj,
            down_proj,
        } = expert;
        requests.extend([gate_proj, up_proj, down_proj].map(|m| (m, precision)));
    }
    requests
}

impl Layer {
    pub fn new(shape: &ModelShape, weights: &LayerWeights, linears: Vec<Linear>) -> Layer {
        let mut linears = linears.into_iter();
        let mut next = || linears.next().expect("a matrix for each request");
        let mixer = match &weights.mixer {
            MixerWeights::GatedDeltaNet(m) => {
                // The gated norm magnifies errors of these a hundredfold where it divides by almost
                // nothing, which random weights make it do.
                let projections = [(); 3].map(|()| {
                    let mut linear = next();
                    if linear.integers == Integers::Int16 {
                        linear.integers = Integers::Wide;
                    }
                    linear
                });
                Mixer::DeltaNet(Box::new(DeltaNet::new(&shape.delta_net, m, projections)))
            }
            MixerWeights::GatedAttention(m) => Mixer::Attention(Box::new(Attention {
                q: next(),
                k: next(),
                v: next(),
                out: next(),
                q_norm: one_plus(&m.q_norm),
                k_norm: one_plus(&m.k_norm),
                inverse_frequencies: (shape.attention.rope)
                    .inverse_frequencies(shape.attention.rotary_dim),
            })),
        };
        let router = next();
        let shared_gate = next();
        let mut expert = || Expert {
            gate: next(),
            up: next(),
            down: next(),
        };
        let shared_expert = expert();
        Layer {
            input_norm: one_plus(&weights.input_layernorm),
            mixer,
            expert_norm: one_plus(&weights.post_attention_layernorm),
            router,
            experts: weights.moe.experts.iter().map(|_| expert()).collect(),
            shared_expert,
            shared_gate,
        }
    }
}

/// Zero-centred norm weights as factors.
pub fn one_plus(w: &[f32]) -> Vec<f32> {
    w.iter().map(|w| 1.0 + w).collect()
}
