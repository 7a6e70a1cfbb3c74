pub mod chat;
pub mod generation_config;
pub mod python_json;
pub mod tokenizer;

pub use chat::{ChatError, ChatTemplate, Message};
pub use generation_config::{GenerationConfig, GenerationConfigError};
pub use tokenizer::{Tokenizer, TokenizerError};
