//! `moectl run --chat`: turns of a conversation, on a terminal or from a pipe.

use std::io::{self, Write};
use std::path::Path;

use super::commands::{COMMANDS, ChatCommand, parse};
use super::conversation::{Conversation, keep_prefix};
use super::editor::{Input, TurnReader};
use super::{RunArgs, closing_line, generate, load};
use crate::commands::console::Console;
use crate::commands::{Failure, cache_state, interrupt};
use crate::engine::Engine;
use crate::engine::generate::{FinishReason, GenerateOptions, Generation};
use crate::hardware::monitor::high_water_mark;
use crate::model::{Message, ModelConfig, Source};
use crate::planning::units::show_bytes;

const DEFAULT_CONTEXT: usize = 8192;

/// Loads the model and talks until the user ends it.
///
/// # Errors
/// As for loading a model; the engine's.
pub fn chat(
    args: &RunArgs,
    source: &Source,
    config: &ModelConfig,
    options: GenerateOptions,
    console: &Console,
) -> anyhow::Result<()> {
    let limit = config.max_position_embeddings;
    let max_tokens = args
        .ctx
        .map_or(DEFAULT_CONTEXT.min(limit), |ctx| ctx as usize);
    let engine = load(args, source, max_tokens, console)?;
    let mut chat = Chat {
        conversation: Conversation::new(args.system.as_deref()),
        engine,
        options,
        max_tokens,
        limit,
        last: None,
        console,
    };
    let ended = chat.run();
    cache_state::save(args.cache.cache_state.as_deref(), &chat.engine, console)?;
    ended
}

struct Chat<'a> {
    engine: Engine,
    conversation: Conversation,
    options: GenerateOptions,
    /// Room of the sequence
    max_tokens: usize,
    /// Room that the model could have
    limit: usize,
    /// The last answer
    last: Option<Generation>,
    console: &'a Console,
}

