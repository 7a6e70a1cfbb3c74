//! Where a chat's turns come from: a line editor on a terminal, or the lines of a pipe.

use std::borrow::Cow;
use std::io::{self, BufRead, IsTerminal};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use rustyline::completion::Completer;
use rustyline::config::{Behavior, Configurer};
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::FileHistory;
use rustyline::validate::{ValidationContext, ValidationResult, Validator};
use rustyline::{
    Cmd, ConditionalEventHandler, Config, Editor, Event, EventContext, EventHandler, Helper,
    KeyCode, KeyEvent, Modifiers, Movement, RepeatCount,
};

use super::commands::COMMANDS;

/// What the user did at the prompt.
#[derive(Debug, PartialEq, Eq)]
pub enum Input {
    Turn(String),
    /// Ctrl-C where nothing was typed
    CtrlC,
    /// Ctrl-D, or the end of a pipe
    End,
    /// A signal that asks the program to end
    Interrupted,
}

/// Reads turns on a thread of its own, so that a signal ends the wait for the next one.
pub struct TurnReader {
    ask: SyncSender<()>,
    turns: Receiver<anyhow::Result<Input>>,
    interactive: bool,
    terminal: terminal::Modes,
}

impl TurnReader {
    /// # Errors
    /// If the terminal cannot be set up.
    pub fn new() -> anyhow::Result<Self> {
        let interactive = io::stdin().is_terminal();
        let (ask, asked) = sync_channel::<()>(1);
        let (answer, turns) = sync_channel(1);
        let mut source = match interactive {
            true => Source::Editor(Box::new(editor()?), history_file()),
            false => Source::Lines,
        };
        std::thread::spawn(
            move || {
                while asked.recv().is_ok() && answer.send(source.next()).is_ok() {}
            },
        );
        Ok(TurnReader {
            ask,
            turns,
            interactive,
            terminal: terminal::Modes::now(),
        })
    }

    /// Whether a person sits there.
    pub fn interactive(&self) -> bool {
        self.interactive
    }

    /// Waits for the next turn, or for `interrupt`.
    ///
    /// # Errors
    /// If standard input cannot be read.
    pub fn next(&self, interrupt: &AtomicBool) -> anyhow::Result<Input> {
        const POLL: Duration = Duration::from_millis(50);
        if self.ask.send(()).is_err() {
            return Ok(Input::End);
        }
        loop {
            match self.turns.recv_timeout(POLL) {
                Ok(input) => return input,
                Err(RecvTimeoutError::Disconnected) => return Ok(Input::End),
                Err(RecvTimeoutError::Timeout) if interrupt.load(Ordering::Relaxed) => {
                    // The editor still waits for a key and leaves the terminal as it is.
                    self.terminal.restore();
                    return Ok(Input::Interrupted);
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }
}

enum Source {
    Editor(Box<Editor<ChatHelper, FileHistory>>, Option<PathBuf>),
    Lines,
}

impl Source {
    fn next(&mut self) -> anyhow::Result<Input> {
        match self {
            Source::Editor(editor, history) => {
                let read = editor.readline("> ");
                if let (Ok(_), Some(path)) = (&read, history) {
                    // A history that cannot be kept is no reason to end a chat.
                    let _ = editor.append_history(path);
                }
                match read {
                    Ok(text) => Ok(Input::Turn(unquoted(&text))),
                    Err(ReadlineError::Interrupted | ReadlineError::Signal(_)) => Ok(Input::CtrlC),
                    Err(ReadlineError::Eof) => Ok(Input::End),
                    Err(error) => Err(error.into()),
                }
            }
            Source::Lines => {
                let mut text = String::new();
                loop {
                    let read = io::stdin().lock().read_line(&mut text)?;
                    if read == 0 && text.is_empty() {
                        return Ok(Input::End);
                    }
                    if read == 0 || !is_open(&text) {
                        let text = text.trim_end_matches(['\r', '\n']);
                        return Ok(Input::Turn(unquoted(text)));
                    }
                }
            }
        }
    }
}

fn editor() -> anyhow::Result<Editor<ChatHelper, FileHistory>> {
    const HISTORY_ENTRIES: usize = 1000;
    let behavior = match io::stdout().is_terminal() {
        true => Behavior::Stdio,
        // Answers go to a file; the prompt is for who types.
        false => Behavior::PreferTerm,
    };
    let config = Config::builder()
        .auto_add_history(true)
        .max_history_size(HISTORY_ENTRIES)?
        .bracketed_paste(true)
        .behavior(behavior)
        .build();
    let mut editor = Editor::with_config(config)?;
    editor.set_helper(Some(ChatHelper));
    editor.set_history_ignore_space(false);
    let newline = EventHandler::Simple(Cmd::Newline);
    editor.bind_sequence(KeyEvent(KeyCode::Enter, Modifiers::ALT), newline);
    let clear = EventHandler::Conditional(Box::new(ClearLine));
    editor.bind_sequence(KeyEvent::ctrl('C'), clear);
    if let Some(path) = history_file() {
        if let Some(folder) = path.parent() {
            let _ = std::fs::create_dir_all(folder);
        }
        // Missing at first.
        let _ = editor.load_history(&path);
    }
    Ok(editor)
}

/// `$XDG_STATE_HOME/moectl/history`.
fn history_file() -> Option<PathBuf> {
    let state = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from);
    let state = state
        .filter(|path| path.is_absolute())
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".local/state")))?;
    Some(state.join("moectl/history"))
}

