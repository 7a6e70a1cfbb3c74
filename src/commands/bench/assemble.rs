//! From what was measured to run.json and its report.

use std::path::Path;

use anyhow::Context;
use sha2::{Digest, Sha256};

use super::measure::MeasurePlan;
use super::predict::{self, Lengths, Situation};
use super::variants::Variants;
use super::{BenchArgs, gpu};
use crate::commands::{machine as machines, report};
use crate::engine::Engine;
use crate::formats::Document;
use crate::formats::corpus::Corpus;
use crate::formats::document::RUN;
use crate::hardware::{HardwareBody, MonitorRecord};
use crate::planning::footprint::Footprint;
use crate::planning::hardware::Hardware;
use crate::planning::placement::{self, Placement};
use crate::planning::profile::ProfileBody;
use crate::report::record::{
    ContextRun, Labels, MemoryComponent, MemoryRecord, Quality, RunBody, Settings, SoftwareFacts,
    Tier,
};

/// All that goes into the records of a bench.
pub struct Results<'a> {
    pub args: &'a BenchArgs,
    pub engine: &'a Engine,
    pub synthetic: bool,
    pub corpus: &'a Corpus,
    pub plan: &'a MeasurePlan,
    pub footprint: &'a Footprint,
    pub placement: &'a Document<Placement>,
    pub profile: Option<&'a Document<ProfileBody>>,
    /// That predictions are for
    pub machine: Hardware,
    pub hardware: HardwareBody,
    pub variants: &'a Variants<'a>,
    pub notes: Vec<String>,
    pub quality: Option<Quality>,
    pub monitor: MonitorRecord,
}

/// Where the blocks ran.
pub fn executed_on(engine: &Engine) -> String {
    let facts = engine.backend();
    match facts.gpu() {
        Some(_) => format!("{} + cpu", facts.name),
        None => facts.name.clone(),
    }
}

/// The machine that ran, or the one that was named.
pub fn machine(engine: &Engine, given: Option<Hardware>, hardware: &HardwareBody) -> Hardware {
    match engine.backend().gpu() {
        Some(_) => given.unwrap_or_else(|| machines::with_gpu(hardware)),
        None => given.map_or_else(
            || machines::on_cpu(hardware),
            |machine| Hardware {
                gpu: None,
                ..machine
            },
        ),
    }
}

