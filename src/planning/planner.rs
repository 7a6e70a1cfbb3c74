//! Budget, model, machine and hit curves to a placement.
//!
//! Dense weights, KV cache, states and workspace come first; the rest of the VRAM is divided into
//! expert slots by a knapsack over the layers' predicted times.

use thiserror::Error;

use super::cost::{self, DecodeSituation};
use super::footprint::{Footprint, KvDtype};
use super::hardware::{Hardware, HardwareError};
use super::knapsack::choose;
use super::placement::{CurveSource, MemoryItem, Placement, Tier};
use super::profile::{ProfileBody, ProfileError};
use super::stack_distance::HitCurve;
use super::stats::RoutingStats;
use super::trace::RoutingTrace;
use super::units::{GIB, show_budget, show_bytes, show_tokens};
use super::validation::{CANDIDATES, Split};

/// Tokens that prefill works on at a time, if the prompt has as many.
const PREFILL_CHUNK_TOKENS: u64 = 8192;
/// Whole-layer buffers that prefill borrows from the slots while it streams.
const PREFILL_LAYER_BUFFERS: usize = 2;

/// What is known about the model's routing.
#[derive(Clone, Copy, Debug)]
pub enum RoutingSource<'a> {
    Unknown,
    Profile(&'a ProfileBody),
    /// Slots from one part of its documents, the policy by another, validation on the rest; with
    /// fewer than three documents the policy is LRU and there is no validation.
    Trace(&'a RoutingTrace),
}

#[derive(Clone, Debug)]
pub struct PlanRequest<'a> {
    pub footprint: &'a Footprint,
    pub hardware: &'a Hardware,
    pub vram_budget_bytes: u64,
    /// None: RAM holds all experts.
    pub ram_budget_bytes: Option<u64>,
    pub ctx_tokens: u64,
    pub kv_dtype: KvDtype,
    pub routing: RoutingSource<'a>,
}

