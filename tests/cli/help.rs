//! Help that reads well, with examples that work.

use clap::{CommandFactory, Parser};
use moectl::cli::Cli;

use crate::program::Sandbox;
#[cfg(unix)]
use crate::terminal::Terminal;

fn verbs() -> Vec<String> {
    let command = Cli::command();
    let verbs = command.get_subcommands();
    verbs.map(|verb| verb.get_name().to_string()).collect()
}

#[test]
fn every_verb_has_a_page_with_examples_that_parse() {
    let sandbox = Sandbox::new();
    let mut pages = vec![sandbox.run("--help").ok().stdout];
    for verb in verbs() {
        let page = sandbox.run(&format!("{verb} --help")).ok().stdout;
        let own = format!("  moectl {verb}");
        assert!(page.contains(&own) || page.contains(&format!("| moectl {verb}")));
        pages.push(page);
    }
    for page in pages {
        let (_, examples) = page
            .split_once("Examples:\n")
            .expect("a section of examples");
        assert!(examples.lines().count() >= 2, "{examples}");
        for line in examples.lines() {
            let line = line.rsplit(" | ").next().unwrap();
            let line = line.split(" > ").next().unwrap();
            let words = shell_words(line);
            assert_eq!(words[0], "moectl", "{line}");
            if let Err(error) = Cli::try_parse_from(&words) {
                panic!("{line}: {error}");
            }
        }
    }
}

#[test]
fn each_verb_is_one_line_in_the_summary_and_begins_its_own_page() {
    let sandbox = Sandbox::new();
    let summary = sandbox.run("-h").ok().stdout;
    let commands = Cli::command();
    for verb in commands.get_subcommands() {
        let about = verb
            .get_about()
            .expect("each verb says what it does")
            .to_string();
        assert!(about.len() < 80 && !about.ends_with('.'), "{about}");
        let line = summary
            .lines()
            .find(|line| line.trim_start().starts_with(verb.get_name()));
        assert!(line.unwrap().ends_with(&about), "{line:?}");
        for flag in ["-h", "--help"] {
            let page = sandbox.run(&format!("{} {flag}", verb.get_name()));
            assert!(page.ok().stdout.starts_with(&about));
        }
    }
}

#[test]
fn every_flag_is_explained_once_and_says_its_default_once() {
    let mut commands = Cli::command();
    commands.build();
    for verb in commands.get_subcommands() {
        for arg in verb.get_arguments() {
            let place = format!("{} {}", verb.get_name(), arg.get_id());
            let help = arg
                .get_help()
                .unwrap_or_else(|| panic!("{place}"))
                .to_string();
            assert!(!help.ends_with('.') && help.len() <= 200, "{place}: {help}");
            let shown = usize::from(!arg.get_default_values().is_empty());
            let written = help.matches("[default").count();
            assert!(shown + written <= 1, "{place}: {help}");
            if arg.get_action().takes_values() && !arg.is_positional() {
                let name = arg.get_value_names().unwrap_or_else(|| panic!("{place}"));
                assert!(
                    name.iter().all(|name| **name == name.to_uppercase()),
                    "{place}"
                );
            }
        }
    }
}

#[test]
fn shells_complete_verbs_and_flags() {
    let sandbox = Sandbox::new();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = sandbox.run(&format!("completions {shell}")).ok().stdout;
        for word in ["quantize", "top-p", "placement"] {
            assert!(script.contains(word), "{shell}: {word}");
        }
    }
    sandbox.run("completions tcsh").fails(2, &["bash"]);
}

#[test]
fn every_verb_has_a_manual_page_and_so_has_the_program() {
    let sandbox = Sandbox::new();
    let page = sandbox.run("man").ok().stdout;
    assert!(
        page.starts_with(".ie") || page.contains(".TH moectl 1"),
        "{page}"
    );
    for verb in verbs() {
        assert!(page.contains(&format!("moectl\\-{verb}(1)")), "{verb}");
        let page = sandbox.run(&format!("man {verb}")).ok().stdout;
        assert!(page.contains(&format!(".TH moectl-{verb} 1")), "{page}");
    }
    sandbox.run("man fly").fails(2, &["verbs: ", "run"]);
}

/// What people type out of habit, from llama.cpp and the Hugging Face tools.
#[test]
fn short_flags_and_other_names_mean_what_they_mean_elsewhere() {
    let parse = |line: &str| {
        let words = shell_words(line);
        format!(
            "{:?}",
            Cli::try_parse_from(&words).unwrap_or_else(|e| panic!("{line}: {e}"))
        )
    };
    for (short, long) in [
        (
            "run -p hello -n 5 -c 2k -t 2 -s 7",
            "run --prompt hello --max-tokens 5 --ctx 2k --threads 2 --seed 7",
        ),
        (
            "run x --temp 0.5 --n-predict 5",
            "run x --temperature 0.5 --max-tokens 5",
        ),
        (
            "run x --ctx-size 2k --max-new-tokens 5",
            "run x --ctx 2k --max-tokens 5",
        ),
        (
            "run x --repeat-penalty 1.1",
            "run x --repetition-penalty 1.1",
        ),
        (
            "run --interactive --system-prompt x",
            "run --chat --system x",
        ),
        ("run x --kv f16", "run x --kv-dtype f16"),
        ("plan --kv-dtype int8 -c 8k", "plan --kv int8 --ctx 8k"),
        (
            "bench -r 3 -c 512 -t 2 --kv f16",
            "bench --repetitions 3 --ctx 512 --threads 2 --kv-dtype f16",
        ),
        ("profile x.jsonl -c 1k", "profile x.jsonl --ctx 1k"),
    ] {
        assert_eq!(
            parse(&format!("moectl {short}")),
            parse(&format!("moectl {long}"))
        );
    }
}

#[test]
fn the_version_is_that_of_the_package() {
    let version = Sandbox::new().run("--version").ok().stdout;
    assert!(version.starts_with(concat!("moectl ", env!("CARGO_PKG_VERSION"))));
}

/// Words as a shell splits them, as far as the examples need it.
fn shell_words(line: &str) -> Vec<String> {
    let (mut words, mut word) = (Vec::new(), String::new());
    let (mut quoted, mut escaped) = (false, false);
    for c in line.trim().chars() {
        match c {
            _ if escaped => {
                word.push(c);
                escaped = false;
            }
            '\\' => escaped = true,
            '"' => quoted = !quoted,
            ' ' if !quoted => words.push(std::mem::take(&mut word)),
            c => word.push(c),
        }
    }
    words.push(word);
    words.retain(|word| !word.is_empty());
    words
}

#[test]
#[cfg(unix)]
fn tables_fit_a_terminal_of_80_columns() {
    let sandbox = Sandbox::new();
    let plan = "plan --model synth:qwen3-next-80b-a3b --vram 14G --ctx 32k --explain -q";
    for line in [
        plan,
        "doctor --no-measure",
        "profile --ctx 16 --shard 1/40 -q",
    ] {
        let command = sandbox.command(&line.split(' ').collect::<Vec<_>>());
        let mut terminal = Terminal::of_width(80, command);
        assert!(terminal.end().success(), "{line}");
        for row in terminal.log.lines() {
            assert!(row.chars().count() <= 80, "{line}: {row}");
        }
    }
}
