//! What a checkpoint means: its configuration, its weights by role, its text. Knows no hardware.

pub mod chat;
pub mod config;
pub mod families;
mod fields;
pub mod generation_config;
pub mod hub;
mod jinja;
mod rope;
pub mod source;
pub mod synth;
pub mod tokenizer;
mod tokenizer_config;
pub mod tokenizer_files;
pub mod weights;

pub use chat::{ChatError, ChatTemplate, Message, TemplateInputs};
pub use config::{ConfigError, ModelConfig};
pub use generation_config::{GenerationConfig, GenerationConfigError, Suppressed};
pub use source::{Source, SourceError};
pub use tokenizer::{Tokenizer, TokenizerError};
pub use tokenizer_files::{TokenizerFiles, TokenizerFilesError};
