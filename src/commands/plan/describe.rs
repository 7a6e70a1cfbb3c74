//! A placement as a person reads it.

use crate::planning::hardware::Basis;
use crate::planning::knapsack::Solution;
use crate::planning::placement::{CurveSource, Placement, Tier};
use crate::planning::planner::Alternative;
use crate::planning::units::{show_bytes, show_tokens};
use crate::planning::validation::{PolicyScore, Validation};

/// Memory, slots, prediction and validation; without a GPU what a CPU makes of it: RAM, and
/// predictions from RAM.
pub fn describe(placement: &Placement, has_gpu: bool) -> String {
    let mut out = match has_gpu {
        true => memory(placement) + &slots(placement),
        false => ram(placement),
    };
    out += &prediction(placement, has_gpu);
    if let Some(validation) = &placement.validation {
        out += &held_out(validation);
    }
    out.trim_end().to_string()
}

fn memory(placement: &Placement) -> String {
    let mut out = String::from("component          tier        size\n");
    for item in &placement.memory {
        out += &format!(
            "{:18} {:5} {:>11}\n",
            item.component,
            item.tier.name(),
            show_bytes(item.bytes)
        );
    }
    out + &format!(
        "{:18} VRAM  {:>11} of {}\n",
        "total",
        show_bytes(placement.bytes_in(Tier::Vram)),
        show_bytes(placement.vram_budget_bytes)
    )
}

/// Parts of a plan that are there for the GPU alone.
const GPU_ONLY: [&str; 3] = ["CUDA context", "workspace", "expert slots"];

/// All that a run without a GPU holds, in RAM whatever the plan's tier.
fn ram(placement: &Placement) -> String {
    let mut out = String::from("component          tier        size\n");
    let items = || {
        let all = placement.memory.iter();
        all.filter(|item| !GPU_ONLY.contains(&item.component.as_str()))
    };
    for item in items() {
        out += &format!(
            "{:18} RAM   {:>11}\n",
            item.component,
            show_bytes(item.bytes)
        );
    }
    let total: u64 = items().map(|item| item.bytes).sum();
    out + &format!("{:18} RAM   {:>11}\n", "total", show_bytes(total))
}

fn slots(placement: &Placement) -> String {
    let slots: Vec<usize> = placement.layers.iter().map(|layer| layer.slots).collect();
    let (least, most) = (slots.iter().min(), slots.iter().max());
    let curves = match placement.curves_from {
        CurveSource::Published => {
            "no profile: hit curve published for a model of 512 experts, not of your text"
        }
        CurveSource::Profile => "hit curves of the profile",
        CurveSource::Trace => "hit curves of the trace",
    };
    let Solution::Exact = placement.solution;
    format!(
        "\n{} expert slots of {}: {} to {} per layer, policy {}; {curves}; solved exactly\n",
        placement.total_slots(),
        placement.num_experts * placement.layers.len(),
        least.unwrap_or(&0),
        most.unwrap_or(&0),
        placement.policy.label(),
    ) + &left_in_ram(placement)
}

/// Where there is room for more experts than the plan puts into VRAM.
fn left_in_ram(placement: &Placement) -> String {
    let all = placement.num_experts * placement.layers.len();
    let left = (all - placement.total_slots()) as u64;
    let used = placement.bytes_in(Tier::Vram);
    let free = placement.vram_budget_bytes.saturating_sub(used) / placement.expert_bytes.max(1);
    match left.min(free) {
        0 => String::new(),
        room => format!(
            "room for {room} more slots is left unused on purpose: {left} experts stay in RAM, where \
             the CPU computes them while the GPU computes its own, which is predicted faster\n"
        ),
    }
}

