//! Tokens to text as they come: never half a character, never part of a stop string.

use std::str;

use crate::model::Tokenizer;

/// Turns token ids, one at a time, into text that can be shown at once.
///
/// The pieces joined together are exactly the decoded ids, up to the first stop string. A push
/// costs time in the length of its token and of the stop strings, not of the text so far.
#[derive(Clone, Debug)]
pub struct TextStream {
    tokenizer: Tokenizer,
    skip_special: bool,
    /// At most 3 bytes: a character that later tokens may complete.
    incomplete: Vec<u8>,
    stop_strings: StopStrings,
}

impl TextStream {
    /// - `skip_special`: leave special tokens out of the text
    /// - `stop_strings`: the text ends before any of these; empty ones match nothing
    pub fn new(tokenizer: &Tokenizer, skip_special: bool, stop_strings: &[String]) -> Self {
        TextStream {
            tokenizer: tokenizer.clone(),
            skip_special,
            incomplete: Vec::new(),
            stop_strings: StopStrings::new(stop_strings),
        }
    }

    /// Takes the next token; returns the text that is certain now, often empty.
    ///
    /// After a stop string was found all further text is dropped.
    pub fn push(&mut self, id: u32) -> String {
        if !(self.skip_special && self.tokenizer.is_special(id)) {
            // An id outside the vocabulary has no text, as in `Tokenizer::decode`.
            self.incomplete
                .extend(self.tokenizer.token_bytes(id).unwrap_or_default());
        }
        let text = take_complete(&mut self.incomplete);
        self.stop_strings.push(&text)
    }

    /// Ends the text: returns what was held back for a character or stop string that never came.
    pub fn finish(&mut self) -> String {
        let incomplete = std::mem::take(&mut self.incomplete);
        let mut text = self
            .stop_strings
            .push(&String::from_utf8_lossy(&incomplete));
        text.push_str(&self.stop_strings.finish());
        text
    }

    /// The stop string that ended the text, if one did.
    pub fn stopped_by(&self) -> Option<&str> {
        self.stop_strings.found()
    }
}

/// Removes the characters that are complete from the front of `bytes`.
///
/// Invalid bytes become U+FFFD one maximal run at a time, as [`String::from_utf8_lossy`] has it,
/// so the result does not depend on where the bytes were split.
fn take_complete(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut rest = bytes.as_slice();
    loop {
        let error = match str::from_utf8(rest) {
            Ok(valid) => {
                text.push_str(valid);
                bytes.clear();
                return text;
            }
            Err(error) => error,
        };
        let (valid, after) = rest.split_at(error.valid_up_to());
        text.push_str(&String::from_utf8_lossy(valid));
        match error.error_len() {
            Some(invalid) => {
                text.push(char::REPLACEMENT_CHARACTER);
                rest = &after[invalid..];
            }
            None => {
                *bytes = after.to_vec();
                return text;
            }
        }
    }
}

/// Finds stop strings in text that arrives in pieces.
///
/// The first to be complete, counted in characters, wins; of several complete at once, the
/// longest. So the result does not depend on how the text was cut into pieces.
#[derive(Clone, Debug)]
pub struct StopStrings {
    stop_strings: Vec<String>,
    /// Text that may be the beginning of a stop string: shorter than the longest of them.
    held: String,
    found: Option<usize>,
}

impl StopStrings {
    pub fn new(stop_strings: &[String]) -> Self {
        StopStrings {
            stop_strings: stop_strings
                .iter()
                .filter(|stop| !stop.is_empty())
                .cloned()
                .collect(),
            held: String::new(),
            found: None,
        }
    }

    /// Takes the next piece of text; returns what certainly precedes any stop string.
    pub fn push(&mut self, text: &str) -> String {
        if self.found.is_some() {
            return String::new();
        }
        self.held.push_str(text);
        let first = self
            .stop_strings
            .iter()
            .enumerate()
            .filter_map(|(i, stop)| Some((self.held.find(stop)?, stop.len(), i)))
            .min_by_key(|&(start, len, _)| (start + len, start));
        let keep = match first {
            Some((start, _, i)) => {
                self.found = Some(i);
                self.held.truncate(start);
                start
            }
            None => self.held.len() - self.longest_beginning(),
        };
        let held = self.held.split_off(keep);
        std::mem::replace(&mut self.held, held)
    }

    /// Ends the text: returns what was held back.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// The stop string that was found, if one was.
    pub fn found(&self) -> Option<&str> {
        self.found.map(|i| self.stop_strings[i].as_str())
    }

    /// Bytes at the end of `held` with which some stop string begins.
    fn longest_beginning(&self) -> usize {
        self.stop_strings
            .iter()
            .flat_map(|stop| stop.char_indices().map(move |(end, _)| &stop[..end]))
            .filter(|beginning| self.held.ends_with(beginning))
            .map(str::len)
            .max()
            .unwrap_or(0)
    }
}