impl Results<'_> {
    /// Writes run.json and report of each variant that has results; returned are the documents and
    /// where their files are.
    ///
    /// - `contexts`: `[variant][context]`
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn write(
        &self,
        contexts: Vec<Vec<ContextRun>>,
    ) -> anyhow::Result<Vec<(Document<RunBody>, String)>> {
        let mut written = Vec::new();
        for (i, contexts) in contexts.into_iter().enumerate() {
            let document = self.document(i, contexts)?;
            let folder = match self.variants.name(i) {
                None => self.args.output.clone(),
                Some(rival) => self.args.output.join(rival),
            };
            let files = self.write_one(&folder, &document)?;
            written.push((document, files));
        }
        Ok(written)
    }

    fn write_one(&self, folder: &Path, document: &Document<RunBody>) -> anyhow::Result<String> {
        std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        document.write(&folder.join("run.json"))?;
        let files = report::of_bench(folder, document, self.profile, self.placement)?;
        Ok(report::list(folder, &files))
    }

    fn document(
        &self,
        i: usize,
        mut contexts: Vec<ContextRun>,
    ) -> anyhow::Result<Document<RunBody>> {
        let (engine, placement) = (self.engine, &self.placement.body);
        let flags = self.variants.flags(i);
        let situation = match engine.backend().gpu() {
            Some(_) => predict::situation(flags, placement),
            None => Situation::on_cpu(self.footprint.num_layers),
        };
        for context in &mut contexts {
            self.predict(context, &situation);
        }
        let mut memory = memory(placement, &self.monitor, engine.backend().gpu().is_some());
        if gpu::by_the_plan(engine, flags, placement) {
            memory.compare_vram();
        }
        let mut notes = self.variants.notes(i, engine);
        notes.extend(self.notes.iter().cloned());
        let body = RunBody {
            labels: Labels {
                synthetic: self.synthetic,
                executed_on: executed_on(engine),
                notes,
            },
            hardware: self.hardware.clone(),
            software: software(engine),
            settings: Settings {
                warmups: self.plan.warmups,
                repetitions: self.plan.repetitions,
                generated_tokens: self.plan.generated_tokens,
                corpus: self.corpus.name().into(),
                corpus_sha256: Some(self.corpus.sha256.clone()),
                continuation: self.plan.continuation,
                command: std::env::args().collect::<Vec<_>>().join(" "),
            },
            placement_sha256: Some(hash_json(placement)?),
            contexts,
            memory,
            quality: self.quality.clone().filter(|_| i == 0),
            monitor: Some(self.monitor.clone()).filter(|_| i == 0),
            endpoint: None,
        };
        Ok(Document::new(RUN, Some(engine.model_id().clone()), body))
    }

    /// What was to be expected of what ran.
    fn predict(&self, context: &mut ContextRun, situation: &Situation) {
        let Some(first) = context.repetitions.first() else {
            return;
        };
        let lengths = Lengths {
            prompt_tokens: first.prompt_tokens,
            generated_tokens: first.generated_tokens,
        };
        context.bytes_read_per_token = self.engine.decode_read_bytes(lengths.seen());
        context.prediction = Some(predict::predict(
            self.footprint,
            &self.machine,
            lengths,
            situation,
        ));
        context.compare_prediction();
    }
}

/// Parts of a plan that are there for the GPU alone.
const GPU_ONLY: [&str; 3] = ["CUDA context", "workspace", "expert slots"];

/// The plan's parts by tier; without a GPU all are in RAM, and there is no budget.
fn memory(placement: &Placement, monitor: &MonitorRecord, on_gpu: bool) -> MemoryRecord {
    let tier = |tier| match tier {
        placement::Tier::Vram if !on_gpu => Tier::Ram,
        placement::Tier::Vram => Tier::Vram,
        placement::Tier::Ram => Tier::Ram,
        placement::Tier::Disk => Tier::Disk,
    };
    let items = placement.memory.iter();
    let items = items.filter(|item| on_gpu || !GPU_ONLY.contains(&item.component.as_str()));
    let components = items.map(|item| MemoryComponent {
        component: item.component.clone(),
        tier: tier(item.tier),
        bytes: item.bytes,
    });
    MemoryRecord {
        components: components.collect(),
        vram_budget_bytes: on_gpu.then_some(placement.vram_budget_bytes),
        peak_rss_bytes: monitor.peak_rss_bytes,
        peak_vram_bytes: monitor.peak_vram_bytes,
        vram_prediction_error: None,
    }
}

/// Of this build.
pub fn this_program() -> SoftwareFacts {
    SoftwareFacts {
        moectl_version: env!("CARGO_PKG_VERSION").into(),
        features: [("tiny-moe", cfg!(feature = "tiny-moe"))]
            .iter()
            .filter(|(_, on)| *on)
            .map(|(name, _)| name.to_string())
            .collect(),
        target: env!("MOECTL_TARGET").into(),
        rustc_version: env!("MOECTL_RUSTC").into(),
        ..SoftwareFacts::default()
    }
}

fn software(engine: &Engine) -> SoftwareFacts {
    let backend = engine.backend();
    SoftwareFacts {
        backend: backend.name,
        kernels: backend.kernels,
        threads: backend.threads,
        ..this_program()
    }
}

fn hash_json(value: &impl serde::Serialize) -> anyhow::Result<String> {
    Ok(format!("{:x}", Sha256::digest(serde_json::to_vec(value)?)))
}
