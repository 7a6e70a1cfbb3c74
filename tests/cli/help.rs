//! Help that reads well, with examples that work.

use clap::{CommandFactory, Parser};
use moectl::cli::Cli;

use crate::program::Sandbox;

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
