//! Bytes and bandwidths to milliseconds: a roofline of one token and of one prefill chunk.
//!
//! A ceiling, not a promise: every byte at the attainable bandwidth, hits on the GPU and misses on
//! the CPU at the same time. The terms keep their names so that a measurement can be held against
//! each of them.

use serde::{Deserialize, Serialize};

use super::footprint::{Footprint, KvDtype};
use super::hardware::{Cpu, Gpu, Hardware};

/// One named part of a predicted time; the parts add up to the total.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Term {
    pub name: String,
    pub ms: f64,
}

/// One token of decode with the context full.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DecodePrediction {
    pub terms: Vec<Term>,
    pub total_ms: f64,
    pub tok_s: f64,
    /// Picks found in VRAM, mean of the layers.
    pub expert_hit_rate: f64,
    /// If every miss were promoted: beside the terms, since promotions run behind the computation
    /// and the run time holds them to a byte budget.
    pub promotion_h2d_bytes_per_token: f64,
    pub promotion_h2d_ms: f64,
}

/// A whole prompt, chunk by chunk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PrefillPrediction {
    pub prompt_tokens: u64,
    pub chunk_tokens: u64,
    pub terms: Vec<Term>,
    pub total_ms: f64,
    pub tok_s: f64,
}

/// The situation a token is decoded in.
#[derive(Clone, Debug)]
pub struct DecodeSituation<'a> {
    pub ctx_tokens: u64,
    pub kv_dtype: KvDtype,
    /// Per layer, the share of picks found in VRAM.
    pub hit_rates: &'a [f64],
    /// Share of the experts that RAM does not hold.
    pub disk_share: f64,
}

/// Predicts one decode token.
///
/// Per layer the experts cost the slower of the GPU reading its hits and the CPU reading its
/// misses; a miss outside RAM comes from disk and is paid on top. Without a GPU every byte is read
/// from DRAM and hit rates do not matter.
pub fn decode(f: &Footprint, hardware: &Hardware, at: &DecodeSituation) -> DecodePrediction {
    let kv_bytes = at.ctx_tokens * f.kv_bytes_per_token(at.kv_dtype);
    // The delta rule reads and writes its state.
    let state_bytes = 2 * f.delta_state_bytes;
    let layer_bytes = f.num_experts_per_tok as f64 * f.expert_bytes as f64;
    let cpu = &hardware.cpu;
    let read_gb_s = hardware
        .gpu
        .as_ref()
        .map_or(cpu.dram_read_gb_s, |g| g.vram_gb_s);
    let hit_rate = |layer: usize| match hardware.gpu {
        Some(_) => at.hit_rates[layer],
        None => 0.0,
    };
    let layers = 0..f.num_layers;
    let misses_bytes: f64 = layers
        .clone()
        .map(|l| (1.0 - hit_rate(l)) * layer_bytes)
        .sum();

    let mut terms = Terms::default();
    terms.add("dense weights", ms(f.always_read_bytes() as f64, read_gb_s));
    terms.add("delta-net state", ms(state_bytes as f64, read_gb_s));
    terms.add("kv cache", ms(kv_bytes as f64, read_gb_s));
    if let Some(gpu) = &hardware.gpu {
        terms.add(
            "launches",
            f.num_layers as f64 * gpu.launch_us_per_layer / 1e3,
        );
        terms.add(
            "handoffs",
            f.num_layers as f64 * gpu.handoff_us_per_layer / 1e3,
        );
    }
    terms.add(
        "experts",
        layers
            .clone()
            .map(|l| expert_layer_ms(f, hardware, hit_rate(l)))
            .sum(),
    );
    if at.disk_share > 0.0 {
        let disk_ms = |l| disk_layer_ms(f, hardware, hit_rate(l), at.disk_share);
        terms.add("experts from disk", layers.clone().map(disk_ms).sum());
    }
    let total_ms = terms.total();
    let promoted = match hardware.gpu {
        Some(_) => misses_bytes,
        None => 0.0,
    };
    DecodePrediction {
        terms: terms.0,
        total_ms,
        tok_s: 1e3 / total_ms,
        expert_hit_rate: layers.map(hit_rate).sum::<f64>() / f.num_layers.max(1) as f64,
        promotion_h2d_bytes_per_token: promoted,
        promotion_h2d_ms: hardware
            .gpu
            .as_ref()
            .map_or(0.0, |g| ms(promoted, g.h2d_gb_s)),
    }
}

