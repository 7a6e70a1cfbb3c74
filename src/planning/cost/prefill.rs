//! A prompt, chunk by chunk: experts stream past the GPU one layer ahead of the computation.

use serde::{Deserialize, Serialize};

use super::{Term, Terms, at_rate, ms};
use crate::planning::execution::{
    PICKED_BATCH, PrefillPlan, PrefillSettings, PrefillSizes, Streaming, batches_ahead,
    planned_memory, prefill_plan,
};
use crate::planning::footprint::Footprint;
use crate::planning::hardware::{Cpu, Gpu, Hardware};
use crate::planning::precision::Precision;
use crate::planning::sharing::{ShareRates, picks_for_cpu};

/// What a prompt is cut into where the CPU computes it.
const CPU_CHUNK_TOKENS: usize = 512;

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
    pub settings: PrefillSettings,
}

/// Predicts the prefill of a prompt that is cut as [`prefill_plan`] cuts it.
///
/// A long chunk streams every expert that is not resident past the GPU, one layer ahead of the
/// computation: the slower of the two counts, and the first layer's copy hides behind nothing. Of a
/// short one only picked experts come, and the CPU computes some meanwhile. The memory for it is
/// borrowed from the slots, which are filled again afterwards. Without a GPU a chunk costs the slower of reading
/// the experts it meets and its arithmetic.
pub fn prefill(f: &Footprint, hardware: &Hardware, at: PrefillSituation) -> PrefillPrediction {
    let tokens = at.prompt_tokens.max(1) as usize;
    let plan = match &hardware.gpu {
        Some(_) => {
            let sizes = PrefillSizes::of(f, at.settings.precision);
            let memory = planned_memory(&sizes, at.slots, tokens, &at.settings);
            prefill_plan(&sizes, memory, at.slots, tokens, &at.settings)
        }
        None => PrefillPlan {
            chunk_tokens: tokens.min(CPU_CHUNK_TOKENS),
            streaming: Streaming::All,
            workspace_bytes: 0,
            borrowed_slots: 0,
        },
    };
    by_plan(f, hardware, at, plan)
}

/// Parts of a prompt's time that add up over its chunks.
#[derive(Default)]
struct Sums {
    products_ms: f64,
    attention_ms: f64,
    waiting_ms: f64,
}

fn by_plan(
    f: &Footprint,
    hardware: &Hardware,
    at: PrefillSituation,
    plan: PrefillPlan,
) -> PrefillPrediction {
    let chunk_tokens = plan.chunk_tokens as u64;
    let borrowed_slots = plan.borrowed_slots.min(at.slots);
    let resident = (at.slots - borrowed_slots) as f64 / f.total_experts().max(1) as f64;
    let layer_bytes = f.num_experts as u64 * f.expert_bytes;
    let missing = 1.0 - resident;
    let streamed_bytes = f.experts_bytes() as f64 * missing;
    let mut sums = Sums::default();
    let mut start = 0;
    while start < at.prompt_tokens {
        let tokens = chunk_tokens.min(at.prompt_tokens - start);
        add_chunk(
            &mut sums,
            f,
            hardware,
            at.settings.precision,
            [start, tokens],
            (plan.streaming, missing),
        );
        start += tokens;
    }
    let mut terms = Terms::default();
    let chunks = at.prompt_tokens.div_ceil(chunk_tokens);
    let flops = f.flops_per_token as f64 / 1e9;
    terms.add(
        "matrix products",
        sums.products_ms,
        format!(
            "{chunks} chunks of {chunk_tokens} tokens, {flops:.1} GFLOP a token, precision {}",
            at.settings.precision.name()
        ),
    );
    terms.add(
        "attention",
        sums.attention_ms,
        format!(
            "{:.0} kFLOP a token and token of context",
            f.attention_flops_per_context_token as f64 / 1e3
        ),
    );
    let waits_for = match (&hardware.gpu, plan.streaming) {
        (Some(gpu), Streaming::All) => format!(
            "{} a chunk over PCIe",
            at_rate(streamed_bytes, gpu.h2d_gb_s(layer_bytes))
        ),
        (Some(gpu), Streaming::Picked) => format!(
            "what was picked of {:.1} GB, over PCIe at {:.0} GB/s and on the CPU",
            streamed_bytes / 1e9,
            gpu.h2d_gb_s(layer_bytes)
        ),
        (None, _) => "on the CPU".into(),
    };
    terms.add("waiting for experts", sums.waiting_ms, waits_for);
    if let Some(gpu) = &hardware.gpu {
        if plan.streaming == Streaming::All {
            terms.read(
                "first layer",
                layer_bytes as f64 * missing,
                gpu.h2d_gb_s(layer_bytes),
            );
        }
        let refilled = borrowed_slots as f64 * f.expert_bytes as f64;
        terms.read("slots refilled", refilled, gpu.h2d_gb_s(f.expert_bytes));
    }
    let total_ms = terms.total();
    PrefillPrediction {
        prompt_tokens: at.prompt_tokens,
        chunk_tokens,
        borrowed_slots,
        terms: terms.0,
        total_ms,
        tok_s: match total_ms > 0.0 {
            true => at.prompt_tokens as f64 * 1e3 / total_ms,
            false => 0.0,
        },
    }
}

