//! What a checkpoint means: its configuration, its weights by role, its text, and the order in
//! which blocks run. Knows no hardware: blocks are computed by a [`Backend`](crate::backend::Backend).

pub mod config;
pub mod forward;
pub mod source;
pub mod weights;

pub use config::{ConfigError, ModelConfig};
pub use forward::{LogitRows, OnRouting, Runner, Sequence};
pub use source::{Source, SourceError};
