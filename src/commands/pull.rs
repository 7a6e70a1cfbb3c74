//! `moectl pull`: fetch a model, saying first how large it is.

use clap::Args;
use serde::Serialize;

use super::Failure;
use super::console::{Console, Unit};
use crate::hardware::disk;
use crate::model::Source;
use crate::model::source::TEXT_FILES;
use crate::model::tokenizer_files::OPTIONAL_FILES;
use crate::planning::units::show_bytes;

/// Fetch a model from the Hugging Face hub
///
/// Says first what there is to fetch and how much room the disk has, and refuses what does not fit.
/// Files go to the hub's cache (HF_HOME), where every verb and other programs find them. After an
/// interruption the same command goes on where it was.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  moectl pull org/name --dry-run
  moectl pull org/name@revision")]
pub struct PullArgs {
    /// org/name[@revision] on the hub
    #[arg(value_name = "MODEL")]
    model: String,
    /// Only say what there is to fetch
    #[arg(long)]
    dry_run: bool,
}

#[derive(Serialize)]
struct PullRecord {
    model: String,
    files: usize,
    bytes: u64,
    /// Fetched before
    here_bytes: u64,
    free_bytes: Option<u64>,
    /// Where the files are; absent after --dry-run
    #[serde(skip_serializing_if = "Option::is_none")]
    folder: Option<std::path::PathBuf>,
}

/// Runs `moectl pull`.
///
/// # Errors
/// No such model, or a download that failed.
pub fn execute(args: &PullArgs, console: &Console) -> anyhow::Result<()> {
    let source = Source::resolve(Some(&args.model))?;
    // A model that cannot run is refused by its config.json, before the large files.
    source.config()?;
    let Some(files) = source.remote_files()? else {
        return Err(Failure::Usage(format!(
            "{}: is on this machine; pull fetches org/name[@revision] from the hub",
            args.model
        ))
        .into());
    };
    let bytes = files.iter().map(|file| file.bytes).sum();
    let here_bytes = files.iter().map(|file| file.here_bytes).sum();
    let folder = source.cache_folder().expect("a model of the hub");
    let exists = folder.ancestors().find(|folder| folder.exists());
    let free_bytes = exists.and_then(disk::free_bytes);
    let mut record = PullRecord {
        model: args.model.clone(),
        files: files.len(),
        bytes,
        here_bytes,
        free_bytes,
        folder: None,
    };
    console.note(describe(&record, &folder.display().to_string()));
    let missing = bytes - here_bytes;
    if let Some(free) = free_bytes.filter(|&free| free < missing) {
        return Err(Failure::DoesNotFit(format!(
            "{}: {} to fetch, {} free; make room, or set HF_HOME to a folder on another disk",
            folder.display(),
            show_bytes(missing),
            show_bytes(free)
        ))
        .into());
    }
    if !args.dry_run {
        for file in TEXT_FILES.into_iter().chain(OPTIONAL_FILES) {
            source.read(file)?;
        }
        let bar = console.progress("pull", bytes, Unit::Bytes);
        let mut done = 0;
        for file in &files {
            let path = source.fetch(&file.name, &mut |bytes| bar.set_position(done + bytes))?;
            done += file.bytes;
            bar.set_position(done);
            record.folder = path.parent().map(Into::into);
        }
        bar.finish_and_clear();
    }
    match (&record.folder, console.json) {
        (_, true) => console.result_json(&record)?,
        (Some(folder), false) => console.result(folder.display().to_string())?,
        (None, false) => {}
    }
    Ok(())
}

fn describe(record: &PullRecord, folder: &str) -> String {
    let mut text = format!(
        "{}: {} of weights in {} file{}",
        record.model,
        show_bytes(record.bytes),
        record.files,
        if record.files == 1 { "" } else { "s" }
    );
    match record.bytes - record.here_bytes {
        0 => text += ", all of it here",
        missing if record.here_bytes > 0 => {
            text += &format!(
                ", {} of it here, {} to fetch",
                show_bytes(record.here_bytes),
                show_bytes(missing)
            );
        }
        _ => {}
    }
    if let Some(free) = record.free_bytes {
        text += &format!("; {} free in {folder}", show_bytes(free));
    }
    text
}
