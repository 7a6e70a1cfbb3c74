//! A corpus through the model: every routing event counted, and written to the trace.

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;

use super::Settings;
use super::progress::{Progress, TraceSink};
use crate::backend::Routing;
use crate::commands::console::{Console, Unit};
use crate::commands::{Failure, interrupt};
use crate::engine::Engine;
use crate::engine::generate::{FinishReason, GenerateOptions, Observer};
use crate::engine::sampler::SamplingParams;
use crate::formats::Document;
use crate::formats::corpus::{Content, Corpus, Record};
use crate::formats::document::PROFILE;
use crate::planning::profile::ProfileBody;
use crate::planning::trace::{Phase, Picks, Record as Event, TraceHeader};
use crate::planning::{RoutingStats, TraceWriter};

/// Feeds every record through the model; counts, and writes events to `trace` if there is one.
///
/// # Errors
/// The engine's; a trace that cannot be written.
pub fn record(
    engine: &mut Engine,
    corpora: &[Corpus],
    settings: &Settings,
    mut kept: Option<&mut Progress>,
    mut trace: Option<&mut dyn TraceSink>,
    console: &Console,
) -> anyhow::Result<Document<ProfileBody>> {
    let moe = engine.shape().moe.clone();
    let num_layers = engine.shape().num_layers();
    let header = TraceHeader {
        num_layers: num_layers as u16,
        num_experts: moe.num_experts as u16,
        num_experts_per_tok: moe.num_experts_per_tok as u16,
        fingerprint: engine.model_id().fingerprint.clone().unwrap_or_default(),
    };
    let done_before = kept.as_mut().and_then(|progress| progress.take_start());
    let trace = trace
        .as_mut()
        .map(|out| match &done_before {
            None => TraceWriter::new(out, &header),
            Some(_) => Ok(TraceWriter::resume(out, &header)),
        })
        .transpose()?;
    let (skip, stats) = match done_before {
        Some(start) => (start.records, RoutingStats::resume(start.profile)),
        None => {
            let stats = RoutingStats::new(num_layers, moe.num_experts, moe.num_experts_per_tok);
            (0, stats)
        }
    };
    let mut sink = Sink {
        stats,
        trace,
        prompt_end: 0,
        error: None,
    };
    let interrupt = interrupt::flag();
    let in_shard = |number: &usize| number % settings.shard.count == settings.shard.index - 1;
    let used = |corpus: &Corpus| corpus.records.min(settings.max_records);
    let total: usize = corpora.iter().map(used).sum();
    let total = (0..total).filter(in_shard).count();
    let bar = console.progress("profile", total as u64, Unit::Runs);
    let mut number = 0;
    for corpus in corpora {
        for record in corpus.records()?.take(settings.max_records) {
            let record = record?;
            let mine = in_shard(&number);
            number += 1;
            if mine && number <= skip {
                bar.inc(1);
            } else if mine {
                let done = feed(engine, &record, settings, interrupt, &mut sink)
                    .with_context(|| format!("{}: record `{}`", corpus.name(), record.id))?;
                if !done {
                    let kept = match &mut kept {
                        Some(progress) => progress.save()?,
                        None => false,
                    };
                    let next = match kept {
                        true => "the same command goes on from there",
                        false => "nothing was kept",
                    };
                    let position = bar.position();
                    console.note(format!(
                        "interrupted after {position} of {total} records; {next}"
                    ));
                    return Err(Failure::Interrupted.into());
                }
                bar.inc(1);
                if let Some(progress) = &mut kept {
                    let trace_bytes = sink.end_of_trace()?;
                    progress.record_done(number, sink.stats.counts(), trace_bytes)?;
                }
            }
        }
    }
    bar.finish_and_clear();
    let Sink { stats, trace, .. } = sink;
    if let Some(trace) = trace {
        trace.finish()?;
    }
    let hashes: BTreeSet<String> = corpora.iter().map(|corpus| corpus.sha256.clone()).collect();
    Ok(Document::new(
        PROFILE,
        Some(engine.model_id().clone()),
        stats.profile(hashes),
    ))
}

/// Where routing events go.
struct Sink<'a, 'w> {
    stats: RoutingStats,
    trace: Option<TraceWriter<'a, &'w mut dyn TraceSink>>,
    /// Tokens from this position on are decode
    prompt_end: usize,
    /// The first failure to write; events come from where none can be returned
    error: Option<io::Error>,
}

impl Sink<'_, '_> {
    /// Closes the last frame; bytes of the trace so far, 0 without one.
    fn end_of_trace(&mut self) -> io::Result<u64> {
        match &mut self.trace {
            Some(trace) => trace.flush_frame()?.bytes(),
            None => Ok(0),
        }
    }

    fn begin_document(&mut self, domain: &str, prompt_tokens: usize) -> io::Result<()> {
        self.prompt_end = prompt_tokens;
        self.stats.begin_document(domain);
        match &mut self.trace {
            Some(trace) => trace.push(&Event::Document {
                domain: domain.into(),
            }),
            None => Ok(()),
        }
    }

    fn record(&mut self, layer: usize, first_position: usize, routing: &Routing) {
        let phase = if first_position < self.prompt_end {
            Phase::Prefill
        } else {
            Phase::Decode
        };
        let (ids, weights) = (&routing.topk_ids, &routing.topk_weights);
        self.stats.record(phase, layer, ids, weights);
        if let (Some(trace), None) = (&mut self.trace, &self.error) {
            let event = Event::Picks(Picks::new(phase, layer, first_position, ids, weights));
            self.error = trace.push(&event).err();
        }
    }
}

/// One record through the model; false if interrupted.
fn feed(
    engine: &mut Engine,
    record: &Record,
    settings: &Settings,
    interrupt: &AtomicBool,
    sink: &mut Sink<'_, '_>,
) -> anyhow::Result<bool> {
    let mut ids = engine.text().encode_content(&record.content)?;
    ids.truncate(settings.ctx);
    if ids.is_empty() {
        return Ok(true);
    }
    let new_tokens = match record.content {
        Content::Text(_) => 0,
        Content::Prompt(_) | Content::Messages(_) => settings.generate,
    };
    let limit = engine.config().max_position_embeddings;
    // The same room for every record: another would move the experts in VRAM each time.
    engine.reset((settings.ctx + settings.generate).min(limit))?;
    sink.begin_document(&record.domain, ids.len())?;
    let mut on_routing = |layer: usize, first: usize, routing: &Routing| {
        sink.record(layer, first, routing);
    };
    let done = if new_tokens == 0 {
        let proceed = &mut |_| !interrupt.load(Ordering::Relaxed);
        engine.prefill(&ids, &mut on_routing, proceed)?.is_some()
    } else {
        let options = GenerateOptions {
            max_new_tokens: new_tokens,
            sampling: SamplingParams::from(engine.text().generation_config()?),
            stop: Vec::new(),
            ignore_eos: false,
            logprobs: 0,
            forced: Vec::new(),
        };
        let mut observer = Observer {
            on_text: &mut |_| {},
            on_prefill: &mut |_| {},
            on_routing: &mut on_routing,
        };
        let generation = engine.generate(&ids, &options, interrupt, &mut observer)?;
        generation.finish_reason != FinishReason::Interrupted
    };
    match sink.error.take() {
        Some(error) => Err(error.into()),
        None => Ok(done),
    }
}
