//! Runs that look like real ones, made from a seed.

use moectl::hardware::{
    CpuFacts, GpuFacts, GpuReport, HardwareBody, MemoryFacts, MonitorRecord, Sample,
};
use moectl::report::record::*;
use moectl::report::{RouterPicks, Run};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A run whose decode speed is `speed` times that of the base, at each of `contexts`.
pub fn run(name: &str, contexts: &[usize], speed: f64, seed: u64) -> Run {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let contexts = contexts
        .iter()
        .map(|&tokens| context(tokens, speed, &mut rng))
        .collect();
    Run {
        name: name.to_string(),
        model: "unsloth/Qwen3-Next-80B-A3B-Instruct-bnb-4bit".to_string(),
        fingerprint: None,
        created: "2025-11-23T07:30:00Z".to_string(),
        body: RunBody {
            labels: Labels {
                synthetic: false,
                executed_on: "cuda:0 + cpu".to_string(),
                notes: vec![],
            },
            hardware: hardware(),
            software: SoftwareFacts {
                moectl_version: "0.1.0".to_string(),
                features: vec!["tiny-moe".to_string()],
                target: "x86_64-unknown-linux-gnu".to_string(),
                rustc_version: "1.95.0".to_string(),
                backend: "cuda:0".to_string(),
                kernels: Some("avx512-vnni int16".to_string()),
                threads: 8,
            },
            settings: Settings {
                warmups: 1,
                repetitions: 10,
                generated_tokens: 128,
                corpus: "long-documents".to_string(),
                corpus_sha256: None,
                continuation: Continuation::Sampled,
                command: "moectl bench --ctx 4k,32k".to_string(),
            },
            placement_sha256: Some("ab".repeat(32)),
            contexts,
            memory: memory(),
            quality: Some(Quality {
                reference: "reference f32".to_string(),
                tokens: 4096,
                mean_kl_nats: 3.1e-5,
                perplexity: 8.412,
                reference_perplexity: 8.409,
            }),
            monitor: Some(monitor(&mut rng)),
            endpoint: None,
        },
    }
}

fn context(tokens: usize, speed: f64, rng: &mut ChaCha8Rng) -> ContextRun {
    let token_ms = (11.0 + 4.5 * (tokens as f64 / 131_072.0)) / speed;
    let repetitions = (0..10).map(|_| repetition(tokens, token_ms, rng)).collect();
    let mut context = ContextRun {
        context_tokens: tokens,
        repetitions,
        concurrent: vec![],
        prediction: Some(Prediction {
            decode_tok_s: 1e3 / (token_ms * 0.94),
            prefill_tok_s: Some(2000.0),
            terms: [
                ("dense weights", 0.35),
                ("KV cache", 0.07),
                ("experts in VRAM", 0.10),
                ("experts in RAM", 0.34),
                ("launches and handoffs", 0.08),
            ]
            .map(|(name, share)| PredictionTerm {
                name: name.to_string(),
                ms_per_token: share * token_ms,
            })
            .to_vec(),
        }),
        prediction_error: None,
        prefill_prediction_error: None,
        started_ms: Some(1000.0 * (tokens / 4096) as f64),
        bytes_read_per_token: Some(2_500_000_000),
    };
    context.compare_prediction();
    context
}

fn repetition(tokens: usize, token_ms: f64, rng: &mut ChaCha8Rng) -> Repetition {
    let drift = 1.0 + 0.03 * (rng.random::<f64>() - 0.5);
    let itl_ms: Vec<f64> = (0..127)
        .map(|_| {
            let noise: f64 = (0..6).map(|_| rng.random::<f64>()).sum::<f64>() / 6.0;
            let tail = if rng.random_bool(0.03) {
                1.0 + rng.random::<f64>()
            } else {
                1.0
            };
            token_ms * drift * (0.85 + 0.3 * noise) * tail
        })
        .collect();
    let decode_ms: f64 = itl_ms.iter().sum();
    let prefill_tok_s = 2100.0 * drift * (tokens as f64 / 32_768.0).powf(0.2);
    let ttft_ms = tokens as f64 / prefill_tok_s * 1e3;
    Repetition {
        prompt_tokens: tokens,
        generated_tokens: 128,
        ttft_ms,
        prefill_tok_s,
        decode_tok_s: 127.0 / decode_ms * 1e3,
        e2e_ms: ttft_ms + decode_ms,
        itl_ms,
        experts: ExpertCounts {
            hits: 33_000,
            misses: 28_000,
            moved_bytes: 9_000_000_000,
            h2d_bytes: 9_000_000_000,
            ..ExpertCounts::default()
        },
        decode_split: None,
        gpu_energy_j: Some(310.0),
        output_sha256: "cd".repeat(32),
        cached_tokens: None,
    }
}