impl Chat<'_> {
    fn run(&mut self) -> anyhow::Result<()> {
        // A template that cannot be used is told before the first line is typed.
        self.engine
            .text()
            .encode_chat(&[Message::new("user", "")])?;
        let interrupt = interrupt::flag();
        let reader = TurnReader::new()?;
        if reader.interactive() {
            interrupt::stops_only_what_runs();
            self.console.note(
                "chat: Enter sends, Alt-Enter begins a new line, Ctrl-C stops an answer, Ctrl-D \
                 ends; /help for more",
            );
        }
        let mut ending = false;
        loop {
            let asked = std::mem::take(&mut ending);
            match reader.next(interrupt)? {
                Input::End => return Ok(()),
                Input::CtrlC if asked => return Ok(()),
                Input::CtrlC => {
                    eprintln!("(Ctrl-C once more, Ctrl-D or /exit ends the chat)");
                    ending = true;
                }
                // The signal came before the editor had the terminal.
                Input::Interrupted if asked => return Ok(()),
                Input::Interrupted => return Err(Failure::Interrupted.into()),
                Input::Turn(text) => match parse(&text) {
                    Some(ChatCommand::Exit) => return Ok(()),
                    Some(command) => self.command(command)?,
                    None if text.trim().is_empty() => {}
                    None => self.turn(text, reader.interactive())?,
                },
            }
        }
    }

    /// One question and its answer.
    fn turn(&mut self, text: String, interactive: bool) -> anyhow::Result<()> {
        self.conversation.push_user(text);
        let Some(ids) = self.fitting_ids(interactive)? else {
            return Ok(());
        };
        let seen = keep_prefix(&mut self.engine, &ids)?;
        if interactive {
            interrupt::clear();
        }
        let interrupt = interrupt::flag();
        let generation = generate(
            &mut self.engine,
            &ids[seen..],
            &self.options,
            interrupt,
            true,
            &mut 0,
            self.console,
        )?;
        writeln!(io::stdout())?;
        closing_line(&self.engine, &generation, self.console);
        let interrupted = generation.finish_reason == FinishReason::Interrupted;
        if interrupted && generation.token_ids.is_empty() {
            self.conversation.pop_user();
            self.console
                .note("stopped before the answer; the turn is taken back");
        } else {
            if interactive {
                self.tell_cut(&generation);
            }
            let text = self.engine.text();
            self.conversation.push_answer(text, &ids, &generation);
        }
        self.last = Some(generation);
        match (interrupted, interactive) {
            (true, true) => {
                interrupt::clear();
                Ok(())
            }
            (true, false) => Err(Failure::Interrupted.into()),
            (false, _) => Ok(()),
        }
    }

    /// The conversation's ids with room for an answer, the oldest turns dropped where they must be;
    /// `None` if the last turn is too long, which is told and taken back.
    fn fitting_ids(&mut self, interactive: bool) -> anyhow::Result<Option<Vec<u32>>> {
        let answer = self
            .options
            .max_new_tokens
            .clamp(1, (self.max_tokens / 4).max(1));
        let text = self.engine.text();
        let room = self.max_tokens - answer.min(self.max_tokens);
        if let Some((ids, dropped)) = self.conversation.fit(text, room)? {
            if dropped > 0 {
                self.console.note(format!(
                    "note: the context of {} tokens is full; the oldest {dropped} turn{} dropped \
                     (a larger --ctx keeps more, up to {})",
                    self.max_tokens,
                    if dropped == 1 { " was" } else { "s were" },
                    self.limit
                ));
            }
            return Ok(Some(ids));
        }
        let tokens = self.conversation.ids(text)?.len();
        self.conversation.pop_user();
        let message = format!(
            "this turn makes {tokens} tokens, and the context of {} must hold an answer too; \
             shorten it, or start with a larger --ctx (the model's limit is {})",
            self.max_tokens, self.limit
        );
        match interactive {
            true => {
                eprintln!("{message}");
                Ok(None)
            }
            false => Err(Failure::Usage(message).into()),
        }
    }

    fn tell_cut(&self, generation: &Generation) {
        if generation.finish_reason != FinishReason::Length {
            return;
        }
        self.console.note(
            match generation.token_ids.len() < self.options.max_new_tokens {
                true => {
                    "note: the context is full: the answer ends here, and the next turn drops the \
                         oldest ones"
                        .to_owned()
                }
                false => format!(
                    "note: the answer was cut at {} tokens (-n)",
                    self.options.max_new_tokens
                ),
            },
        );
    }

    fn command(&mut self, command: ChatCommand) -> anyhow::Result<()> {
        let done = match command {
            ChatCommand::Help => {
                for (name, what) in COMMANDS {
                    eprintln!("  {name:16}{what}");
                }
                eprintln!(
                    "Several lines: Alt-Enter between them, paste them, or put them in \"\"\"."
                );
                Ok(())
            }
            ChatCommand::Reset => {
                self.conversation.reset();
                self.console.note("a new conversation");
                Ok(())
            }
            ChatCommand::System(None) => {
                eprintln!("system: {}", self.conversation.system().unwrap_or("(none)"));
                Ok(())
            }
            ChatCommand::System(Some(text)) => {
                self.conversation.set_system((text != "-").then_some(&text));
                Ok(())
            }
            ChatCommand::Save(path) => self.save(&path),
            ChatCommand::Load(path) => self.load(&path),
            ChatCommand::Stats => self.stats(),
            ChatCommand::Wrong(reason) => {
                eprintln!("{reason}");
                Ok(())
            }
            ChatCommand::Exit => Ok(()),
        };
        // A file that cannot be read or written is no reason to lose the conversation.
        if let Err(error) = done {
            eprintln!("error: {error:#}");
        }
        Ok(())
    }

    fn save(&self, path: &Path) -> anyhow::Result<()> {
        self.conversation.save(path)?;
        self.console.note(format!("wrote {}", path.display()));
        Ok(())
    }

    fn load(&mut self, path: &Path) -> anyhow::Result<()> {
        self.conversation.load(path)?;
        let turns = self.conversation.turns();
        self.console
            .note(format!("{turns} turns from {}", path.display()));
        Ok(())
    }

    fn stats(&mut self) -> anyhow::Result<()> {
        eprintln!(
            "  {:10}{} turns, {} of {} tokens",
            "context",
            self.conversation.turns(),
            self.engine.tokens().len(),
            self.max_tokens
        );
        if let Some(last) = &self.last {
            eprintln!(
                "  {:10}{} tokens at {:.1} tok/s, answer {} tokens at {:.1} tok/s",
                "last turn",
                last.timings.prompt_tokens,
                last.timings.prefill_tok_s(),
                last.token_ids.len(),
                last.timings.decode_tok_s()
            );
        }
        let ram = high_water_mark().map(|bytes| format!("{} of RAM at most", show_bytes(bytes)));
        let vram = (self.engine.vram_bytes()).map(|bytes| format!("{} of VRAM", show_bytes(bytes)));
        let memory: Vec<String> = vram.into_iter().chain(ram).collect();
        eprintln!("  {:10}{}", "memory", memory.join(", "));
        let backend = self.engine.backend();
        eprintln!(
            "  {:10}{} on {}",
            "model",
            self.engine.model_id().id,
            backend.name
        );
        Ok(())
    }
}
