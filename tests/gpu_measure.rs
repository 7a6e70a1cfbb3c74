//! `doctor --measure` on the emulated GPU: every figure is there, and plans are made from them.
#![cfg(feature = "emulate")]

#[path = "cli/program.rs"]
mod program;

use moectl::hardware::GpuProbe;
use program::{Sandbox, finish};
use serde_json::Value;

#[test]
fn every_figure_is_measured_and_planned_with() {
    let sandbox = Sandbox::new();
    let line = "doctor --measure --json -o hw.json \
                --measure-model synth:tiny?layers=4&experts=8&max-position-embeddings=512";
    let mut command = sandbox.command(&line.split_whitespace().collect::<Vec<_>>());
    command.env("MOECTL_EMULATE", "1");
    finish(&mut command).ok();
    let file = sandbox.json("hw.json");
    let probe: GpuProbe = serde_json::from_value(file["gpu_probe"].clone()).unwrap();
    assert!(probe.name.contains("emulated"), "{}", probe.name);
    for (name, rate) in probe.rates() {
        let (median, mad) = (rate.median_gb_s, rate.mad_gb_s);
        assert!(median.is_finite() && median > 0.0, "{name}: {median}");
        assert!(mad.is_finite() && mad >= 0.0, "{name}: ± {mad}");
        assert!(rate.best_gb_s >= median && rate.repetitions >= 3, "{name}");
    }
    for (name, duration) in probe.durations() {
        let (median, mad) = (duration.median_us, duration.mad_us);
        // Differences of noisy steps, which here may come out as nothing.
        let least = if name.starts_with("hand-off") || name.starts_with("experts of a layer") {
            0.0
        } else {
            1e-3
        };
        assert!(median.is_finite() && median >= least, "{name}: {median}");
        assert!(mad.is_finite() && duration.repetitions >= 3, "{name}");
    }
    assert!(probe.h2d.is_sorted_by(|a, b| a.bytes < b.bytes) && probe.h2d.len() >= 3);
    assert_eq!(probe.d2h.len(), probe.h2d.len());

    let gpu = &file["machine"]["gpu"];
    let measured = |field: &Value| assert_eq!(field["basis"], "measured", "{field}");
    for field in [
        "vram_gb_s",
        "weight_kernel_share",
        "dense_gb_s",
        "lm_head_gb_s",
        "kv_cache_gb_s",
        "cpu_and_pcie_gb_s",
        "kernel_boundary_us",
        "flag_round_trip_us",
    ] {
        measured(&gpu[field]);
    }
    measured(&gpu["h2d"][0]["gb_s"]);
    let waits = gpu["expert_wait"].as_array().unwrap();
    assert!(waits.len() >= 3, "{waits:?}");
    let missing = waits.iter().map(|w| w["missing_bytes"].as_f64().unwrap());
    assert!(missing.is_sorted_by(|a, b| 0.0 < *a && a < b), "{waits:?}");
    waits.iter().for_each(|wait| measured(&wait["us"]));
    measured(&file["machine"]["cpu"]["expert_kernel_gb_s"]);
    assert_eq!(gpu["gemm_tflops"]["basis"], "modelled");

    let plan = sandbox.run("plan --hardware hw.json --vram 2G --json").ok();
    let plan = plan.json();
    assert_eq!(plan["hardware_basis"], "mixed");
    assert!(plan["decode"]["tok_s"].as_f64().unwrap() > 0.0);
}
