//! Budget, model, machine and hit curves to a placement.
//!
//! Dense weights, KV cache, states and workspace come first; the rest of the VRAM is divided into
//! expert slots by a knapsack over the layers' predicted times. One solution of it serves every
//! budget, so the choices beside it (type of the KV cache, place of the output matrix) are simply
//! all tried.

mod alternatives;
mod fitted;

use thiserror::Error;

use super::cost::{self, DecodePrediction, DecodeSituation, PrefillPrediction, PrefillSituation};
use super::execution::PrefillSettings;
use super::footprint::{Footprint, KvDtype};
use super::hardware::{Hardware, HardwareError};
use super::knapsack::{Solved, solve};
use super::placement::{BudgetPoint, CurveSource, MemoryItem, Placement, Tier};
use super::policy::PolicyConfig;
use super::profile::{ProfileBody, ProfileError};
use super::stack_distance::HitCurve;
use super::trace::RoutingTrace;
use super::units::{show_budget, show_bytes, show_tokens};

pub use alternatives::Alternative;

use fitted::{Fitted, fit};

/// What is known about the model's routing.
#[derive(Clone, Copy, Debug)]
pub enum RoutingSource<'a> {
    Unknown,
    Profile(&'a ProfileBody),
    /// Slots from one part of its documents, the policy by another, validation on the rest; with
    /// fewer than three documents the policy is the default and there is no validation.
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
    /// Sequences in VRAM at once, of `ctx_tokens` each; at least one.
    pub sequences: u64,
    /// Types of the KV cache to choose among; at least one.
    pub kv_dtypes: &'a [KvDtype],
    /// Places of the output matrix to choose among; at least one.
    pub heads: &'a [Tier],
    /// None: the best of all candidates on the trace, or the default.
    pub policy: Option<PolicyConfig>,
    pub routing: RoutingSource<'a>,
    pub prefill: PrefillSettings,
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
/// More VRAM never predicts slower decoding.
///
/// # Errors
/// If the budget cannot hold what must be in VRAM or RAM, or the routing is of another model.
pub fn plan(request: &PlanRequest) -> Result<Placement, PlanError> {
    Planner::new(request)?.plan()
}

/// All that does not depend on the VRAM budget, worked out once.
pub struct Planner<'a> {
    request: PlanRequest<'a>,
    fitted: Fitted<'a>,
    solved: Solved,
    /// `[capacity + 1]` how many of so many slots to use. Copies cost time of their own, and a few
    /// slots may bring less than their content costs.
    useful: Vec<usize>,
    in_ram: u64,
    disk_share: f64,
}

/// What may be asked of a planner.
#[derive(Clone, Debug)]
struct Budget {
    vram_bytes: u64,
    ctx_tokens: u64,
    sequences: u64,
    kv_dtypes: Vec<KvDtype>,
    heads: Vec<Tier>,
    /// Slots at most, whatever the memory.
    most_slots: usize,
}

/// An answer, before its bytes are itemised.
struct Choice {
    kv_dtype: KvDtype,
    head: Tier,
    slots: Vec<usize>,
    hit_rates: Vec<f64>,
    decode: DecodePrediction,
}

impl<'a> Planner<'a> {
    /// # Errors
    /// If RAM cannot hold what it must, the machine is none, or the routing is of another model.
    pub fn new(request: &PlanRequest<'a>) -> Result<Self, PlanError> {
        assert!(!request.kv_dtypes.is_empty() && !request.heads.is_empty());
        assert!(request.sequences > 0);
        let f = request.footprint;
        request.hardware.check()?;
        let fitted = fit(request)?;
        let in_ram = experts_in_ram(request)?;
        let disk_share = 1.0 - in_ram as f64 / f.total_experts().max(1) as f64;
        let costs: Vec<Vec<f64>> = fitted
            .curves
            .iter()
            .map(|c| layer_costs(request, c, disk_share))
            .collect();
        let solved = solve(&costs, f.total_experts());
        Ok(Planner {
            useful: useful(request, &fitted, &costs, &solved),
            solved,
            request: request.clone(),
            fitted,
            in_ram,
            disk_share,
        })
    }

