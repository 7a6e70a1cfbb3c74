//! A chat as a person has it: on a terminal.
#![cfg(unix)]

use std::time::{Duration, Instant};

use serde_json::json;

use crate::program::{Sandbox, small_model};
use crate::terminal::{ALT_ENTER, CTRL_C, CTRL_D, ENTER, LEFT, Terminal, UP};

/// The random model, which answers two tokens at once; `flags` go on.
fn small_chat(sandbox: &Sandbox, flags: &str) -> Terminal {
    let model = small_model();
    let mut args = vec![
        "run",
        "--chat",
        "-m",
        model.to_str().unwrap(),
        "--ignore-eos",
    ];
    args.extend(flags.split_whitespace());
    let mut terminal = Terminal::start(sandbox.command(&args));
    terminal.wait_for("> ");
    terminal
}

/// What the user said, by `/save`.
fn turns(terminal: &mut Terminal, sandbox: &Sandbox) -> Vec<String> {
    terminal.line("/save turns.json");
    terminal.wait_for("wrote turns.json");
    terminal.wait_for("> ");
    let saved = sandbox.json("turns.json");
    let messages = saved["messages"].as_array().unwrap();
    let users = messages.iter().filter(|m| m["role"] == "user");
    users
        .map(|m| m["content"].as_str().unwrap().to_owned())
        .collect()
}

fn answered(terminal: &mut Terminal) {
    terminal.wait_for("[prompt ");
    terminal.wait_for("> ");
}

#[test]
fn lines_are_edited_recalled_and_pasted_as_one_turn() {
    let sandbox = Sandbox::new();
    let mut terminal = small_chat(&sandbox, "-n 2");
    terminal.line(&format!("helo{LEFT}l"));
    answered(&mut terminal);
    terminal.line(&format!("{UP} again"));
    answered(&mut terminal);
    terminal.line(&format!("first{ALT_ENTER}second"));
    answered(&mut terminal);
    terminal.line("\x1b[200~def f():\n    return 1\n\nf()\x1b[201~");
    answered(&mut terminal);
    terminal.line("\"\"\"a");
    terminal.line("b\"\"\"");
    answered(&mut terminal);
    terminal.line("/usr/bin/env is what?");
    answered(&mut terminal);
    let expected = [
        "hello",
        "hello again",
        "first\nsecond",
        "def f():\n    return 1\n\nf()",
        "a\nb",
        "/usr/bin/env is what?",
    ];
    assert_eq!(turns(&mut terminal, &sandbox), expected);
    terminal.keys(CTRL_D);
    assert!(terminal.end().success());

    // The next chat begins with the history of this one.
    let mut terminal = small_chat(&sandbox, "-n 2");
    terminal.line(&format!("{UP}{UP}"));
    answered(&mut terminal);
    assert_eq!(turns(&mut terminal, &sandbox), ["/usr/bin/env is what?"]);
}

#[test]
fn commands_are_for_the_program_and_a_mistyped_one_is_told() {
    let sandbox = Sandbox::new();
    let mut terminal = small_chat(&sandbox, "-n 2 --system Brief. --temperature 0");
    terminal.line("/help");
    for command in ["/reset", "/system", "/save", "/load", "/stats", "/exit"] {
        terminal.wait_for(command);
    }
    terminal.line("/hlep");
    terminal.wait_for("no such command");
    terminal.line("one");
    answered(&mut terminal);
    terminal.line("/stats");
    terminal.wait_for("1 turns, ");
    terminal.wait_for("of RAM");
    terminal.line("/system Longer.");
    terminal.line("/system");
    terminal.wait_for("system: Longer.");
    terminal.line("two");
    answered(&mut terminal);
    assert_eq!(turns(&mut terminal, &sandbox), ["one", "two"]);
    assert_eq!(
        sandbox.json("turns.json")["messages"][0]["content"],
        "Longer."
    );
    terminal.line("/reset");
    terminal.wait_for("a new conversation");
    assert!(turns(&mut terminal, &sandbox).is_empty());

    let saved = json!({"messages": [
        {"role": "user", "content": "before"}, {"role": "assistant", "content": "yes"},
    ]});
    sandbox.write("old.json", saved.to_string());
    terminal.line("/load old.json");
    terminal.wait_for("1 turns from old.json");
    terminal.line("/load missing.json");
    terminal.wait_for("missing.json: No such file");
    terminal.line("/save");
    terminal.wait_for("which file?");
    terminal.line("after");
    answered(&mut terminal);
    assert_eq!(turns(&mut terminal, &sandbox), ["before", "after"]);
    terminal.line("/exit");
    assert!(terminal.end().success());
}

