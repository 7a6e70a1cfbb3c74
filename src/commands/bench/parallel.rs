//! `bench --parallel`: sequences of different text, whose tokens are decoded in steps together.

use std::time::Instant;

use serde::Serialize;

use super::measure::MeasurePlan;
use crate::backend::Routing;
use crate::commands::console::{Console, Unit};
use crate::commands::{Failure, interrupt};
use crate::engine::Engine;
use crate::engine::session::NextToken;
use crate::planning::units::show_tokens;
use crate::report::stats::median;

/// Steps of a repetition that are not counted: the first one prepares graphs.
const FIRST_STEPS: usize = 2;

/// Steps to generate in, so that some are left to count.
pub const LEAST_STEPS: usize = FIRST_STEPS + 2;

/// The tokens of a step.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Case {
    /// Sequences, one token of each
    pub parallel: usize,
    /// Or consecutive tokens of one, which may be taken back: what checking guesses takes
    pub consecutive: usize,
}

impl Case {
    fn tokens(self) -> usize {
        self.parallel * self.consecutive
    }
}

/// Medians over repetitions.
#[derive(Debug, Serialize)]
pub struct Row {
    pub context_tokens: usize,
    #[serde(flatten)]
    pub case: Case,
    pub repetitions: usize,
    /// Of all sequences together
    pub decode_tok_s: f64,
    pub step_ms: f64,
    /// `decode_tok_s` over that of the first row of this context
    pub times_first: f64,
    /// Per token; absent where no GPU takes part
    pub experts: Option<Experts>,
}

/// Where the experts of a token were, of all layers.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Experts {
    pub vram: f64,
    pub cpu: f64,
    pub pcie: f64,
}

struct Sample {
    steps_ms: Vec<f64>,
    experts: Option<Experts>,
}

/// Measures each context with each case, interleaved in rounds. Sequence i reads the i-th part of the text.
///
/// # Errors
/// If memory is short for so many sequences, the backend fails, or Ctrl-C is pressed.
pub fn measure(
    engine: &mut Engine,
    text: &[u32],
    plan: &MeasurePlan,
    cases: &[Case],
    console: &Console,
) -> anyhow::Result<Vec<Row>> {
    // Each repetition computes its prompts.
    engine.set_prefix_cache(0);
    let rounds = plan.warmups + plan.repetitions;
    let runs = plan.contexts.len() * rounds * cases.len();
    let bar = console.progress("bench", runs as u64, Unit::Runs);
    let mut rows = Vec::new();
    for &context in &plan.contexts {
        let mut samples: Vec<Vec<Sample>> = cases.iter().map(|_| Vec::new()).collect();
        for round in 0..rounds {
            for (&case, samples) in cases.iter().zip(&mut samples) {
                let sample = repeat(engine, text, plan, context, case)?;
                if round >= plan.warmups {
                    samples.push(sample);
                }
                bar.inc(1);
            }
        }
        let first = rows.len();
        for (&case, samples) in cases.iter().zip(&samples) {
            rows.push(row(context, case, samples));
            let row: &Row = &rows[first];
            let one = row.decode_tok_s;
            if let Some(row) = rows.last_mut() {
                row.times_first = row.decode_tok_s / one;
            }
        }
    }
    bar.finish_and_clear();
    Ok(rows)
}