/// Adds the chunk of `tokens` tokens from `start` on.
fn add_chunk(
    sums: &mut Sums,
    f: &Footprint,
    hardware: &Hardware,
    precision: Precision,
    [start, tokens]: [u64; 2],
    (streaming, missing): (Streaming, f64),
) {
    let context = start as f64 + tokens as f64 / 2.0;
    let attention = tokens as f64 * context * f.attention_flops_per_context_token as f64;
    let flops = tokens as f64 * f.flops_per_token as f64;
    let (products_ms, attention_ms, waiting_ms) = match &hardware.gpu {
        Some(gpu) => {
            let (products_ms, attention_ms) = gpu_ms(gpu, precision, flops, attention);
            let gpu_ms = products_ms + attention_ms;
            let layer_bytes = f.num_experts as u64 * f.expert_bytes;
            let waiting_ms = match streaming {
                Streaming::All => {
                    let bytes = f.experts_bytes() as f64 * missing;
                    (ms(bytes, gpu.h2d_gb_s(layer_bytes)) - gpu_ms).max(0.0)
                }
                // Copies run while the mixer does, or begin after it.
                Streaming::Picked => {
                    let copies_ms = picked_ms(f, gpu, &hardware.cpu, tokens, missing);
                    match batches_ahead(tokens as usize) {
                        0 => copies_ms,
                        _ => (copies_ms - gpu_ms).max(0.0),
                    }
                }
            };
            (products_ms, attention_ms, waiting_ms)
        }
        None => {
            let flops_per_ms = hardware.cpu.expert_kernel_gflops.value * 1e6;
            let (products_ms, attention_ms) = (flops / flops_per_ms, attention / flops_per_ms);
            let experts_ms = cpu_experts_ms(f, &hardware.cpu, tokens);
            let waiting_ms = (experts_ms - products_ms - attention_ms).max(0.0);
            (products_ms, attention_ms, waiting_ms)
        }
    };
    sums.products_ms += products_ms;
    sums.attention_ms += attention_ms;
    sums.waiting_ms += waiting_ms;
}

/// Copies of a chunk's picked experts, of which the CPU computes some meanwhile. As if all missing
/// experts were picked alike, which overrates how many are and underrates what the CPU can do.
fn picked_ms(f: &Footprint, gpu: &Gpu, cpu: &Cpu, tokens: u64, missing: f64) -> f64 {
    let rates = ShareRates {
        pcie_gb_s: gpu.h2d_gb_s(PICKED_BATCH as u64 * f.expert_bytes),
        cpu_gb_s: cpu.expert_kernel_gb_s.value,
        cpu_gflops: cpu.expert_kernel_gflops.value,
    };
    let picked = distinct_experts(f, tokens);
    let tokens_each = (tokens * f.num_experts_per_tok as u64) as f64 / picked.max(1.0);
    let count = (picked * missing).round() as usize;
    let ahead = (batches_ahead(tokens as usize) * PICKED_BATCH).min(count);
    let shared = (0..count - ahead).map(|e| (e as u16, tokens_each.round() as u32));
    let for_cpu = picks_for_cpu(
        shared.collect(),
        &rates,
        f.expert_bytes as usize,
        f.expert_flops,
    );
    let copied = (count - for_cpu.len()) as f64 * f.expert_bytes as f64;
    f.num_layers as f64 * ms(copied, rates.pcie_gb_s)
}

