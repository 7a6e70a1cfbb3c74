//! Another binary or other flags, interleaved with this one: rounds of one process each, in random
//! order, so that whatever else the machine does meets all of them alike.
//!
//! This binary runs twice in each round; how far it is from itself is the machine's own noise. A
//! comparison that does not pass at once is measured on, and the test is made once, at the end: so
//! measuring on never makes false alarms more likely.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, bail};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::pace::show_left;
use super::{BenchArgs, TIME_LIMIT};
use crate::commands::console::{Console, Unit};
use crate::commands::output::prepare_folder;
use crate::commands::{Failure, interrupt, report as reports};
use crate::formats::Document;
use crate::formats::document::RUN;
use crate::report::comparable::Aspect;
use crate::report::metrics::{DECODE_TOK_S, PREFILL_TOK_S};
use crate::report::record::RunBody;
use crate::report::verdict::{Outcome, Rule, Verdict};
use crate::report::{ReportInputs, Run, ci, rank, units, write_report};

/// Rounds, if nothing else is asked for: as few as a signed-rank test can tell noise by at
/// [`ALPHA`](crate::report::verdict::ALPHA).
const ROUNDS: usize = 10;
/// So many times the rounds are measured where those do not pass.
const MEASURED_ON: usize = 3;
/// Decides the order within rounds.
const SEED: u64 = 0x6d6f_6563_746c;

/// Flags that are not passed on, and whether a value follows.
const OWN_FLAGS: [(&str, bool); 16] = [
    ("--against-binary", true),
    ("--against-flags", true),
    ("--fail-above", true),
    ("--ci", true),
    ("--output", true),
    ("-o", true),
    ("--repetitions", true),
    ("-r", true),
    ("--warmups", true),
    ("--time-limit", true),
    ("--quality-tokens", true),
    ("--json", false),
    ("--quiet", false),
    ("-q", false),
    ("--verbose", false),
    ("-v", false),
];

/// One of those that are compared.
struct Side {
    name: String,
    program: PathBuf,
    flags: Vec<OsString>,
    folder: PathBuf,
    /// Of a first run, with everything around the measurement; its repetitions are those of the rounds.
    document: Option<Document<RunBody>>,
}

/// Places in the list of sides.
const BASE: usize = 0;
const THIS: usize = 1;
const AGAIN: usize = 2;

/// Measures two binaries, interleaved.
///
/// # Errors
/// Bad flags, or either binary's failure.
pub fn execute(args: &BenchArgs, console: &Console) -> anyhow::Result<()> {
    let mut sides = sides(args)?;
    prepare_folder(&args.output, &["report.html"], console)?;
    let started = Instant::now();
    console.note("a first run of each, not counted: profile, plan and quality");
    for side in &mut sides {
        side.settle(args.quality_tokens)?;
    }
    let rounds = args.repetitions.unwrap_or(ROUNDS);
    let limit = args.time_limit.unwrap_or(TIME_LIMIT);
    let bar = console.progress("bench", rounds as u64, Unit::Runs);
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    let rule = Rule {
        threshold: args.fail_above.unwrap_or(f64::INFINITY),
        paired: true,
        allowed: match args.against_flags.is_some() {
            // Other flags may well mean other arithmetic.
            true => vec![Aspect::Output],
            false => Vec::new(),
        },
    };
    let (mut done, mut most) = (0, rounds);
    let mut interrupted = false;
    while done < most && !interrupted {
        let round = Instant::now();
        interrupted = !measure_round(&mut sides, &mut rng)?;
        done += usize::from(!interrupted);
        bar.inc(1);
        if done == rounds && most == rounds && !interrupted {
            let verdict = judge(&rule, &sides)?;
            if verdict.outcome != Outcome::Pass && args.fail_above.is_some() {
                most = MEASURED_ON * rounds;
                bar.set_length(most as u64);
            }
        }
        let left = round.elapsed().as_secs_f64() * (most - done.min(most)) as f64;
        bar.set_prefix(show_left(left));
        if done >= rounds && started.elapsed() + round.elapsed() > limit {
            break;
        }
    }
    bar.finish_and_clear();
    if done == 0 {
        return Err(Failure::Interrupted.into());
    }
    conclude(args, &rule, &sides, done, interrupted, console)
}

