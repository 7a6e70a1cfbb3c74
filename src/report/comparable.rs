//! What two runs must have in common for a difference in speed to mean anything.

use std::fmt;
use std::str::FromStr;

use super::Run;

/// A condition of a run that is not the program's speed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aspect {
    Model,
    Machine,
    Backend,
    Threads,
    Corpus,
    Continuation,
    GeneratedTokens,
    Budget,
    Contexts,
    Output,
}

/// All of them with the names that `--allow-different` takes.
pub const ASPECTS: [(Aspect, &str); 10] = [
    (Aspect::Model, "model"),
    (Aspect::Machine, "machine"),
    (Aspect::Backend, "backend"),
    (Aspect::Threads, "threads"),
    (Aspect::Corpus, "corpus"),
    (Aspect::Continuation, "continuation"),
    (Aspect::GeneratedTokens, "generated-tokens"),
    (Aspect::Budget, "budget"),
    (Aspect::Contexts, "contexts"),
    (Aspect::Output, "output"),
];

/// One condition that differs.
#[derive(Clone, Debug, PartialEq)]
pub struct Difference {
    pub aspect: Aspect,
    pub base: String,
    pub new: String,
}

impl Aspect {
    pub fn name(self) -> &'static str {
        let found = ASPECTS.iter().find(|(aspect, _)| *aspect == self);
        found.expect("every aspect has a name").1
    }
}

impl FromStr for Aspect {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = ASPECTS.iter().find(|(_, known)| *known == name);
        found.map(|(aspect, _)| *aspect).ok_or_else(|| {
            let names: Vec<&str> = ASPECTS.iter().map(|(_, name)| *name).collect();
            format!("expected one of {}", names.join(", "))
        })
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(
            f,
            "{}: {} against {}",
            self.aspect.name(),
            self.base,
            self.new
        )
    }
}

/// Whatever differs between two runs beside what was measured; contexts and output, which need a
/// look at what was measured, are not among it.
pub fn differences(base: &Run, new: &Run) -> Vec<Difference> {
    let mut found = Vec::new();
    let mut differ = |aspect, of: &dyn Fn(&Run) -> String| {
        let (base, new) = (of(base), of(new));
        if base != new {
            found.push(Difference { aspect, base, new });
        }
    };
    differ(Aspect::Model, &model);
    differ(Aspect::Machine, &|run| run.body.hardware.summary());
    differ(Aspect::Backend, &backend);
    differ(Aspect::Threads, &|run| {
        run.body.software.threads.to_string()
    });
    differ(Aspect::Corpus, &corpus);
    differ(Aspect::Continuation, &|run| {
        run.body.settings.continuation.describe().into()
    });
    differ(Aspect::GeneratedTokens, &|run| {
        run.body.settings.generated_tokens.to_string()
    });
    // On a CPU a budget is planned and changes nothing.
    if [base, new]
        .iter()
        .all(|run| run.body.memory.peak_vram_bytes.is_some())
    {
        differ(Aspect::Budget, &|run| {
            let budget = run.body.memory.vram_budget_bytes;
            budget.map_or("none".into(), |bytes| format!("{bytes} bytes"))
        });
    }
    found
}

fn model(run: &Run) -> String {
    let synthetic = match run.body.labels.synthetic {
        true => " (synthetic weights)",
        false => "",
    };
    let fingerprint = run.fingerprint.as_deref().unwrap_or("");
    let fingerprint = match fingerprint.get(..12) {
        Some(start) => format!(" {start}"),
        None => String::new(),
    };
    format!("{}{synthetic}{fingerprint}", run.model)
}

fn backend(run: &Run) -> String {
    let software = &run.body.software;
    match &software.kernels {
        Some(kernels) => format!("{} ({kernels})", run.body.labels.executed_on),
        None => run.body.labels.executed_on.clone(),
    }
}

fn corpus(run: &Run) -> String {
    let settings = &run.body.settings;
    match settings.corpus_sha256.as_deref().and_then(|s| s.get(..12)) {
        Some(start) => format!("sha256 {start}"),
        None => settings.corpus.clone(),
    }
}
