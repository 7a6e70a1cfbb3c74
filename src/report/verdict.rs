//! Whether a run is worse than another: the rule that CI fails by, and what it came to.

use std::fmt;

use serde::Serialize;

use super::comparable::Aspect;
use super::metrics::{Better, HEADLINES, ITL_P99_MS, Metric, PEAK_RSS, PEAK_VRAM};
use super::rank::{self, Shift};
use super::record::{ContextRun, RunBody};
use super::{Run, units};

/// Chance of noise that a metric must be below to fail: with the eight metrics of two contexts, at
/// most one comparison of equals in a hundred fails.
pub const ALPHA: f64 = 0.00125;
/// Rise of perplexity that fails, as a share.
const PERPLEXITY_RISE: f64 = 0.001;
/// Rise of the mean KL divergence below which it is rounding, in nats.
const KL_RISE_NATS: f64 = 1e-5;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    Pass,
    /// Worse by more than allowed, but that may be noise
    Undecided,
    Fail,
}

/// How runs are held against each other.
#[derive(Clone, Debug)]
pub struct Rule {
    /// Share by which a median may be worse: 0.05 is 5%.
    pub threshold: f64,
    /// Repetition i of both runs was measured in one round.
    pub paired: bool,
    /// Differences that are no reason to fail.
    pub allowed: Vec<Aspect>,
}

/// One quantity of both runs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Check {
    pub metric: String,
    pub unit: &'static str,
    /// Absent for what is measured once per run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context_tokens: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub new: Option<f64>,
    /// As a share; negative if better.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub worse_by: Option<f64>,
    /// 95% interval of `worse_by`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub worse_by_interval: Option<[f64; 2]>,
    /// Chance of noise that looks as bad
    #[serde(skip_serializing_if = "Option::is_none")]
    pub p: Option<f64>,
    pub outcome: Outcome,
    pub reason: String,
}

/// What a comparison came to.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Verdict {
    pub outcome: Outcome,
    pub base: String,
    pub new: String,
    pub threshold: f64,
    /// The rule in a sentence.
    pub rule: String,
    /// Why it is no pass; empty if it is one.
    pub reasons: Vec<String>,
    pub checks: Vec<Check>,
}

impl Outcome {
    pub fn name(self) -> &'static str {
        match self {
            Outcome::Pass => "pass",
            Outcome::Undecided => "undecided",
            Outcome::Fail => "fail",
        }
    }
}

impl Rule {
    /// In a sentence.
    pub fn describe(&self) -> String {
        // 5, not 5.000000000000001.
        let percent = (1e5 * self.threshold).round() / 1e3;
        let test = match self.paired {
            true => "a signed-rank test of the rounds",
            false => "a rank-sum test of the repetitions",
        };
        format!(
            "fails if at any context the median of decode, prefill, time to first token or p99 latency \
             is worse by more than {percent}% and {test} excludes noise (p < {ALPHA}; with too few \
             samples for that the median alone decides, but for p99), if a context or a figure is missing, if peak \
             memory rises by more than {percent}%, perplexity by 0.1%, mean KL by {percent}% and \
             1e-5 nats, or if other tokens are generated; undecided, which is no pass, if another figure than p99 is that \
             much worse and may be noise"
        )
    }

    /// Holds `new` against `base`. Whether they can be compared at all is for
    /// [`differences`](super::comparable::differences) to say.
    pub fn judge(&self, base: &Run, new: &Run) -> Verdict {
        let mut checks = Vec::new();
        for context in &base.body.contexts {
            self.context(context, &new.body, &mut checks);
        }
        if base.body.contexts.is_empty() && !self.allows(Aspect::Contexts) {
            checks.push(missing("contexts", "", None, &base.name));
        }
        self.memory(&base.body, &new.body, &mut checks);
        self.quality(&base.body, &new.body, &mut checks);
        self.output(&base.body, &new.body, &mut checks);
        if !checks
            .iter()
            .any(|c| c.worse_by.is_some() && c.context_tokens.is_some())
        {
            checks.push(missing("speed", "", None, "both runs"));
        }
        let worst = checks.iter().map(|check| check.outcome).max();
        let reasons = checks.iter().filter(|c| c.outcome != Outcome::Pass);
        Verdict {
            outcome: worst.unwrap_or(Outcome::Fail),
            base: base.name.clone(),
            new: new.name.clone(),
            threshold: self.threshold,
            rule: self.describe(),
            reasons: reasons.map(Check::to_string).collect(),
            checks,
        }
    }