#[derive(Clone, Debug, Error, PartialEq)]
pub enum PlanError {
    #[error(
        "plan needs at least {} of GPU memory for {} tokens of context, the budget is {}; \
         give --vram {} or more{}",
        show_bytes(*.smallest_bytes), show_tokens(*.ctx_tokens), show_bytes(*.budget_bytes),
        show_budget(*.smallest_bytes), shorter(*.largest_ctx_tokens)
    )]
    DoesNotFit {
        budget_bytes: u64,
        ctx_tokens: u64,
        /// The smallest budget that holds this context, without a single expert slot.
        smallest_bytes: u64,
        /// The longest context that fits the budget; none if the dense part alone does not.
        largest_ctx_tokens: Option<u64>,
    },
    #[error(
        "plan needs at least {} of RAM, the budget is {}; give --ram {} or more",
        show_bytes(*.smallest_bytes), show_bytes(*.budget_bytes), show_budget(*.smallest_bytes)
    )]
    RamDoesNotFit {
        budget_bytes: u64,
        smallest_bytes: u64,
    },
    #[error(
        "{source_name} is of a model with {found:?} layers, experts and experts per token, \
         this one has {expected:?}; record it with this model"
    )]
    OtherModel {
        source_name: &'static str,
        found: [usize; 3],
        expected: [usize; 3],
    },
    #[error(transparent)]
    Profile(#[from] ProfileError),
    #[error(transparent)]
    Hardware(#[from] HardwareError),
}

fn shorter(largest_ctx_tokens: Option<u64>) -> String {
    largest_ctx_tokens.map_or(String::new(), |t| format!(", or --ctx {t} or less"))
}

/// Makes the plan.
///
/// With curves from a profile, or none, more VRAM never predicts slower; the choice among policies
/// that a trace allows is made by measurement and promises nothing.
///
/// # Errors
/// If the budget cannot hold what must be in VRAM or RAM, or the routing is of another model.
pub fn plan(request: &PlanRequest) -> Result<Placement, PlanError> {
    let f = request.footprint;
    request.hardware.check()?;
    let (curves, hottest, curves_from, split) = routing(request)?;
    let kv_bytes = request
        .ctx_tokens
        .saturating_mul(f.kv_bytes_per_token(request.kv_dtype));
    let slot_budget = slot_budget_bytes(request, kv_bytes)?;
    let capacity = (slot_budget / f.expert_bytes.max(1)).min(f.total_experts() as u64) as usize;

    let in_ram = experts_in_ram(request)?;
    let disk_share = 1.0 - in_ram as f64 / f.total_experts().max(1) as f64;

    let costs: Vec<Vec<f64>> = curves
        .iter()
        .map(|c| layer_costs(request, c, disk_share))
        .collect();
    let (slots, solution) = choose(&costs, capacity);

    let mut policy = CANDIDATES[0];
    let mut hit_rates: Vec<f64> = curves
        .iter()
        .zip(&slots)
        .map(|(c, &n)| c.hit_rate(n))
        .collect();
    let mut validation = None;
    if let Some(split) = split {
        let selection = split.score(f, &slots, &hottest, &split.selection);
        let best = selection
            .iter()
            .enumerate()
            .reduce(|a, b| if b.1.hits() > a.1.hits() { b } else { a });
        let (index, outcome) = best.expect("there are candidates");
        policy = CANDIDATES[index];
        if index > 0 {
            hit_rates = outcome.layers.iter().map(|l| l.hit_rate()).collect();
            hit_rates.resize(f.num_layers, 0.0);
        }
        validation = Some(split.validate(f, &slots, &hottest, index));
    }

    let memory = memory_table(f, kv_bytes, slots.iter().sum(), in_ram);
    let situation = DecodeSituation {
        ctx_tokens: request.ctx_tokens,
        kv_dtype: request.kv_dtype,
        hit_rates: &hit_rates,
        disk_share,
    };
    let kept = slots
        .iter()
        .sum::<usize>()
        .saturating_sub(PREFILL_LAYER_BUFFERS * f.num_experts);
    let fill = |(&n, hottest): (&usize, &Vec<u16>)| policy.fill(n, hottest);
    Ok(Placement {
        vram_budget_bytes: request.vram_budget_bytes,
        ram_budget_bytes: request.ram_budget_bytes,
        ctx_tokens: request.ctx_tokens,
        kv_dtype: request.kv_dtype,
        expert_bytes: f.expert_bytes,
        num_experts: f.num_experts,
        memory,
        policy,
        layers: slots.iter().zip(&hottest).map(fill).collect(),
        curves_from,
        solution,
        hardware: request.hardware.label.clone(),
        hardware_basis: request.hardware.basis,
        decode: cost::decode(f, request.hardware, &situation),
        prefill: cost::prefill(
            f,
            request.hardware,
            request.ctx_tokens,
            PREFILL_CHUNK_TOKENS.min(request.ctx_tokens.max(1)),
            kept as f64 / f.total_experts().max(1) as f64,
        ),
        expected_hit_rates: hit_rates,
        validation,
    })
}

/// What else could be done with the money.
#[derive(Clone, Debug, PartialEq)]
pub struct Alternative {
    pub change: String,
    /// Its plan; none if that would not fit.
    pub plan: Option<Placement>,
}

/// Plans for the neighbouring choices: one GiB more and less, the other KV type, half and twice
/// the context, and no expert in VRAM.
pub fn explain(request: &PlanRequest) -> Vec<Alternative> {
    let f = request.footprint;
    let kv_bytes = request
        .ctx_tokens
        .saturating_mul(f.kv_bytes_per_token(request.kv_dtype));
    let smallest = f.fixed_vram_bytes().saturating_add(kv_bytes);
    let other_kv = match request.kv_dtype {
        KvDtype::Bf16 => (KvDtype::Int8, "int8 KV cache"),
        KvDtype::Int8 => (KvDtype::Bf16, "bf16 KV cache"),
    };
    let with = |change: &str, edit: &dyn Fn(&mut PlanRequest)| {
        let mut changed = request.clone();
        edit(&mut changed);
        Alternative {
            change: change.into(),
            plan: plan(&changed).ok(),
        }
    };
    let ctx = request.ctx_tokens;
    vec![
        with("one GiB more VRAM", &|r| {
            r.vram_budget_bytes = r.vram_budget_bytes.saturating_add(GIB);
        }),
        with("one GiB less VRAM", &|r| {
            r.vram_budget_bytes = r.vram_budget_bytes.saturating_sub(GIB);
        }),
        with(other_kv.1, &|r| r.kv_dtype = other_kv.0),
        with(&format!("context {}", show_tokens(ctx / 2)), &|r| {
            r.ctx_tokens = ctx / 2
        }),
        with(
            &format!("context {}", show_tokens(ctx.saturating_mul(2))),
            &|r| r.ctx_tokens = ctx.saturating_mul(2),
        ),
        with("no expert in VRAM", &|r| r.vram_budget_bytes = smallest),
    ]
}

/// Bytes left for slots once everything that must be in VRAM is there.
fn slot_budget_bytes(request: &PlanRequest, kv_bytes: u64) -> Result<u64, PlanError> {
    let f = request.footprint;
    let fixed = f.fixed_vram_bytes();
    let budget = request.vram_budget_bytes;
    let smallest_bytes = fixed.saturating_add(kv_bytes);
    budget.checked_sub(smallest_bytes).ok_or_else(|| {
        let for_kv = budget.checked_sub(fixed);
        let per_token = f.kv_bytes_per_token(request.kv_dtype).max(1);
        PlanError::DoesNotFit {
            budget_bytes: budget,
            ctx_tokens: request.ctx_tokens,
            smallest_bytes,
            largest_ctx_tokens: for_kv.map(|bytes| bytes / per_token).filter(|&t| t > 0),
        }
    })
}

/// Time of a layer's experts by its slots; misses alone where no GPU would make use of hits.
fn layer_costs(request: &PlanRequest, curve: &HitCurve, disk_share: f64) -> Vec<f64> {
    let (f, hardware) = (request.footprint, request.hardware);
    let cost = |&hit_rate: &f64| match hardware.gpu {
        Some(_) => {
            cost::expert_layer_ms(f, hardware, hit_rate)
                + cost::disk_layer_ms(f, hardware, hit_rate, disk_share)
        }
        None => 1.0 - hit_rate,
    };
    curve.as_slice().iter().map(cost).collect()
}

/// How many experts the RAM budget holds beside the embedding.
fn experts_in_ram(request: &PlanRequest) -> Result<u64, PlanError> {
    let f = request.footprint;
    let all = f.total_experts() as u64;
    let Some(budget_bytes) = request.ram_budget_bytes else {
        return Ok(all);
    };
    // A token's experts of one layer must at least pass through.
    let smallest_bytes = f.embedding_bytes + f.num_experts_per_tok as u64 * f.expert_bytes;
    if budget_bytes < smallest_bytes {
        return Err(PlanError::RamDoesNotFit {
            budget_bytes,
            smallest_bytes,
        });
    }
    Ok(all.min((budget_bytes - f.embedding_bytes) / f.expert_bytes.max(1)))
}

/// Every byte by component and tier.
fn memory_table(f: &Footprint, kv_bytes: u64, slots: usize, in_ram: u64) -> Vec<MemoryItem> {
    let item = |component: &str, tier, bytes| MemoryItem {
        component: component.into(),
        tier,
        bytes,
    };
    let on_disk = f.total_experts() as u64 - in_ram;
    let mut memory = vec![
        item("dense weights", Tier::Vram, f.dense_bytes),
        item("router", Tier::Vram, f.router_bytes),
        item("lm_head", Tier::Vram, f.lm_head_bytes),
        item("kv cache", Tier::Vram, kv_bytes),
        item("delta-net state", Tier::Vram, f.delta_state_bytes),
        item("conv state", Tier::Vram, f.conv_state_bytes),
        item("CUDA context", Tier::Vram, f.context_bytes),
        item("workspace", Tier::Vram, f.workspace_bytes),
        item("expert slots", Tier::Vram, slots as u64 * f.expert_bytes),
        item("embedding", Tier::Ram, f.embedding_bytes),
        item("experts", Tier::Ram, in_ram * f.expert_bytes),
    ];
    if on_disk > 0 {
        memory.push(item("experts", Tier::Disk, on_disk * f.expert_bytes));
    }
    memory
}

type KnownRouting<'a> = (Vec<HitCurve>, Vec<Vec<u16>>, CurveSource, Option<Split<'a>>);

