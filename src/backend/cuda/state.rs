//! What one sequence carries on: projections that the convolution still needs, delta-rule memories,
//! keys and values.

use super::abi::KvCache;
use super::device::{Buffer, Device, Stream};
use crate::backend::kv::KV_BLOCK;
use crate::backend::{KvDtype, MixerKind, ModelShape, Result};

/// Caches hold whole groups of this many tokens, so that kernels may read to the end of one.
const CAPACITY_UNIT: usize = 64;

pub enum LayerState {
    DeltaNet {
        /// `[taps, qkvz_rows]`: the projection of position p is in slot p % taps
        ring: u64,
        /// `[value_heads, value_head_dim, key_head_dim]`
        memory: u64,
    },
    Attention(KvCache),
}

/// One sequence with room for `max_tokens`.
pub struct SequenceState {
    pub layers: Vec<LayerState>,
    pub max_tokens: usize,
    /// Tokens seen
    pub position: usize,
    buffer: Buffer,
}

/// Bytes of the keys of one token in one layer, and of their scales; as many for its values.
fn kv_bytes(dtype: KvDtype, shape: &ModelShape) -> (usize, usize) {
    let values = shape.attention.kv_rows();
    match dtype {
        KvDtype::Int8 => (values, values / KV_BLOCK * 2),
        _ => (2 * values, 0),
    }
}

/// Bytes of the keys and values of one token in one layer.
pub fn kv_token_bytes(dtype: KvDtype, shape: &ModelShape) -> usize {
    let (values, scales) = kv_bytes(dtype, shape);
    2 * (values + scales)
}

/// Bytes that a sequence takes on the device.
pub fn state_bytes(shape: &ModelShape, format: KvDtype, max_tokens: usize) -> usize {
    let capacity = max_tokens.next_multiple_of(CAPACITY_UNIT);
    let layer = |kind: &MixerKind| -> usize { pieces(shape, format, capacity, *kind).iter().sum() };
    shape.mixers.iter().map(layer).sum()
}

/// The pieces of one layer's state, each rounded up to 256 bytes.
fn pieces(shape: &ModelShape, format: KvDtype, capacity: usize, kind: MixerKind) -> Vec<usize> {
    let net = &shape.delta_net;
    let sizes = match kind {
        MixerKind::GatedDeltaNet => vec![
            4 * net.conv_kernel_dim * net.qkvz_rows(),
            4 * net.value_dim() * net.key_head_dim,
        ],
        MixerKind::GatedAttention => {
            let (values, scales) = kv_bytes(format, shape);
            vec![
                values * capacity,
                values * capacity,
                scales * capacity,
                scales * capacity,
            ]
        }
    };
    sizes
        .into_iter()
        .map(|bytes| bytes.next_multiple_of(256))
        .collect()
}

impl SequenceState {
    pub fn new(
        device: &Device,
        shape: &ModelShape,
        format: KvDtype,
        max_tokens: usize,
        stream: &Stream,
    ) -> Result<Self> {
        let capacity = max_tokens.next_multiple_of(CAPACITY_UNIT);
        let buffer = device.alloc(state_bytes(shape, format, max_tokens), stream)?;
        let mut offset = 0;
        let layers = shape
            .mixers
            .iter()
            .map(|&kind| {
                let addresses: Vec<u64> = pieces(shape, format, capacity, kind)
                    .into_iter()
                    .map(|bytes| {
                        let address = buffer.at(offset);
                        offset += bytes;
                        address
                    })
                    .collect();
                match (kind, &addresses[..]) {
                    (MixerKind::GatedDeltaNet, &[ring, memory]) => {
                        LayerState::DeltaNet { ring, memory }
                    }
                    (_, &[k, v, k_scales, v_scales]) => LayerState::Attention(KvCache {
                        k,
                        v,
                        k_scales,
                        v_scales,
                        capacity: capacity as i32,
                        format: (format == KvDtype::Int8) as i32,
                    }),
                    _ => unreachable!("two pieces or four"),
                }
            })
            .collect();
        Ok(SequenceState {
            layers,
            max_tokens,
            position: 0,
            buffer,
        })
    }

    /// Starts over in the same memory.
    pub fn clear(&mut self, stream: &Stream) -> Result<()> {
        self.position = 0;
        self.buffer.fill_zero(stream)
    }

    pub fn bytes(&self) -> u64 {
        self.buffer.bytes() as u64
    }
}