    fn allows(&self, aspect: Aspect) -> bool {
        self.allowed.contains(&aspect)
    }

    fn context(&self, base: &ContextRun, new: &RunBody, checks: &mut Vec<Check>) {
        let tokens = base.context_tokens;
        let same = |c: &&ContextRun| c.context_tokens == tokens;
        let Some(new) = new.contexts.iter().find(same) else {
            if !self.allows(Aspect::Contexts) {
                checks.push(missing("context", "", Some(tokens), "the later run"));
            }
            return;
        };
        let before = checks.len();
        for metric in HEADLINES {
            let (old, now) = (metric.values(base), metric.values(new));
            match (old.is_empty(), now.is_empty()) {
                (false, true) => {
                    checks.push(missing(
                        metric.key,
                        metric.unit,
                        Some(tokens),
                        "the later run",
                    ));
                }
                (false, false) => checks.extend(self.metric(metric, tokens, &old, &now)),
                (true, _) => {}
            }
        }
        if checks.len() == before {
            checks.push(missing("repetitions", "", Some(tokens), "the first run"));
        }
    }

    fn metric(&self, metric: &Metric, tokens: usize, base: &[f64], new: &[f64]) -> Option<Check> {
        let paired = self.paired.then(|| rank::paired(base, new)).flatten();
        let shift = paired.or_else(|| rank::unpaired(base, new))?;
        let (worse_by, interval, p) = worsening(metric, &shift);
        // A tail of few tokens is shaken by more than any threshold: it counts if noise is excluded.
        let tail = metric.key == ITL_P99_MS.key;
        let outcome = match worse_by > self.threshold {
            false => Outcome::Pass,
            true if tail && p >= ALPHA => Outcome::Pass,
            true if p < ALPHA || shift.least_p >= ALPHA => Outcome::Fail,
            true => Outcome::Undecided,
        };
        let reason = match outcome {
            Outcome::Pass => String::new(),
            Outcome::Undecided => format!(
                "that may be noise (p = {p:.3}); repeat with more repetitions or on a quieter machine"
            ),
            Outcome::Fail if p < ALPHA => "no noise".into(),
            Outcome::Fail => format!(
                "{} and {} samples are too few for a test, so the median decides",
                base.len(),
                new.len()
            ),
        };
        Some(Check {
            metric: metric.key.into(),
            unit: metric.unit,
            context_tokens: Some(tokens),
            base: super::stats::median(base),
            new: super::stats::median(new),
            worse_by: Some(worse_by),
            worse_by_interval: Some(interval),
            p: Some(p),
            outcome,
            reason,
        })
    }

    fn memory(&self, base: &RunBody, new: &RunBody, checks: &mut Vec<Check>) {
        let (old, now) = (&base.memory, &new.memory);
        let rss = Some((old.peak_rss_bytes, now.peak_rss_bytes));
        let vram = old.peak_vram_bytes.zip(now.peak_vram_bytes);
        for (metric, peaks) in [(PEAK_RSS.0, rss), (PEAK_VRAM.0, vram)] {
            let Some((base, new)) = peaks.filter(|(base, _)| *base > 0) else {
                continue;
            };
            let worse_by = new as f64 / base as f64 - 1.0;
            let fails = worse_by > self.threshold;
            checks.push(single(
                metric,
                "bytes",
                base as f64,
                new as f64,
                worse_by,
                fails,
            ));
        }
    }

