//! A server under load: what one request saw, and all together, by how many there were at once.

use super::content::{Block, Section, Table};
use super::record::{ContextRun, Repetition};
use super::stats::{Summary, percentile};
use super::{Run, units};

/// Samples from which on a 99th percentile is more than the largest of them.
pub const ENOUGH_FOR_P99: usize = 100;

/// Requests of one context at one concurrency.
#[derive(Clone, Copy, Debug)]
pub struct Level<'a> {
    pub context_tokens: usize,
    pub concurrency: usize,
    pub requests: &'a [Repetition],
    /// From the first request sent to the last token
    pub wall_ms: f64,
}

/// The slow end of a set of samples.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Tail {
    P99(f64),
    /// Of too few samples for a percentile so high
    Largest(f64),
}

/// All levels of a context that have an answer, alone first.
pub fn levels(context: &ContextRun) -> Vec<Level<'_>> {
    let context_tokens = context.context_tokens;
    let alone = Level {
        context_tokens,
        concurrency: 1,
        requests: &context.repetitions,
        wall_ms: context.repetitions.iter().map(|r| r.e2e_ms).sum(),
    };
    let concurrent = context.concurrent.iter().map(|run| Level {
        context_tokens,
        concurrency: run.concurrency,
        requests: &run.requests,
        wall_ms: run.wall_ms,
    });
    let levels = std::iter::once(alone).chain(concurrent);
    levels.filter(|level| !level.requests.is_empty()).collect()
}

impl Level<'_> {
    pub fn ttft_ms(&self) -> Vec<f64> {
        self.requests
            .iter()
            .map(|request| request.ttft_ms)
            .collect()
    }

    /// Of all requests together.
    pub fn itl_ms(&self) -> Vec<f64> {
        let gaps = self.requests.iter().flat_map(|request| &request.itl_ms);
        gaps.copied().collect()
    }

    /// Generated tokens of all requests per second of the level.
    pub fn total_tok_s(&self) -> f64 {
        let tokens = self.requests.iter().map(|request| request.generated_tokens);
        1e3 * tokens.sum::<usize>() as f64 / self.wall_ms
    }

    /// Decode speed that one request saw.
    pub fn request_tok_s(&self) -> Option<Summary> {
        let rates = self.requests.iter().map(|request| request.decode_tok_s);
        Summary::of(&rates.filter(|rate| *rate > 0.0).collect::<Vec<_>>())
    }

    fn prompt_tokens(&self) -> f64 {
        let tokens = self.requests.iter().map(|r| r.prompt_tokens as f64);
        percentile(&tokens.collect::<Vec<_>>(), 50.0).unwrap_or(0.0)
    }
}

impl Tail {
    pub fn of(samples: &[f64]) -> Option<Self> {
        match samples.len() {
            n if n >= ENOUGH_FOR_P99 => percentile(samples, 99.0).map(Tail::P99),
            _ => percentile(samples, 100.0).map(Tail::Largest),
        }
    }

    pub fn value(self) -> f64 {
        match self {
            Tail::P99(value) | Tail::Largest(value) => value,
        }
    }

    /// `12.3`, or `max 12.3`.
    pub fn show(self) -> String {
        match self {
            Tail::P99(value) => units::significant(value),
            Tail::Largest(value) => format!("max {}", units::significant(value)),
        }
    }
}

/// The columns of [`row`].
pub const HEADER: [&str; 10] = [
    "context",
    "at once",
    "requests",
    "prompt tokens",
    "ttft_ms p50",
    "ttft_ms p99",
    "itl_ms p50",
    "itl_ms p99",
    "tok/s of one",
    "tok/s of all",
];

/// What a table says of a level.
pub fn row(level: &Level) -> Vec<String> {
    let (ttft, itl) = (level.ttft_ms(), level.itl_ms());
    let none = || "–".to_string();
    let middle = |samples: &[f64]| percentile(samples, 50.0).map_or_else(none, units::significant);
    let tail = |samples: &[f64]| Tail::of(samples).map_or_else(none, Tail::show);
    vec![
        units::tokens(level.context_tokens),
        level.concurrency.to_string(),
        level.requests.len().to_string(),
        format!("{:.0}", level.prompt_tokens()),
        middle(&ttft),
        tail(&ttft),
        middle(&itl),
        tail(&itl),
        (level.request_tok_s()).map_or_else(none, |s| units::significant(s.median)),
        units::significant(level.total_tok_s()),
    ]
}

/// What the figures of [`row`] are.
pub const EXPLANATION: &str = "Every client sends its next request when its last is answered. ttft_ms: from \
    sending a request to its first event with text; itl_ms: between events with text, of all requests \
    together; tok/s of one: median over requests of (tokens - 1) / (last event - first event); tok/s of \
    all: generated tokens / time from the first request sent to the last token. A p99 needs 100 samples; \
    below, the largest stands there. Every request is in requests.csv.";

/// `None` if no run is of a server.
pub(super) fn section(runs: &[Run]) -> Option<Section> {
    let mut rows = Vec::new();
    for run in runs.iter().filter(|run| run.body.endpoint.is_some()) {
        for level in run.body.contexts.iter().flat_map(levels) {
            let mut cells = vec![run.name.clone()];
            cells.extend(row(&level));
            rows.push(cells);
        }
    }
    if rows.is_empty() {
        return None;
    }
    let header: Vec<&str> = std::iter::once("run").chain(HEADER).collect();
    let blocks = vec![
        Table::block(1, &header, rows),
        Block::Text(EXPLANATION.to_string()),
    ];
    Some(Section::new("Requests at once", blocks))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::record::ConcurrentRun;

    fn request(ttft_ms: f64) -> Repetition {
        Repetition {
            prompt_tokens: 10,
            generated_tokens: 4,
            ttft_ms,
            itl_ms: vec![10.0, 10.0, 20.0],
            decode_tok_s: 75.0,
            e2e_ms: ttft_ms + 40.0,
            ..Repetition::default()
        }
    }

    #[test]
    fn a_level_counts_tokens_of_all_requests_over_its_time() {
        let context = ContextRun {
            context_tokens: 14,
            repetitions: vec![request(60.0), request(60.0)],
            concurrent: vec![ConcurrentRun {
                concurrency: 3,
                wall_ms: 160.0,
                requests: vec![request(100.0); 4],
                failed: 1,
            }],
            ..ContextRun::default()
        };
        let levels = levels(&context);
        assert_eq!(levels.len(), 2);
        assert_eq!((levels[0].concurrency, levels[1].concurrency), (1, 3));
        assert_eq!(levels[0].total_tok_s(), 40.0);
        assert_eq!(levels[1].total_tok_s(), 100.0);
        assert_eq!(levels[1].itl_ms().len(), 12);
        let row = row(&levels[1]);
        assert_eq!(row.len(), HEADER.len());
        assert_eq!(row[5], "max 100");
    }

    #[test]
    fn a_p99_is_told_of_a_hundred_samples_and_not_of_fewer() {
        let samples: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(Tail::of(&samples), Some(Tail::P99(99.01)));
        assert_eq!(Tail::of(&samples[..99]), Some(Tail::Largest(99.0)));
        assert_eq!(Tail::of(&[]), None);
    }
}
