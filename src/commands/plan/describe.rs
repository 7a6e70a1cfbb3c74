//! A placement as a person reads it.

use crate::planning::hardware::Basis;
use crate::planning::knapsack::Solution;
use crate::planning::placement::{CurveSource, Placement, Tier};
use crate::planning::planner::Alternative;
use crate::planning::units::{show_bytes, show_tokens};
use crate::planning::validation::{PolicyScore, Validation};

/// Memory, slots, prediction and validation.
pub fn describe(placement: &Placement) -> String {
    let mut out = memory(placement);
    out += &slots(placement);
    out += &prediction(placement);
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
    )
}

fn prediction(placement: &Placement) -> String {
    let basis = match placement.hardware_basis {
        Basis::Measured => "measured",
        Basis::Modelled => "modelled",
        Basis::Mixed => "partly measured, partly modelled",
    };
    let (decode, prefill) = (&placement.decode, &placement.prefill);
    let mut out = format!(
        "\npredicted for {} ({basis}), context {}, KV cache {}\n",
        placement.hardware,
        show_tokens(placement.ctx_tokens),
        placement.kv_dtype.name()
    );
    out += &format!(
        "decode   {:8.1} tok/s   hit rate {:.1}%\n",
        decode.tok_s,
        100.0 * decode.expert_hit_rate
    );
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

fn held_out(validation: &Validation) -> String {
    let mut out = format!(
        "\nheld out: {} documents, {} tokens\npolicy                 hit rate   bytes/token\n",
        validation.held_out_documents, validation.held_out_tokens
    );
    for score in &validation.scores {
        let mark = if score.chosen { "  <- chosen" } else { "" };
        out += &format!(
            "{:22} {:7.1}%  {:>11}{mark}\n",
            score.policy,
            100.0 * score.expert_hit_rate,
            show_bytes(score.h2d_bytes_per_token as u64)
        );
    }
    out
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
