//! Plans of known models on known machines.

use std::collections::BTreeSet;

use super::*;
use crate::planning::ShapeNumbers;
use crate::planning::footprint::tests::qwen3_next_80b;
use crate::planning::stats::RoutingStats;
use crate::planning::trace::tests::synthetic;
use crate::planning::units::GIB;

fn request<'a>(footprint: &'a Footprint, hardware: &'a Hardware) -> PlanRequest<'a> {
    PlanRequest {
        footprint,
        hardware,
        vram_budget_bytes: 14_000_000_000,
        ram_budget_bytes: None,
        ctx_tokens: 8192,
        sequences: 1,
        kv_dtypes: &[KvDtype::F16],
        heads: &[Tier::Vram],
        policy: None,
        routing: RoutingSource::Unknown,
        prefill: PrefillSettings::default(),
    }
}

/// A small model that a synthetic trace of 3 layers, 16 experts and k = 4 belongs to.
fn small() -> Footprint {
    let published = qwen3_next_80b();
    Footprint {
        shape: ShapeNumbers {
            num_attention_layers: 1,
            num_delta_net_layers: 2,
            num_experts: 16,
            num_experts_per_tok: 4,
            ..published.shape
        },
        num_layers: 3,
        num_experts: 16,
        num_experts_per_tok: 4,
        ..published
    }
}

#[test]
fn slots_per_layer_at_14_gb_are_those_of_the_published_layout() {
    let (f, laptop) = (qwen3_next_80b(), Hardware::laptop_4090());
    for (ctx_tokens, f16, int8) in [
        (8 << 10, 141, 142),
        (32 << 10, 133, 138),
        (128 << 10, 103, 122),
        (256 << 10, 63, 101),
    ] {
        for (kv_dtype, expected) in [(KvDtype::F16, f16), (KvDtype::Int8, int8)] {
            let plan = plan(&PlanRequest {
                ctx_tokens,
                kv_dtypes: &[kv_dtype],
                ..request(&f, &laptop)
            })
            .unwrap();
            assert!(
                plan.layers.iter().all(|l| l.slots.abs_diff(expected) <= 1),
                "{ctx_tokens}"
            );
            assert!(plan.bytes_in(Tier::Vram) <= plan.vram_budget_bytes);
            assert!(plan.vram_budget_bytes - plan.bytes_in(Tier::Vram) < f.expert_bytes);
            assert_eq!(plan.check(&f), Ok(()));
        }
    }
}

#[test]
fn more_vram_never_predicts_slower() {
    let trace = synthetic(3, 16, 4, 6, 60);
    let mut stats = RoutingStats::new(3, 16, 4);
    trace.records().iter().for_each(|r| stats.push(r));
    let profile = stats.profile(BTreeSet::new());
    let f = small();
    let mut cpu_only = Hardware::laptop_4090();
    cpu_only.gpu = None;
    for hardware in [Hardware::laptop_4090(), Hardware::h100_box(), cpu_only] {
        for (routing, ram_budget_bytes) in [
            (RoutingSource::Unknown, None),
            (RoutingSource::Profile(&profile), None),
            (RoutingSource::Profile(&profile), Some(680_000_000)),
        ] {
            let (mut last, mut slots) = (0.0, 0);
            for n in 0..60 {
                let plan = plan(&PlanRequest {
                    vram_budget_bytes: 2_800_000_000 + n * f.expert_bytes,
                    ram_budget_bytes,
                    routing,
                    ..request(&f, &hardware)
                })
                .unwrap();
                assert!(plan.decode.tok_s >= last * (1.0 - 1e-9));
                last = plan.decode.tok_s;
                slots = plan.total_slots().max(slots);
            }
            assert!(slots > 30);
        }
    }
}

#[test]
fn what_does_not_fit_names_the_smallest_budget_that_does() {
    let (f, laptop) = (qwen3_next_80b(), Hardware::laptop_4090());
    let small = PlanRequest {
        vram_budget_bytes: 3 << 30,
        ctx_tokens: 128 << 10,
        ..request(&f, &laptop)
    };
    let error = plan(&small).unwrap_err();
    let PlanError::DoesNotFit {
        smallest_bytes,
        largest_ctx_tokens,
        ..
    } = error
    else {
        panic!("{error}");
    };
    let with = |vram_budget_bytes, ctx_tokens| {
        plan(&PlanRequest {
            vram_budget_bytes,
            ctx_tokens,
            ..small.clone()
        })
    };
    assert_eq!(with(smallest_bytes, 128 << 10).unwrap().total_slots(), 0);
    assert!(with(smallest_bytes - 1, 128 << 10).is_err());
    let ctx = largest_ctx_tokens.unwrap();
    assert!(with(3 << 30, ctx).is_ok() && with(3 << 30, ctx + 1).is_err());
    let message = with(1 << 30, 4096).unwrap_err().to_string();
    assert_eq!(
        message,
        "plan needs at least 2.4 GiB of GPU memory for 4k tokens of context, \
         the budget is 1.0 GiB; give --vram 2.44GiB or more"
    );
    assert!(with(3 << 30, u64::MAX).is_err());
}

