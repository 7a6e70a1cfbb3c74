//! Flags against back ends: what one cannot do is refused, what has no effect is said.

use crate::program::{Sandbox, small_model};

/// How a flag fares on `--backend reference`, on `--backend cpu`, and where `auto` finds no GPU.
#[derive(Clone, Copy, PartialEq)]
enum Fate {
    Heeded,
    /// Said on stderr
    Noted,
    /// Exit code 2
    Refused,
}

use Fate::{Heeded, Noted, Refused};

#[test]
fn no_flag_is_ignored_in_silence() {
    let table = [
        ("--threads 1", [Noted, Heeded, Heeded]),
        ("--kv-dtype f32", [Heeded, Heeded, Heeded]),
        ("--kv-dtype f16", [Refused, Heeded, Heeded]),
        ("--kv int8", [Refused, Heeded, Heeded]),
        ("--cpu-precision f32", [Heeded, Heeded, Heeded]),
        ("--cpu-precision int8", [Refused, Heeded, Heeded]),
        ("--vram 14G", [Refused, Refused, Noted]),
        ("--cpu-moe", [Refused, Refused, Noted]),
        ("--placement placement.json", [Refused, Refused, Noted]),
        (
            "--placement placement.json --policy lru",
            [Refused, Refused, Noted],
        ),
        ("--policy lru", [Refused, Refused, Refused]),
        ("--gpu-reads 0,1", [Refused, Refused, Noted]),
        ("--precision exact", [Refused, Refused, Noted]),
        ("--prefill-chunk 4k", [Refused, Refused, Noted]),
    ];
    let sandbox = Sandbox::new();
    let model = small_model();
    let model = model.display();
    sandbox.run(&format!("plan --ctx 64 -m {model}")).ok();
    for (flags, fates) in table {
        let flag = flags.rsplit(" --").next().unwrap().trim_start_matches('-');
        let flag = flag.split(' ').next().unwrap();
        for (backend, fate) in ["--backend reference", "--backend cpu", ""]
            .iter()
            .zip(fates)
        {
            let line = format!("run -m {model} --prompt-ids 1,2 -n 1 {backend} {flags}");
            let outcome = sandbox.run(&line);
            let told = outcome.stderr.contains(&format!("--{flag}"));
            match fate {
                Refused => drop(outcome.fails(2, &["--"])),
                Noted => assert!(outcome.ok().stderr.contains("no effect"), "{line}"),
                Heeded => assert!(!told, "{line}: {:?}", outcome.ok()),
            }
        }
    }
}

#[test]
fn a_model_that_ram_cannot_hold_is_refused_before_loading_with_the_way_out() {
    let sandbox = Sandbox::new();
    let model = small_model();
    let line = format!(
        "run -m {} --prompt-ids 1,2 -n 1 --backend cpu",
        model.display()
    );
    let parts = [
        "of RAM",
        "--ram is 10.0 MiB",
        "--backend reference",
        "--ram ",
    ];
    let refused = sandbox.run(&format!("{line} --ram 10M")).fails(4, &parts);
    let (_, way_out) = refused.stderr.split_once("; --ram ").unwrap();
    let enough = way_out.split(' ').next().unwrap();
    sandbox.run(&format!("{line} --ram {enough}")).ok();
    // Nothing is made, nothing is read: 41 GB would take minutes.
    let model = "synth:qwen3-next-80b-a3b";
    let huge = format!("run -m {model} --prompt-ids 1,2 -n 1 --backend cpu --ram 24G");
    let start = std::time::Instant::now();
    sandbox.run(&huge).fails(4, &["the model takes 4"]);
    assert!(start.elapsed().as_secs() < 30);
}

/// What is generated goes as it is packed.
#[test]
fn a_synthetic_model_in_memory_peaks_near_its_own_size() {
    let sandbox = Sandbox::new();
    let shape = "synth:qwen3-next-80b-a3b?layers=4&experts=64&vocab-size=8192";
    let args = [
        "run",
        "--json",
        "--backend",
        "cpu",
        "--prompt-ids",
        "1",
        "-n",
        "1",
        "-m",
        shape,
    ];
    let record = sandbox.run_args(&args).ok().json();
    let peak = record["peak_rss_bytes"].as_u64().unwrap();
    // 4 layers of 64 experts of 1.6 MB, and 60 MB beside them each.
    let weights = 620_000_000;
    assert!(peak < weights / 10 * 11 + 150_000_000, "{peak}");
}