/// Ctrl-C first clears what is typed.
struct ClearLine;

impl ConditionalEventHandler for ClearLine {
    fn handle(&self, _: &Event, _: RepeatCount, _: bool, context: &EventContext) -> Option<Cmd> {
        Some(match context.line().is_empty() {
            true => Cmd::Interrupt,
            false => Cmd::Kill(Movement::WholeBuffer),
        })
    }
}

/// Knows when a turn is not finished yet, and the commands.
struct ChatHelper;

impl Helper for ChatHelper {}
impl Hinter for ChatHelper {
    type Hint = String;
}
impl Highlighter for ChatHelper {
    fn highlight_prompt<'b, 's: 'b, 'p: 'b>(&'s self, prompt: &'p str, _: bool) -> Cow<'b, str> {
        Cow::Borrowed(prompt)
    }
}

impl Validator for ChatHelper {
    fn validate(&self, context: &mut ValidationContext) -> rustyline::Result<ValidationResult> {
        Ok(match is_open(context.input()) {
            true => ValidationResult::Incomplete,
            false => ValidationResult::Valid(None),
        })
    }
}

impl Completer for ChatHelper {
    type Candidate = String;

    fn complete(
        &self,
        line: &str,
        _: usize,
        _: &rustyline::Context<'_>,
    ) -> rustyline::Result<(usize, Vec<String>)> {
        let names = COMMANDS.iter().map(|(name, _)| name.split(' ').next());
        let begun = names.flatten().filter(|name| name.starts_with(line));
        let found = match line.starts_with('/') {
            true => begun.map(str::to_owned).collect(),
            false => Vec::new(),
        };
        Ok((0, found))
    }
}

const QUOTES: &str = "\"\"\"";

/// Whether `text` began with three quotation marks that nothing closes yet.
fn is_open(text: &str) -> bool {
    let text = text.trim_start();
    let rest = text.strip_prefix(QUOTES);
    rest.is_some_and(|rest| !rest.contains(QUOTES))
}

/// What stands between three quotation marks, if that is all; else the text as it is.
fn unquoted(text: &str) -> String {
    let inner = (text.trim())
        .strip_prefix(QUOTES)
        .and_then(|rest| rest.strip_suffix(QUOTES))
        .filter(|inner| !inner.contains(QUOTES));
    match inner {
        Some(inner) => inner.trim_matches(['\r', '\n']).to_owned(),
        None => text.to_owned(),
    }
}

/// How the terminal was before an editor changed it.
#[cfg(unix)]
mod terminal {
    use std::io::{IsTerminal, Write};

    pub struct Modes(Option<libc::termios>);

    impl Modes {
        pub fn now() -> Self {
            let mut modes = std::mem::MaybeUninit::<libc::termios>::uninit();
            // SAFETY: the call fills the struct if it returns 0.
            let modes = unsafe {
                (libc::tcgetattr(libc::STDIN_FILENO, modes.as_mut_ptr()) == 0)
                    .then(|| modes.assume_init())
            };
            Modes(modes)
        }

        /// Also ends bracketed paste.
        pub fn restore(&self) {
            let Some(modes) = &self.0 else { return };
            // SAFETY: the struct came from the same terminal.
            unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, modes) };
            if std::io::stdout().is_terminal() {
                let _ = std::io::stdout().write_all(b"\x1b[?2004l\r\n");
                let _ = std::io::stdout().flush();
            }
        }
    }
}

#[cfg(not(unix))]
mod terminal {
    pub struct Modes;

    impl Modes {
        pub fn now() -> Self {
            Modes
        }

        pub fn restore(&self) {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_quotation_marks_hold_several_lines() {
        for (text, open, turn) in [
            ("plain", false, "plain"),
            ("\"\"\"first", true, "\"\"\"first"),
            ("\"\"\"a\nb\"\"\"", false, "a\nb"),
            ("\"\"\"\na\n\n b\n\"\"\" ", false, "a\n\n b"),
            // Text that was pasted: a Python file stays as it is.
            ("\"\"\"Doc.\"\"\"\nx = 1", false, "\"\"\"Doc.\"\"\"\nx = 1"),
            ("say \"\"\"", false, "say \"\"\""),
        ] {
            assert_eq!(is_open(text), open, "{text}");
            assert_eq!(unquoted(text), turn);
        }
    }
}
