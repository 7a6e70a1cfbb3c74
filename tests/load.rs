//! What loading a checkpoint from disk takes: never both forms of the weights at once.

mod support;

use moectl::backend::cpu::{Cpu, CpuOptions};
use moectl::backend::{Backend, LogitRows, MixerKind};
use moectl::model::{Source, weights};
use support::one;

/// A field of /proc/self/status, in bytes.
fn status(field: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find(|line| line.starts_with(field))?;
    let kb: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kb << 10)
}

#[test]
fn loading_takes_under_a_tenth_more_memory_than_the_packed_weights() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("model");
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_moectl"))
        .args(["synth", "qwen3-next-80b-a3b"])
        .arg(&dir)
        .args([
            "--layers",
            "4",
            "--experts",
            "40",
            "--vocab-size",
            "8192",
            "--quiet",
        ])
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let source = Source::resolve(Some(dir.to_str().unwrap())).unwrap();
    let config = source.config().unwrap();
    let weights = weights::load(&source.checkpoint().unwrap(), &config).unwrap();
    // 5 sets the peak to what there is now.
    if std::fs::write("/proc/self/clear_refs", "5").is_err() {
        eprintln!("skipped: this system does not measure peak memory");
        return;
    }
    let cpu = Cpu::new(
        config.shape.clone(),
        &weights,
        CpuOptions::default(),
        &|_, _| {},
    );
    let cpu = cpu.unwrap();
    let peak = status("VmHWM:").unwrap();
    let (packed, load) = (cpu.weight_bytes() as u64, cpu.load_rates().unwrap());
    let share = peak as f64 / packed as f64;
    println!(
        "{packed} bytes packed, the process has {peak} at most ({share:.3}); {:.2} GB/s, read {:.2} s, packed {:.2} s",
        load.bytes as f64 / load.seconds / 1e9,
        load.read_seconds,
        load.pack_seconds
    );
    assert!(packed > 300 << 20);
    assert!(share < 1.1, "{share}");
    assert!(load.read_seconds + load.pack_seconds <= load.seconds * 1.01);

    // The embedding was not packed, and is read from the file still.
    assert!(config.shape.mixers.contains(&MixerKind::GatedAttention));
    let mut sequence = one(cpu, 16);
    let logits = sequence
        .forward(&[5, 6, 7], LogitRows::Last, &mut |_, _, _| {})
        .unwrap();
    assert!(logits.iter().all(|l| l.is_finite()));
}
