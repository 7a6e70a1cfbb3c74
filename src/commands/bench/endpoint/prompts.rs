//! Prompts of a wanted length in the server's own tokens, no two of which begin alike.

use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, bail};

use super::client::Endpoint;
use crate::formats::corpus::{Content, Corpus};

/// Text to cut prompts from.
pub struct Prompts {
    text: String,
    /// Of this run: a server that ran one before knows none of this one's prompts.
    run: String,
    next: AtomicUsize,
}

/// A prompt's length in characters that gave a wanted length in tokens.
#[derive(Clone, Copy, Debug)]
pub struct Length {
    pub chars: usize,
}

/// From the beginning of one prompt to that of the next: a prime, so that the text's whole length is
/// gone through before one comes again.
const STRIDE: usize = 1_009;
/// To begin with; English has about four characters per token.
const CHARS_PER_TOKEN: f64 = 3.0;
/// Prompts that a length is fitted with, at most.
const TRIES: usize = 4;
/// How far from the wanted length is close enough.
const CLOSE: f64 = 0.02;

impl Prompts {
    /// # Errors
    /// If the corpus cannot be read, or is empty.
    pub fn new(corpus: &Corpus, run: String) -> anyhow::Result<Self> {
        let mut text = String::new();
        for record in corpus.records()? {
            match record?.content {
                Content::Text(more) | Content::Prompt(more) => text.push_str(&more),
                Content::Messages(conversation) => {
                    let contents = conversation.messages.iter();
                    let contents = contents.filter_map(|message| message["content"].as_str());
                    contents.for_each(|content| text.push_str(content));
                }
            }
            text.push_str("\n\n");
        }
        if text.trim().is_empty() {
            bail!("{}: holds no text", corpus.name());
        }
        Ok(Prompts {
            text,
            run,
            next: AtomicUsize::new(0),
        })
    }

    /// A prompt that no other begins like: what a server keeps of one helps with none.
    pub fn next(&self, length: Length) -> String {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let mut prompt = format!("{}-{number}: ", self.run);
        let start = number * STRIDE % self.text.chars().count();
        let pieces = self.text.chars().cycle().skip(start);
        let left = length.chars.saturating_sub(prompt.chars().count());
        prompt.extend(pieces.take(left));
        prompt
    }

    /// Finds the length in characters that gives `tokens`, as the server counts them.
    ///
    /// # Errors
    /// If the server refuses, or doesn't count its prompts' tokens.
    pub fn fit(&self, endpoint: &Endpoint, tokens: usize) -> anyhow::Result<Length> {
        let mut chars = tokens as f64 * CHARS_PER_TOKEN;
        for _ in 0..TRIES {
            let length = Length {
                chars: chars as usize,
            };
            // Some tokens, so that one of them has text.
            let answer = endpoint.ask(&self.next(length), 4)?;
            let counted = answer.usage.prompt_tokens;
            let counted = counted.filter(|&n| n > 0).context(
                "the server doesn't say how many tokens a prompt has (usage.prompt_tokens)",
            )?;
            if (counted as f64 / tokens as f64 - 1.0).abs() <= CLOSE {
                break;
            }
            // A template adds its own tokens, so the first correction is not exact.
            chars = (chars * tokens as f64 / counted as f64).max(1.0);
        }
        Ok(Length {
            chars: chars as usize,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_have_their_length_and_differ_from_the_first_word() {
        let corpus = Corpus::from_static("c", "{\"text\": \"äbc def\"}\n").unwrap();
        let prompts = Prompts::new(&corpus, "r".into()).unwrap();
        let length = Length { chars: 40 };
        let (first, second) = (prompts.next(length), prompts.next(length));
        assert_eq!(first.chars().count(), 40);
        assert_eq!(second.chars().count(), 40);
        assert!(first.starts_with("r-0: äbc def\n\näbc"), "{first}");
        assert!(second.starts_with("r-1: "), "{second}");
    }
}
