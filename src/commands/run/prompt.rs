//! The prompt of one run: from an argument, a file, standard input, or several of them.

use std::io::{self, IsTerminal, Read};

use anyhow::Context;

use super::{RunArgs, system_message};
use crate::commands::Failure;
use crate::engine::TextModel;
use crate::formats::input;
use crate::model::{Message, ModelConfig};

/// The prompt's token ids, from wherever the flags say.
///
/// # Errors
/// No prompt, an empty one, an id or text that the model cannot take.
pub fn prompt_ids(
    args: &RunArgs,
    config: &ModelConfig,
    text: &TextModel,
) -> anyhow::Result<Vec<u32>> {
    if let Some(ids) = &args.prompt_ids {
        return checked(ids, config.shape.vocab_size);
    }
    let prompt = prompt_text(args)?;
    // A system message needs a template; without one, that is an error of encoding.
    let templated = text.chat_template.is_some() || args.system.is_some();
    let templated = templated && !args.raw;
    // White space alone is something to continue, but nothing to answer.
    if prompt.is_empty() || (templated && prompt.trim().is_empty()) {
        return Err(empty());
    }
    let ids = match templated {
        true => {
            let mut messages = system_message(args);
            messages.push(Message::new("user", prompt));
            text.encode_chat(&messages)?
        }
        false => text.tokenizer.encode(&prompt)?,
    };
    match ids.is_empty() {
        true => Err(empty()),
        false => Ok(ids),
    }
}

fn empty() -> anyhow::Error {
    Failure::Usage("the prompt is empty: give a text, pipe one in, or use --chat".into()).into()
}

fn checked(ids: &[u32], vocab_size: usize) -> anyhow::Result<Vec<u32>> {
    match ids.iter().find(|&&id| id as usize >= vocab_size) {
        Some(id) => Err(Failure::Usage(format!(
            "--prompt-ids: {id} is not in the model's vocabulary; expected 0 to {}",
            vocab_size - 1
        ))
        .into()),
        None => Ok(ids.to_vec()),
    }
}

/// The argument, then the file, then what is piped in, with an empty line between them.
fn prompt_text(args: &RunArgs) -> anyhow::Result<String> {
    let mut parts = Vec::new();
    // `-` asks for what is read anyway.
    parts.extend(
        args.given_prompt()
            .filter(|text| *text != "-")
            .map(str::to_owned),
    );
    let mut stdin_read = io::stdin().is_terminal();
    if let Some(path) = &args.file {
        let bytes = input::read(path).with_context(|| path.display().to_string())?;
        let text = String::from_utf8(bytes)
            .with_context(|| format!("{}: not UTF-8 text", path.display()))?;
        parts.push(text);
        stdin_read |= path.as_os_str() == "-" || path.as_os_str() == "/dev/stdin";
    }
    if !stdin_read {
        let mut text = String::new();
        io::stdin()
            .read_to_string(&mut text)
            .context("standard input")?;
        parts.push(text);
    }
    if parts.is_empty() {
        let way_out = "no prompt: give one, pipe one in, or use --chat";
        return Err(Failure::Usage(way_out.into()).into());
    }
    Ok(joined(parts))
}

/// One part stays as it is; several are parted by an empty line, and empty ones left out.
fn joined(mut parts: Vec<String>) -> String {
    if parts.len() > 1 {
        parts.retain(|part| !part.trim().is_empty());
    }
    let (last, before) = match parts.split_last() {
        Some((last, before)) if !before.is_empty() => (last, before),
        _ => return parts.concat(),
    };
    let before = before
        .iter()
        .map(|part| part.trim_end().to_owned() + "\n\n");
    before.collect::<String>() + last
}

#[cfg(test)]
mod tests {
    use super::joined;

    #[test]
    fn parts_of_a_prompt_are_parted_by_an_empty_line() {
        for (parts, expected) in [
            (vec!["a"], "a"),
            (vec!["a\n"], "a\n"),
            (vec!["a", ""], "a"),
            (vec!["", "b\n"], "b\n"),
            (vec!["a", "b\n"], "a\n\nb\n"),
            (vec!["a\n\n", "b", "c"], "a\n\nb\n\nc"),
            (vec!["", ""], ""),
        ] {
            let parts = parts.into_iter().map(str::to_owned).collect();
            assert_eq!(joined(parts), expected);
        }
    }
}
