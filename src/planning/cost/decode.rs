//! One token of decode: what the GPU reads, what it waits for, what promotions take away.

use serde::{Deserialize, Serialize};

use super::{Term, Terms, at_rate, ms};
use crate::planning::footprint::{Footprint, KvDtype};
use crate::planning::hardware::{Figure, Gpu, Hardware};
use crate::planning::placement::Tier;

/// Kernels of one layer in a decode step: norm and projection, mixer, output projection, router,
/// gate and up, down; one more adds up where the CPU is asked.
const KERNELS_PER_LAYER: usize = 6;
/// Share of a token's time that promotions may keep the bus busy: the rest is for misses that the
/// GPU reads itself, and for being wrong.
const PROMOTION_SHARE: f64 = 0.5;

/// One token of decode with the context full.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DecodePrediction {
    pub terms: Vec<Term>,
    pub total_ms: f64,
    pub tok_s: f64,
    /// Picks found in VRAM, mean of the layers.
    pub expert_hit_rate: f64,
    pub promotion_h2d_bytes_per_token: f64,
    /// How long the bus is busy with them: not a term, since it runs behind the computation.
    pub promotion_h2d_ms: f64,
}

/// The situation a token is decoded in.
#[derive(Clone, Debug)]
pub struct DecodeSituation<'a> {
    pub ctx_tokens: u64,
    pub kv_dtype: KvDtype,
    /// Where the output matrix is.
    pub head: Tier,
    /// Per layer, the share of picks found in VRAM.
    pub hit_rates: &'a [f64],
    /// Experts copied into slots per token, all layers together.
    pub promotions_per_token: f64,
    /// Share of the experts that RAM does not hold.
    pub disk_share: f64,
}

/// Predicts one decode token.
///
/// Per layer the GPU reads its hits while the misses are read by the CPU or, where the machine has
/// a figure for both at once, partly by the GPU over PCIe; the slower side counts. Where whole layers
/// were measured with some of their experts missing, that counts instead. A miss outside
/// RAM comes from disk and is paid on top, and so is the RAM bandwidth that promotions take.
/// Without a GPU every byte is read from DRAM and hit rates do not matter.
pub fn decode(f: &Footprint, hardware: &Hardware, at: &DecodeSituation) -> DecodePrediction {
    let kv_bytes = at.ctx_tokens as f64 * f.kv_bytes_per_token(at.kv_dtype) as f64;
    // The delta rule reads and writes its state.
    let state_bytes = 2.0 * f.delta_state_bytes as f64;
    let dram_gb_s = hardware.cpu.dram_read_gb_s.value;
    let read_gb_s = |of: fn(&Gpu) -> Option<Figure>| {
        let gpu = hardware.gpu.as_ref();
        gpu.map_or(dram_gb_s, |gpu| gpu.rate_or_weight_read(of(gpu)))
    };
    let dense_gb_s = read_gb_s(|gpu| gpu.dense_gb_s);
    let head_gb_s = match at.head {
        Tier::Vram => read_gb_s(|gpu| gpu.lm_head_gb_s),
        Tier::Ram | Tier::Disk => dram_gb_s,
    };
    let hit_rate = |layer: usize| match hardware.gpu {
        Some(_) => at.hit_rates[layer],
        None => 0.0,
    };
    let layers = || 0..f.num_layers;

    let mut terms = Terms::default();
    let dense = (f.dense_bytes + f.router_bytes) as f64;
    terms.read("dense weights", dense, dense_gb_s);
    terms.read("lm_head", f.lm_head_bytes as f64, head_gb_s);
    terms.read("delta-net state", state_bytes, dense_gb_s);
    terms.read("kv cache", kv_bytes, read_gb_s(|gpu| gpu.kv_cache_gb_s));
    let mut promoted_bytes = 0.0;
    match &hardware.gpu {
        Some(gpu) => {
            let handed_over = layers().any(|layer| hit_rate(layer) < 1.0);
            fixed(&mut terms, f, gpu, handed_over);
            let hit_share: f64 = layers().map(hit_rate).sum();
            let layer_bytes = picked_bytes(f);
            let hits_gb_s = gpu.weight_read_gb_s();
            terms.read("experts in VRAM", hit_share * layer_bytes, hits_gb_s);
            let (mut all_ms, mut wait_ms) = (0.0, 0.0);
            for l in layers() {
                let layer_ms = expert_layer_ms(f, hardware, hit_rate(l));
                all_ms += layer_ms;
                wait_ms += layer_ms - ms(hit_rate(l) * layer_bytes, hits_gb_s);
            }
            let miss_bytes = (f.num_layers as f64 - hit_share) * layer_bytes;
            terms.add(
                "waiting for experts in RAM",
                wait_ms,
                format!(
                    "{}, beside the hits",
                    at_rate(miss_bytes, miss_bytes / f64::max(all_ms * 1e6, 1e-9))
                ),
            );
            if at.promotions_per_token > 0.0 {
                promoted_bytes = at.promotions_per_token * f.expert_bytes as f64;
                terms.read("promotions", promoted_bytes, dram_gb_s);
            }
        }
        None => {
            let bytes = f.num_layers as f64 * picked_bytes(f);
            terms.read("experts in RAM", bytes, miss_gb_s(hardware));
        }
    }
    if at.disk_share > 0.0 {
        let disk_ms = |l| disk_layer_ms(f, hardware, hit_rate(l), at.disk_share);
        let gb_s = hardware.cpu.disk_read_gb_s.value;
        let total: f64 = layers().map(disk_ms).sum();
        terms.add(
            "experts from disk",
            total,
            at_rate(total * gb_s * 1e6, gb_s),
        );
    }
    let total_ms = terms.total();
    DecodePrediction {
        terms: terms.0,
        total_ms,
        tok_s: 1e3 / total_ms,
        expert_hit_rate: layers().map(hit_rate).sum::<f64>() / f.num_layers.max(1) as f64,
        promotion_h2d_bytes_per_token: promoted_bytes,
        promotion_h2d_ms: match &hardware.gpu {
            Some(gpu) if promoted_bytes > 0.0 => ms(promoted_bytes, gpu.h2d_gb_s(f.expert_bytes)),
            _ => 0.0,
        },
    }
}