#[test]
fn experts_beyond_the_ram_budget_are_on_disk_and_cost_time() {
    let (f, laptop) = (qwen3_next_80b(), Hardware::laptop_4090());
    let all = plan(&request(&f, &laptop)).unwrap();
    assert_eq!(
        all.bytes_in(Tier::Ram),
        f.embedding_bytes + f.experts_bytes()
    );
    let short = PlanRequest {
        ram_budget_bytes: Some(20 << 30),
        ..request(&f, &laptop)
    };
    let some = plan(&short).unwrap();
    assert!(some.bytes_in(Tier::Ram) <= 20 << 30 && some.bytes_in(Tier::Disk) > 18 << 30);
    assert!(some.decode.tok_s < all.decode.tok_s / 2.0);
    let none = PlanRequest {
        ram_budget_bytes: Some(1 << 20),
        ..short
    };
    assert!(matches!(plan(&none), Err(PlanError::RamDoesNotFit { .. })));
}

#[test]
fn a_trace_chooses_the_policy_and_validates_it_on_held_out_documents() {
    let trace = synthetic(3, 16, 4, 9, 90);
    let (f, laptop) = (small(), Hardware::laptop_4090());
    let smallest = smallest_bytes(&f, [1, 8192], KvDtype::F16, Tier::Vram);
    let plan = plan(&PlanRequest {
        vram_budget_bytes: smallest + f.experts_bytes() / 2,
        routing: RoutingSource::Trace(&trace),
        ..request(&f, &laptop)
    })
    .unwrap();
    let validation = plan.validation.as_ref().unwrap();
    assert_eq!(validation.held_out_documents, 3);
    assert_eq!(validation.held_out_tokens, 270);
    let rate = |name: &str| {
        validation
            .scores
            .iter()
            .find(|s| s.policy == name)
            .unwrap()
            .expert_hit_rate
    };
    let chosen = validation.scores.iter().find(|s| s.chosen).unwrap();
    assert_eq!(chosen.policy, plan.policy.label());
    let others = validation.scores.iter().filter(|s| s.policy != "belady");
    let best = others.map(|s| s.expert_hit_rate).fold(0.0, f64::max);
    assert!(best <= rate("belady") && rate("belady") < 1.0);
    assert!(chosen.expert_hit_rate > best - 0.02);
    let shares: Vec<usize> = validation
        .by_share
        .iter()
        .map(|s| s.slots_per_layer)
        .collect();
    assert_eq!(shares, [2, 4, 8]);
    let text = serde_json::to_string(&plan).unwrap();
    assert_eq!(serde_json::from_str::<Placement>(&text).unwrap(), plan);
}

/// To the byte: one less, and an expert less is held.
#[test]
fn experts_in_ram_are_what_the_budget_holds_beside_embedding_and_head() {
    let (f, laptop) = (qwen3_next_80b(), Hardware::laptop_4090());
    let on_disk_at = |heads: &[Tier], ram_budget_bytes| {
        let request = PlanRequest {
            ram_budget_bytes: Some(ram_budget_bytes),
            heads,
            ..request(&f, &laptop)
        };
        plan(&request).map(|plan| {
            assert!(plan.bytes_in(Tier::Ram) <= ram_budget_bytes);
            plan.bytes_in(Tier::Disk) / f.expert_bytes
        })
    };
    let all = f.total_experts() as u64;
    for (heads, fixed) in [
        (&[Tier::Vram][..], f.embedding_bytes),
        (&[Tier::Ram], f.embedding_bytes + f.lm_head_bytes),
        (
            &[Tier::Vram, Tier::Ram],
            f.embedding_bytes + f.lm_head_bytes,
        ),
    ] {
        for held in [10, 5000, all] {
            let budget = fixed + held * f.expert_bytes;
            assert_eq!(on_disk_at(heads, budget), Ok(all - held));
            assert_eq!(
                on_disk_at(heads, budget + f.expert_bytes - 1),
                Ok(all - held)
            );
        }
        // A token's ten experts of one layer must at least pass through.
        let smallest_bytes = fixed + 10 * f.expert_bytes;
        let budget_bytes = smallest_bytes - 1;
        let refused = PlanError::RamDoesNotFit {
            budget_bytes,
            smallest_bytes,
        };
        assert_eq!(on_disk_at(heads, budget_bytes), Err(refused));
    }
}

