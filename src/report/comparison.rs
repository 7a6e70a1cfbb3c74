//! Two runs side by side, metric by metric: ratios, and whether their intervals lie apart.

use super::metrics::{METRICS, Metric};
use super::record::{ContextRun, RunBody};
use super::stats::{Interval, Spread, Summary};
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

    /// `apart` or `overlap`, which is no test of significance; nothing is said of ranges.
    pub fn intervals(&self) -> &'static str {
        let ranges = [&self.base, &self.new].map(|s| s.spread == Spread::Range);
        match self.base.interval.overlaps(self.new.interval) {
            _ if ranges.contains(&true) => "too few samples",
            true => "overlap",
            false => "apart",
        }
    }
}

/// Every metric at every context length that both runs have.
pub fn comparisons(base: &RunBody, new: &RunBody) -> Vec<Comparison> {
    shared_contexts(base, new)
        .flat_map(|(base, new)| METRICS.iter().filter_map(|m| comparison(m, base, new)))
        .collect()
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