fn fixed(terms: &mut Terms, f: &Footprint, gpu: &Gpu, handed_over: bool) {
    let (boundary, flag) = (gpu.kernel_boundary_us.value, gpu.flag_round_trip_us.value);
    let kernels = f.num_layers * (KERNELS_PER_LAYER + usize::from(handed_over));
    terms.add(
        "kernel boundaries",
        kernels as f64 * boundary / 1e3,
        format!("{kernels} at {boundary:.2} us"),
    );
    // Where all experts are in VRAM, the CPU is never asked.
    let handoffs = if handed_over { f.num_layers } else { 0 };
    terms.add(
        "handoffs",
        handoffs as f64 * flag / 1e3,
        format!("{handoffs} at {flag:.2} us"),
    );
}

/// Routed experts of one layer and token: hits and misses overlap, the slower side counts.
pub fn expert_layer_ms(f: &Footprint, hardware: &Hardware, hit_rate: f64) -> f64 {
    let bytes = picked_bytes(f);
    let missing = bytes * (1.0 - hit_rate);
    match &hardware.gpu {
        Some(gpu) => {
            let hits_gb_s = gpu.weight_read_gb_s();
            // What was measured covers hits and misses.
            let measured = gpu.expert_wait_us(missing, 1e3 * ms(bytes, hits_gb_s));
            let by_rates = || ms(bytes * hit_rate, hits_gb_s).max(ms(missing, miss_gb_s(hardware)));
            measured.map_or_else(by_rates, |us| us / 1e3)
        }
        None => ms(bytes, miss_gb_s(hardware)),
    }
}

/// Waiting for the disk, in one layer and token, for the misses that RAM does not hold.
pub fn disk_layer_ms(f: &Footprint, hardware: &Hardware, hit_rate: f64, disk_share: f64) -> f64 {
    let bytes = picked_bytes(f) * (1.0 - hit_rate) * disk_share;
    ms(bytes, hardware.cpu.disk_read_gb_s.value)
}

