//! A plan and a profile in the words of other engines.

use serde_json::{Map, Value, json};

use crate::backend::MixerKind;
use crate::formats::ModelId;
use crate::model::ModelConfig;
use crate::planning::Phase;
use crate::planning::cost::{self, DecodeSituation};
use crate::planning::footprint::{Footprint, KvDtype};
use crate::planning::hardware::Hardware;
use crate::planning::placement::{Placement, Tier};
use crate::planning::profile::ProfileBody;
use crate::planning::units::{show_bytes, show_tokens};

/// Bits per weight of a Q4_K_M file: Q4_K, half of the `down` matrices and the head Q6_K.
const Q4_K_BITS: f64 = 4.5;
const Q6_K_BITS: f64 = 6.5625;
/// NF4 with an absmax of 16 bits per 64 weights.
const NF4_BITS: f64 = 4.25;

/// The best command line for llama.cpp within the budget.
///
/// llama.cpp keeps or moves the experts of a whole layer, or one of their three tensors, and never
/// changes them at run time. `--n-cpu-moe N` leaves the experts of the first N layers in RAM; the
/// second line also uses what is left for tensors of one layer more. Names as in
/// llama.cpp/common/common.h (LLM_FFN_EXPS_REGEX).
pub struct LlamaCpp {
    pub n_cpu_moe: usize,
    /// Tensors of the last of those layers that fit into VRAM after all.
    pub extra_tensors: Vec<&'static str>,
    pub predicted_decode_tok_s: f64,
    num_layers: usize,
    flags: String,
    free_bytes: u64,
    planned_tok_s: f64,
    vram_budget_bytes: u64,
    ctx_tokens: u64,
}

pub fn llama_cpp(f: &Footprint, hardware: &Hardware, placement: &Placement) -> LlamaCpp {
    let kv_bytes = placement.ctx_tokens * f.kv_bytes_per_token(placement.kv_dtype);
    let fixed = f.dense_bytes as f64 * (Q4_K_BITS + Q6_K_BITS) / 2.0 / NF4_BITS
        // Routers are f32 there.
        + 2.0 * f.router_bytes as f64
        + f.lm_head_bytes as f64 * Q6_K_BITS / 16.0
        + (kv_bytes + f.delta_state_bytes + f.conv_state_bytes) as f64
        + (f.context_bytes + f.workspace_bytes) as f64;
    let free = (placement.vram_budget_bytes as f64 - fixed).max(0.0);
    // Gate, up and down have equally many weights.
    let matrix_bytes =
        |bits: f64| f.num_experts as f64 * f.expert_bytes as f64 / 3.0 * bits / NF4_BITS;
    let (gate, down) = (
        matrix_bytes(Q4_K_BITS),
        matrix_bytes((Q4_K_BITS + Q6_K_BITS) / 2.0),
    );
    let layer = 2.0 * gate + down;
    let on_gpu = ((free / layer) as usize).min(f.num_layers);
    let left = free - on_gpu as f64 * layer;
    let n_cpu_moe = f.num_layers - on_gpu;
    let extra_tensors = match (left / gate) as usize {
        _ if n_cpu_moe == 0 => vec![],
        0 => vec![],
        1 => vec!["gate"],
        _ => vec!["gate", "up"],
    };
    let in_vram = |layer: usize| match layer {
        l if l >= n_cpu_moe => 1.0,
        l if l + 1 == n_cpu_moe => extra_tensors.len() as f64 / 3.0,
        _ => 0.0,
    };
    let hit_rates: Vec<f64> = (0..f.num_layers).map(in_vram).collect();
    let decode = cost::decode(
        f,
        hardware,
        &DecodeSituation {
            ctx_tokens: placement.ctx_tokens,
            kv_dtype: placement.kv_dtype,
            head: Tier::Vram,
            hit_rates: &hit_rates,
            promotions_per_token: 0.0,
            disk_share: 0.0,
        },
    );
    let kv = match placement.kv_dtype {
        KvDtype::F16 => "",
        KvDtype::Int8 => " -ctk q8_0 -ctv q8_0",
    };
    LlamaCpp {
        n_cpu_moe,
        extra_tensors,
        predicted_decode_tok_s: decode.tok_s,
        num_layers: f.num_layers,
        flags: format!("-c {} -ngl 99 -fa on{kv}", placement.ctx_tokens),
        free_bytes: free as u64,
        planned_tok_s: placement.decode.tok_s,
        vram_budget_bytes: placement.vram_budget_bytes,
        ctx_tokens: placement.ctx_tokens,
    }
}

impl LlamaCpp {
    /// `--n-cpu-moe 36`, or nothing if all experts fit.
    pub fn n_cpu_moe_flag(&self) -> String {
        match self.n_cpu_moe {
            0 => String::new(),
            n => format!(" --n-cpu-moe {n}"),
        }
    }

    /// The same by tensor, with what is left of the budget used; none if nothing is.
    pub fn override_flag(&self) -> Option<String> {
        let last = self.n_cpu_moe.checked_sub(1)?;
        if self.extra_tensors.is_empty() {
            return None;
        }
        let whole: Vec<String> = (0..last).map(|layer| layer.to_string()).collect();
        let stays: Vec<&str> = ["up", "down", "gate"]
            .into_iter()
            .filter(|name| !self.extra_tensors.contains(name))
            .collect();
        let mut patterns = Vec::new();
        if !whole.is_empty() {
            let layers = whole.join("|");
            patterns.push(format!(
                r"blk\.({layers})\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU"
            ));
        }
        patterns.push(format!(r"blk\.{last}\.ffn_({})_exps=CPU", stays.join("|")));
        Some(format!(" -ot \"{}\"", patterns.join(",")))
    }

