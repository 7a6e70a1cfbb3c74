//! Tensor names to typed weights, whatever layout the file has. Reads headers, copies vectors.

use super::config::ModelConfig;
use super::families::qwen3_moe::{no_shared_expert, with_constant_gates};
use super::families::{Attention, DeltaNetLayout, Norms};
use crate::backend::weights::{AttentionWeights, DeltaNetWeights};
use crate::backend::{
    DeltaNetShape, ExpertWeights, LayerWeights, MixerKind, MixerWeights, ModelWeights, MoeWeights,
};
use crate::formats::{Checkpoint, FormatError, Gathered, Matrix};

/// Prefix of the multi-token-prediction layer, which generation does not use.
const MTP_PREFIX: &str = "mtp.";

/// Finds every weight of the model in the checkpoint and checks its shape.
///
/// Each matrix is taken as the file has it: NF4 where it has a quantisation state, floats where
/// not; experts one by one or fused in one tensor per layer.
///
/// # Errors
/// The first tensor that is missing, misshapen or damaged, by name.
pub fn load(checkpoint: &Checkpoint, config: &ModelConfig) -> Result<ModelWeights, FormatError> {
    let shape = &config.shape;
    let (vocab, hidden) = (shape.vocab_size, shape.hidden_size);
    let prefix = prefix(checkpoint, config);
    let embed_tokens =
        checkpoint.matrix(&format!("{prefix}.embed_tokens.weight"), vocab, hidden)?;
    let lm_head = if config.tie_word_embeddings {
        embed_tokens.clone()
    } else {
        checkpoint.matrix("lm_head.weight", vocab, hidden)?
    };
    let layers = (0..shape.num_layers())
        .map(|i| load_layer(checkpoint, config, i, &format!("{prefix}.layers.{i}")))
        .collect::<Result<_, _>>()?;
    let norm = load_norm(checkpoint, config, &format!("{prefix}.norm.weight"), hidden)?;
    Ok(ModelWeights {
        embed_tokens,
        layers,
        norm,
        lm_head,
    })
}

/// Every part of the model that cannot be loaded, and why: one error for the embedding, the output
/// matrix, the last norm and each layer.
pub fn problems(checkpoint: &Checkpoint, config: &ModelConfig) -> Vec<FormatError> {
    let (vocab, hidden) = (config.shape.vocab_size, config.shape.hidden_size);
    let prefix = prefix(checkpoint, config);
    let matrix = |name: &str| checkpoint.matrix(name, vocab, hidden).err();
    let mut found = Vec::new();
    found.extend(matrix(&format!("{prefix}.embed_tokens.weight")));
    if !config.tie_word_embeddings {
        found.extend(matrix("lm_head.weight"));
    }
    found.extend(load_norm(checkpoint, config, &format!("{prefix}.norm.weight"), hidden).err());
    let layer = |i| load_layer(checkpoint, config, i, &format!("{prefix}.layers.{i}")).err();
    found.extend((0..config.shape.num_layers()).filter_map(layer));
    found
}

/// What names of the text model begin with: that of the family, or the plain one of a checkpoint that
/// has nothing beside text.
fn prefix<'a>(checkpoint: &Checkpoint, config: &'a ModelConfig) -> &'a str {
    const PLAIN: &str = "model";
    let usual = config.family.prefix;
    let has = |prefix: &str| checkpoint.contains(&format!("{prefix}.embed_tokens.weight"));
    if has(PLAIN) && !has(usual) {
        PLAIN
    } else {
        usual
    }
}

/// How many multi-token-prediction tensors the checkpoint has; they are skipped.
pub fn count_mtp_tensors(checkpoint: &Checkpoint) -> usize {
    checkpoint
        .names()
        .filter(|name| name.starts_with(MTP_PREFIX))
        .count()
}

/// The weight of an RMSNorm, zero-centred.
fn load_norm(
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    name: &str,
    len: usize,
) -> Result<Vec<f32>, FormatError> {
    let mut w = checkpoint.vector(name, &[len])?;
    if config.family.norms == Norms::Plain {
        w.iter_mut().for_each(|w| *w -= 1.0);
    }
    Ok(w)
}