#[test]
fn the_memory_table_counts_every_byte_once() {
    let (f, laptop) = (qwen3_next_80b(), Hardware::laptop_4090());
    for (head, kv_dtype, kv_bytes_per_token) in [
        (Tier::Vram, KvDtype::F16, 24_576),
        (Tier::Ram, KvDtype::Int8, 13_056),
    ] {
        let plan = plan(&PlanRequest {
            kv_dtypes: &[kv_dtype],
            heads: &[head],
            ..request(&f, &laptop)
        })
        .unwrap();
        let slots = plan.total_slots() as u64 * f.expert_bytes;
        let head_in = |tier| if head == tier { f.lm_head_bytes } else { 0 };
        let vram = f.fixed_vram_bytes_without_head()
            + head_in(Tier::Vram)
            + 8192 * kv_bytes_per_token
            + slots;
        assert_eq!(plan.bytes_in(Tier::Vram), vram);
        let ram = f.embedding_bytes + f.experts_bytes() + head_in(Tier::Ram);
        assert_eq!(plan.bytes_in(Tier::Ram), ram);
        assert_eq!(plan.bytes_in(Tier::Disk), 0);
    }
}

#[test]
fn routing_of_another_model_is_refused() {
    let (f, laptop) = (qwen3_next_80b(), Hardware::laptop_4090());
    let profile = ProfileBody::new(3, 16, 4);
    let error = plan(&PlanRequest {
        routing: RoutingSource::Profile(&profile),
        ..request(&f, &laptop)
    })
    .unwrap_err();
    assert!(error.to_string().contains("[3, 16, 4]"), "{error}");
}

#[test]
fn a_machine_without_bandwidth_is_refused() {
    let f = qwen3_next_80b();
    let mut broken = Hardware::laptop_4090();
    broken.cpu.dram_read_gb_s.value = 0.0;
    let error = plan(&request(&f, &broken)).unwrap_err().to_string();
    assert!(
        error.contains("dram_read_gb_s is 0, expected a positive number"),
        "{error}"
    );
}

#[test]
fn a_placement_that_contradicts_itself_is_refused() {
    let (f, laptop) = (small(), Hardware::laptop_4090());
    let good = plan(&request(&f, &laptop)).unwrap();
    let broken = |experts: Vec<u16>, slots| {
        let mut bad = good.clone();
        bad.layers[1].slots = slots;
        bad.layers[1].initial_experts = experts;
        bad.check(&f).unwrap_err().to_string()
    };
    assert!(broken(vec![], 17).contains("17 slots for 16 experts"));
    assert!(broken(vec![1, 2], 1).contains("2 experts in 1 slots"));
    assert!(broken(vec![16], 4).contains("no expert 16"));
    assert!(broken(vec![3, 3], 4).contains("named twice"));
    assert!(good.check(&qwen3_next_80b()).is_err());
}

#[test]
fn alternatives_show_what_the_next_gib_is_worth() {
    let (f, laptop) = (qwen3_next_80b(), Hardware::laptop_4090());
    let planner = Planner::new(&request(&f, &laptop)).unwrap();
    let now = planner.plan().unwrap().decode.tok_s;
    let others = planner.explain();
    let point = |change: &str| {
        let other = others.iter().find(|a| a.change == change).unwrap();
        other.outcome.clone().unwrap()
    };
    assert!(point("one GiB more VRAM").decode_tok_s > now);
    assert!(point("one GiB less VRAM").decode_tok_s < now);
    assert!(point("int8 KV cache").decode_tok_s > now);
    assert!(point("lm_head in RAM").expert_slots > point("int8 KV cache").expert_slots);
    assert!(point("lm_head in RAM").decode_tok_s < now);
    assert_eq!(point("no expert in VRAM").expert_slots, 0);
}