    /// Lines for a shell, with comments that say what they rest on.
    pub fn text(&self) -> String {
        let mut out = format!(
            "# {} of GPU memory, context {}: experts of {} of {} layers on the GPU, {} for experts\n\
             # sizes of a Q4_K_M file; predicted {:.1} tok/s by moectl's cost model, {:.1} with \
             moectl's expert slots\n\
             llama-server -m MODEL.gguf {}{}",
            show_bytes(self.vram_budget_bytes),
            show_tokens(self.ctx_tokens),
            self.num_layers - self.n_cpu_moe,
            self.num_layers,
            show_bytes(self.free_bytes),
            self.predicted_decode_tok_s,
            self.planned_tok_s,
            self.flags,
            self.n_cpu_moe_flag()
        );
        if let Some(overrides) = self.override_flag() {
            out += &format!(
                "\n# or, with the rest of the budget for {} of one layer more\n\
                 llama-server -m MODEL.gguf {}{overrides}",
                self.extra_tensors.join(" and "),
                self.flags
            );
        }
        out
    }

    pub fn json(&self) -> Value {
        json!({
            "n_cpu_moe": self.n_cpu_moe,
            "command": format!("llama-server -m MODEL.gguf {}{}", self.flags, self.n_cpu_moe_flag()),
            "override_command": self.override_flag()
                .map(|flag| format!("llama-server -m MODEL.gguf {}{flag}", self.flags)),
            "predicted_decode_tok_s": self.predicted_decode_tok_s,
        })
    }
}

/// The `device_map` of transformers and accelerate: module to GPU 0, RAM or disk.
///
/// For checkpoints whose experts are modules of their own (transformers 4). Every module is named
/// once. accelerate keeps the embedding on the GPU, so as many experts as weigh as much leave it.
pub fn accelerate(config: &ModelConfig, f: &Footprint, placement: &Placement) -> Value {
    let mut map = Map::new();
    let mut set = |name: String, device: Value| {
        map.insert(name, device);
    };
    let gpu = json!(0);
    let mut resident = resident_experts(placement);
    let mut to_drop = f.embedding_bytes.div_ceil(f.expert_bytes.max(1)) as usize;
    while to_drop > 0 {
        let Some(most) = resident.iter_mut().max_by_key(|layer| layer.len()) else {
            break;
        };
        if most.pop().is_none() {
            break;
        }
        to_drop -= 1;
    }
    let in_ram = placement
        .bytes_in(Tier::Ram)
        .saturating_sub(f.embedding_bytes);
    let mut ram_left = in_ram / f.expert_bytes.max(1);

    set("model.embed_tokens".into(), gpu.clone());
    set("model.rotary_emb".into(), gpu.clone());
    for (layer, kind) in config.shape.mixers.iter().enumerate() {
        let mixer = match kind {
            MixerKind::GatedDeltaNet => "linear_attn",
            MixerKind::GatedAttention => "self_attn",
        };
        for module in [
            "input_layernorm",
            mixer,
            "post_attention_layernorm",
            "mlp.gate",
            "mlp.shared_expert",
            "mlp.shared_expert_gate",
        ] {
            set(format!("model.layers.{layer}.{module}"), gpu.clone());
        }
        for expert in 0..placement.num_experts as u16 {
            let device = if resident[layer].contains(&expert) {
                gpu.clone()
            } else if ram_left > 0 {
                ram_left -= 1;
                json!("cpu")
            } else {
                json!("disk")
            };
            set(format!("model.layers.{layer}.mlp.experts.{expert}"), device);
        }
    }
    set("model.norm".into(), gpu.clone());
    let head = match placement.head {
        Tier::Vram => gpu,
        Tier::Ram | Tier::Disk => json!("cpu"),
    };
    set("lm_head".into(), head);
    Value::Object(map)
}

/// Experts that start in VRAM, hottest first; without a profile the first ones.
fn resident_experts(placement: &Placement) -> Vec<Vec<u16>> {
    let layers = 0..placement.layers.len();
    layers
        .map(|layer| {
            let planned: Vec<u16> = placement.planned_experts(layer).collect();
            match planned.is_empty() {
                true => (0..placement.layers[layer].slots as u16).collect(),
                false => planned,
            }
        })
        .collect()
}

/// Logical expert loads: what SGLang takes as `--init-expert-location FILE.json`, and the `weight`
/// matrix of `rebalance_experts` in vLLM and DeepSeek's EPLB, which vLLM otherwise counts itself.
///
/// `logical_count` is `[layers][experts]` picks.
pub fn eplb(profile: &ProfileBody, model: &ModelId) -> Value {
    let layers = 0..profile.num_layers;
    let counts: Vec<Vec<u64>> = layers.map(|layer| profile.total(layer).picks).collect();
    json!({
        "model": model.id,
        "num_layers": profile.num_layers,
        "num_logical_experts": profile.num_experts,
        "tokens": profile.tokens(Phase::Prefill) + profile.tokens(Phase::Decode),
        "logical_count": counts,
    })
}