/// Writes and tells what the rounds came to.
fn conclude(
    args: &BenchArgs,
    rule: &Rule,
    sides: &[Side],
    rounds: usize,
    interrupted: bool,
    console: &Console,
) -> anyhow::Result<()> {
    let verdict = judge(rule, sides)?;
    let gated = args.fail_above.is_some();
    for side in &sides[..AGAIN] {
        let document = side.document.as_ref().context("every side has run")?;
        document.write(&side.folder.join("run.json"))?;
    }
    let inputs = ReportInputs {
        title: "moectl bench".into(),
        runs: vec![sides[BASE].run()?, sides[THIS].run()?],
        verdicts: if gated {
            vec![verdict.clone()]
        } else {
            Vec::new()
        },
        ..ReportInputs::default()
    };
    let mut files = write_report(&inputs, &args.output)?;
    if let Some(folder) = &args.ci {
        files.extend(ci::write(&inputs, folder)?);
    }
    let noise = noise(&sides[THIS].run()?, &sides[AGAIN].run()?);
    if console.json {
        console.result_json(&serde_json::json!({
            "rounds": rounds, "noise": noise, "verdict": verdict, "files": files,
        }))?;
    } else {
        console.result(format!(
            "{rounds} rounds, each of all in random order\n{noise}"
        ))?;
        match gated {
            true => console.result(verdict.to_string())?,
            false => {
                let names = (&verdict.new, &verdict.base);
                console.result(format!("{} against {}", names.0, names.1))?;
                for check in &verdict.checks {
                    console.result(format!("  {check}"))?;
                }
            }
        }
        if !console.quiet {
            console.result(reports::list(&args.output, &files))?;
        }
    }
    match (interrupted, gated) {
        (true, _) => Err(Failure::Interrupted.into()),
        (_, true) => reports::conclude(&[verdict]),
        _ => Ok(()),
    }
}

fn sides(args: &BenchArgs) -> anyhow::Result<[Side; 3]> {
    let own = std::env::current_exe().context("this program's own path")?;
    let other = args.against_binary.clone().unwrap_or_else(|| own.clone());
    if !other.is_file() {
        return Err(Failure::Usage(format!(
            "--against-binary {}: there is no such file; give the path of another moectl",
            other.display()
        ))
        .into());
    }
    // A name without a folder would be looked for in PATH.
    let other = std::path::absolute(&other).with_context(|| other.display().to_string())?;
    let passed_on = passed_on(std::env::args_os().skip(1));
    let more: Vec<OsString> = args
        .against_flags
        .iter()
        .flat_map(|flags| flags.split_whitespace())
        .map(OsString::from)
        .collect();
    let name = match (&args.against_binary, &args.against_flags) {
        (Some(path), None) => path.display().to_string(),
        (Some(path), Some(flags)) => format!("{} {flags}", path.display()),
        (None, flags) => format!("with {}", flags.as_deref().unwrap_or("")),
    };
    let side = |name: String, program: &Path, flags: Vec<OsString>, folder: &str| Side {
        name,
        program: program.to_path_buf(),
        flags,
        folder: args.output.join(folder),
        document: None,
    };
    let base_flags: Vec<OsString> = passed_on.iter().cloned().chain(more).collect();
    Ok([
        side(name, &other, base_flags, "base"),
        side("this".into(), &own, passed_on.clone(), "this"),
        side("this again".into(), &own, passed_on, "again"),
    ])
}

/// The arguments of this process that its children get too.
fn passed_on(args: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut kept = Vec::new();
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        let text = arg.to_string_lossy();
        let (flag, inline) = match text.split_once('=') {
            Some((flag, _)) => (flag, true),
            None => (text.as_ref(), false),
        };
        // `-ofolder`, as short flags may be written.
        let glued = ["-o", "-r"]
            .iter()
            .any(|own| text.starts_with(own) && text.len() > 2);
        match OWN_FLAGS.iter().find(|(own, _)| *own == flag) {
            Some((_, true)) if !inline => drop(args.next()),
            Some(_) => {}
            None if glued => {}
            None => kept.push(arg),
        }
    }
    kept
}

/// One run of every side in random order; `false` if Ctrl-C came in between.
fn measure_round(sides: &mut [Side; 3], rng: &mut ChaCha8Rng) -> anyhow::Result<bool> {
    let mut order = [BASE, THIS, AGAIN];
    order.shuffle(rng);
    let mut results = [const { None }; 3];
    for i in order {
        if interrupt::flag().load(std::sync::atomic::Ordering::Relaxed) {
            return Ok(false);
        }
        results[i] = Some(sides[i].measure(&["--warmups", "1", "--quality-tokens", "0"])?);
    }
    // A round counts for all sides or for none.
    for (side, result) in sides.iter_mut().zip(results) {
        side.add(&result.context("every side ran")?)?;
    }
    Ok(true)
}

