//! Text in and out of a model: tokenizer, chat template, generation defaults.

use std::sync::Arc;

use super::{EngineError, Result};
use crate::formats::corpus::Content;
use crate::model::{
    ChatError, ChatTemplate, GenerationConfig, GenerationConfigError, Message, Source,
    TemplateInputs, Tokenizer, TokenizerFiles,
};

/// What a model needs to read and write text, without its weights.
///
/// Chat template and generation defaults are judged where they are used: a broken template is
/// nobody's concern who continues plain text.
pub struct TextModel {
    pub tokenizer: Tokenizer,
    chat_template: std::result::Result<Option<ChatTemplate>, Arc<ChatError>>,
    generation_config: std::result::Result<GenerationConfig, Arc<GenerationConfigError>>,
    location: String,
}

impl TextModel {
    /// Reads tokenizer, chat template and generation defaults.
    ///
    /// # Errors
    /// Files that are missing or damaged.
    pub fn load(source: &Source) -> Result<Self> {
        let tokenizer = source.read_required("tokenizer.json")?;
        let files = TokenizerFiles::read(&tokenizer, |file| source.read(file))?;
        let config = files.config.as_deref();
        let tokenizer = Tokenizer::from_bytes(&tokenizer, config)?;
        let generation_config = GenerationConfig::from_bytes(
            source.read("generation_config.json")?.as_deref(),
            &source.read_required("config.json")?,
        );
        Ok(TextModel {
            tokenizer,
            chat_template: ChatTemplate::from_bytes(config, files.chat_template.as_deref())
                .map_err(Arc::new),
            generation_config: generation_config.map_err(Arc::new),
            location: source.location(),
        })
    }

    /// Sampling defaults and stop tokens.
    ///
    /// # Errors
    /// If generation_config.json cannot be used.
    pub fn generation_config(&self) -> Result<&GenerationConfig> {
        self.generation_config
            .as_ref()
            .map_err(|error| EngineError::GenerationConfig(Arc::clone(error)))
    }

    /// Whether the model comes with a chat template, whatever is wrong with it.
    pub fn has_chat_template(&self) -> bool {
        !matches!(self.chat_template, Ok(None))
    }

    /// The prompt ids of a conversation, up to where the assistant begins to answer.
    ///
    /// # Errors
    /// If the model has no chat template, or it refuses the conversation.
    pub fn encode_chat(&self, messages: &[Message]) -> Result<Vec<u32>> {
        Ok(self.tokenizer.encode(&self.render_chat(messages)?)?)
    }

    /// The text of a conversation, up to where the assistant begins to answer.
    ///
    /// # Errors
    /// If the model has no chat template, or it refuses the conversation.
    pub fn render_chat(&self, messages: &[Message]) -> Result<String> {
        Ok(self.chat_template()?.render(messages, None, true)?)
    }

    /// The ids of a corpus record; conversations go through the chat template as they stand.
    ///
    /// # Errors
    /// If a conversation is met and the model has no chat template, or it refuses the conversation.
    pub fn encode_content(&self, content: &Content) -> Result<Vec<u32>> {
        match content {
            Content::Text(text) | Content::Prompt(text) => {
                Ok(self.tokenizer.encode_document(text)?)
            }
            Content::Messages(conversation) => {
                let inputs = TemplateInputs {
                    tools: conversation.tools.as_ref(),
                    documents: conversation.documents.as_ref(),
                    variables: conversation.chat_template_kwargs.as_ref(),
                    add_generation_prompt: false,
                };
                let template = self.chat_template()?;
                let text = template.render_with(&conversation.messages, &inputs)?;
                Ok(self.tokenizer.encode(&text)?)
            }
        }
    }

    /// The template that makes a prompt of a conversation.
    ///
    /// # Errors
    /// If the model has none, or one that cannot be used.
    pub fn chat_template(&self) -> Result<&ChatTemplate> {
        match &self.chat_template {
            Ok(Some(template)) => Ok(template),
            Ok(None) => Err(EngineError::NoChatTemplate {
                location: self.location.clone(),
            }),
            Err(error) => Err(EngineError::BadChatTemplate(Arc::clone(error))),
        }
    }
}