    /// # Errors
    /// If the budget cannot hold what must be in VRAM.
    pub fn plan(&self) -> Result<Placement, PlanError> {
        let request = &self.request;
        let (f, fitted) = (request.footprint, &self.fitted);
        let choice = self.choose(&self.budget())?;
        let kv_bytes = request
            .ctx_tokens
            .saturating_mul(f.kv_bytes_per_token(choice.kv_dtype));
        let others = (request.sequences - 1)
            .saturating_mul(f.sequence_bytes(request.ctx_tokens, choice.kv_dtype));
        let fill = |(&n, hottest): (&usize, &Vec<u16>)| fitted.policy.fill(n, hottest);
        let validation = fitted.split.as_ref().map(|split| {
            split.validate(
                f,
                &choice.slots,
                &fitted.hottest,
                fitted.policy,
                fitted.throttle,
                &|outcome| {
                    let gpu = request.hardware.gpu.is_some();
                    gpu.then(|| fitted::time_of(request, outcome))
                },
            )
        });
        let slots = choice.slots.iter().sum();
        Ok(Placement {
            vram_budget_bytes: request.vram_budget_bytes,
            ram_budget_bytes: request.ram_budget_bytes,
            ctx_tokens: request.ctx_tokens,
            kv_dtype: choice.kv_dtype,
            head: choice.head,
            expert_bytes: f.expert_bytes,
            num_experts: f.num_experts,
            sequences: request.sequences,
            memory: memory_table(f, kv_bytes, others, choice.head, slots, self.in_ram),
            policy: fitted.policy,
            throttle: fitted.throttle,
            layers: choice.slots.iter().zip(&fitted.hottest).map(fill).collect(),
            curves_from: fitted.from,
            solution: self.solved.solution,
            hardware: request.hardware.label.clone(),
            hardware_basis: request.hardware.basis(),
            prefill: self.prefill(request.ctx_tokens, slots),
            expected_hit_rates: choice.hit_rates,
            decode: choice.decode,
            budget_curve: self.budget_curve(),
            validation,
        })
    }

    /// The budget of the request.
    fn budget(&self) -> Budget {
        Budget {
            vram_bytes: self.request.vram_budget_bytes,
            ctx_tokens: self.request.ctx_tokens,
            sequences: self.request.sequences,
            kv_dtypes: self.request.kv_dtypes.to_vec(),
            heads: self.request.heads.to_vec(),
            most_slots: self.request.footprint.total_experts(),
        }
    }

    /// The fastest of the choices that fit.
    fn choose(&self, budget: &Budget) -> Result<Choice, PlanError> {
        let mut best: Option<Choice> = None;
        for &kv_dtype in &budget.kv_dtypes {
            for &head in &budget.heads {
                if let Some(choice) = self.with(budget, kv_dtype, head)
                    && best
                        .as_ref()
                        .is_none_or(|b| choice.decode.total_ms < b.decode.total_ms)
                {
                    best = Some(choice);
                }
            }
        }
        best.ok_or_else(|| self.does_not_fit(budget))
    }

    fn with(&self, budget: &Budget, kv_dtype: KvDtype, head: Tier) -> Option<Choice> {
        let f = self.request.footprint;
        let contexts = [budget.sequences, budget.ctx_tokens];
        let free = (budget.vram_bytes).checked_sub(smallest_bytes(f, contexts, kv_dtype, head))?;
        let capacity = (free / f.expert_bytes.max(1)).min(budget.most_slots as u64) as usize;
        let choice = self.decoded(
            budget,
            kv_dtype,
            head,
            self.solved.slots(self.useful[capacity]),
        );
        if capacity < f.total_experts() {
            return Some(choice);
        }
        // With the last expert in VRAM all hand-offs vanish at once, which no layer's cost knows of.
        let all = vec![f.num_experts; f.num_layers];
        let all = self.decoded(budget, kv_dtype, head, all);
        Some(match all.decode.total_ms <= choice.decode.total_ms {
            true => all,
            false => choice,
        })
    }

    /// The prediction for these slots per layer.
    fn decoded(&self, budget: &Budget, kv_dtype: KvDtype, head: Tier, slots: Vec<usize>) -> Choice {
        let f = self.request.footprint;
        let each = || slots.iter().enumerate();
        let hit_rate = |(layer, &n): (usize, &usize)| match n == f.num_experts {
            true => 1.0,
            false => self.fitted.curves[layer].hit_rate(n),
        };
        let hit_rates: Vec<f64> = each().map(hit_rate).collect();
        // Where an expert is there is nothing to copy.
        let admits = |(layer, &n): (usize, &usize)| match n == f.num_experts {
            true => 0.0,
            false => self.fitted.admits[layer][n],
        };
        let promotions_per_token = each().map(admits).sum();
        let decode = cost::decode(
            f,
            self.request.hardware,
            &DecodeSituation {
                ctx_tokens: budget.ctx_tokens,
                kv_dtype,
                head,
                hit_rates: &hit_rates,
                promotions_per_token,
                disk_share: self.disk_share,
            },
        );
        Choice {
            kv_dtype,
            head,
            slots,
            hit_rates,
            decode,
        }
    }

    fn prefill(&self, prompt_tokens: u64, slots: usize) -> PrefillPrediction {
        let at = PrefillSituation {
            prompt_tokens,
            slots,
            settings: self.request.prefill,
        };
        cost::prefill(self.request.footprint, self.request.hardware, at)
    }

