//! What other budgets and choices would give.

use super::{Budget, BudgetPoint, Choice, KvDtype, Planner, Tier, show_tokens, smallest_bytes};
use crate::planning::cost::DecodePrediction;
use crate::planning::units::GIB;

/// Budgets of a curve, ends included.
const CURVE_POINTS: u64 = 24;

/// What else could be done with the money.
#[derive(Clone, Debug, PartialEq)]
pub struct Alternative {
    pub change: String,
    /// None if that would not fit.
    pub outcome: Option<BudgetPoint>,
}

impl Planner<'_> {
    /// Neighbouring choices: one GiB more and less, the other type of KV cache, the output matrix
    /// elsewhere, half and twice the context, every slot's content fixed, and no expert in VRAM.
    pub fn explain(&self) -> Vec<Alternative> {
        let base = self.budget();
        let Ok(chosen) = self.choose(&base) else {
            return Vec::new();
        };
        let with = |change: String, edit: &dyn Fn(&mut Budget)| {
            let mut budget = base.clone();
            edit(&mut budget);
            let outcome = self.point(&budget);
            Alternative { change, outcome }
        };
        let other_kv = match chosen.kv_dtype {
            KvDtype::F16 => KvDtype::Int8,
            KvDtype::Int8 => KvDtype::F16,
        };
        let other_head = match chosen.head {
            Tier::Vram => Tier::Ram,
            Tier::Ram | Tier::Disk => Tier::Vram,
        };
        let ctx = base.ctx_tokens;
        let mut all = vec![
            with("one GiB more VRAM".into(), &|b| {
                b.vram_bytes = b.vram_bytes.saturating_add(GIB);
            }),
            with("one GiB less VRAM".into(), &|b| {
                b.vram_bytes = b.vram_bytes.saturating_sub(GIB);
            }),
            with(format!("{} KV cache", other_kv.name()), &|b| {
                b.kv_dtypes = vec![other_kv];
            }),
            with(format!("lm_head in {}", other_head.name()), &|b| {
                b.heads = vec![other_head];
            }),
        ];
        for tokens in [ctx / 2, ctx.saturating_mul(2)] {
            all.push(with(format!("context {}", show_tokens(tokens)), &|b| {
                b.ctx_tokens = tokens;
            }));
        }
        if base.sequences > 1 {
            all.push(with("one sequence".into(), &|b| b.sequences = 1));
        }
        all.push(with("no expert in VRAM".into(), &|b| b.most_slots = 0));
        all
    }

    /// What each budget would give; those that do not fit are left out.
    pub fn sweep(&self, vram_budgets: impl IntoIterator<Item = u64>) -> Vec<BudgetPoint> {
        let mut budget = self.budget();
        let point = |vram_bytes| {
            budget.vram_bytes = vram_bytes;
            self.point(&budget)
        };
        vram_budgets.into_iter().filter_map(point).collect()
    }

    /// From the smallest budget that fits to all experts in VRAM, or what the card has.
    pub(super) fn budget_curve(&self) -> Vec<BudgetPoint> {
        let request = &self.request;
        let f = request.footprint;
        let contexts = [request.sequences, request.ctx_tokens];
        let each = |kv: KvDtype| {
            let of_head = move |&head| smallest_bytes(f, contexts, kv, head);
            request.heads.iter().map(of_head)
        };
        let fits = request.kv_dtypes.iter().flat_map(|&kv| each(kv));
        let smallest = fits.min().expect("there are choices");
        let everything = smallest.saturating_add(f.experts_bytes());
        let card = request.hardware.gpu.as_ref().map(|gpu| gpu.vram_bytes);
        let largest = card
            .map_or(everything, |bytes| everything.min(bytes))
            .max(request.vram_budget_bytes.min(everything));
        let step = largest.saturating_sub(smallest) / (CURVE_POINTS - 1);
        let mut budgets: Vec<u64> = (0..CURVE_POINTS).map(|i| smallest + i * step).collect();
        budgets.push(request.vram_budget_bytes);
        budgets.sort_unstable();
        budgets.dedup();
        self.sweep(budgets)
    }

    fn point(&self, budget: &Budget) -> Option<BudgetPoint> {
        let Choice {
            kv_dtype,
            head,
            slots,
            decode,
            ..
        } = self.choose(budget).ok()?;
        let expert_slots = slots.iter().sum();
        let DecodePrediction {
            tok_s,
            expert_hit_rate,
            ..
        } = decode;
        Some(BudgetPoint {
            vram_budget_bytes: budget.vram_bytes,
            kv_dtype,
            head,
            expert_slots,
            expert_hit_rate,
            decode_tok_s: tok_s,
            prefill_tok_s: self.prefill(budget.ctx_tokens, expert_slots).tok_s,
        })
    }
}