#[test]
fn ctrl_c_at_the_prompt_clears_the_line_and_twice_ends_the_chat() {
    let sandbox = Sandbox::new();
    let mut terminal = small_chat(&sandbox, "-n 2");
    terminal.keys("never sent");
    terminal.keys(CTRL_C);
    terminal.line("sent");
    answered(&mut terminal);
    assert_eq!(turns(&mut terminal, &sandbox), ["sent"]);
    terminal.keys(CTRL_C);
    terminal.wait_for("once more");
    terminal.keys(CTRL_C);
    assert!(terminal.end().success());
    assert!(terminal.echoes());
}

#[test]
fn ctrl_c_stops_the_answer_and_the_chat_goes_on() {
    let sandbox = Sandbox::new();
    // They take many seconds.
    let mut terminal = small_chat(&sandbox, "-n 4000 --ctx 4k --backend reference");
    for turn in ["one", "two"] {
        terminal.line(turn);
        // The echo of the line, then the first tokens.
        terminal.wait_for("\n");
        std::thread::sleep(Duration::from_millis(300));
        let pressed = Instant::now();
        terminal.keys(CTRL_C);
        terminal.keys(CTRL_C);
        answered(&mut terminal);
        assert!(pressed.elapsed() < Duration::from_secs(10));
    }
    assert_eq!(turns(&mut terminal, &sandbox), ["one", "two"]);
    let messages = sandbox.json("turns.json")["messages"].clone();
    assert_ne!(
        messages[1]["content"], "",
        "what there was of the answer is kept"
    );
    terminal.line("/exit");
    assert!(terminal.end().success());
}

#[test]
fn a_full_context_drops_the_oldest_turns_and_a_turn_too_long_is_refused() {
    let sandbox = Sandbox::new();
    let mut terminal = small_chat(&sandbox, "-n 8 --ctx 128");
    for turn in 0.. {
        assert!(turn < 20, "never full: {}", terminal.log);
        terminal.line(&format!("turn {turn} with some words in it"));
        let before = terminal.wait_for("[prompt ");
        terminal.wait_for("> ");
        if before.contains("the context of 128 tokens is full") {
            break;
        }
    }
    let kept = turns(&mut terminal, &sandbox);
    assert!(!kept.is_empty() && kept[0] != "turn 0 with some words in it");
    terminal.line(&"long ".repeat(200));
    terminal.wait_for("shorten it");
    terminal.line("still there");
    answered(&mut terminal);
    assert_eq!(
        turns(&mut terminal, &sandbox).last().unwrap(),
        "still there"
    );
    terminal.line("/exit");
    assert!(terminal.end().success());
}

#[test]
fn a_signal_at_the_prompt_ends_the_chat_and_restores_the_terminal() {
    let sandbox = Sandbox::new();
    let mut terminal = small_chat(&sandbox, "-n 2");
    assert!(!terminal.echoes());
    terminal.signal(libc::SIGTERM);
    assert_eq!(terminal.end().code(), Some(130));
    assert!(terminal.echoes());
}

/// Later turns feed what is new, whatever ids the model chose before.
#[test]
fn a_turn_reads_only_what_is_new() {
    let sandbox = Sandbox::new();
    let mut terminal = small_chat(&sandbox, "-n 30 --temperature 2 --seed 3");
    let mut prompts = Vec::new();
    for _ in 0..3 {
        terminal.line("and so on");
        terminal.wait_for("[prompt ");
        let tokens = terminal.wait_for(" tokens");
        prompts.push(tokens.parse::<usize>().unwrap());
        terminal.wait_for("> ");
    }
    assert!(prompts[1] < prompts[0] + 8, "{prompts:?}");
    assert_eq!(prompts[1], prompts[2], "{prompts:?}");
}

#[test]
fn run_without_a_prompt_on_a_terminal_is_a_chat() {
    let sandbox = Sandbox::new();
    let model = small_model();
    let args = ["run", "-m", model.to_str().unwrap(), "-n", "2"];
    let mut terminal = Terminal::start(sandbox.command(&args));
    terminal.wait_for("> ");
    terminal.keys(ENTER);
    terminal.keys(CTRL_D);
    assert!(terminal.end().success());
}
