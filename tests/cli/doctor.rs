//! `moectl doctor --measure` without a GPU; `tests/gpu_measure.rs` has the rest.

use serde_json::Value;

use crate::program::Sandbox;

#[test]
fn expert_kernels_are_measured_by_batch_and_planned_with() {
    let sandbox = Sandbox::new();
    let model = "synth:tiny?layers=4&experts=8";
    let outcome = sandbox.run(&format!(
        "doctor --measure --measure-model {model} -o hw.json"
    ));
    let outcome = outcome.ok();
    let file = sandbox.json("hw.json");
    let batches = file["cpu_experts"]["batches"].as_array().unwrap();
    let tokens: Vec<u64> = (batches.iter().map(|b| b["tokens"].as_u64().unwrap())).collect();
    assert!(
        tokens[0] == 1 && tokens.is_sorted() && tokens.len() >= 3,
        "{tokens:?}"
    );
    for batch in batches {
        let positive = |v: &Value| assert!(v.as_f64().unwrap() > 0.0, "{batch}");
        positive(&batch["weights"]["median_gb_s"]);
        positive(&batch["median_gflops"]);
        assert!(
            batch["weights"]["repetitions"].as_u64() >= Some(3),
            "{batch}"
        );
    }
    let cpu = &file["machine"]["cpu"];
    for field in ["expert_kernel_gb_s", "expert_kernel_gflops"] {
        assert_eq!(cpu[field]["basis"], "measured", "{field}");
        assert!(cpu[field]["mad"].is_f64(), "{field}");
    }
    assert!(outcome.stdout.contains("cpu experts"), "{outcome:?}");
    if file.get("gpu_probe").is_none() {
        let because = ["no GPU to measure", "no kernels for a GPU"];
        let said = because.iter().any(|part| outcome.stderr.contains(part));
        assert!(said, "{outcome:?}");
    }
    sandbox.run("plan --hardware hw.json --vram 2G").ok();
}
