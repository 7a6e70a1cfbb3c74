//! Text in and out of a model: tokenizer, chat template, generation defaults.

use super::{EngineError, Result};
use crate::formats::corpus::Content;
use crate::model::{ChatTemplate, GenerationConfig, Message, Source, Tokenizer};

/// What a model needs to read and write text, without its weights.
pub struct TextModel {
    pub tokenizer: Tokenizer,
    pub chat_template: Option<ChatTemplate>,
    pub generation_config: GenerationConfig,
    location: String,
}

impl TextModel {
    /// Reads tokenizer, chat template and generation defaults.
    pub fn load(source: &Source) -> Result<Self> {
        let tokenizer_config = source.read("tokenizer_config.json")?;
        let tokenizer_config = tokenizer_config.as_deref();
        let template = source.read("chat_template.jinja")?;
        Ok(TextModel {
            tokenizer: Tokenizer::from_bytes(
                &source.read_required("tokenizer.json")?,
                tokenizer_config,
            )?,
            chat_template: ChatTemplate::from_bytes(tokenizer_config, template.as_deref())?,
            generation_config: GenerationConfig::from_bytes(
                source.read("generation_config.json")?.as_deref(),
                &source.read_required("config.json")?,
            )?,
            location: source.location(),
        })
    }

    /// The prompt ids of a conversation, up to where the assistant begins to answer.
    pub fn encode_chat(&self, messages: &[Message]) -> Result<Vec<u32>> {
        Ok(self.tokenizer.encode(&self.render_chat(messages)?)?)
    }

    /// The text of a conversation, up to where the assistant begins to answer.
    pub fn render_chat(&self, messages: &[Message]) -> Result<String> {
        Ok(self.template()?.render(messages, None, true)?)
    }

    /// The ids of a corpus record; conversations go through the chat template as they stand.
    pub fn encode_content(&self, content: &Content) -> Result<Vec<u32>> {
        let rendered;
        let text = match content {
            Content::Text(text) | Content::Prompt(text) => text,
            Content::Messages(messages) => {
                rendered = self.template()?.render(messages, None, false)?;
                &rendered
            }
        };
        Ok(self.tokenizer.encode(text)?)
    }

    fn template(&self) -> Result<&ChatTemplate> {
        self.chat_template
            .as_ref()
            .ok_or_else(|| EngineError::NoChatTemplate {
                location: self.location.clone(),
            })
    }
}