/// Routed experts of one layer and token: hits and misses overlap, the slower side counts.
pub fn expert_layer_ms(f: &Footprint, hardware: &Hardware, hit_rate: f64) -> f64 {
    let bytes = f.num_experts_per_tok as f64 * f.expert_bytes as f64;
    match &hardware.gpu {
        Some(gpu) => ms(bytes * hit_rate, gpu.vram_gb_s).max(ms(
            bytes * (1.0 - hit_rate),
            hardware.cpu.expert_kernel_gb_s,
        )),
        None => ms(bytes, hardware.cpu.expert_kernel_gb_s),
    }
}

/// Waiting for the disk, in one layer and token, for the misses that RAM does not hold.
pub fn disk_layer_ms(f: &Footprint, hardware: &Hardware, hit_rate: f64, disk_share: f64) -> f64 {
    let bytes = f.num_experts_per_tok as f64 * f.expert_bytes as f64;
    ms(
        bytes * (1.0 - hit_rate) * disk_share,
        hardware.cpu.disk_read_gb_s,
    )
}

/// Predicts the prefill of `prompt_tokens` in chunks of `chunk_tokens`.
///
/// A chunk streams every expert that is not resident past the GPU, one layer ahead of the
/// computation: the slower of the two counts, and the first layer's copy hides behind nothing. A
/// chunk of few tokens is cheaper with its experts on the CPU. Without a GPU a chunk costs the
/// slower of reading the experts it meets and its arithmetic.
///
/// - `resident`: share of all experts in VRAM slots that prefill did not borrow
pub fn prefill(
    f: &Footprint,
    hardware: &Hardware,
    prompt_tokens: u64,
    chunk_tokens: u64,
    resident: f64,
) -> PrefillPrediction {
    assert!(chunk_tokens > 0, "a prefill chunk holds at least one token");
    let mut compute_ms = 0.0;
    let mut waiting_ms = 0.0;
    let mut start = 0;
    let mut streams = false;
    while start < prompt_tokens {
        let tokens = chunk_tokens.min(prompt_tokens - start);
        let context = start as f64 + tokens as f64 / 2.0;
        let attention = tokens as f64 * context * f.attention_flops_per_context_token as f64;
        let chunk_flops = tokens as f64 * f.flops_per_token as f64;
        let on_cpu_ms = cpu_experts_ms(f, &hardware.cpu, tokens);
        match &hardware.gpu {
            Some(gpu) => {
                let gpu_ms = chunk_flops / (gpu.gemm_tflops * 1e9)
                    + attention / (gpu.attention_tflops * 1e9);
                let stream_ms = ms(f.experts_bytes() as f64 * (1.0 - resident), gpu.h2d_gb_s);
                streams |= stream_ms < on_cpu_ms;
                compute_ms += gpu_ms;
                waiting_ms += (stream_ms.min(on_cpu_ms) - gpu_ms).max(0.0);
            }
            None => {
                let flops_ms =
                    (chunk_flops + attention) / (hardware.cpu.expert_kernel_gflops * 1e6);
                compute_ms += flops_ms;
                waiting_ms += (on_cpu_ms - flops_ms).max(0.0);
            }
        }
        start += tokens;
    }
    let mut terms = Terms::default();
    terms.add("compute", compute_ms);
    terms.add("waiting for experts", waiting_ms);
    if let (Some(gpu), true) = (&hardware.gpu, streams) {
        terms.add("first layer", first_layer_ms(f, gpu, resident));
    }
    let total_ms = terms.total();
    PrefillPrediction {
        prompt_tokens,
        chunk_tokens,
        terms: terms.0,
        total_ms,
        tok_s: if total_ms > 0.0 {
            prompt_tokens as f64 * 1e3 / total_ms
        } else {
            0.0
        },
    }
}

fn first_layer_ms(f: &Footprint, gpu: &Gpu, resident: f64) -> f64 {
    let layer_bytes = f.num_experts as f64 * f.expert_bytes as f64;
    ms(layer_bytes * (1.0 - resident), gpu.h2d_gb_s)
}

/// The routed experts of a chunk on the CPU: weights met at least once, or arithmetic.
fn cpu_experts_ms(f: &Footprint, cpu: &Cpu, tokens: u64) -> f64 {
    let experts = f.num_experts as f64;
    let picked = f.num_experts_per_tok as f64 / experts;
    let distinct = experts * (1.0 - (1.0 - picked).powf(tokens as f64));
    let read_ms = ms(distinct * f.expert_bytes as f64, cpu.expert_kernel_gb_s);
    let flops = (tokens * f.num_experts_per_tok as u64 * f.expert_flops) as f64;
    f.num_layers as f64 * read_ms.max(flops / (cpu.expert_kernel_gflops * 1e6))
}

fn ms(bytes: f64, gb_s: f64) -> f64 {
    bytes / (gb_s * 1e6)
}

#[derive(Default)]
struct Terms(Vec<Term>);