impl Side {
    /// The first run, with quality; what it measured is left out.
    fn settle(&mut self, quality_tokens: usize) -> anyhow::Result<()> {
        let tokens = quality_tokens.to_string();
        let mut document = self.measure(&["--warmups", "1", "--quality-tokens", &tokens])?;
        for context in &mut document.body.contexts {
            context.repetitions.clear();
        }
        self.document = Some(document);
        Ok(())
    }

    /// One repetition of every context in a process of its own.
    fn measure(&self, flags: &[&str]) -> anyhow::Result<Document<RunBody>> {
        let mut command = Command::new(&self.program);
        command.args(&self.flags).args(flags);
        command
            .args(["--repetitions", "1", "-q", "-o"])
            .arg(&self.folder);
        let placement = self.folder.join("placement.json");
        let planned = self.flags.iter().any(|flag| {
            let flag = flag.to_string_lossy();
            flag == "--placement" || flag.starts_with("--placement=")
        });
        // The first run's own plan: no round spends time on another.
        if self.document.is_some() && !planned && placement.is_file() {
            command.arg("--placement").arg(placement);
        }
        let output = command
            .stdin(Stdio::null())
            .output()
            .with_context(|| self.program.display().to_string())?;
        if !output.status.success() {
            if interrupt::flag().load(std::sync::atomic::Ordering::Relaxed) {
                return Err(Failure::Interrupted.into());
            }
            bail!(
                "{} ({}) ended with {}:\n{}",
                self.program.display(),
                self.name,
                output.status,
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Document::read(&self.folder.join("run.json"), RUN).map_err(Into::into)
    }

    fn add(&mut self, round: &Document<RunBody>) -> anyhow::Result<()> {
        let document = self.document.as_mut().context("a first run came before")?;
        for context in &round.body.contexts {
            let mut all = document.body.contexts.iter_mut();
            let same = all.find(|c| c.context_tokens == context.context_tokens);
            let same = same
                .with_context(|| format!("{}: measured other contexts than at first", self.name))?;
            same.repetitions.extend(context.repetitions.iter().cloned());
        }
        document.body.settings.repetitions = document.body.contexts[0].repetitions.len();
        Ok(())
    }

    fn run(&self) -> anyhow::Result<Run> {
        let mut document = self.document.clone().context("every side has run")?;
        (document.body.contexts.iter_mut()).for_each(|context| context.compare_prediction());
        Ok(reports::named(&self.name, &document))
    }
}

fn judge(rule: &Rule, sides: &[Side]) -> anyhow::Result<Verdict> {
    Ok(rule.judge(&sides[BASE].run()?, &sides[THIS].run()?))
}

/// How far this binary is from itself: what a round shakes, and what all rounds together come to.
fn noise(this: &Run, again: &Run) -> String {
    let mut out = String::from("the machine's own noise, this binary against itself:");
    for (a, b) in this.body.contexts.iter().zip(&again.body.contexts) {
        for metric in [&DECODE_TOK_S, &PREFILL_TOK_S] {
            let (a_values, b_values) = (metric.values(a), metric.values(b));
            let Some(shift) = rank::paired(&a_values, &b_values) else {
                continue;
            };
            let shaken: Vec<f64> = a_values
                .iter()
                .zip(&b_values)
                .map(|(a, b)| (b / a).ln().abs())
                .collect();
            let shaken = crate::report::stats::median(&shaken).unwrap_or(0.0);
            out += &format!(
                "\n  {} at {} context: ±{:.1}% in a round; over all, {:+.1}% [{:+.1}%, {:+.1}%]",
                metric.key,
                units::tokens(a.context_tokens),
                100.0 * shaken,
                100.0 * (shift.ratio - 1.0),
                100.0 * (shift.low - 1.0),
                100.0 * (shift.high - 1.0)
            );
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_get_all_flags_but_those_of_the_comparison() {
        let line = "bench c.jsonl --ctx 64 --against-binary x -o out --fail-above=5% --json -q \
                    --against-flags=--threads\u{a0}1 --repetitions 12 -n 8 -oother -r 3 -r5 --ci=ci -m tiny";
        let kept = passed_on(line.split(' ').map(OsString::from));
        let kept: Vec<_> = kept.iter().map(|arg| arg.to_str().unwrap()).collect();
        assert_eq!(kept.join(" "), "bench c.jsonl --ctx 64 -n 8 -m tiny");
    }
}