fn load_layer(
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    layer: usize,
    prefix: &str,
) -> Result<LayerWeights, FormatError> {
    let hidden = config.shape.hidden_size;
    let norm = |name: &str| {
        load_norm(
            checkpoint,
            config,
            &format!("{prefix}.{name}.weight"),
            hidden,
        )
    };
    Ok(LayerWeights {
        input_layernorm: norm("input_layernorm")?,
        mixer: match config.shape.mixers[layer] {
            MixerKind::GatedDeltaNet => MixerWeights::GatedDeltaNet(Box::new(load_delta_net(
                checkpoint,
                config,
                &format!("{prefix}.linear_attn"),
            )?)),
            MixerKind::GatedAttention => MixerWeights::GatedAttention(Box::new(load_attention(
                checkpoint,
                config,
                &format!("{prefix}.self_attn"),
            )?)),
        },
        post_attention_layernorm: norm("post_attention_layernorm")?,
        moe: load_moe(checkpoint, config, &format!("{prefix}.mlp"))?,
    })
}

fn load_delta_net(
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    prefix: &str,
) -> Result<DeltaNetWeights, FormatError> {
    let shape = &config.shape.delta_net;
    let hidden = config.shape.hidden_size;
    let matrix =
        |name: &str, rows, cols| checkpoint.matrix(&format!("{prefix}.{name}.weight"), rows, cols);
    let vector = |name: &str, dims: &[usize]| checkpoint.vector(&format!("{prefix}.{name}"), dims);
    // A synthetic checkpoint has the first layout in every family.
    let layout = match checkpoint.contains(&format!("{prefix}.in_proj_qkvz.weight")) {
        true => DeltaNetLayout::Interleaved,
        false => config
            .family
            .delta_net
            .unwrap_or(DeltaNetLayout::Interleaved),
    };
    let (in_proj_qkvz, in_proj_ba) = match layout {
        DeltaNetLayout::Interleaved => (
            matrix("in_proj_qkvz", shape.qkvz_rows(), hidden)?,
            matrix("in_proj_ba", shape.ba_rows(), hidden)?,
        ),
        DeltaNetLayout::Split => (
            interleave_qkvz(
                shape,
                &matrix("in_proj_qkv", shape.conv_dim(), hidden)?,
                &matrix("in_proj_z", shape.value_dim(), hidden)?,
            ),
            interleave_ba(
                shape,
                &matrix("in_proj_b", shape.num_value_heads, hidden)?,
                &matrix("in_proj_a", shape.num_value_heads, hidden)?,
            ),
        ),
    };
    Ok(DeltaNetWeights {
        in_proj_qkvz,
        in_proj_ba,
        conv1d: vector(
            "conv1d.weight",
            &[shape.conv_dim(), 1, shape.conv_kernel_dim],
        )?,
        a_log: vector("A_log", &[shape.num_value_heads])?,
        dt_bias: vector("dt_bias", &[shape.num_value_heads])?,
        norm: vector("norm.weight", &[shape.value_head_dim])?,
        out_proj: matrix("out_proj", hidden, shape.value_dim())?,
    })
}

/// `in_proj_qkvz` of `in_proj_qkv`, which has all q, then all k, then all v, and `in_proj_z`.
fn interleave_qkvz(shape: &DeltaNetShape, qkv: &Matrix, z: &Matrix) -> Matrix {
    let key = shape.key_head_dim;
    let values = shape.num_value_heads / shape.num_key_heads * shape.value_head_dim;
    let runs = (0..shape.num_key_heads).flat_map(|head| {
        let q = head * key;
        let k = shape.key_dim() + q;
        let v = 2 * shape.key_dim() + head * values;
        [
            (qkv.clone(), q..q + key),
            (qkv.clone(), k..k + key),
            (qkv.clone(), v..v + values),
            (z.clone(), head * values..(head + 1) * values),
        ]
    });
    Matrix::Gathered(Box::new(Gathered::new(runs.collect())))
}

/// `in_proj_ba` of `in_proj_b` and `in_proj_a`, each by value heads.
fn interleave_ba(shape: &DeltaNetShape, b: &Matrix, a: &Matrix) -> Matrix {
    let values = shape.num_value_heads / shape.num_key_heads;
    let runs = (0..shape.num_key_heads).flat_map(|head| {
        let rows = head * values..(head + 1) * values;
        [(b.clone(), rows.clone()), (a.clone(), rows)]
    });
    Matrix::Gathered(Box::new(Gathered::new(runs.collect())))
}