impl Terms {
    fn add(&mut self, name: &str, ms: f64) {
        self.0.push(Term {
            name: name.into(),
            ms,
        });
    }

    fn total(&self) -> f64 {
        self.0.iter().map(|t| t.ms).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::super::footprint::tests::qwen3_next_80b;
    use super::*;

    fn decode_tok_s(hardware: &Hardware, ctx_tokens: u64, kv_dtype: KvDtype, h: f64) -> f64 {
        let at = DecodeSituation {
            ctx_tokens,
            kv_dtype,
            hit_rates: &[h; 48],
            disk_share: 0.0,
        };
        decode(&qwen3_next_80b(), hardware, &at).tok_s
    }

    fn near(found: f64, expected: f64, share: f64) {
        assert!(
            (found / expected - 1.0).abs() < share,
            "{found}, expected {expected}"
        );
    }

    #[test]
    fn decode_ceilings_are_those_of_the_roofline() {
        let (laptop, server) = (Hardware::laptop_4090(), Hardware::h100_box());
        for (h, k4, k32, k262) in [
            (0.2, 65., 59., 44.),
            (0.4, 78., 69., 50.),
            (0.5, 86., 76., 53.),
            (0.6, 96., 84., 57.),
        ] {
            near(decode_tok_s(&laptop, 4096, KvDtype::Bf16, h), k4, 0.012);
            near(decode_tok_s(&laptop, 32_768, KvDtype::Bf16, h), k32, 0.012);
            near(
                decode_tok_s(&laptop, 262_144, KvDtype::Int8, h),
                k262,
                0.012,
            );
        }
        for (h, k4, k32) in [
            (0.2, 135., 130.),
            (0.4, 164., 155.),
            (0.5, 183., 173.),
            (0.6, 207., 194.),
        ] {
            near(decode_tok_s(&server, 4096, KvDtype::Bf16, h), k4, 0.012);
            near(decode_tok_s(&server, 32_768, KvDtype::Bf16, h), k32, 0.012);
        }
    }

    #[test]
    fn prefill_ceilings_are_those_of_the_roofline() {
        let f = qwen3_next_80b();
        let (laptop, server) = (Hardware::laptop_4090(), Hardware::h100_box());
        for (hardware, prompt, by_chunk) in [
            (&laptop, 32_768, [1250., 2490., 3960., 4020.]),
            (&laptop, 131_072, [1250., 1880., 2040., 2040.]),
            (&server, 32_768, [2590., 5170., 10_300., 20_500.]),
            (&server, 131_072, [2590., 5180., 10_400., 17_300.]),
        ] {
            for (chunk, expected) in [2048, 4096, 8192, 16_384].into_iter().zip(by_chunk) {
                near(
                    prefill(&f, hardware, prompt, chunk, 0.0).tok_s,
                    expected,
                    0.012,
                );
            }
        }
        near(prefill(&f, &laptop, 4096, 4096, 0.0).tok_s, 2440., 0.01);
        near(prefill(&f, &server, 4096, 4096, 0.0).tok_s, 5080., 0.01);
    }

    #[test]
    fn a_short_prompt_leaves_the_experts_on_the_cpu() {
        let f = qwen3_next_80b();
        let laptop = Hardware::laptop_4090();
        let has_copy = |tokens| {
            let p = prefill(&f, &laptop, tokens, 8192, 0.0);
            p.terms.iter().any(|t| t.name == "first layer")
        };
        assert!(!has_copy(64) && !has_copy(256) && has_copy(1024));
    }

    #[test]
    fn without_a_gpu_every_byte_comes_from_dram() {
        let mut hardware = Hardware::laptop_4090();
        hardware.gpu = None;
        let slow = decode_tok_s(&hardware, 4096, KvDtype::Bf16, 0.5);
        // 1.62 + 0.15 + 0.10 GB at 76 GB/s and 0.80 GB at 65 GB/s
        near(slow, 1e3 / (1.872e3 / 76.0 + 0.802e3 / 65.0), 0.01);
        assert_eq!(slow, decode_tok_s(&hardware, 4096, KvDtype::Bf16, 0.9));
        assert!(prefill(&qwen3_next_80b(), &hardware, 4096, 512, 0.0).tok_s > 0.0);
    }

    #[test]
    fn terms_add_up_to_the_total() {
        let at = DecodeSituation {
            ctx_tokens: 1000,
            kv_dtype: KvDtype::Int8,
            hit_rates: &[0.3; 48],
            disk_share: 0.1,
        };
        let p = decode(&qwen3_next_80b(), &Hardware::h100_box(), &at);
        near(p.terms.iter().map(|t| t.ms).sum::<f64>(), p.total_ms, 1e-12);
        assert_eq!(p.terms.len(), 7);
    }
}
