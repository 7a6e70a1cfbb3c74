//! Settings files: keys are long flag names, at the top for every verb or under `[verb]`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::error::ErrorKind;
use toml::Value;

/// `(verb or empty, flag)` to value and the file it came from.
pub type Settings = BTreeMap<(String, String), (String, PathBuf)>;

/// The settings of all files that exist, the strongest first.
///
/// # Errors
/// A file that cannot be read or is not TOML, or holds what is no value of a flag.
pub fn load(files: &[PathBuf]) -> anyhow::Result<Settings> {
    let mut settings = Settings::new();
    // Weakest first, so that stronger files overwrite.
    for path in files.iter().rev() {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
            Err(e) => return Err(e).with_context(|| path.display().to_string()),
        };
        let table: toml::Table = text
            .parse()
            .with_context(|| format!("{}: not valid TOML", path.display()))?;
        for (key, value) in table {
            match value {
                Value::Table(section) => {
                    for (flag, value) in section {
                        let value = scalar(&value)
                            .with_context(|| format!("{}: [{key}] {flag}", path.display()))?;
                        settings.insert((key.clone(), flag), (value, path.clone()));
                    }
                }
                value => {
                    let value =
                        scalar(&value).with_context(|| format!("{}: {key}", path.display()))?;
                    settings.insert((String::new(), key), (value, path.clone()));
                }
            }
        }
    }
    Ok(settings)
}

fn scalar(value: &Value) -> anyhow::Result<String> {
    Ok(match value {
        Value::String(text) => text.clone(),
        Value::Integer(number) => number.to_string(),
        Value::Float(number) => number.to_string(),
        Value::Boolean(flag) => flag.to_string(),
        other => bail!(
            "is {}, expected a string, number or true/false",
            other.type_str()
        ),
    })
}

/// Makes the settings the defaults of the flags they name.
///
/// # Errors
/// A verb or flag that there is not, or a value that the flag does not take, by its file.
pub fn as_defaults(
    mut command: clap::Command,
    settings: &Settings,
) -> anyhow::Result<clap::Command> {
    let verbs: Vec<String> = command
        .get_subcommands()
        .map(|verb| verb.get_name().to_string())
        .collect();
    // General settings first: a `[verb]` section overrides them.
    for ((verb, flag), (value, path)) in settings {
        if !verb.is_empty() && !verbs.contains(verb) {
            bail!(
                "{}: [{verb}] is no verb; verbs: {}",
                path.display(),
                verbs.join(", ")
            );
        }
        let (mut known, mut refused) = (false, None);
        for name in verbs.iter().filter(|name| verb.is_empty() || *name == verb) {
            command = command.mut_subcommand(name, |sub| {
                let Some(id) = sub
                    .get_arguments()
                    .find(|arg| arg.get_long() == Some(flag) && arg.get_action().takes_values())
                    .map(|arg| arg.get_id().clone())
                else {
                    return sub;
                };
                known = true;
                refused = refused.take().or_else(|| refusal(&sub, flag, value));
                let value = value.clone();
                sub.mut_arg(id, |arg| arg.default_value(value))
            });
        }
        if let Some(reason) = refused {
            bail!("{}: {reason}", path.display());
        }
        if !known {
            let place = if verb.is_empty() { "any verb" } else { verb };
            bail!("{}: `{flag}` is no setting of {place}", path.display());
        }
    }
    Ok(command)
}

/// Why the flag does not take the value, if so: a default that clap refuses would be blamed
/// on a flag that nobody gave.
fn refusal(verb: &clap::Command, flag: &str, value: &str) -> Option<String> {
    let error = verb
        .clone()
        .try_get_matches_from([verb.get_name(), &format!("--{flag}={value}")])
        .err()?;
    // Anything else is about what is missing beside it.
    if !matches!(
        error.kind(),
        ErrorKind::InvalidValue | ErrorKind::ValueValidation
    ) {
        return None;
    }
    let text = error.to_string();
    // Up to the empty line before the hint at --help.
    let lines = text.lines().map(str::trim).take_while(|l| !l.is_empty());
    let reason = lines.collect::<Vec<_>>().join(" ");
    Some(reason.trim_start_matches("error: ").to_string())
}
