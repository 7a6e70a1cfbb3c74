//! `moectl completions` and `moectl man`: what shells and manuals know of the command line.

use std::io::{self, Write};

use clap::Args;
use clap_complete::Shell;
use clap_mangen::Man;

use super::Failure;

/// Print completions for a shell
///
/// To be sourced by the shell, or put where it looks for completions.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  moectl completions bash > ~/.local/share/bash-completion/completions/moectl
  moectl completions fish > ~/.config/fish/completions/moectl.fish
  moectl completions zsh > ~/.zfunc/_moectl")]
pub struct CompletionsArgs {
    /// bash, zsh, fish, elvish or powershell
    #[arg(value_enum)]
    shell: Shell,
}

/// Runs `moectl completions`; `program`: the whole command line.
///
/// # Errors
/// If the file cannot be written.
pub fn completions(args: &CompletionsArgs, mut program: clap::Command) -> anyhow::Result<()> {
    // Whole in memory first: the generator panics where a closed pipe ends it.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut program, "moectl", &mut script);
    io::stdout().write_all(&script)?;
    Ok(())
}

/// Print the manual page of a verb, or of the program
///
/// For `man -l -`, or for a folder of manual pages.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  moectl man > /usr/local/share/man/man1/moectl.1
  moectl man run > /usr/local/share/man/man1/moectl-run.1")]
pub struct ManArgs {
    /// Verb whose page is wanted [default: the program's own]
    verb: Option<String>,
}

/// Runs `moectl man`; `program`: the whole command line.
///
/// # Errors
/// If the pages cannot be written.
pub fn man(args: &ManArgs, mut program: clap::Command) -> anyhow::Result<()> {
    program.build();
    let page = match &args.verb {
        None => program,
        Some(verb) => {
            let Some(found) = program.find_subcommand(verb) else {
                let verbs: Vec<&str> = program.get_subcommands().map(|v| v.get_name()).collect();
                let known = verbs.join(", ");
                return Err(Failure::Usage(format!("no verb `{verb}`; verbs: {known}")).into());
            };
            found.clone().name(format!("moectl-{verb}"))
        }
    };
    let mut text = Vec::new();
    Man::new(page).render(&mut text)?;
    io::stdout().write_all(&text)?;
    Ok(())
}