/// Prefills prompts and decodes the text after them.
fn repeat(
    engine: &mut Engine,
    text: &[u32],
    plan: &MeasurePlan,
    context: usize,
    case: Case,
) -> anyhow::Result<Sample> {
    let quiet = &mut |_: usize, _: usize, _: &Routing| {};
    let check = || match interrupt::flag().load(std::sync::atomic::Ordering::Relaxed) {
        true => Err(anyhow::Error::from(Failure::Interrupted)),
        false => Ok(()),
    };
    let count = case.parallel;
    engine.reserve(count, context)?;
    engine.restart_experts()?;
    let prompt_tokens = context - plan.generated_tokens;
    let parts: Vec<&[u32]> = text.chunks_exact(context).take(count).collect();
    assert_eq!(parts.len(), count, "as much text was read");
    let mut sessions = Vec::new();
    for (i, part) in parts.iter().enumerate() {
        let prompt = &part[..prompt_tokens];
        let mut session = engine.open(prompt, &[], i as u64)?;
        while engine.prefill_piece(&mut session, prompt, quiet)?.is_none() {
            check()?;
        }
        sessions.push(session);
    }
    let mut steps_ms = Vec::new();
    for step in 0..plan.generated_tokens / case.consecutive {
        check()?;
        if step == FIRST_STEPS {
            engine.take_times();
        }
        let next = prompt_tokens + step * case.consecutive;
        let start = Instant::now();
        match (&mut sessions[..], case.consecutive) {
            ([session], 2..) => {
                let ids = &parts[0][next..next + case.consecutive];
                engine.try_tokens(session, ids, quiet)?;
                engine.keep_tried(session, ids)?;
            }
            (sessions, _) => {
                let mut tokens: Vec<NextToken> = (sessions.iter_mut().zip(&parts))
                    .map(|(session, part)| NextToken {
                        session,
                        id: part[next],
                        wanted: Some(1),
                    })
                    .collect();
                engine.decode_together(&mut tokens, &mut |_, _, _, _| {})?;
            }
        }
        if step >= FIRST_STEPS {
            steps_ms.push(1e3 * start.elapsed().as_secs_f64());
        }
    }
    let times = engine.take_times().filter(|times| times.tokens > 0);
    sessions.into_iter().for_each(|s| engine.close(s));
    Ok(Sample {
        steps_ms,
        experts: times.map(|times| {
            let per_token = |sum: u64| sum as f64 / times.tokens as f64;
            Experts {
                vram: per_token(times.experts_vram),
                cpu: per_token(times.experts_cpu),
                pcie: per_token(times.experts_pcie),
            }
        }),
    })
}

fn row(context_tokens: usize, case: Case, samples: &[Sample]) -> Row {
    let of_all = |f: &dyn Fn(&Sample) -> f64| {
        let values: Vec<f64> = samples.iter().map(f).collect();
        median(&values).unwrap_or(f64::NAN)
    };
    let tok_s = |sample: &Sample| {
        let tokens = (case.tokens() * sample.steps_ms.len()) as f64;
        1e3 * tokens / sample.steps_ms.iter().sum::<f64>()
    };
    let decode_tok_s = of_all(&tok_s);
    let experts = samples.iter().all(|sample| sample.experts.is_some());
    let of_experts =
        |f: fn(Experts) -> f64| of_all(&|sample| f(sample.experts.unwrap_or_default()));
    Row {
        context_tokens,
        case,
        repetitions: samples.len(),
        decode_tok_s,
        step_ms: of_all(&|sample| median(&sample.steps_ms).unwrap_or(f64::NAN)),
        times_first: 1.0,
        experts: experts.then(|| Experts {
            vram: of_experts(|e| e.vram),
            cpu: of_experts(|e| e.cpu),
            pcie: of_experts(|e| e.pcie),
        }),
    }
}

/// A line for each row.
pub fn render(rows: &[Row]) -> String {
    let mut out = format!(
        "{:>8}  {:>8}  {:>11}  {:>3}  {:>12}  {:>8}  {:>6}",
        "context", "parallel", "consecutive", "n", "decode_tok_s", "step_ms", "times"
    );
    if rows.iter().any(|row| row.experts.is_some()) {
        out += "  experts of a token in VRAM, RAM, over PCIe";
    }
    for row in rows {
        out += &format!(
            "\n{:>8}  {:>8}  {:>11}  {:>3}  {:>12.1}  {:>8.2}  {:>6.2}",
            show_tokens(row.context_tokens as u64),
            row.case.parallel,
            row.case.consecutive,
            row.repetitions,
            row.decode_tok_s,
            row.step_ms,
            row.times_first
        );
        if let Some(experts) = row.experts {
            let Experts { vram, cpu, pcie } = experts;
            out += &format!("  {vram:.0}, {cpu:.0}, {pcie:.0}");
        }
    }
    out
}