/// Hit curves and hottest experts per layer; with a long enough trace, what is held out of it.
fn routing<'a>(request: &PlanRequest<'a>) -> Result<KnownRouting<'a>, PlanError> {
    let f = request.footprint;
    let expected = [f.num_layers, f.num_experts, f.num_experts_per_tok];
    let check = |source_name, found: [usize; 3]| match found == expected {
        true => Ok(()),
        false => Err(PlanError::OtherModel {
            source_name,
            found,
            expected,
        }),
    };
    let of_profile = |profile: &ProfileBody| {
        let hottest = (0..f.num_layers).map(|l| profile.hottest(l)).collect();
        (profile.hit_curves(), hottest)
    };
    match request.routing {
        RoutingSource::Unknown => {
            let curves = vec![HitCurve::uniform(f.num_experts); f.num_layers];
            let nothing = vec![Vec::new(); f.num_layers];
            Ok((curves, nothing, CurveSource::Uniform, None))
        }
        RoutingSource::Profile(profile) => {
            let p = profile;
            check(
                "the profile",
                [p.num_layers, p.num_experts, p.num_experts_per_tok],
            )?;
            profile.check()?;
            let (curves, hottest) = of_profile(profile);
            Ok((curves, hottest, CurveSource::Profile, None))
        }
        RoutingSource::Trace(trace) => {
            let h = trace.header();
            check(
                "the trace",
                [h.num_layers, h.num_experts, h.num_experts_per_tok].map(usize::from),
            )?;
            let split = Split::of(trace);
            let mut stats = RoutingStats::new(f.num_layers, f.num_experts, f.num_experts_per_tok);
            let training = split
                .as_ref()
                .map_or(trace.documents(), |s| s.training.clone());
            training.into_iter().flatten().for_each(|r| stats.push(r));
            let (curves, hottest) = of_profile(&stats.profile(Default::default()));
            Ok((curves, hottest, CurveSource::Trace, split))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::footprint::tests::qwen3_next_80b;
    use super::super::trace::tests::synthetic;
    use super::*;

    fn request<'a>(footprint: &'a Footprint, hardware: &'a Hardware) -> PlanRequest<'a> {
        PlanRequest {
            footprint,
            hardware,
            vram_budget_bytes: 14_000_000_000,
            ram_budget_bytes: None,
            ctx_tokens: 8192,
            kv_dtype: KvDtype::Bf16,
            routing: RoutingSource::Unknown,
        }
    }

    /// A small model that a synthetic trace of 3 layers, 16 experts and k = 4 belongs to.
    fn small() -> Footprint {
        Footprint {
            num_layers: 3,
            num_experts: 16,
            num_experts_per_tok: 4,
            ..qwen3_next_80b()
        }
    }

    #[test]
    fn slots_per_layer_at_14_gb_are_those_of_the_published_layout() {
        let (f, laptop) = (qwen3_next_80b(), Hardware::laptop_4090());
        for (ctx_tokens, bf16, int8) in [
            (8 << 10, 141, 142),
            (32 << 10, 133, 138),
            (128 << 10, 103, 122),
            (256 << 10, 63, 101),
        ] {
            for (kv_dtype, expected) in [(KvDtype::Bf16, bf16), (KvDtype::Int8, int8)] {
                let plan = plan(&PlanRequest {
                    ctx_tokens,
                    kv_dtype,
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
             the budget is 1.0 GiB; give --vram 2.43GiB or more"
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
        let plan = plan(&PlanRequest {
            vram_budget_bytes: 2_800_000_000,
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
        let best = ["lru", "lfu_decay", "static"]
            .map(rate)
            .into_iter()
            .fold(0.0, f64::max);
        assert!(best <= rate("belady") && rate("belady") < 1.0);
        let chosen = validation.scores.iter().find(|s| s.chosen).unwrap();
        assert_eq!(chosen.policy, plan.policy.name());
        assert!(chosen.expert_hit_rate > best - 0.02);
        let text = serde_json::to_string(&plan).unwrap();
        assert_eq!(serde_json::from_str::<Placement>(&text).unwrap(), plan);
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
        broken.cpu.dram_read_gb_s = 0.0;
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
        let base = request(&f, &laptop);
        let now = plan(&base).unwrap().decode.tok_s;
        let others = explain(&base);
        let speed = |i: usize| others[i].plan.as_ref().unwrap().decode.tok_s;
        assert!(speed(0) > now && speed(1) < now && speed(2) > now);
        assert_eq!(others[5].plan.as_ref().unwrap().total_slots(), 0);
    }
}
