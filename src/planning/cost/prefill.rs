//! A prompt, chunk by chunk: experts stream past the GPU one layer ahead of the computation.

use serde::{Deserialize, Serialize};

use super::{Term, Terms, at_rate, ms};
use crate::planning::footprint::Footprint;
use crate::planning::hardware::{Cpu, Hardware};

/// Whole-layer buffers that the experts stream through: one is computed, one is filled.
const LAYER_BUFFERS: u64 = 2;
/// Chunks that are tried, in tokens.
const CHUNKS: [u64; 6] = [256, 512, 1024, 2048, 4096, 8192];

/// A whole prompt, chunk by chunk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PrefillPrediction {
    pub prompt_tokens: u64,
    pub chunk_tokens: u64,
    /// Slots whose memory a chunk borrows for streaming and activations.
    #[serde(default)]
    pub borrowed_slots: usize,
    pub terms: Vec<Term>,
    pub total_ms: f64,
    pub tok_s: f64,
}

#[derive(Clone, Copy, Debug)]
pub struct PrefillSituation {
    pub prompt_tokens: u64,
    /// Expert slots in VRAM, all layers together.
    pub slots: usize,
}

/// Predicts the prefill of a prompt with the chunk that makes it fastest.
///
/// A chunk streams every expert that is not resident past the GPU, one layer ahead of the
/// computation: the slower of the two counts, and the first layer's copy hides behind nothing. The
/// memory for it is borrowed from the slots, which are filled again afterwards. A chunk of few
/// tokens is cheaper with its experts on the CPU. Without a GPU a chunk costs the slower of reading
/// the experts it meets and its arithmetic.
pub fn prefill(f: &Footprint, hardware: &Hardware, at: PrefillSituation) -> PrefillPrediction {
    let longest = at.prompt_tokens.max(1);
    let chunks = CHUNKS
        .into_iter()
        .filter(|&chunk| chunk < longest)
        .chain((longest <= CHUNKS[CHUNKS.len() - 1]).then_some(longest));
    chunks
        .map(|chunk| with_chunk(f, hardware, at, chunk))
        .reduce(|best, next| match next.total_ms < best.total_ms {
            true => next,
            false => best,
        })
        .expect("the shortest chunk, or the prompt itself")
}

fn with_chunk(
    f: &Footprint,
    hardware: &Hardware,
    at: PrefillSituation,
    chunk_tokens: u64,
) -> PrefillPrediction {
    let buffers = LAYER_BUFFERS * f.num_experts as u64;
    let activations = (chunk_tokens * f.prefill_bytes_per_token).div_ceil(f.expert_bytes.max(1));
    let borrowed_slots = ((buffers + activations) as usize).min(at.slots);
    let resident = (at.slots - borrowed_slots) as f64 / f.total_experts().max(1) as f64;

    let (mut compute_ms, mut waiting_ms) = (0.0, 0.0);
    let mut start = 0;
    let mut streams = false;
    let layer_bytes = f.num_experts as u64 * f.expert_bytes;
    let streamed_bytes = f.experts_bytes() as f64 * (1.0 - resident);
    while start < at.prompt_tokens {
        let tokens = chunk_tokens.min(at.prompt_tokens - start);
        let context = start as f64 + tokens as f64 / 2.0;
        let attention = tokens as f64 * context * f.attention_flops_per_context_token as f64;
        let chunk_flops = tokens as f64 * f.flops_per_token as f64;
        let on_cpu_ms = cpu_experts_ms(f, &hardware.cpu, tokens);
        match &hardware.gpu {
            Some(gpu) => {
                let gpu_ms = chunk_flops / (gpu.gemm_tflops.value * 1e9)
                    + attention / (gpu.attention_tflops.value * 1e9);
                let stream_ms = ms(streamed_bytes, gpu.h2d_gb_s(layer_bytes));
                streams |= stream_ms < on_cpu_ms;
                compute_ms += gpu_ms;
                waiting_ms += (stream_ms.min(on_cpu_ms) - gpu_ms).max(0.0);
            }
            None => {
                let gflops = hardware.cpu.expert_kernel_gflops.value;
                let flops_ms = (chunk_flops + attention) / (gflops * 1e6);
                compute_ms += flops_ms;
                waiting_ms += (on_cpu_ms - flops_ms).max(0.0);
            }
        }
        start += tokens;
    }
    let mut terms = Terms::default();
    let chunks = at.prompt_tokens.div_ceil(chunk_tokens);
    let flops = f.flops_per_token as f64 / 1e9;
    terms.add(
        "compute",
        compute_ms,
        format!("{chunks} chunks of {chunk_tokens} tokens, {flops:.1} GFLOP a token"),
    );
    let waits_for = match (&hardware.gpu, streams) {
        (Some(gpu), true) => format!(
            "{} a chunk over PCIe",
            at_rate(streamed_bytes, gpu.h2d_gb_s(layer_bytes))
        ),
        _ => "on the CPU".into(),
    };
    terms.add("waiting for experts", waiting_ms, waits_for);
    if let (Some(gpu), true) = (&hardware.gpu, streams) {
        let first = layer_bytes as f64 * (1.0 - resident);
        terms.read("first layer", first, gpu.h2d_gb_s(layer_bytes));
        let refilled = borrowed_slots as f64 * f.expert_bytes as f64;
        terms.read("slots refilled", refilled, gpu.h2d_gb_s(f.expert_bytes));
    }
    let total_ms = terms.total();
    PrefillPrediction {
        prompt_tokens: at.prompt_tokens,
        chunk_tokens,
        borrowed_slots: if streams { borrowed_slots } else { 0 },
        terms: terms.0,
        total_ms,
        tok_s: match total_ms > 0.0 {
            true => at.prompt_tokens as f64 * 1e3 / total_ms,
            false => 0.0,
        },
    }
}

