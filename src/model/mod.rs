//! What a checkpoint means: its configuration, its weights by role, its text. Knows no hardware.

pub mod chat;
pub mod config;
pub mod generation_config;
mod python_json;
pub mod source;
pub mod synth;
pub mod tokenizer;
pub mod weights;

pub use chat::{ChatError, ChatTemplate, Message};
pub use config::{ConfigError, ModelConfig};
pub use generation_config::{GenerationConfig, GenerationConfigError};
pub use source::{Source, SourceError};
pub use tokenizer::{Tokenizer, TokenizerError};
