//! Loading a model the way the flags ask, with a progress bar.

use crate::cli::ComputeArgs;
use crate::commands::console::{Console, Unit};
use crate::engine::{Engine, LoadOptions};
use crate::model::Source;

/// Loads the model with room for `max_tokens`; says what its owner should know.
pub fn engine(
    source: &Source,
    compute: &ComputeArgs,
    max_tokens: usize,
    console: &Console,
) -> anyhow::Result<Engine> {
    let bar = console.progress("load", 0, Unit::Bytes);
    let options = LoadOptions {
        backend: compute.backend,
        threads: compute.threads,
        cpu_precision: compute.cpu_precision.into(),
        gpu: compute.gpu(),
        kv_dtype: compute.kv_dtype,
        progress: &|done, total| {
            bar.set_length(total as u64);
            bar.set_position(done as u64);
        },
        max_tokens,
    };
    let engine = Engine::load(source, &options);
    bar.finish_and_clear();
    let engine = engine?;
    engine
        .notes()
        .iter()
        .for_each(|note| console.note(format!("note: {note}")));
    if let Some(load) = engine.load_rates() {
        let gb_s = |seconds: f64| load.bytes as f64 / seconds.max(1e-9) / 1e9;
        console.detail(format!(
            "loaded {:.2} GB in {:.1} s, {:.2} GB/s: reading alone {:.2} GB/s, packing alone {:.2} GB/s",
            load.bytes as f64 / 1e9,
            load.seconds,
            gb_s(load.seconds),
            gb_s(load.read_seconds),
            gb_s(load.pack_seconds),
        ));
    }
    console.detail(format!(
        "model {} on backend {}, room for {max_tokens} tokens",
        source.id(),
        engine.backend().name
    ));
    Ok(engine)
}
