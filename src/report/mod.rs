//! Records, statistics, charts and text reports.