/// Expected further picks that a copy into a slot must bring to be worth its while.
///
/// A copy costs its bytes of RAM bandwidth, a hit saves the same bytes at the rate of misses, or of
/// the last misses of many where those were measured.
pub fn pay_back_picks(hardware: &Hardware) -> f64 {
    let Some(gpu) = &hardware.gpu else { return 0.0 };
    let saved = 1.0 / last_misses_gb_s(hardware) - 1.0 / gpu.weight_read_gb_s();
    match saved > 0.0 {
        true => 1.0 / hardware.cpu.dram_read_gb_s.value / saved,
        // Hits save nothing: no copy ever pays.
        false => f64::INFINITY,
    }
}

/// Bytes that promotions may move per token: a share of what the bus carries in the time of a
/// token without context in which every second pick hits.
pub fn promotion_bytes_per_token(f: &Footprint, hardware: &Hardware) -> f64 {
    let Some(gpu) = &hardware.gpu else { return 0.0 };
    let at = DecodeSituation {
        ctx_tokens: 0,
        kv_dtype: KvDtype::F16,
        head: Tier::Vram,
        hit_rates: &vec![0.5; f.num_layers],
        promotions_per_token: 0.0,
        disk_share: 0.0,
    };
    let token_ms = decode(f, hardware, &at).total_ms;
    PROMOTION_SHARE * token_ms * gpu.h2d_gb_s(f.expert_bytes) * 1e6
}

/// Bytes of a token's experts in one layer.
fn picked_bytes(f: &Footprint) -> f64 {
    f.num_experts_per_tok as f64 * f.expert_bytes as f64
}

/// At which missing experts are read.
fn miss_gb_s(hardware: &Hardware) -> f64 {
    let cpu = hardware.cpu.expert_kernel_gb_s.value;
    let both = hardware.gpu.as_ref().and_then(|g| g.cpu_and_pcie_gb_s);
    both.map_or(cpu, |both| both.value.max(cpu))
}

