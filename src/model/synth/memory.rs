//! A delta net that remembers what its text is about.
//!
//! The key heads of its first half have one key for all tokens, which is also their query. The delta
//! rule then keeps a running mean of the values, `S <- S + beta (v - S)`, and reads it back whole:
//! what the subjects of the last `1 / beta` tokens have in common. Its norm gives it one length, and
//! it goes to a region of the hidden state where nobody else writes. Routers that read it pick, for
//! as long as a text keeps to its subject, the same experts: others in another text, so that over
//! many texts all are equally busy.
//!
//! The other half of its heads are as in every delta net.

use super::codes::{Given, ONE, ZERO, code_rms, nearest};
use super::embedding::{CONSTANT, CONSTANTS};
use super::weights::{Maker, RowKind, SILU_RMS};
use crate::backend::{DeltaNetShape, MixerKind, ModelShape};

/// How much of the memory a token replaces: every other head this, the others that.
const BETA: [f64; 2] = [0.02, 0.005];

/// `A_log` of heads that forget nothing but what they replace.
const NO_DECAY: f32 = -8.0;

/// Key heads that remember.
fn key_heads(net: &DeltaNetShape) -> usize {
    net.num_key_heads / 2
}

fn value_heads_per_key(net: &DeltaNetShape) -> usize {
    net.num_value_heads / net.num_key_heads
}

/// Value channels, the first of all, of the heads that remember.
fn value_dim(net: &DeltaNetShape) -> usize {
    key_heads(net) * value_heads_per_key(net) * net.value_head_dim
}

/// The first layer with a delta net, if that has heads enough to remember.
pub fn remembering_layer(shape: &ModelShape) -> Option<usize> {
    let mut mixers = shape.mixers.iter();
    let first = mixers.position(|mixer| *mixer == MixerKind::GatedDeltaNet);
    first.filter(|_| key_heads(&shape.delta_net) > 0)
}

impl Maker<'_> {
    /// What a row of a matrix whose largest weight is `absmax` makes of the constants alone, with
    /// codes of 1.
    fn of_constants(&self, absmax: f64) -> f64 {
        let rms = self.embedding_variance().sqrt();
        CONSTANTS as f64 * f64::from(CONSTANT) / rms * absmax
    }

    /// Standard deviation of the matrix that writes the memory to the hidden state.
    fn memory_std(&self) -> f64 {
        let net = &self.shape.delta_net;
        let others = net.value_dim() - value_dim(net);
        self.written_std / (SILU_RMS * (others as f64).sqrt())
    }

    /// Variance of the text's region of the hidden state.
    pub(super) fn text_variance(&self) -> f64 {
        let absmax = (1.0 / self.shape.hidden_size as f64).sqrt() / code_rms();
        let gate = self.of_constants(absmax);
        let gate = gate / (1.0 + (-gate).exp());
        value_dim(&self.shape.delta_net) as f64 * (self.memory_std() * gate).powi(2)
    }

    /// The weights of a delta net with heads that remember.
    pub(super) fn remembering_delta_net(&mut self, prefix: &str) {
        let net = self.shape.delta_net.clone();
        let hidden = self.shape.hidden_size;
        let (dk, dv, ratio) = (
            net.key_head_dim,
            net.value_head_dim,
            value_heads_per_key(&net),
        );
        let given = |rows, cols, code| Given { rows, cols, code };
        let subject = self.regions.subject();

        // Rows of a key head: query, key, values, gates.
        let mut codes = Vec::new();
        for head in 0..key_heads(&net) {
            let query = head * (2 * dk + 2 * ratio * dv);
            let values = query + 2 * dk;
            let gates = values + ratio * dv;
            let end = gates + ratio * dv;
            for rows in [query..values, gates..end] {
                codes.push(given(rows.clone(), 0..hidden, ZERO));
                codes.push(given(rows, 0..CONSTANTS, ONE));
            }
            codes.push(given(values..gates, 0..subject.start, ZERO));
            codes.push(given(values..gates, subject.end..hidden, ZERO));
        }
        let qkvz = format!("{prefix}.in_proj_qkvz");
        let std = (1.0 / hidden as f64).sqrt();
        self.nf4(&qkvz, net.qkvz_rows(), hidden, std, codes);

        // A steady beta needs large weights, so the other heads read a few elements only.
        let read = (hidden / 128 * 2).max(CONSTANTS);
        let std = (1.0 / read as f64).sqrt();
        let of_one = self.of_constants(std / code_rms());
        let mut codes = vec![given(0..net.ba_rows(), read..hidden, ZERO)];
        for head in 0..key_heads(&net) {
            let first = 2 * ratio * head;
            codes.push(given(first..first + 2 * ratio, 0..read, ZERO));
            let beta = BETA[head % BETA.len()];
            let logit = (beta / (1.0 - beta)).ln();
            let code = nearest((logit / of_one) as f32);
            codes.push(given(first..first + ratio, 0..CONSTANTS, code));
        }
        let ba = format!("{prefix}.in_proj_ba");
        self.nf4(&ba, net.ba_rows(), hidden, std, codes);

        // Channels of the convolution: queries of all heads, keys, values.
        let (keys, values) = (key_heads(&net) * dk, value_dim(&net));
        let plain = [0, net.key_dim(), 2 * net.key_dim()];
        let plain = [
            plain[0]..plain[0] + keys,
            plain[1]..plain[1] + keys,
            plain[2]..plain[2] + values,
        ];
        self.convolution(prefix, RowKind::taps(&net, plain.into()));
        let steady = key_heads(&net) * ratio;
        self.decay(prefix, |head| (head < steady).then_some(NO_DECAY));

        let text = self.regions.text();
        let codes = vec![
            given(0..text.start, 0..values, ZERO),
            given(text, values..net.value_dim(), ZERO),
        ];
        let out_proj = format!("{prefix}.out_proj");
        let std = self.memory_std();
        self.nf4(&out_proj, hidden, net.value_dim(), std, codes);
    }
}
