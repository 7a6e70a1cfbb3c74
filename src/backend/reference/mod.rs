//! The oracle: the model as the formulas say it, in f32, with candle on the CPU.
//!
//! Nothing here is tuned. Weights stay in the checkpoint's form and are dequantized a panel of
//! rows at a time, so that a 41 GB model runs in little memory, slowly.
//!
//! Source: transformers 4.57.6 and 5.23.0, `modeling_qwen3_next.py`.

mod attention;
mod delta_net;
pub mod delta_rule;
mod moe;
mod ops;

use std::ops::Range;

use candle_core::{Device, Tensor};

use super::tally::Tally;
use super::{
    Backend, BackendError, BackendFacts, LoadRates, MixerWeights, ModelShape, ModelWeights, Result,
    Routing, SharedPage,
};
use ops::{linear, rms_norm};

pub use attention::AttentionState;
pub use delta_net::DeltaNetState;

/// Receives intermediate results by layer and name, for tests against recorded ones.
pub type Tap = Box<dyn FnMut(usize, &str, &Tensor) + Send>;

/// The reference backend: readable, exact, slow.
pub struct Reference {
    shape: ModelShape,
    weights: ModelWeights,
    /// Bytes of states
    states: Tally,
    tap: Option<Tap>,
}

/// Per layer what a sequence carries on.
#[derive(Clone, Debug)]
pub enum LayerState {
    DeltaNet(DeltaNetState),
    Attention(AttentionState),
}

impl Reference {
    pub fn new(shape: ModelShape, weights: ModelWeights) -> Self {
        assert_eq!(shape.num_layers(), weights.layers.len());
        Reference {
            shape,
            weights,
            states: Tally::default(),
            tap: None,
        }
    }

    /// Calls `tap` with every intermediate result that has a name in transformers.
    pub fn set_tap(&mut self, tap: Tap) {
        self.tap = Some(tap);
    }
}

/// Hands intermediate results to the tap, if there is one.
struct Probe<'a> {
    tap: Option<&'a mut Tap>,
    layer: usize,
}

impl Probe<'_> {
    fn see(&mut self, name: &str, tensor: &Tensor) {
        if let Some(tap) = &mut self.tap {
            tap(self.layer, name, tensor);
        }
    }
}

impl Backend for Reference {
    type Hidden = Tensor;
    type State = Vec<LayerState>;

    fn facts(&self) -> BackendFacts {
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        BackendFacts {
            name: "reference".into(),
            kernels: None,
            threads,
        }
    }

    fn prefill_chunk(&self) -> usize {
        512
    }

    fn load_rates(&self) -> Option<LoadRates> {
        None
    }

    fn decode_read_bytes(&self, _context: usize) -> Option<u64> {
        None
    }

    fn shape(&self) -> &ModelShape {
        &self.shape
    }

    fn new_state(&self, _max_tokens: usize) -> Result<Self::State> {
        self.weights
            .layers
            .iter()
            .map(|layer| match layer.mixer {
                MixerWeights::GatedDeltaNet(_) => {
                    DeltaNetState::new(&self.shape.delta_net, &self.states)
                        .map(LayerState::DeltaNet)
                }
                MixerWeights::GatedAttention(_) => {
                    Ok(LayerState::Attention(AttentionState::new(&self.states)))
                }
            })
            .collect()
    }

    fn truncate(&self, state: &mut Self::State, tokens: usize) -> Result<()> {
        for layer in state {
            match layer {
                LayerState::Attention(state) => state.truncate(tokens)?,
                LayerState::DeltaNet(_) => unreachable!("only asked of models without delta nets"),
            }
        }
        Ok(())
    }

    /// Tensors never change, and clones share them; each holder counts them all the same.
    fn state_bytes(&self, state: &Self::State) -> (usize, Vec<SharedPage>) {
        let bytes = state.iter().map(|layer| match layer {
            LayerState::DeltaNet(state) => state.bytes(),
            LayerState::Attention(state) => state.bytes(),
        });
        (bytes.sum(), Vec::new())
    }

    fn held_bytes(&self) -> usize {
        self.states.bytes()
    }

    fn embed(&mut self, ids: &[u32]) -> Result<Tensor> {
        let cols = self.shape.hidden_size;
        let mut out = vec![0.0; ids.len() * cols];
        for (row, &id) in out.chunks_exact_mut(cols).zip(ids) {
            let id = id as usize;
            self.weights.embed_tokens.dequantize_rows(id..id + 1, row);
        }
        Ok(Tensor::from_vec(out, (ids.len(), cols), &Device::Cpu)?)
    }

    /// Candle's products add up in an order that depends on the number of rows.
    fn most_together(&self) -> usize {
        1
    }

    fn most_consecutive(&self) -> usize {
        1
    }

    fn mixer(
        &mut self,
        layer: usize,
        hidden: &mut Tensor,
        states: &mut [&mut Self::State],
    ) -> Result<()> {
        let [state] = states else {
            return Err(BackendError::Other(
                "the reference computes one sequence at a time".into(),
            ));
        };
        let weights = &self.weights.layers[layer];
        let mut probe = Probe {
            tap: self.tap.as_mut(),
            layer,
        };
        let x = rms_norm(hidden, &weights.input_layernorm, self.shape.rms_norm_eps)?;
        probe.see("input_layernorm", &x);
        let mixed = match (&weights.mixer, &mut state[layer]) {
            (MixerWeights::GatedDeltaNet(w), LayerState::DeltaNet(state)) => {
                delta_net::forward(&self.shape, w, &x, state, &mut probe)?
            }
            (MixerWeights::GatedAttention(w), LayerState::Attention(state)) => {
                attention::forward(&self.shape, w, &x, state, &mut probe)?
            }
            _ => unreachable!("the state was made from the same list of mixers"),
        };
        *hidden = (&*hidden + mixed)?;
        Ok(())
    }

    fn router(&mut self, layer: usize, hidden: &Tensor) -> Result<Routing> {
        let weights = &self.weights.layers[layer];
        let mut probe = Probe {
            tap: self.tap.as_mut(),
            layer,
        };
        let x = rms_norm(
            hidden,
            &weights.post_attention_layernorm,
            self.shape.rms_norm_eps,
        )?;
        probe.see("post_attention_layernorm", &x);
        moe::route(&self.shape.moe, &weights.moe, &x, &mut probe)
    }

    fn experts(&mut self, layer: usize, hidden: &mut Tensor, routing: &Routing) -> Result<()> {
        let weights = &self.weights.layers[layer];
        let mut probe = Probe {
            tap: self.tap.as_mut(),
            layer,
        };
        let x = rms_norm(
            hidden,
            &weights.post_attention_layernorm,
            self.shape.rms_norm_eps,
        )?;
        let mlp = moe::forward(&weights.moe, &x, routing, &mut probe)?;
        *hidden = (&*hidden + mlp)?;
        probe.see("hidden", hidden);
        Ok(())
    }

    fn head(&mut self, hidden: &Tensor, rows: Range<usize>) -> Result<Vec<f32>> {
        let hidden = hidden.narrow(0, rows.start, rows.len())?;
        let x = rms_norm(&hidden, &self.weights.norm, self.shape.rms_norm_eps)?;
        let mut probe = Probe {
            tap: self.tap.as_mut(),
            layer: self.shape.num_layers(),
        };
        probe.see("norm", &x);
        Ok(linear(&x, &self.weights.lm_head)?
            .flatten_all()?
            .to_vec1()?)
    }
}