/// The routed experts of a chunk on the CPU: weights met at least once, or arithmetic.
fn cpu_experts_ms(f: &Footprint, cpu: &Cpu, tokens: u64) -> f64 {
    let experts = f.num_experts as f64;
    let picked = f.num_experts_per_tok as f64 / experts;
    let distinct = experts * (1.0 - (1.0 - picked).powf(tokens as f64));
    let read_ms = ms(
        distinct * f.expert_bytes as f64,
        cpu.expert_kernel_gb_s.value,
    );
    let flops = (tokens * f.num_experts_per_tok as u64 * f.expert_flops) as f64;
    f.num_layers as f64 * read_ms.max(flops / (cpu.expert_kernel_gflops.value * 1e6))
}

#[cfg(test)]
mod tests {
    use super::super::tests::{laptop, near, server, terms_are};
    use super::*;
    use crate::planning::footprint::tests::qwen3_next_80b;

    /// No slots: nothing is borrowed and nothing is resident.
    fn without_slots(prompt_tokens: u64) -> PrefillSituation {
        PrefillSituation {
            prompt_tokens,
            slots: 0,
        }
    }

    #[test]
    fn prefill_ceilings_are_those_of_the_roofline() {
        let f = qwen3_next_80b();
        let (laptop, server) = (laptop(), server());
        for (hardware, prompt, by_chunk) in [
            (&laptop, 32_768, [1250., 2490., 3960., 4020.]),
            (&laptop, 131_072, [1250., 1880., 2040., 2040.]),
            (&server, 32_768, [2590., 5170., 10_300., 20_500.]),
            (&server, 131_072, [2590., 5180., 10_400., 17_300.]),
        ] {
            for (chunk, expected) in [2048, 4096, 8192, 16_384].into_iter().zip(by_chunk) {
                let found = with_chunk(&f, hardware, without_slots(prompt), chunk);
                near(found.tok_s, expected, 0.012);
            }
        }
        near(prefill(&f, &laptop, without_slots(4096)).tok_s, 2440., 0.01);
        near(prefill(&f, &server, without_slots(4096)).tok_s, 5080., 0.01);
    }

    #[test]
    fn a_short_prompt_leaves_the_experts_on_the_cpu() {
        let f = qwen3_next_80b();
        let streams = |tokens| {
            let p = prefill(&f, &laptop(), without_slots(tokens));
            p.terms.iter().any(|t| t.name == "first layer")
        };
        assert!(!streams(64) && !streams(256) && streams(1024));
    }

