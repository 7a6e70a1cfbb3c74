//! The lines of a chat that are for the program and not for the model.

use std::path::PathBuf;

/// What `/help` lists.
pub const COMMANDS: &[(&str, &str)] = &[
    ("/help", "this list"),
    ("/reset", "start over; the system message stays"),
    (
        "/system [TEXT]",
        "show or set the system message; `/system -` removes it",
    ),
    (
        "/save FILE",
        "write the conversation, as a line that `moectl profile` reads too",
    ),
    ("/load FILE", "go on with a conversation that was saved"),
    ("/stats", "context, speed and memory"),
    ("/exit", "end the chat, as Ctrl-D does"),
];

/// A line that begins with `/`.
#[derive(Debug, PartialEq, Eq)]
pub enum ChatCommand {
    Help,
    Reset,
    /// `None` to show it
    System(Option<String>),
    Save(PathBuf),
    Load(PathBuf),
    Stats,
    Exit,
    /// No command, or one without what it needs: what to tell
    Wrong(String),
}

/// The command in `line`; `None` if it is a turn, as a line that begins with a path is.
pub fn parse(line: &str) -> Option<ChatCommand> {
    let line = line.trim_end();
    let (name, rest) = match line.split_once(char::is_whitespace) {
        Some((name, rest)) => (name, rest.trim()),
        None => (line, ""),
    };
    let word = name.strip_prefix('/')?;
    let is_word = word.chars().all(|c| c.is_ascii_alphabetic() || c == '?');
    if !is_word || line.contains('\n') {
        return None;
    }
    let file = |make: fn(PathBuf) -> ChatCommand| match rest {
        "" => ChatCommand::Wrong(format!("{name}: which file? {name} FILE")),
        rest => make(rest.into()),
    };
    Some(match word {
        "help" | "?" => ChatCommand::Help,
        "reset" | "clear" => ChatCommand::Reset,
        "system" => ChatCommand::System((!rest.is_empty()).then(|| rest.to_owned())),
        "save" => file(ChatCommand::Save),
        "load" => file(ChatCommand::Load),
        "stats" => ChatCommand::Stats,
        "exit" | "quit" | "bye" => ChatCommand::Exit,
        _ => ChatCommand::Wrong(format!(
            "{name}: no such command, /help lists them; a space before it sends it to the model"
        )),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_words_after_a_slash_and_paths_are_not() {
        assert_eq!(parse("/reset"), Some(ChatCommand::Reset));
        assert_eq!(parse("/quit "), Some(ChatCommand::Exit));
        assert_eq!(parse("/system"), Some(ChatCommand::System(None)));
        let system = ChatCommand::System(Some("Be brief.".into()));
        assert_eq!(parse("/system  Be brief."), Some(system));
        let file = ChatCommand::Save("a b.json".into());
        assert_eq!(parse("/save a b.json"), Some(file));
        assert!(matches!(parse("/load"), Some(ChatCommand::Wrong(_))));
        assert!(matches!(parse("/hlep"), Some(ChatCommand::Wrong(_))));
        for turn in [
            "hello",
            "/usr/bin/env is what?",
            " /help",
            "/reset\nand more",
            "a /help",
        ] {
            assert_eq!(parse(turn), None, "{turn}");
        }
    }
}
