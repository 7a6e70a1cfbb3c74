//! The program on a GPU: two processes at once, too little memory, the plan's memory beside the
//! measured.
//!
//! On a machine without a GPU the emulator runs the same kernels, if it is built in; its memory is
//! each process' own, so nothing there can take another's.
#![cfg(any(feature = "cuda", feature = "emulate"))]

mod gpu;
mod support;

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard};

use gpu::{is_emulated, open_device};
use moectl::backend::cuda::device::Device;
use serde_json::Value;
use support::{data, json};

/// Tests that measure memory want the device for themselves.
fn alone() -> MutexGuard<'static, ()> {
    static DEVICE: Mutex<()> = Mutex::new(());
    DEVICE.lock().unwrap_or_else(|failed| failed.into_inner())
}

/// The program, on the device that the test sees; `MOECTL_BIN` names another binary than cargo's.
fn moectl(device: &Device, words: &str) -> Command {
    let given = std::env::var_os("MOECTL_BIN");
    let mut command = Command::new(given.unwrap_or(env!("CARGO_BIN_EXE_moectl").into()));
    command
        .args(words.split_whitespace())
        .env(
            "MOECTL_EMULATE",
            if is_emulated(device) { "1" } else { "0" },
        )
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

#[track_caller]
fn printed(output: &Output) -> Value {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {stderr}", output.status);
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Exit status 4, and what is said with it.
#[track_caller]
fn refused(output: &Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(4), "{stderr}");
    assert!(output.stdout.is_empty(), "nothing was generated: {stderr}");
    stderr
}

const BUDGET: u64 = 1200 << 20;

/// Long enough that two are under way at once, if they start together.
fn generation(device: &Device, prompt: &str) -> Command {
    let n = if is_emulated(device) { 6 } else { 400 };
    let line = format!(
        "run -q --json --model tiny --backend cuda:0 --vram 1200M --temperature 0 --ignore-eos \
         -n {n} --threads 2 --prompt-ids {prompt}"
    );
    moectl(device, &line)
}

#[test]
fn two_processes_at_once_keep_their_budgets_and_give_the_tokens_of_one() {
    let _alone = alone();
    let Some(device) = open_device() else { return };
    let prompts = ["5,6,7,8", "900,40,3"];
    let expected: Vec<Value> = prompts
        .iter()
        .map(|prompt| printed(&generation(&device, prompt).output().unwrap()))
        .collect();
    let started: Vec<_> = prompts
        .iter()
        .map(|prompt| generation(&device, prompt).spawn().unwrap())
        .collect();
    for (process, alone) in started.into_iter().zip(&expected) {
        let found = printed(&process.wait_with_output().unwrap());
        assert_eq!(found["token_ids"], alone["token_ids"]);
        for record in [&found, alone] {
            let held = record["vram_bytes"].as_u64().unwrap();
            assert!(held > 0 && held <= BUDGET, "{held} of {BUDGET} bytes");
        }
    }
    assert_ne!(expected[0]["token_ids"], expected[1]["token_ids"]);
}

#[test]
fn too_small_a_budget_exits_4_with_numbers() {
    let _alone = alone();
    let Some(device) = open_device() else { return };
    let line = "run -q --json --model tiny --backend cuda:0 --vram 20M -n 2 --prompt-ids 1";
    let said = refused(&moectl(&device, line).output().unwrap());
    assert!(
        said.contains("20.0 MiB") && said.contains("needs"),
        "{said}"
    );
}

#[test]
fn memory_that_another_process_holds_exits_4_with_numbers() {
    let _alone = alone();
    let Some(device) = open_device() else { return };
    if is_emulated(&device) {
        println!("skipped: no CUDA device; emulated processes share no memory");
        return;
    }
    let stream = device.new_stream().unwrap();
    let (free, _) = device.memory().unwrap();
    // This process is the other one: it leaves a little less than a model needs.
    let left = 300 << 20;
    let held = device.alloc((free - left) as usize, &stream).unwrap();
    stream.synchronize().unwrap();
    let line = "run -q --json --model tiny --backend cuda:0 -n 2 --prompt-ids 1";
    let said = refused(&moectl(&device, line).output().unwrap());
    assert!(said.contains("needs") && said.contains("is free"), "{said}");
    let line = format!("{line} --vram 4G");
    let said = refused(&moectl(&device, &line).output().unwrap());
    assert!(
        said.contains("4.0 GiB") && said.contains("another process"),
        "{said}"
    );
    drop(held);
    let line = format!("{line} --temperature 0");
    printed(&moectl(&device, &line).output().unwrap());
}

/// The plan's memory table adds up to the measured peak within 2%.
#[test]
fn a_plan_has_the_memory_that_its_run_takes() {
    let _alone = alone();
    let Some(device) = open_device() else { return };
    let folder = tempfile::tempdir().unwrap();
    let out: PathBuf = folder.path().join("out");
    let line = format!(
        "bench --model {} --backend cuda:0 --vram 1200M --ctx 24,40 -n 3 --warmups 0 \
         --repetitions 1 --quality-tokens 0 -o {}",
        data("goldens/tiny-c/bf16").display(),
        out.display()
    );
    let output = moectl(&device, &line).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let failed = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{failed}");
    let run = json(out.join("run.json"));
    let memory = &run["memory"];
    let planned: u64 = memory["components"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|item| item["tier"] == "vram")
        .map(|item| item["bytes"].as_u64().unwrap())
        .sum();
    let peak = memory["peak_vram_bytes"].as_u64().unwrap();
    let error = memory["vram_prediction_error"].as_f64().unwrap();
    println!("{planned} bytes planned, {peak} at most: {error:+.4}");
    assert!(peak > 0 && peak <= BUDGET, "{peak}");
    assert!((error - (planned as f64 - peak as f64) / peak as f64).abs() < 1e-9);
    assert!(error.abs() <= 0.02, "{planned} planned, {peak} measured");
    assert!(said.contains("peak GPU memory"), "{said}");
    // The monitor went through the run; what this machine does not count is absent.
    let monitor = &run["monitor"];
    let samples = monitor["samples"].as_array().unwrap();
    assert!(samples.len() >= 2);
    assert!(samples.iter().all(|s| s["vram_bytes"].as_u64().is_some()));
    if is_emulated(&device) && !moectl_sees_a_gpu() {
        assert!(samples.iter().all(|s| s.get("gpu_power_w").is_none()));
        assert!(monitor.get("pcie_rx_bytes").is_none());
    }
    let report = std::fs::read_to_string(out.join("report.md")).unwrap();
    assert!(
        report.contains("of VRAM planned, measured peak"),
        "{report}"
    );
    assert!(report.contains("## During the run"), "{report}");
}

fn moectl_sees_a_gpu() -> bool {
    !moectl::hardware::GpuReport::detect().devices.is_empty()
}