    fn quality(&self, base: &RunBody, new: &RunBody, checks: &mut Vec<Check>) {
        let Some(old) = &base.quality else { return };
        let Some(now) = new.quality.as_ref().filter(|now| now.tokens == old.tokens) else {
            checks.push(missing(
                "quality",
                "",
                None,
                &format!("the later run, on {} tokens", old.tokens),
            ));
            return;
        };
        let (old_kl, new_kl) = (old.mean_kl_nats, now.mean_kl_nats);
        let rise = new_kl - old_kl;
        let share = rise / old_kl.max(f64::MIN_POSITIVE);
        let fails = rise > KL_RISE_NATS && share > self.threshold;
        checks.push(single("mean_kl_nats", "nats", old_kl, new_kl, share, fails));
        let worse_by = now.perplexity / old.perplexity - 1.0;
        let fails = worse_by.is_nan() || worse_by > PERPLEXITY_RISE;
        checks.push(single(
            "perplexity",
            "perplexity",
            old.perplexity,
            now.perplexity,
            worse_by,
            fails,
        ));
    }

    fn output(&self, base: &RunBody, new: &RunBody, checks: &mut Vec<Check>) {
        if base.same_output(new) != Some(false) || self.allows(Aspect::Output) {
            return;
        }
        checks.push(Check {
            outcome: Outcome::Fail,
            reason: "other tokens were generated from the same prompts; if that is meant, \
                     --allow-different output"
                .into(),
            ..empty("output", "", None)
        });
    }
}

/// Ratios to how much worse that is, with its interval and the chance of noise.
fn worsening(metric: &Metric, shift: &Shift) -> (f64, [f64; 2], f64) {
    match metric.better {
        Better::Higher => (
            1.0 - shift.ratio,
            [1.0 - shift.high, 1.0 - shift.low],
            shift.p_below,
        ),
        Better::Lower => (
            shift.ratio - 1.0,
            [shift.low - 1.0, shift.high - 1.0],
            shift.p_above,
        ),
    }
}

fn empty(metric: &str, unit: &'static str, context_tokens: Option<usize>) -> Check {
    Check {
        metric: metric.into(),
        unit,
        context_tokens,
        base: None,
        new: None,
        worse_by: None,
        worse_by_interval: None,
        p: None,
        outcome: Outcome::Pass,
        reason: String::new(),
    }
}

fn single(
    metric: &str,
    unit: &'static str,
    base: f64,
    new: f64,
    worse_by: f64,
    fails: bool,
) -> Check {
    Check {
        base: Some(base),
        new: Some(new),
        worse_by: Some(worse_by),
        outcome: if fails { Outcome::Fail } else { Outcome::Pass },
        ..empty(metric, unit, None)
    }
}

fn missing(metric: &str, unit: &'static str, context: Option<usize>, side: &str) -> Check {
    Check {
        outcome: Outcome::Fail,
        reason: format!("missing in {side}"),
        ..empty(metric, unit, context)
    }
}

impl Check {
    /// `1.2% worse [-0.3%, 2.1%]`
    pub fn change(&self) -> Option<String> {
        let worse_by = self.worse_by?;
        let mut text = match worse_by {
            0.0 => "no change".to_string(),
            w if w > 0.0 => format!("{:.1}% worse", 100.0 * w),
            w => format!("{:.1}% better", -100.0 * w),
        };
        if let Some([low, high]) = self.worse_by_interval {
            text += &format!(" [{:+.1}%, {:+.1}%]", 100.0 * low, 100.0 * high);
        }
        Some(text)
    }

    /// `decode_tok_s at 4k context`
    pub fn place(&self) -> String {
        match self.context_tokens {
            Some(context) => format!("{} at {} context", self.metric, units::tokens(context)),
            None => self.metric.clone(),
        }
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let value = |v| match self.unit {
            "nats" => format!("{v:.2e} nats"),
            "perplexity" => format!("{v:.4}"),
            unit => units::with_unit(v, unit),
        };
        write!(f, "{}: ", self.place())?;
        if let (Some(base), Some(new), Some(change)) = (self.base, self.new, self.change()) {
            write!(f, "{} -> {}, {change}", value(base), value(new))?;
            if !self.reason.is_empty() {
                write!(f, "; ")?;
            }
        }
        write!(f, "{}", self.reason)
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Verdict { base, new, .. } = self;
        write!(
            f,
            "verdict: {} ({new} against {base})",
            self.outcome.name().to_uppercase()
        )?;
        for check in &self.checks {
            write!(f, "\n  {:9} {check}", check.outcome.name())?;
        }
        write!(f, "\nrule: {}", self.rule)
    }
}

#[cfg(test)]
mod tests;