    #[test]
    fn more_slots_never_make_prefill_slower_than_the_refill_costs() {
        let f = qwen3_next_80b();
        let machine = Hardware::laptop_4090();
        let speed = |slots| {
            let at = PrefillSituation {
                prompt_tokens: 32_768,
                slots,
            };
            let p = prefill(&f, &machine, at);
            assert!(p.borrowed_slots <= slots);
            p.tok_s
        };
        assert!(speed(6000) > speed(2000) && speed(12_000) > speed(6000));
        assert!(speed(1000) > 0.98 * speed(0));
    }

    #[test]
    fn every_term_of_a_prompt_is_exact() {
        let f = qwen3_next_80b();
        let at = PrefillSituation {
            prompt_tokens: 6144,
            slots: 2000,
        };
        let p = with_chunk(&f, &laptop(), at, 4096);
        // Two layers of 512 experts, and 4096 tokens of 110,592 bytes in slots of 1,671,168.
        assert_eq!(p.borrowed_slots, 2 * 512 + 272);
        let missing = 1.0 - (2000 - 1296) as f64 / 24_576.0;
        let read_ms = |experts: f64| experts * 1_671_168.0 / 25e6;
        // A chunk of 4096 and one of 2048 tokens, each token against half of its own chunk and all before.
        let gpu_ms = [(4096.0, 2048.0), (2048.0, 5120.0)].map(|(tokens, context)| {
            tokens * 6_653_411_328.0 / 40e9 + tokens * context * 196_608.0 / 40e9
        });
        let waiting = gpu_ms.map(|ms| f64::max(read_ms(24_576.0 * missing) - ms, 0.0));
        assert!(waiting[0] > 0.0 && waiting[1] > waiting[0]);
        let expected = [
            ("compute", gpu_ms[0] + gpu_ms[1]),
            ("waiting for experts", waiting[0] + waiting[1]),
            ("first layer", read_ms(512.0 * missing)),
            ("slots refilled", read_ms(1296.0)),
        ];
        terms_are(&p.terms, &expected);
        near(p.total_ms, expected.iter().map(|(_, ms)| ms).sum(), 1e-12);
        near(p.tok_s, 6144e3 / p.total_ms, 1e-12);
        // Slots that are not there cannot be borrowed.
        let few = PrefillSituation { slots: 100, ..at };
        let p = with_chunk(&f, &laptop(), few, 4096);
        assert_eq!(p.borrowed_slots, 100);
        near(p.terms[3].ms, read_ms(100.0), 1e-12);
    }

    #[test]
    fn without_a_gpu_a_chunk_waits_for_each_expert_that_it_meets_once() {
        let f = qwen3_next_80b();
        let mut hardware = laptop();
        hardware.cpu.expert_kernel_gflops.value = 2000.0;
        hardware.gpu = None;
        let waiting = |tokens: u64| {
            let p = with_chunk(&f, &hardware, without_slots(tokens), tokens);
            let flops = tokens as f64 * (6_653_411_328.0 + tokens as f64 / 2.0 * 196_608.0);
            near(p.terms[0].ms, flops / 2000e6, 1e-9);
            p.terms[1].ms + p.terms[0].ms
        };
        // One token meets ten experts of each layer; the kernels read 65 GB/s.
        near(waiting(1), 48.0 * 10.0 * 1_671_168.0 / 65e6, 1e-9);
        // An expert is missed by all three of a chunk's tokens with probability (502 / 512)^3.
        let distinct = 512.0 * (1.0 - (502.0f64 / 512.0).powi(3));
        near(waiting(3), 48.0 * distinct * 1_671_168.0 / 65e6, 1e-9);
    }

    #[test]
    fn without_a_gpu_the_cpu_does_it_all() {
        let mut hardware = laptop();
        hardware.gpu = None;
        let p = prefill(&qwen3_next_80b(), &hardware, without_slots(4096));
        assert!(p.tok_s > 0.0 && p.borrowed_slots == 0);
    }
}