#[test]
fn the_faster_of_the_choices_is_taken_and_what_only_fits_in_ram_goes_there() {
    let (f, laptop) = (qwen3_next_80b(), Hardware::laptop_4090());
    let free = PlanRequest {
        kv_dtypes: &[KvDtype::F16, KvDtype::Int8],
        heads: &[Tier::Vram, Tier::Ram],
        ..request(&f, &laptop)
    };
    let plan_at = |vram_budget_bytes| {
        let request = PlanRequest {
            vram_budget_bytes,
            ..free.clone()
        };
        plan(&request)
    };
    let roomy = plan_at(14 * GIB).unwrap();
    assert_eq!((roomy.kv_dtype, roomy.head), (KvDtype::Int8, Tier::Vram));
    let tight = plan_at(2_200_000_000).unwrap();
    assert_eq!(tight.head, Tier::Ram);
    let head = |p: &Placement| p.memory.iter().find(|i| i.component == "lm_head").cloned();
    assert_eq!(head(&tight).unwrap().tier, Tier::Ram);
    assert!(tight.bytes_in(Tier::Vram) <= tight.vram_budget_bytes);
    let PlanError::DoesNotFit { smallest_bytes, .. } = plan_at(1_000_000_000).unwrap_err() else {
        panic!("a gigabyte holds no 80B model");
    };
    assert!(plan_at(smallest_bytes).is_ok() && plan_at(smallest_bytes - 1).is_err());
}

#[test]
fn a_sweep_is_the_plans_of_its_budgets_and_never_falls() {
    let trace = synthetic(3, 16, 4, 9, 90);
    let (f, laptop) = (small(), Hardware::laptop_4090());
    for routing in [RoutingSource::Unknown, RoutingSource::Trace(&trace)] {
        let base = PlanRequest {
            routing,
            kv_dtypes: &[KvDtype::F16, KvDtype::Int8],
            heads: &[Tier::Vram, Tier::Ram],
            ..request(&f, &laptop)
        };
        let planner = Planner::new(&base).unwrap();
        let budgets: Vec<u64> = (0..40)
            .map(|i| 2_600_000_000 + i * f.expert_bytes * 2)
            .collect();
        let points = planner.sweep(budgets);
        assert!(points.len() > 30);
        for pair in points.windows(2) {
            assert!(pair[1].decode_tok_s >= pair[0].decode_tok_s * (1.0 - 1e-9));
        }
        for point in points.iter().step_by(7) {
            let alone = plan(&PlanRequest {
                vram_budget_bytes: point.vram_budget_bytes,
                ..base.clone()
            })
            .unwrap();
            assert_eq!(alone.decode.tok_s, point.decode_tok_s);
            assert_eq!(alone.total_slots(), point.expert_slots);
        }
    }
}

#[test]
fn a_plan_holds_the_curve_of_its_surroundings() {
    let (f, laptop) = (qwen3_next_80b(), Hardware::laptop_4090());
    let plan = plan(&request(&f, &laptop)).unwrap();
    let curve = &plan.budget_curve;
    assert!(curve.len() >= 24);
    let own = curve
        .iter()
        .find(|p| p.vram_budget_bytes == plan.vram_budget_bytes);
    assert_eq!(own.unwrap().decode_tok_s, plan.decode.tok_s);
    assert!(curve.is_sorted_by(|a, b| a.vram_budget_bytes < b.vram_budget_bytes));
    assert_eq!(curve[0].expert_slots, 0);
}

#[test]
fn the_run_time_cache_hits_exactly_as_often_as_the_plan_simulated() {
    let trace = synthetic(3, 16, 4, 9, 90);
    let (f, laptop) = (small(), Hardware::laptop_4090());
    let smallest = smallest_bytes(&f, [1, 8192], KvDtype::F16, Tier::Vram);
    let plan = plan(&PlanRequest {
        vram_budget_bytes: smallest + f.experts_bytes() / 2,
        routing: RoutingSource::Trace(&trace),
        ..request(&f, &laptop)
    })
    .unwrap();
    // What an engine does with a placement, on the held-out documents.
    let mut cache = plan.cache();
    for document in trace.documents().into_iter().skip(2).step_by(3) {
        cache.begin_sequence();
        for record in document {
            if let crate::planning::Record::Picks(p) = record {
                for ids in p.topk_ids.chunks_exact(4) {
                    cache.on_step(p.layer.into(), ids);
                }
            }
        }
    }
    let sum = |count: fn(&crate::planning::LayerCounts) -> u64| -> u64 {
        cache.counts().iter().map(count).sum()
    };
    let (hits, misses) = (sum(|c| c.hits), sum(|c| c.misses));
    let scores = &plan.validation.as_ref().unwrap().scores;
    let chosen = scores.iter().find(|s| s.chosen).unwrap();
    assert_eq!(chosen.expert_hit_rate, hits as f64 / (hits + misses) as f64);
}

