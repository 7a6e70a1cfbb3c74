//! What was said so far: messages, the ids that the model has seen of them, and files of both.

use std::path::Path;

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};

use crate::engine::generate::Generation;
use crate::engine::{Engine, TextModel};
use crate::formats::{atomic, input};
use crate::model::Message;

/// A conversation: perhaps a system message, then turns of the user and the assistant.
pub struct Conversation {
    messages: Vec<Message>,
    /// The text that the model was fed and has answered, and the ids of it
    seen: Option<Seen>,
}

struct Seen {
    text: String,
    ids: Vec<u32>,
}

/// The file of `/save`: also a line of a corpus.
#[derive(Serialize, Deserialize)]
struct Saved {
    messages: Vec<Message>,
}

impl Conversation {
    pub fn new(system: Option<&str>) -> Self {
        let mut conversation = Conversation {
            messages: Vec::new(),
            seen: None,
        };
        conversation.set_system(system);
        conversation
    }

    pub fn system(&self) -> Option<&str> {
        let first = self.messages.first()?;
        (first.role == "system").then_some(&first.content)
    }

    /// Sets or removes the system message; what was said stays.
    pub fn set_system(&mut self, text: Option<&str>) {
        if self.system().is_some() {
            self.messages.remove(0);
        }
        if let Some(text) = text {
            self.messages.insert(0, Message::new("system", text));
        }
    }

    /// Forgets all but the system message.
    pub fn reset(&mut self) {
        self.messages.retain(|message| message.role == "system");
        self.seen = None;
    }

    /// Turns of the user.
    pub fn turns(&self) -> usize {
        let turns = self.messages.iter().filter(|m| m.role == "user");
        turns.count()
    }

    pub fn push_user(&mut self, text: impl Into<String>) {
        self.messages.push(Message::new("user", text));
    }

    /// Takes the last turn back, which was not answered.
    pub fn pop_user(&mut self) {
        if self.messages.last().is_some_and(|m| m.role == "user") {
            self.messages.pop();
        }
    }

    /// Adds the answer to `prompt`, the ids of all before it.
    pub fn push_answer(&mut self, text: &TextModel, prompt: &[u32], answer: &Generation) {
        self.seen = self.rendered(text).and_then(|before| {
            let eos = &text.generation_config().ok()?.eos_token_ids;
            let said = match answer.token_ids.split_last() {
                Some((last, said)) if eos.contains(last) => said,
                _ => &answer.token_ids,
            };
            // A stop string cuts the text but not the ids.
            let whole = text.tokenizer.decode(said, true).ok()? == answer.text;
            whole.then(|| Seen {
                text: before + &answer.text,
                ids: [prompt, said].concat(),
            })
        });
        let message = Message::new("assistant", answer.text.clone());
        self.messages.push(message);
    }

    /// The ids of the conversation up to where the assistant begins to answer.
    ///
    /// What the model has said is given back as the ids that it chose, which its text alone may not
    /// give again; so a sequence that holds them goes on from there.
    ///
    /// # Errors
    /// No chat template, or one that refuses the conversation.
    pub fn ids(&self, text: &TextModel) -> anyhow::Result<Vec<u32>> {
        if let Some(seen) = &self.seen
            && let Some(rendered) = self.rendered(text)
            && let Some(rest) = rendered.strip_prefix(&seen.text)
            && text.tokenizer.encode("")?.is_empty()
        {
            return Ok([&seen.ids[..], &text.tokenizer.encode(rest)?].concat());
        }
        Ok(text.encode_chat(&self.messages)?)
    }

    fn rendered(&self, text: &TextModel) -> Option<String> {
        text.render_chat(&self.messages).ok()
    }

    /// The ids of the conversation if `room` tokens hold them, after dropping the oldest turns as far as
    /// needed, and how many those were; `None` if the last turn alone is too long.
    ///
    /// Once turns must go, a quarter of the room is made free: the model reads all that stays anew.
    ///
    /// # Errors
    /// As [`Conversation::ids`].
    pub fn fit(
        &mut self,
        text: &TextModel,
        room: usize,
    ) -> anyhow::Result<Option<(Vec<u32>, usize)>> {
        let ids = self.ids(text)?;
        if ids.len() <= room {
            return Ok(Some((ids, 0)));
        }
        let mut dropped = 0;
        while self.drop_oldest() {
            dropped += 1;
            let ids = self.ids(text)?;
            if ids.len() <= room - room / 4 {
                return Ok(Some((ids, dropped)));
            }
        }
        let ids = self.ids(text)?;
        Ok((ids.len() <= room).then_some((ids, dropped)))
    }

    /// Drops the oldest turn of the user and its answer, if another one follows.
    fn drop_oldest(&mut self) -> bool {
        let mut users = (self.messages.iter().enumerate())
            .filter(|(_, message)| message.role == "user")
            .map(|(at, _)| at);
        let (Some(first), Some(second)) = (users.next(), users.next()) else {
            return false;
        };
        self.messages.drain(first..second);
        self.seen = None;
        true
    }

    /// Writes all messages to a file.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn save(&self, path: &Path) -> anyhow::Result<()> {
        let messages = self.messages.clone();
        let mut line = serde_json::to_vec(&Saved { messages })?;
        line.push(b'\n');
        atomic::write(path, &line).with_context(|| path.display().to_string())?;
        Ok(())
    }

    /// Takes the messages of a file in place of these.
    ///
    /// # Errors
    /// If it cannot be read or holds something else; the conversation stays as it is.
    pub fn load(&mut self, path: &Path) -> anyhow::Result<()> {
        let bytes = input::read(path).with_context(|| path.display().to_string())?;
        let saved: Saved = serde_json::from_slice(&bytes).with_context(|| {
            format!(
                "{}: not a saved chat; expected {{\"messages\": [..]}}",
                path.display()
            )
        })?;
        for (at, message) in saved.messages.iter().enumerate() {
            let known = match message.role.as_str() {
                "system" => at == 0,
                role => role == "user" || role == "assistant",
            };
            if !known {
                bail!(
                    "{}: message {} is of role `{}`; expected user, assistant, or system first",
                    path.display(),
                    at + 1,
                    message.role
                );
            }
        }
        self.messages = saved.messages;
        self.pop_user();
        self.seen = None;
        Ok(())
    }
}

/// How many of `ids` the engine's sequence has seen already: as many as are known of this or an earlier
/// conversation, at least one is left to feed.
///
/// # Errors
/// If the backend fails.
pub fn keep_prefix(engine: &mut Engine, ids: &[u32]) -> anyhow::Result<usize> {
    Ok(engine.resume(ids)?)
}