/// Experts of a layer that a chunk's tokens pick, if they pick all alike.
fn distinct_experts(f: &Footprint, tokens: u64) -> f64 {
    let experts = f.num_experts as f64;
    let picked = f.num_experts_per_tok as f64 / experts;
    experts * (1.0 - (1.0 - picked).powf(tokens as f64))
}

/// Milliseconds of products and of attention. Rates are those of one f16 term; two terms take three
/// products of a pair of matrices, and two where one factor, the cache, has one term.
fn gpu_ms(gpu: &Gpu, precision: Precision, flops: f64, attention: f64) -> (f64, f64) {
    let (products, attentions) = match precision {
        Precision::Exact => (3.0, 2.0),
        Precision::F16 => (1.0, 1.0),
    };
    (
        products * flops / (gpu.gemm_tflops.value * 1e9),
        attentions * attention / (gpu.attention_tflops.value * 1e9),
    )
}

/// The routed experts of a chunk on the CPU: weights met at least once, or arithmetic.
fn cpu_experts_ms(f: &Footprint, cpu: &Cpu, tokens: u64) -> f64 {
    let read_ms = ms(
        distinct_experts(f, tokens) * f.expert_bytes as f64,
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
            settings: PrefillSettings::default(),
        }
    }

    fn with_chunk(
        f: &Footprint,
        hardware: &Hardware,
        prompt: u64,
        chunk_tokens: usize,
    ) -> PrefillPrediction {
        let plan = PrefillPlan {
            streaming: Streaming::All,
            chunk_tokens,
            workspace_bytes: 0,
            borrowed_slots: 0,
        };
        by_plan(f, hardware, without_slots(prompt), plan)
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
                let found = with_chunk(&f, hardware, prompt, chunk);
                near(found.tok_s, expected, 0.012);
            }
        }
        near(with_chunk(&f, &laptop, 4096, 4096).tok_s, 2440., 0.01);
        near(with_chunk(&f, &server, 4096, 4096).tok_s, 5080., 0.01);
    }

    #[test]
    fn two_terms_take_three_products_and_twice_the_attention() {
        let f = qwen3_next_80b();
        let terms = |precision| {
            let at = PrefillSituation {
                settings: PrefillSettings {
                    precision,
                    ..PrefillSettings::default()
                },
                slots: 7000,
                ..without_slots(32_768)
            };
            prefill(&f, &server(), at).terms
        };
        let (one, two) = (terms(Precision::F16), terms(Precision::Exact));
        near(two[0].ms, 3.0 * one[0].ms, 1e-9);
        near(two[1].ms, 2.0 * one[1].ms, 1e-9);
    }

    #[test]
    fn what_was_borrowed_is_copied_back_once() {
        let f = qwen3_next_80b();
        let at = PrefillSituation {
            slots: 7000,
            ..without_slots(32_768)
        };
        let p = prefill(&f, &server(), at);
        assert_eq!(p.chunk_tokens, 16_384);
        let refilled = p.terms.iter().find(|t| t.name == "slots refilled").unwrap();
        let gb_s = server().gpu.unwrap().h2d_gb_s(f.expert_bytes);
        let bytes = p.borrowed_slots as f64 * f.expert_bytes as f64;
        near(refilled.ms, bytes / gb_s / 1e6, 1e-9);
    }

    #[test]
    fn a_short_prompt_pays_for_picked_experts_alone() {
        let f = qwen3_next_80b();
        let waiting = |tokens| {
            let p = prefill(&f, &laptop(), without_slots(tokens));
            assert!(p.terms.iter().all(|t| t.name != "first layer"), "{tokens}");
            (p.terms.iter().find(|t| t.name == "waiting for experts")).map_or(0.0, |t| t.ms)
        };
        // All of a layer's experts over PCIe at 25 GB/s.
        let all = 48.0 * 512.0 * 1_671_168.0 / 25e6;
        assert!(waiting(8) < 0.06 * all, "{}", waiting(8) / all);
        assert!(waiting(64) < 0.3 * all && waiting(8) < waiting(64));
        assert!(waiting(512) > waiting(64) && waiting(2048) < all);
        // Beyond, all experts stream.
        let p = prefill(&f, &laptop(), without_slots(5000));
        assert!(p.terms.iter().any(|t| t.name == "first layer"));
    }

    #[test]
    fn more_slots_never_make_prefill_slower_than_the_refill_costs() {
        let f = qwen3_next_80b();
        let machine = Hardware::laptop_4090();
        let speed = |slots| {
            let at = PrefillSituation {
                slots,
                ..without_slots(32_768)
            };
            let p = prefill(&f, &machine, at);
            assert!(p.borrowed_slots <= slots);
            p.tok_s
        };
        assert!(speed(6000) > speed(2000) && speed(12_000) > speed(6000));
        // Of fewer slots the longest chunk has no room.
        assert!(speed(2000) > 0.98 * speed(0));
    }

    #[test]
    fn every_term_of_a_prompt_is_exact() {
        let f = qwen3_next_80b();
        let at = PrefillSituation {
            slots: 2000,
            settings: PrefillSettings {
                precision: Precision::F16,
                ..PrefillSettings::default()
            },
            ..without_slots(6144)
        };
        let plan = PrefillPlan {
            streaming: Streaming::All,
            chunk_tokens: 4096,
            workspace_bytes: 0,
            borrowed_slots: 1296,
        };
        let p = by_plan(&f, &laptop(), at, plan);
        let missing = 1.0 - (2000 - 1296) as f64 / 24_576.0;
        let read_ms = |experts: f64| experts * 1_671_168.0 / 25e6;
        // A chunk of 4096 and one of 2048 tokens, each token against half of its own chunk and all before.
        let chunks = [(4096.0, 2048.0), (2048.0, 5120.0)];
        let products = chunks.map(|(tokens, _)| tokens * 6_653_411_328.0 / 40e9);
        let attention = chunks.map(|(tokens, context)| tokens * context * 196_608.0 / 40e9);
        let waiting = [0, 1].map(|i| read_ms(24_576.0 * missing) - products[i] - attention[i]);
        assert!(waiting[0] > 0.0 && waiting[1] > waiting[0]);
        let expected = [
            ("matrix products", products.iter().sum()),
            ("attention", attention.iter().sum()),
            ("waiting for experts", waiting.iter().sum()),
            ("first layer", read_ms(512.0 * missing)),
            ("slots refilled", read_ms(1296.0)),
        ];
        terms_are(&p.terms, &expected);
        near(p.total_ms, expected.iter().map(|(_, ms)| ms).sum(), 1e-12);
        near(p.tok_s, 6144e3 / p.total_ms, 1e-12);
        // Slots that are not there cannot be borrowed.
        let few = PrefillSituation { slots: 100, ..at };
        let p = by_plan(&f, &laptop(), few, plan);
        assert_eq!(p.borrowed_slots, 100);
        near(p.terms[4].ms, read_ms(100.0), 1e-12);
    }

    #[test]
    fn without_a_gpu_a_chunk_waits_for_each_expert_that_it_meets_once() {
        let f = qwen3_next_80b();
        let mut hardware = laptop();
        hardware.cpu.expert_kernel_gflops.value = 2000.0;
        hardware.gpu = None;
        let waiting = |tokens: u64| {
            let p = with_chunk(&f, &hardware, tokens, tokens as usize);
            let context = tokens as f64 / 2.0;
            near(
                p.terms[0].ms,
                tokens as f64 * 6_653_411_328.0 / 2000e6,
                1e-9,
            );
            near(
                p.terms[1].ms,
                tokens as f64 * context * 196_608.0 / 2000e6,
                1e-9,
            );
            p.total_ms
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
