//! What a model weighs, from its headers where they are at hand, else from config.json.

use super::{Result, load_weights};
use crate::backend::{ExpertWeights, MixerKind, MixerWeights, ModelShape, ModelWeights};
use crate::formats::{Checkpoint, Matrix};
use crate::model::ModelConfig;
use crate::planning::footprint::{Footprint, nf4_matrix_bytes};

/// The footprint of a model; `checkpoint` replaces the published layout by the actual one.
///
/// Reads headers only: an 80B model is weighed without touching its 41 GB.
///
/// # Errors
/// If the checkpoint is not one of this model.
pub fn footprint(config: &ModelConfig, checkpoint: Option<&Checkpoint>) -> Result<Footprint> {
    let mut footprint = Footprint::published(&config.shape.numbers());
    if let Some(checkpoint) = checkpoint {
        let published = published_linear_bytes(&config.shape);
        let weights = load_weights(checkpoint, config)?;
        let stored = LinearBytes::of(&weights);
        // Norms and convolutions are in the published figure and the same in every file.
        footprint.dense_bytes = footprint.dense_bytes - published + stored.dense;
        footprint.router_bytes = stored.router;
        footprint.expert_bytes = stored.largest_expert;
        footprint.lm_head_bytes = kernel_bytes(&weights.lm_head);
        footprint.embedding_bytes = kernel_bytes(&weights.embed_tokens);
    }
    Ok(footprint)
}

/// Bytes of a matrix as kernels hold it: NF4 tiles, or bf16.
fn kernel_bytes(matrix: &Matrix) -> u64 {
    let (rows, cols) = (matrix.rows() as u64, matrix.cols() as u64);
    match matrix {
        Matrix::Nf4(_) => nf4_matrix_bytes(rows, cols),
        Matrix::Dense(_) => 2 * rows * cols,
        Matrix::Gathered(m) if m.parts().all(|part| matches!(part, Matrix::Nf4(_))) => {
            nf4_matrix_bytes(rows, cols)
        }
        Matrix::Gathered(_) => 2 * rows * cols,
    }
}

struct LinearBytes {
    dense: u64,
    router: u64,
    largest_expert: u64,
}

impl LinearBytes {
    fn of(weights: &ModelWeights) -> Self {
        let expert = |e: &ExpertWeights| {
            kernel_bytes(&e.gate_proj) + kernel_bytes(&e.up_proj) + kernel_bytes(&e.down_proj)
        };
        let mut sum = LinearBytes {
            dense: 0,
            router: 0,
            largest_expert: 0,
        };
        for layer in &weights.layers {
            let mixer: Vec<&Matrix> = match &layer.mixer {
                MixerWeights::GatedDeltaNet(w) => vec![&w.in_proj_qkvz, &w.in_proj_ba, &w.out_proj],
                MixerWeights::GatedAttention(w) => vec![&w.q_proj, &w.k_proj, &w.v_proj, &w.o_proj],
            };
            let moe = &layer.moe;
            sum.dense += mixer.into_iter().map(kernel_bytes).sum::<u64>()
                + expert(&moe.shared_expert)
                + kernel_bytes(&moe.shared_expert_gate);
            sum.router += kernel_bytes(&moe.gate);
            let largest = moe.experts.iter().map(expert).max();
            sum.largest_expert = sum.largest_expert.max(largest.unwrap_or(0));
        }
        sum
    }
}

/// What [`Footprint::published`] counts for the Linears that are neither experts nor router.
fn published_linear_bytes(shape: &ModelShape) -> u64 {
    let (attention, net) = (&shape.attention, &shape.delta_net);
    let hidden = shape.hidden_size;
    let shared = shape.moe.shared_expert_intermediate_size;
    let bytes = |matrices: &[(usize, usize)]| -> u64 {
        matrices
            .iter()
            .map(|&(rows, cols)| nf4_matrix_bytes(rows as u64, cols as u64))
            .sum()
    };
    let moe = bytes(&[
        (shared, hidden),
        (shared, hidden),
        (hidden, shared),
        (1, hidden),
    ]);
    let mixer = |kind: &MixerKind| match kind {
        MixerKind::GatedDeltaNet => bytes(&[
            (net.qkvz_rows(), hidden),
            (net.ba_rows(), hidden),
            (hidden, net.value_dim()),
        ]),
        MixerKind::GatedAttention => bytes(&[
            (attention.q_proj_rows(), hidden),
            (attention.kv_rows(), hidden),
            (attention.kv_rows(), hidden),
            (hidden, attention.o_proj_cols()),
        ]),
    };
    shape.mixers.iter().map(|kind| mixer(kind) + moe).sum()
}