    fn does_not_fit(&self, budget: &Budget) -> PlanError {
        let f = self.request.footprint;
        let choices = || {
            let heads = |kv: KvDtype| budget.heads.iter().map(move |&head| (kv, head));
            budget.kv_dtypes.iter().flat_map(move |&kv| heads(kv))
        };
        let needs = |tokens, kv, head| smallest_bytes(f, [budget.sequences, tokens], kv, head);
        let smallest = choices().map(|(kv, head)| needs(budget.ctx_tokens, kv, head));
        let longest = choices().filter_map(|(kv, head)| {
            let for_kv = budget.vram_bytes.checked_sub(needs(0, kv, head))?;
            let token_bytes = budget.sequences * f.kv_bytes_per_token(kv);
            let tokens = for_kv / token_bytes.max(1);
            (tokens > 0).then_some(tokens)
        });
        PlanError::DoesNotFit {
            budget_bytes: budget.vram_bytes,
            ctx_tokens: budget.ctx_tokens,
            smallest_bytes: smallest.min().expect("there are choices"),
            largest_ctx_tokens: longest.max(),
        }
    }
}

/// Bytes without a single expert slot; the first sequence's states are among what is fixed.
fn smallest_bytes(
    f: &Footprint,
    [sequences, ctx_tokens]: [u64; 2],
    kv_dtype: KvDtype,
    head: Tier,
) -> u64 {
    let fixed = match head {
        Tier::Vram => f.fixed_vram_bytes(),
        Tier::Ram | Tier::Disk => f.fixed_vram_bytes_without_head(),
    };
    let kv_bytes = ctx_tokens.saturating_mul(f.kv_bytes_per_token(kv_dtype));
    let others = (sequences - 1).saturating_mul(f.sequence_bytes(ctx_tokens, kv_dtype));
    fixed.saturating_add(kv_bytes).saturating_add(others)
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

/// For every capacity the one, of it and all smaller ones, that takes the least time with what is
/// copied into the slots counted in: so more memory never predicts slower.
fn useful(
    request: &PlanRequest,
    fitted: &Fitted,
    costs: &[Vec<f64>],
    solved: &Solved,
) -> Vec<usize> {
    let f = request.footprint;
    let copy_ms = match request.hardware.gpu {
        Some(_) => f.expert_bytes as f64 / (request.hardware.cpu.dram_read_gb_s.value * 1e6),
        None => 0.0,
    };
    let mut best = (0, f64::INFINITY);
    let mut useful = Vec::with_capacity(f.total_experts() + 1);
    solved.for_each(f.total_experts(), |slots| {
        let layer = |(l, &n): (usize, &usize)| costs[l][n] + fitted.admits[l][n] * copy_ms;
        let time: f64 = slots.iter().enumerate().map(layer).sum();
        if time < best.1 {
            best = (useful.len(), time);
        }
        useful.push(best.0);
    });
    useful
}

/// How many experts the RAM budget holds beside the embedding.
fn experts_in_ram(request: &PlanRequest) -> Result<u64, PlanError> {
    let f = request.footprint;
    let all = f.total_experts() as u64;
    let Some(budget_bytes) = request.ram_budget_bytes else {
        return Ok(all);
    };
    let head_bytes = match request.heads.contains(&Tier::Ram) {
        true => f.lm_head_bytes,
        false => 0,
    };
    let fixed = f.embedding_bytes + head_bytes;
    // A token's experts of one layer must at least pass through.
    let smallest_bytes = fixed + f.num_experts_per_tok as u64 * f.expert_bytes;
    if budget_bytes < smallest_bytes {
        return Err(PlanError::RamDoesNotFit {
            budget_bytes,
            smallest_bytes,
        });
    }
    Ok(all.min((budget_bytes - fixed) / f.expert_bytes.max(1)))
}

/// Every byte by component and tier; `others`: of the sequences beside the first.
fn memory_table(
    f: &Footprint,
    kv_bytes: u64,
    others: u64,
    head: Tier,
    slots: usize,
    in_ram: u64,
) -> Vec<MemoryItem> {
    let item = |component: &str, tier, bytes| MemoryItem {
        component: component.into(),
        tier,
        bytes,
    };
    let on_disk = f.total_experts() as u64 - in_ram;
    let mut memory = vec![
        item("dense weights", Tier::Vram, f.dense_bytes),
        item("router", Tier::Vram, f.router_bytes),
        item("lm_head", head, f.lm_head_bytes),
        item("kv cache", Tier::Vram, kv_bytes),
        item("delta-net state", Tier::Vram, f.delta_state_bytes),
        item("conv state", Tier::Vram, f.conv_state_bytes),
        item("CUDA context", Tier::Vram, f.context_bytes),
        item("workspace", Tier::Vram, f.workspace_bytes),
        item("expert slots", Tier::Vram, slots as u64 * f.expert_bytes),
        item("embedding", Tier::Ram, f.embedding_bytes),
        item("experts", Tier::Ram, in_ram * f.expert_bytes),
    ];
    if others > 0 {
        let row = item("other sequences", Tier::Vram, others);
        memory.insert(memory.len() - 5, row);
    }
    if on_disk > 0 {
        memory.push(item("experts", Tier::Disk, on_disk * f.expert_bytes));
    }
    memory
}

#[cfg(test)]
mod tests;
