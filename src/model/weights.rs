//! Tensor names to typed weights, whatever layout the file has. Reads headers, copies vectors.

use super::config::ModelConfig;
use crate::backend::weights::{AttentionWeights, DeltaNetWeights};
use crate::backend::{
    ExpertWeights, LayerWeights, MixerKind, MixerWeights, ModelWeights, MoeWeights,
};
use crate::formats::{Checkpoint, FormatError, Matrix};

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
    let embed_tokens = checkpoint.matrix("model.embed_tokens.weight", vocab, hidden)?;
    let lm_head = if config.tie_word_embeddings {
        embed_tokens.clone()
    } else {
        checkpoint.matrix("lm_head.weight", vocab, hidden)?
    };
    let layers = (0..shape.num_layers())
        .map(|i| load_layer(checkpoint, config, i))
        .collect::<Result<_, _>>()?;
    let norm = checkpoint.vector("model.norm.weight", &[hidden])?;
    Ok(ModelWeights {
        embed_tokens,
        layers,
        norm,
        lm_head,
    })
}

/// How many multi-token-prediction tensors the checkpoint has; they are skipped.
pub fn count_mtp_tensors(checkpoint: &Checkpoint) -> usize {
    checkpoint
        .names()
        .filter(|name| name.starts_with(MTP_PREFIX))
        .count()
}

fn load_layer(
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    layer: usize,
) -> Result<LayerWeights, FormatError> {
    let hidden = config.shape.hidden_size;
    let prefix = format!("model.layers.{layer}");
    let norm = |name: &str| checkpoint.vector(&format!("{prefix}.{name}.weight"), &[hidden]);
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
    Ok(DeltaNetWeights {
        in_proj_qkvz: matrix("in_proj_qkvz", shape.qkvz_rows(), hidden)?,
        in_proj_ba: matrix("in_proj_ba", shape.ba_rows(), hidden)?,
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

fn load_attention(
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    prefix: &str,
) -> Result<AttentionWeights, FormatError> {
    let shape = &config.shape.attention;
    let hidden = config.shape.hidden_size;
    let matrix =
        |name: &str, rows, cols| checkpoint.matrix(&format!("{prefix}.{name}.weight"), rows, cols);
    let norm =
        |name: &str| checkpoint.vector(&format!("{prefix}.{name}.weight"), &[shape.head_dim]);
    Ok(AttentionWeights {
        q_proj: matrix("q_proj", shape.q_proj_rows(), hidden)?,
        k_proj: matrix("k_proj", shape.kv_rows(), hidden)?,
        v_proj: matrix("v_proj", shape.kv_rows(), hidden)?,
        o_proj: matrix("o_proj", hidden, shape.o_proj_cols())?,
        q_norm: norm("q_norm")?,
        k_norm: norm("k_norm")?,
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
        .collect::<Result<_, _>>()?;
    Ok(MoeWeights {
        gate: checkpoint.matrix(&format!("{prefix}.gate.weight"), shape.num_experts, hidden)?,
        experts,
        shared_expert: load_expert(
            checkpoint,
            hidden,
            shape.shared_expert_intermediate_size,
            &format!("{prefix}.shared_expert"),
        )?,
        shared_expert_gate: checkpoint.matrix(
            &format!("{prefix}.shared_expert_gate.weight"),
            1,
            hidden,
        )?,
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
