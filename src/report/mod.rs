//! Records, statistics, charts and text reports.

pub mod metrics;
pub mod record;
pub mod stats;
pub mod units;
