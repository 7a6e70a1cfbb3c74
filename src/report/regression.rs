//! Two runs against each other: ratios, whether intervals overlap, and what CI should fail on.

use std::fmt;

use super::metrics::{HEADLINES, METRICS, Metric, PEAK_RSS, PEAK_VRAM};
use super::record::{ContextRun, RunBody};
use super::stats::{Interval, Summary};
use super::units;

/// One metric at one context length in both runs.
#[derive(Clone, Debug)]
pub struct Comparison {
    pub context_tokens: usize,
    pub metric: &'static Metric,
    pub base: Summary,
    pub new: Summary,
}

impl Comparison {
    /// `None` against a base of zero.
    pub fn ratio(&self) -> Option<f64> {
        (self.base.median != 0.0).then(|| self.new.median / self.base.median)
    }

    /// No more than that: it is not a test of significance.
    pub fn intervals_overlap(&self) -> bool {
        self.base.interval.overlaps(self.new.interval)
    }
}

/// A metric that got worse by more than was allowed.
#[derive(Clone, Debug, PartialEq)]
pub struct Regression {
    pub metric: &'static str,
    pub unit: &'static str,
    /// Absent for what is measured once per run.
    pub context_tokens: Option<usize>,
    pub base: f64,
    pub new: f64,
    /// As a share of `base`.
    pub worse_by: f64,
}

impl fmt::Display for Regression {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let value = |v| units::with_unit(v, self.unit);
        write!(f, "{}", self.metric)?;
        if let Some(context) = self.context_tokens {
            write!(f, " at {} context", units::tokens(context))?;
        }
        let worse_by = self.worse_by * 100.0;
        write!(
            f,
            ": {} -> {}, {worse_by:.1}% worse",
            value(self.base),
            value(self.new)
        )
    }
}

/// Every metric at every context length that both runs have.
pub fn comparisons(base: &RunBody, new: &RunBody) -> Vec<Comparison> {
    shared_contexts(base, new)
        .flat_map(|(base, new)| METRICS.iter().filter_map(|m| comparison(m, base, new)))
        .collect()
}

/// What got worse from `base` to `new`.
///
/// A headline metric counts if its median is worse by more than `threshold` (0.05 is 5%) and the
/// 95% intervals do not overlap, so that noise alone fails no build. Peaks of memory have no
/// interval and count by the threshold alone.
pub fn compare(base: &RunBody, new: &RunBody, threshold: f64) -> Vec<Regression> {
    let mut found = Vec::new();
    for (base, new) in shared_contexts(base, new) {
        for c in HEADLINES.iter().filter_map(|m| comparison(m, base, new)) {
            let worse_by = c.metric.worsening(c.base.median, c.new.median);
            if worse_by > threshold && !c.intervals_overlap() {
                found.push(Regression {
                    metric: c.metric.key,
                    unit: c.metric.unit,
                    context_tokens: Some(c.context_tokens),
                    base: c.base.median,
                    new: c.new.median,
                    worse_by,
                });
            }
        }
    }
    let rss = Some((base.memory.peak_rss_bytes, new.memory.peak_rss_bytes));
    let vram = base.memory.peak_vram_bytes.zip(new.memory.peak_vram_bytes);
    for (metric, peaks) in [(PEAK_RSS.0, rss), (PEAK_VRAM.0, vram)] {
        let Some((base, new)) = peaks.filter(|(base, _)| *base > 0) else {
            continue;
        };
        let worse_by = new as f64 / base as f64 - 1.0;
        if worse_by > threshold {
            found.push(Regression {
                metric,
                unit: "bytes",
                context_tokens: None,
                base: base as f64,
                new: new as f64,
                worse_by,
            });
        }
    }
    found
}

fn shared_contexts<'a>(
    base: &'a RunBody,
    new: &'a RunBody,
) -> impl Iterator<Item = (&'a ContextRun, &'a ContextRun)> {
    base.contexts.iter().filter_map(|context| {
        let same = |c: &&ContextRun| c.context_tokens == context.context_tokens;
        Some((context, new.contexts.iter().find(same)?))
    })
}

fn comparison(metric: &'static Metric, base: &ContextRun, new: &ContextRun) -> Option<Comparison> {
    Some(Comparison {
        context_tokens: base.context_tokens,
        metric,
        base: metric.summary(base)?,
        new: metric.summary(new)?,
    })
}

/// `[87.1, 88.0]`, or nothing where there is one sample.
pub fn interval_text(interval: Interval) -> String {
    if interval.low == interval.high {
        return String::new();
    }
    let ends = (
        units::significant(interval.low),
        units::significant(interval.high),
    );
    format!("[{}, {}]", ends.0, ends.1)
}