fn prediction(placement: &Placement, has_gpu: bool) -> String {
    let basis = match placement.hardware_basis {
        Basis::Measured => "measured",
        Basis::Modelled => "modelled",
        Basis::Mixed => "partly measured, partly modelled",
    };
    let (decode, prefill) = (&placement.decode, &placement.prefill);
    let mut out = format!(
        "\npredicted for {} ({basis}), context {}, KV cache {}{}\n",
        placement.hardware,
        show_tokens(placement.ctx_tokens),
        placement.kv_dtype.name(),
        match placement.sequences {
            1 => String::new(),
            n => format!(", one of {n} sequences"),
        }
    );
    let hits = match has_gpu {
        true => format!("   hit rate {:.1}%", 100.0 * decode.expert_hit_rate),
        false => String::new(),
    };
    out += &format!("decode   {:8.1} tok/s{hits}\n", decode.tok_s);
    for term in &decode.terms {
        out += &format!("  {:26} {:9.3} ms   {}\n", term.name, term.ms, term.from);
    }
    out += &format!(
        "prefill  {:8.0} tok/s   {} tokens in chunks of {}",
        prefill.tok_s,
        show_tokens(prefill.prompt_tokens),
        show_tokens(prefill.chunk_tokens)
    );
    if prefill.borrowed_slots > 0 {
        out += &format!(", borrowing {} slots", prefill.borrowed_slots);
    }
    out += "\n";
    for term in &prefill.terms {
        out += &format!("  {:26} {:9.1} ms   {}\n", term.name, term.ms, term.from);
    }
    out
}

/// Hit rates on held-out text, for any GPU that has these slots.
pub fn held_out(validation: &Validation) -> String {
    let timed = validation
        .scores
        .iter()
        .any(|score| score.experts_ms.is_some());
    let mut out = format!(
        "\nheld out: {} documents, {} tokens\npolicy                 hit rate   bytes/token{}\n",
        validation.held_out_documents,
        validation.held_out_tokens,
        if timed { "   experts, predicted" } else { "" }
    );
    for score in &validation.scores {
        let time = score.experts_ms.map(|ms| format!("   {ms:10.3} ms/token"));
        let mark = if score.chosen { "  <- chosen" } else { "" };
        out += &format!(
            "{:22} {:7.1}%  {:>11}{}{mark}\n",
            score.policy,
            100.0 * score.expert_hit_rate,
            show_bytes(score.h2d_bytes_per_token as u64),
            time.unwrap_or_default()
        );
    }
    out + match timed {
        true => {
            "chosen by the least predicted time, copies included, on other documents than these\n"
        }
        false => "chosen by the fewest misses on other documents than these\n",
    }
}

/// What other choices would give, the worth of the next GiB, and the policies by slots.
pub fn describe_alternatives(placement: &Placement, alternatives: &[Alternative]) -> String {
    let now = placement.decode.tok_s;
    let mut out = format!(
        "\nalternative              decode   against   slots  hit rate     prefill\n\
         {:20} {now:7.1} tok/s          {:6}  {:7.1}%  {:6.0} tok/s\n",
        "this plan",
        placement.total_slots(),
        100.0 * placement.decode.expert_hit_rate,
        placement.prefill.tok_s
    );
    for alternative in alternatives {
        out += &match &alternative.outcome {
            Some(point) => format!(
                "{:20} {:7.1} tok/s  {:+6.1}% {:6}  {:7.1}%  {:6.0} tok/s\n",
                alternative.change,
                point.decode_tok_s,
                100.0 * (point.decode_tok_s / now - 1.0),
                point.expert_slots,
                100.0 * point.expert_hit_rate,
                point.prefill_tok_s
            ),
            None => format!("{:20} does not fit\n", alternative.change),
        };
    }
    if let Some(validation) = placement
        .validation
        .as_ref()
        .filter(|v| !v.by_share.is_empty())
    {
        out += &by_share(validation);
    }
    out.trim_end().to_string()
}

fn by_share(validation: &Validation) -> String {
    let mut out = String::from("\nheld-out hit rates with equal slots in every layer\nslots   ");
    let Some(first) = validation.by_share.first() else {
        return out;
    };
    for score in &first.scores {
        out += &format!("{:>22}", score.policy);
    }
    for row in &validation.by_share {
        out += &format!("\n{:5.1}%  ", 100.0 * row.share);
        let cell = |s: &PolicyScore| format!("{:21.1}%", 100.0 * s.expert_hit_rate);
        out += &row.scores.iter().map(cell).collect::<String>();
    }
    out + "\n"
}