fn load_attention(
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    prefix: &str,
) -> Result<AttentionWeights, FormatError> {
    let shape = &config.shape.attention;
    let hidden = config.shape.hidden_size;
    let matrix =
        |name: &str, rows, cols| checkpoint.matrix(&format!("{prefix}.{name}.weight"), rows, cols);
    let norm = |name: &str| {
        let name = format!("{prefix}.{name}.weight");
        let mut w = load_norm(checkpoint, config, &name, shape.head_dim)?;
        // Scaled cosines and sines scale what rotates, and so does the norm before them.
        let factor = shape.rope.attention_factor();
        if factor != 1.0 {
            let rotating = w[..shape.rotary_dim].iter_mut();
            rotating.for_each(|w| *w = (1.0 + *w) * factor - 1.0);
        }
        Ok::<_, FormatError>(w)
    };
    let gated = config.family.attention == Attention::Gated;
    let query_rows = match gated {
        true => shape.q_proj_rows(),
        false => shape.q_proj_rows() / 2,
    };
    let weights = AttentionWeights {
        q_proj: matrix("q_proj", query_rows, hidden)?,
        k_proj: matrix("k_proj", shape.kv_rows(), hidden)?,
        v_proj: matrix("v_proj", shape.kv_rows(), hidden)?,
        o_proj: matrix("o_proj", hidden, shape.o_proj_cols())?,
        q_norm: norm("q_norm")?,
        k_norm: norm("k_norm")?,
    };
    Ok(match gated {
        true => weights,
        false => with_constant_gates(shape, weights),
    })
}

fn load_moe(
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    prefix: &str,
) -> Result<MoeWeights, FormatError> {
    let shape = &config.shape.moe;
    let hidden = config.shape.hidden_size;
    let fused = checkpoint.contains(&format!("{prefix}.experts.gate_up_proj"));
    let intermediate = shape.moe_intermediate_size;
    let experts = (0..shape.num_experts)
        .map(|e| match fused {
            true => load_fused_expert(checkpoint, config, prefix, e),
            false => load_expert(
                checkpoint,
                hidden,
                intermediate,
                &format!("{prefix}.experts.{e}"),
            ),
        })
        .collect::<Result<Vec<_>, FormatError>>()?;
    let gate = checkpoint.matrix(&format!("{prefix}.gate.weight"), shape.num_experts, hidden)?;
    let (shared_expert, shared_expert_gate) = match config.family.shared_expert {
        true => (
            load_expert(
                checkpoint,
                hidden,
                shape.shared_expert_intermediate_size,
                &format!("{prefix}.shared_expert"),
            )?,
            checkpoint.matrix(&format!("{prefix}.shared_expert_gate.weight"), 1, hidden)?,
        ),
        false => no_shared_expert(hidden, &experts[0].gate_proj),
    };
    Ok(MoeWeights {
        gate,
        experts,
        shared_expert,
        shared_expert_gate,
    })
}

fn load_expert(
    checkpoint: &Checkpoint,
    hidden: usize,
    intermediate: usize,
    prefix: &str,
) -> Result<ExpertWeights, FormatError> {
    let matrix =
        |name: &str, rows, cols| checkpoint.matrix(&format!("{prefix}.{name}.weight"), rows, cols);
    Ok(ExpertWeights {
        gate_proj: matrix("gate_proj", intermediate, hidden)?,
        up_proj: matrix("up_proj", intermediate, hidden)?,
        down_proj: matrix("down_proj", hidden, intermediate)?,
    })
}

/// One expert inside `gate_up_proj [E, 2 I, D]` (gate rows first) and `down_proj [E, D, I]`.
fn load_fused_expert(
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    prefix: &str,
    expert: usize,
) -> Result<ExpertWeights, FormatError> {
    let hidden = config.shape.hidden_size;
    let (experts, intermediate) = (
        config.shape.moe.num_experts,
        config.shape.moe.moe_intermediate_size,
    );
    let gate_up = |row| -> Result<Matrix, FormatError> {
        let name = format!("{prefix}.experts.gate_up_proj");
        let shape = [experts, 2 * intermediate, hidden];
        checkpoint.fused_expert(&name, shape, expert, row, intermediate)
    };
    let name = format!("{prefix}.experts.down_proj");
    let shape = [experts, hidden, intermediate];
    Ok(ExpertWeights {
        gate_proj: gate_up(0)?,
        up_proj: gate_up(intermediate)?,
        down_proj: checkpoint.fused_expert(&name, shape, expert, 0, hidden)?,
    })
}
