//! The file of `--cache-state`: what is in the expert slots, from one run to the next.

use std::path::Path;

use anyhow::anyhow;

use super::check_output;
use super::console::Console;
use crate::engine::Engine;
use crate::engine::experts::ExpertManager;
use crate::formats::document::CACHE_STATE;
use crate::formats::{Document, ModelId, atomic};
use crate::planning::CacheState;

/// Has `manager` go on from the file, if it is there; without a manager only looks at the file.
///
/// # Errors
/// The file is damaged, of another kind or newer; of another model, placement or policy; or could
/// not be written at the end.
pub fn restore(
    path: &Path,
    model: &ModelId,
    manager: Option<&mut ExpertManager>,
) -> anyhow::Result<bool> {
    check_output(path)?;
    // A device or pipe would keep nothing for the next run.
    anyhow::ensure!(
        !atomic::is_stream(path),
        "{}: is a device or pipe, expected a file that the next run can read",
        path.display()
    );
    if !path.exists() {
        return Ok(false);
    }
    let way_out = "remove it, or name another file, to start as the placement says";
    let document = Document::<CacheState>::read(path, CACHE_STATE)
        .and_then(|document| document.check_model(path, model).map(|()| document))
        .map_err(|error| anyhow!("{error}; {way_out}"))?;
    if let Some(manager) = manager {
        (manager.restore(&document.body))
            .map_err(|error| anyhow!("{}: {error}", path.display()))?;
    }
    Ok(true)
}

/// Writes where the cache of `engine` is now, whole or not at all.
///
/// # Errors
/// If the file cannot be written.
pub fn save(path: Option<&Path>, engine: &Engine, console: &Console) -> anyhow::Result<()> {
    let Some(path) = path else { return Ok(()) };
    let Some(experts) = engine.experts() else {
        console.note(format!(
            "note: {} is not written: {}",
            path.display(),
            match engine.backend().gpu() {
                Some(_) => "experts stay where they are without --placement",
                None => "this backend has no expert slots",
            }
        ));
        return Ok(());
    };
    let model = Some(engine.model_id().clone());
    Document::new(CACHE_STATE, model, experts.state()).write(path)?;
    console.detail(format!("wrote {}", path.display()));
    Ok(())
}
