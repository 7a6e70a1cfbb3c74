//! Records, statistics, charts and text reports.

pub mod charts;
pub mod font;
pub mod metrics;
pub mod record;
pub mod stats;
pub mod svg;
pub mod units;

pub use charts::{Chart, RouterPicks};
pub use record::RunBody;

/// One run.json with what its envelope says.
#[derive(Clone, Debug)]
pub struct Run {
    /// Short, for legends and columns: the file's stem or a label.
    pub name: String,
    /// Model id and revision.
    pub model: String,
    /// RFC 3339, UTC.
    pub created: String,
    pub body: RunBody,
}

impl Run {
    /// `2025-11-23` of the time stamp.
    pub fn day(&self) -> &str {
        self.created.get(..10).unwrap_or(&self.created)
    }
}