#[test]
fn the_first_slots_are_left_empty_rather_than_predict_slower() {
    let (f, laptop) = (qwen3_next_80b(), Hardware::laptop_4090());
    let base = request(&f, &laptop);
    let planner = Planner::new(&base).unwrap();
    let smallest = smallest_bytes(&f, [1, base.ctx_tokens], KvDtype::F16, Tier::Vram);
    for step in [1, 13, 480] {
        let budgets = (0..100).map(|i| smallest + i * step * f.expert_bytes);
        let points = planner.sweep(budgets);
        assert_eq!(points.len(), 100);
        for pair in points.windows(2) {
            let [less, more] = [&pair[0], &pair[1]].map(|p| p.decode_tok_s);
            assert!(more >= less * (1.0 - 1e-12), "{pair:?}");
        }
    }
}

#[test]
fn with_room_for_all_experts_a_gpu_holds_them_all_and_hands_nothing_over() {
    let f = qwen3_next_80b();
    let trace = synthetic(3, 16, 4, 9, 90);
    for (hardware, gib) in [(Hardware::laptop_4090(), 48), (Hardware::h100_box(), 80)] {
        let request = PlanRequest {
            vram_budget_bytes: gib * GIB,
            ..request(&f, &hardware)
        };
        let plan = plan(&request).unwrap();
        assert_eq!(plan.total_slots(), f.total_experts(), "{gib}");
        let term = |name: &str| {
            plan.decode
                .terms
                .iter()
                .find(|t| t.name == name)
                .unwrap()
                .ms
        };
        assert_eq!(term("handoffs"), 0.0);
        // One expert less is predicted slower: each layer waits for the CPU again.
        let planner = Planner::new(&request).unwrap();
        let almost = planner.sweep([gib * GIB, plan.bytes_in(Tier::Vram) - f.expert_bytes]);
        assert!(
            almost[0].decode_tok_s > almost[1].decode_tok_s,
            "{almost:?}"
        );
    }
    // A trace's curve may end below 1; what is there is there.
    let (f, h100) = (small(), Hardware::h100_box());
    let small = plan(&PlanRequest {
        vram_budget_bytes: 80 * GIB,
        routing: RoutingSource::Trace(&trace),
        ..request(&f, &h100)
    });
    assert_eq!(small.unwrap().total_slots(), f.total_experts());
}

#[test]
fn sequences_beside_the_first_are_a_row_and_take_expert_slots() {
    let (f, laptop) = (qwen3_next_80b(), Hardware::laptop_4090());
    let of = |sequences, vram_budget_bytes| {
        plan(&PlanRequest {
            sequences,
            vram_budget_bytes,
            ctx_tokens: 32 << 10,
            ..request(&f, &laptop)
        })
    };
    let [one, four] = [1, 4].map(|n| of(n, 14_000_000_000).unwrap());
    assert_eq!((one.sequences, four.sequences), (1, 4));
    let others = |placement: &Placement| {
        let mut rows = placement.memory.iter();
        let row = rows.find(|item| item.component == "other sequences");
        row.map(|item| item.bytes)
    };
    // 24 KiB of keys and values a token, and 79 MiB of states each.
    let each = f.sequence_bytes(32 << 10, KvDtype::F16);
    assert_eq!((others(&one), others(&four)), (None, Some(3 * each)));
    let fewer = (3 * each).div_ceil(f.expert_bytes) as usize;
    let gone = one.total_slots() - four.total_slots();
    assert!((fewer - 1..=fewer).contains(&gone), "{gone} of {fewer}");
    assert!(four.bytes_in(Tier::Vram) <= 14_000_000_000);
    assert!(four.decode.tok_s < one.decode.tok_s);

    let PlanError::DoesNotFit {
        smallest_bytes,
        largest_ctx_tokens,
        ..
    } = of(4, 3_500_000_000).unwrap_err()
    else {
        panic!()
    };
    assert!(of(4, smallest_bytes).is_ok() && of(4, smallest_bytes - 1).is_err());
    let fits = plan(&PlanRequest {
        sequences: 4,
        vram_budget_bytes: 3_500_000_000,
        ctx_tokens: largest_ctx_tokens.unwrap(),
        ..request(&f, &laptop)
    });
    assert!(fits.is_ok());
}