fn monitor(rng: &mut ChaCha8Rng) -> MonitorRecord {
    let samples = (0..300).map(|i| Sample {
        at_ms: 200.0 * f64::from(i),
        rss_bytes: 41_500 << 20,
        cpu_cores: 5.0 + 3.0 * rng.random::<f64>(),
        vram_bytes: Some(13_200 << 20),
        gpu_utilisation_percent: Some(60 + rng.random_range(0..30)),
        gpu_memory_utilisation_percent: None,
        gpu_power_w: Some(80.0 + 40.0 * rng.random::<f64>()),
        pcie_rx_gb_s: Some(if i % 50 < 10 { 22.0 } else { 1.5 }),
        pcie_tx_gb_s: None,
    });
    MonitorRecord {
        period_ms: 200.0,
        samples: samples.collect(),
        peak_rss_bytes: 41_700 << 20,
        peak_vram_bytes: Some(13_200 << 20),
        gpu_energy_j: Some(6000.0),
    }
}

fn memory() -> MemoryRecord {
    let component = |component: &str, tier, mib: f64| MemoryComponent {
        component: component.to_string(),
        tier,
        bytes: (mib * 1048576.0) as u64,
    };
    let mut memory = MemoryRecord {
        components: vec![
            component("expert slots", Tier::Vram, 10_150.0),
            component("dense weights", Tier::Vram, 1545.0),
            component("KV cache", Tier::Vram, 768.0),
            component("CUDA context", Tier::Vram, 430.0),
            component("workspace", Tier::Vram, 334.0),
            component("delta-net state", Tier::Vram, 76.0),
            component("experts", Tier::Ram, 39_168.0),
            component("embedding", Tier::Ram, 594.0),
            component("CPU workspace", Tier::Ram, 48.0),
            component("checkpoint", Tier::Disk, 41_900.0),
        ],
        vram_budget_bytes: Some(14 << 30),
        peak_rss_bytes: 41_700 << 20,
        peak_vram_bytes: Some(13_200 << 20),
        vram_prediction_error: None,
    };
    memory.compare_vram();
    memory
}

fn hardware() -> HardwareBody {
    HardwareBody {
        os: "Linux (Debian GNU/Linux 12), kernel 6.1.0".to_string(),
        cpu: CpuFacts {
            model_name: "Intel Core i9-13980HX".to_string(),
            physical_core_cpus: (0..8).collect(),
            allowed_cpus: (0..8).collect(),
            logical_cores: 8,
            ..CpuFacts::default()
        },
        memory: MemoryFacts {
            total_bytes: 64 << 30,
            available_bytes: 60 << 30,
            ..MemoryFacts::default()
        },
        gpu: GpuReport {
            devices: vec![GpuFacts {
                name: "RTX 4090 Laptop".to_string(),
                ..GpuFacts::default()
            }],
            ..GpuReport::default()
        },
        cpu_experts: None,
        gpu_probe: None,
        dram: None,
    }
}

/// Skewed picks, the busiest `planned` experts of each layer in the plan.
pub fn picks(layers: usize, experts: usize, planned: usize, seed: u64) -> RouterPicks {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let picks: Vec<Vec<u64>> = (0..layers)
        .map(|_| {
            (0..experts)
                .map(|_| (200.0 * (-rng.random::<f64>().ln()).powf(1.4)) as u64 + 3)
                .collect()
        })
        .collect();
    let busiest = |layer: &Vec<u64>| {
        let mut ids: Vec<u16> = (0..experts as u16).collect();
        ids.sort_by_key(|&id| std::cmp::Reverse(layer[usize::from(id)]));
        ids.truncate(planned);
        ids
    };
    RouterPicks {
        planned: picks.iter().map(busiest).collect(),
        picks,
        footnote: "tiny-moe · workloads/chat.jsonl, 12,480 tokens · 2025-11-23".to_string(),
        synthetic: false,
    }
}