/// At which one more missing expert is read, where half of them or more are.
fn last_misses_gb_s(hardware: &Hardware) -> f64 {
    let waits = (hardware.gpu.as_ref()).map_or(&[][..], |gpu| &gpu.expert_wait);
    let middle = waits.get(waits.len().saturating_sub(1) / 2);
    match (middle, waits.last()) {
        (Some(some), Some(all)) if some.us.value < all.us.value => {
            (all.missing_bytes - some.missing_bytes) / (all.us.value - some.us.value) / 1e3
        }
        _ => miss_gb_s(hardware),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{laptop, near, server, terms_are};
    use super::*;
    use crate::planning::footprint::tests::qwen3_next_80b;
    use crate::planning::hardware::{ExpertWait, Figure};

    fn at(hit_rates: &[f64]) -> DecodeSituation<'_> {
        DecodeSituation {
            ctx_tokens: 4096,
            kv_dtype: KvDtype::F16,
            head: Tier::Vram,
            hit_rates,
            promotions_per_token: 0.0,
            disk_share: 0.0,
        }
    }

    fn decode_tok_s(hardware: &Hardware, ctx_tokens: u64, kv_dtype: KvDtype, h: f64) -> f64 {
        let hit_rates = [h; 48];
        let at = DecodeSituation {
            ctx_tokens,
            kv_dtype,
            ..at(&hit_rates)
        };
        decode(&qwen3_next_80b(), hardware, &at).tok_s
    }

    #[test]
    fn decode_ceilings_are_those_of_the_roofline() {
        let (laptop, server) = (laptop(), server());
        for (h, k4, k32, k262) in [
            (0.2, 65., 59., 44.),
            (0.4, 78., 69., 50.),
            (0.5, 86., 76., 53.),
            (0.6, 96., 84., 57.),
        ] {
            near(decode_tok_s(&laptop, 4096, KvDtype::F16, h), k4, 0.012);
            near(decode_tok_s(&laptop, 32_768, KvDtype::F16, h), k32, 0.012);
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
            near(decode_tok_s(&server, 4096, KvDtype::F16, h), k4, 0.012);
            near(decode_tok_s(&server, 32_768, KvDtype::F16, h), k32, 0.012);
        }
    }

    #[test]
    fn reading_misses_over_pcie_too_is_worth_what_the_roofline_says() {
        let mut laptop = laptop();
        laptop.gpu.as_mut().unwrap().cpu_and_pcie_gb_s =
            Some(crate::planning::Figure::modelled(78.0));
        for (h, expected) in [(0.2, 73.), (0.4, 86.), (0.5, 94.), (0.6, 104.)] {
            near(
                decode_tok_s(&laptop, 4096, KvDtype::F16, h),
                expected,
                0.015,
            );
        }
    }

    #[test]
    fn a_layer_measured_with_missing_experts_counts_instead_of_rates() {
        let f = qwen3_next_80b();
        let mut machine = server();
        let half = 5.0 * f.expert_bytes as f64;
        let wait = |missing_bytes, us| ExpertWait {
            missing_bytes,
            us: Figure::measured(us),
        };
        machine.gpu.as_mut().unwrap().expert_wait = vec![
            wait(half / 2.0, 50.0),
            wait(half, 90.0),
            wait(2.0 * half, 150.0),
        ];
        near(expert_layer_ms(&f, &machine, 0.5), 0.09, 1e-9);
        near(expert_layer_ms(&f, &machine, 0.0), 0.15, 1e-9);
        // The copy's bytes at 150 GB/s against what the second half takes, less what hits take.
        let saved = 60e-6 / half - 1.0 / 2180e9;
        near(pay_back_picks(&machine), 1.0 / 150e9 / saved, 1e-9);
    }

    #[test]
    fn without_a_gpu_every_byte_comes_from_dram() {
        let mut hardware = laptop();
        hardware.gpu = None;
        let slow = decode_tok_s(&hardware, 4096, KvDtype::F16, 0.5);
        // 1.62 + 0.15 + 0.10 GB at 76 GB/s and 0.80 GB at 65 GB/s
        near(slow, 1e3 / (1.872e3 / 76.0 + 0.802e3 / 65.0), 0.01);
        assert_eq!(slow, decode_tok_s(&hardware, 4096, KvDtype::F16, 0.9));
    }

    #[test]
    fn terms_add_up_to_the_total() {
        let hit_rates = [0.3; 48];
        let situation = DecodeSituation {
            promotions_per_token: 3.0,
            disk_share: 0.1,
            ..at(&hit_rates)
        };
        let p = decode(&qwen3_next_80b(), &Hardware::h100_box(), &situation);
        near(p.terms.iter().map(|t| t.ms).sum::<f64>(), p.total_ms, 1e-12);
        assert_eq!(p.terms.len(), 10);
        assert!(p.terms.iter().all(|t| !t.from.is_empty()));
        assert_eq!(p.promotion_h2d_bytes_per_token, 3.0 * 1_671_168.0);
    }

    #[test]
    fn every_term_of_a_token_is_exact() {
        let f = qwen3_next_80b();
        let hit_rates: Vec<f64> = (0..48).map(|l| if l < 12 { 1.0 } else { 0.25 }).collect();
        let mut machine = laptop();
        machine.cpu.disk_read_gb_s.value = 5.0;
        let gpu = machine.gpu.as_mut().unwrap();
        gpu.kernel_boundary_us.value = 3.0;
        gpu.flag_round_trip_us.value = 8.0;
        let situation = DecodeSituation {
            ctx_tokens: 1000,
            promotions_per_token: 3.0,
            disk_share: 0.1,
            ..at(&hit_rates)
        };
        let p = decode(&f, &machine, &situation);
        let picked = 10.0 * 1_671_168.0;
        let hits = (12.0 + 36.0 * 0.25) * picked;
        // A layer that hits a quarter waits for the CPU's 65 GB/s longer than the GPU reads.
        let waits = 36.0 * (0.75 * picked / 65e6 - 0.25 * picked / 461e6);
        let mut expected = [
            ("dense weights", (905_489_408.0 + 100_663_296.0) / 461e6),
            ("lm_head", 622_329_856.0 / 461e6),
            ("delta-net state", 2.0 * 75_497_472.0 / 461e6),
            ("kv cache", 1000.0 * 24_576.0 / 461e6),
            ("kernel boundaries", 48.0 * 7.0 * 3e-3),
            ("handoffs", 48.0 * 8e-3),
            ("experts in VRAM", hits / 461e6),
            ("waiting for experts in RAM", waits),
            ("promotions", 3.0 * 1_671_168.0 / 76e6),
            ("experts from disk", 36.0 * 0.75 * 0.1 * picked / 5e6),
        ];
        terms_are(&p.terms, &expected);
        near(p.expert_hit_rate, (12.0 + 9.0) / 48.0, 1e-12);
        near(p.promotion_h2d_ms, 3.0 * 1_671_168.0 / 25e6, 1e-9);
        near(
            p.tok_s,
            1e3 / expected.iter().map(|(_, ms)| ms).sum::<f64>(),
            1e-9,
        );
        // Rates of their own, where they were measured.
        let figure = |gb_s| Some(Figure::measured(gb_s));
        let gpu = machine.gpu.as_mut().unwrap();
        (gpu.dense_gb_s, gpu.lm_head_gb_s, gpu.kv_cache_gb_s) =
            (figure(400.0), figure(420.0), figure(300.0));
        for (term, slower) in expected.iter_mut().zip([400.0, 420.0, 400.0, 300.0]) {
            term.1 *= 461.0 / slower;
        }
        terms_are(&decode(&f, &machine, &situation).terms, &expected);
    }

    #[test]
    fn with_all_experts_in_vram_the_cpu_is_not_asked() {
        let f = qwen3_next_80b();
        let p = decode(&f, &server(), &at(&[1.0; 48]));
        let ms = |name: &str| p.terms.iter().find(|t| t.name == name).unwrap().ms;
        assert_eq!(
            (ms("handoffs"), ms("waiting for experts in RAM")),
            (0.0, 0.0)
        );
        near(ms("kernel boundaries"), 6.0 / 7.0, 1e-9);
    }

    #[test]
    fn a_head_in_ram_costs_the_difference_of_the_bandwidths() {
        let f = qwen3_next_80b();
        let hit_rates = [0.5; 48];
        let in_vram = decode(&f, &laptop(), &at(&hit_rates)).total_ms;
        let situation = DecodeSituation {
            head: Tier::Ram,
            ..at(&hit_rates)
        };
        let in_ram = decode(&f, &laptop(), &situation).total_ms;
        near(in_ram - in_vram, 622.3 / 76.0 - 622.3 / 461.0, 0.01);
    }

    #[test]
    fn promotions_are_held_to_what_the_bus_has_to_spare() {
        let f = qwen3_next_80b();
        let machine = Hardware::laptop_4090();
        let per_token = promotion_bytes_per_token(&f, &machine) / f.expert_bytes as f64;
        // 11 ms a token at 23 GB/s, half of it: some 75 experts of 48 layers.
        assert!((60.0..90.0).contains(&per_token), "{per_token}");
        let picks = pay_back_picks(&machine);
        assert!((1.0..1.5).contains(&picks), "{picks}");
        // By rates: half of what the bus carries in a token without context, and a copy's bytes at
        // 76 GB/s against what a hit saves.
        let token = DecodeSituation {
            ctx_tokens: 0,
            ..at(&[0.5; 48])
        };
        let token_ms = decode(&f, &laptop(), &token).total_ms;
        let spare = promotion_bytes_per_token(&f, &laptop());
        near(spare, 0.5 * token_ms * 25e6, 1e-9);
        let saved = 1.0 / 65.0 - 1.0 / 461.0;
        near(pay_back_picks(&laptop()), 1.0 / 76.0 / saved, 1e-9);
        let mut even = laptop();
        even.cpu.expert_kernel_gb_s.value = 461.0;
        assert_eq!(pay_back_picks(&even), f64::INFINITY);
        let mut cpu_only = machine;
        cpu_only.gpu = None;
        assert_eq!(promotion_bytes_per_token(&f, &cpu_only), 0.0);
    }
}
