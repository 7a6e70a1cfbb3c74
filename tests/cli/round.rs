//! profile, plan, bench, report: one round with small settings, every file read back.

use std::path::Path;

use serde_json::{Value, json};

use crate::program::{Sandbox, small_model};

const CORPUS: &str = r#"{"id": "a", "domain": "prose", "text": "The river runs past the old mill."}
{"id": "b", "domain": "code", "prompt": "fn main() {"}
{"id": "c", "domain": "chat", "messages": [{"role": "user", "content": "What is a river?"}]}
{"id": "d", "domain": "prose", "text": "It was a dark and stormy night, and the rain fell."}
{"id": "e", "domain": "code", "text": "for i in 0..10 { println!(\"{i}\"); }"}
"#;

/// A sandbox with a corpus, and the small model as its default.
fn sandbox() -> Sandbox {
    let sandbox = Sandbox::new();
    sandbox.write("corpus.jsonl", CORPUS);
    sandbox.write("moectl.toml", format!("model = {:?}\n", small_model()));
    sandbox
}

#[track_caller]
fn assert_envelope(document: &Value, schema: &str) {
    assert_eq!(document["schema"], schema);
    assert_eq!(document["schema_version"], 1);
    assert_eq!(document["moectl_version"], env!("CARGO_PKG_VERSION"));
    let created = document["created"].as_str().unwrap();
    assert!(created.len() == 20 && created.ends_with('Z'), "{created}");
    assert_eq!(document["model"]["id"], small_model().to_str().unwrap());
    for hash in ["fingerprint", "config_sha256"] {
        assert_eq!(document["model"][hash].as_str().unwrap().len(), 64);
    }
}

/// What a document says, without when and by whom.
fn body(mut document: Value) -> Value {
    document.as_object_mut().unwrap().remove("created");
    document
}

#[track_caller]
fn assert_charts_and_tables(folder: &Path, expected: &[&str]) {
    for name in expected {
        let bytes = std::fs::read(folder.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(bytes.len() > 100, "{name}");
    }
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.display();
        match path.extension().and_then(|e| e.to_str()) {
            Some("png") => {
                let bytes = std::fs::read(&path).unwrap();
                assert!(bytes.starts_with(b"\x89PNG\r\n\x1a\n"), "{name}");
                assert!(bytes.len() > 1000, "{name}");
            }
            Some("csv") => {
                let mut table = csv::Reader::from_path(&path).unwrap();
                let columns = table.headers().unwrap().len();
                let rows = table.records().map(|row| row.unwrap().len());
                assert!(columns > 1 && rows.count() > 0, "{name}");
            }
            Some("tmp" | "part") => panic!("left behind: {name}"),
            _ => {}
        }
    }
}

#[test]
fn shards_of_a_corpus_merge_to_the_profile_of_the_whole() {
    let sandbox = sandbox();
    sandbox.run("profile corpus.jsonl").ok();
    for shard in [1, 2] {
        sandbox
            .run(&format!(
                "profile corpus.jsonl --shard {shard}/2 -o part{shard}.json"
            ))
            .ok();
    }
    sandbox
        .run("profile --merge part1.json part2.json -o merged.json")
        .ok();
    let whole = sandbox.json("profile.json");
    assert_envelope(&whole, "moectl.profile");
    assert_eq!(body(sandbox.json("merged.json")), body(whole.clone()));
    assert_ne!(body(sandbox.json("part1.json")), body(whole));
}

#[test]
fn json_prints_the_profile_that_is_written() {
    let sandbox = sandbox();
    let outcome = sandbox.run("profile corpus.jsonl --json --generate 4").ok();
    let profile = outcome.json();
    assert_eq!(profile, sandbox.json("profile.json"));
    assert!(profile.to_string().contains("\"decode\""));
}

#[test]
fn a_trace_is_read_back_and_validates_the_plan() {
    let sandbox = sandbox();
    sandbox
        .run("profile corpus.jsonl --trace t.trace --generate 6")
        .ok();
    let outcome = sandbox
        .run("plan --trace t.trace --ctx 256 --json --hardware laptop-4090")
        .ok();
    let placement = outcome.json();
    assert_envelope(&placement, "moectl.placement");
    assert_eq!(placement["curves_from"], "trace");
    let validation = &placement["validation"];
    assert!(validation["held_out_tokens"].as_u64().unwrap() > 0);
    let scores = validation["scores"].as_array().unwrap();
    assert!(scores.iter().any(|score| score["chosen"] == true));

    // A recording that was cut off is used as far as it goes, and that is said.
    let trace = std::fs::read(sandbox.path("t.trace")).unwrap();
    sandbox.write("cut.trace", &trace[..trace.len() - 40]);
    let outcome = sandbox.run("plan --trace cut.trace --ctx 256 --hardware laptop-4090");
    assert!(outcome.ok().stderr.contains("cut.trace: cut off"));
}

#[test]
fn the_chosen_policy_is_never_a_point_below_static_or_lru_on_held_out_text() {
    // The built-in model, because its router is trained.
    let sandbox = Sandbox::new();
    sandbox.run("profile --trace t.trace").ok();
    let plan = sandbox.run("plan --trace t.trace --vram 2G --ctx 1k --json --hardware laptop-4090");
    let validation = &plan.ok().json()["validation"];
    assert!(validation["held_out_tokens"].as_u64().unwrap() > 20_000);
    let shares = validation["by_share"].as_array().unwrap();
    assert_eq!(shares.len(), 3);
    for share in shares {
        let scores = share["scores"].as_array().unwrap();
        let rate = |of: &dyn Fn(&Value) -> bool| -> f64 {
            let score = scores.iter().find(|score| of(score)).unwrap();
            score["expert_hit_rate"].as_f64().unwrap()
        };
        let chosen = rate(&|score| score["chosen"] == true);
        for other in ["static", "lru"] {
            let other = rate(&|score| score["policy"] == other);
            assert!(chosen >= other - 0.01, "{share}");
        }
        assert!(
            chosen <= rate(&|score| score["policy"] == "belady"),
            "{share}"
        );
    }
}

#[test]
fn a_round_from_profile_to_report() {
    let sandbox = sandbox();
    sandbox.run("profile corpus.jsonl --generate 4").ok();
    sandbox
        .run("plan --profile profile.json --ctx 128 --hardware laptop-4090")
        .ok();
    assert_envelope(&sandbox.json("placement.json"), "moectl.placement");

    let bench = "bench corpus.jsonl --placement placement.json --ctx 24,48 -n 4 \
                 --repetitions 3 --warmups 1 --quality-tokens 64 --json";
    let printed = sandbox.run(bench).ok();
    let run = sandbox.json("bench-out/run.json");
    assert_eq!(printed.json(), run);
    assert_envelope(&run, "moectl.run");
    let contexts = run["contexts"].as_array().unwrap();
    assert_eq!(contexts.len(), 2);
    for context in contexts {
        let repetitions = context["repetitions"].as_array().unwrap();
        assert_eq!(repetitions.len(), 3);
        for repetition in repetitions {
            assert_eq!(repetition["generated_tokens"], 4);
            assert_eq!(repetition["itl_ms"].as_array().unwrap().len(), 3);
            assert!(repetition["ttft_ms"].as_f64().unwrap() > 0.0);
            assert_eq!(repetition["output_sha256"], repetitions[0]["output_sha256"]);
        }
    }
    assert_eq!(run["placement_sha256"].as_str().unwrap().len(), 64);
    assert_eq!(run["labels"]["executed_on"], "cpu");
    assert_eq!(run["settings"]["continuation"], "sampled");
    let bench_out = sandbox.path("bench-out");
    assert_charts_and_tables(&bench_out, &["report.html", "report.md"]);

    // The same files again, now by hand.
    let line = "report bench-out/run.json --profile profile.json --placement placement.json \
                -o report";
    sandbox.run(line).ok();
    let expected = ["report.html", "report.md", "throughput.png", "memory.png"];
    assert_charts_and_tables(&sandbox.path("report"), &expected);

    // A slower run of the same is a regression, a faster one is none.
    for (name, factor, code) in [("slower", 3.0, 3), ("faster", 0.3, 0)] {
        let mut other = run.clone();
        for context in other["contexts"].as_array_mut().unwrap() {
            for repetition in context["repetitions"].as_array_mut().unwrap() {
                stretch(repetition, factor);
            }
        }
        sandbox.write(&format!("{name}.json"), other.to_string());
        let line = format!("report bench-out/run.json {name}.json --fail-above 5% -o {name}");
        let outcome = sandbox.run(&line);
        assert_eq!(outcome.code, Some(code), "{outcome:?}");
        assert!(sandbox.path(name).join("report.md").is_file());
        if code == 3 {
            for part in ["slower: ", "% worse", "decode_tok_s"] {
                assert!(outcome.stderr.contains(part), "{outcome:?}");
            }
        }
    }
}

#[test]
fn bench_decodes_the_text_of_the_corpus_or_what_it_samples() {
    let sandbox = sandbox();
    let bench = |layers: usize, flags: &str| {
        let line = format!(
            "bench corpus.jsonl --model synth:tiny?layers={layers}&experts=8 -n 6 --warmups 0 \
             --repetitions 1 --quality-tokens 0 {flags}"
        );
        let outcome = sandbox.run(&line).ok();
        let run = sandbox.json("bench-out/run.json");
        let repetition = &run["contexts"][0]["repetitions"][0];
        let lengths =
            ["prompt_tokens", "generated_tokens"].map(|n| repetition[n].as_u64().unwrap());
        let fed = run["settings"]["continuation"]
            .as_str()
            .unwrap()
            .to_string();
        let hash = repetition["output_sha256"].as_str().unwrap().to_string();
        (fed, lengths, hash, outcome)
    };
    // The text is the default of synthetic weights, and the same for any of them.
    let (fed, lengths, text, outcome) = bench(2, "--ctx 24");
    assert_eq!((fed.as_str(), lengths), ("text", [18, 6]));
    let told = "decoded the text that follows the prompt";
    assert!(outcome.stdout.contains(told), "{outcome:?}");
    let (fed, lengths, other, _) = bench(4, "--ctx 24 --continuation text");
    assert_eq!((fed.as_str(), lengths), ("text", [18, 6]));
    assert_eq!(other, text);
    let (fed, lengths, sampled, outcome) = bench(2, "--ctx 24 --continuation sampled");
    assert_eq!((fed.as_str(), lengths), ("sampled", [18, 6]));
    assert_ne!(sampled, text);
    assert!(
        outcome.stdout.contains("decoded what was sampled"),
        "{outcome:?}"
    );
}

#[test]
fn bench_decodes_sequences_together_and_counts_all_their_tokens() {
    let sandbox = sandbox();
    let line = "bench corpus.jsonl --model synth:tiny?layers=2&experts=8 --repeat-text --ctx 24 -n 12 \
                --warmups 0 --repetitions 1 --parallel 1,3 --consecutive 2";
    let rows = sandbox.run(&format!("{line} --json")).ok().json();
    let cases: Vec<_> = (rows.as_array().unwrap().iter())
        .map(|row| {
            let (steps, ms) = (
                row["decode_tok_s"].as_f64().unwrap(),
                row["step_ms"].as_f64().unwrap(),
            );
            assert!(steps > 0.0 && ms > 0.0, "{row}");
            [&row["parallel"], &row["consecutive"]].map(|n| n.as_u64().unwrap())
        })
        .collect();
    assert_eq!(cases, [[1, 1], [3, 1], [1, 2]]);
    assert_eq!(rows[0]["times_first"], 1.0);
    let table = sandbox.run(line).ok();
    assert_eq!(table.stdout.lines().count(), 4, "{table:?}");
    let few = sandbox.run("bench --ctx 24 -n 6 --parallel 2 --consecutive 4");
    few.fails(2, &["-n 16"]);
}

#[test]
fn a_label_says_what_ran_or_the_text_is_too_short_and_that_is_an_error() {
    let sandbox = sandbox();
    sandbox.write(
        "corpus.jsonl",
        r#"{"text": "one two three four five six seven eight"}"#,
    );
    let line = "bench corpus.jsonl --model synth:tiny?layers=2&experts=8 -n 6 --ctx 12,64 \
                --repetitions 1 --quality-tokens 0";
    for continuation in ["sampled", "text"] {
        let outcome = sandbox.run(&format!("{line} --continuation {continuation}"));
        outcome.fails(2, &["corpus.jsonl holds ", "wants ", "--repeat-text"]);
        assert!(!sandbox.path("bench-out/run.json").exists());
    }
    let outcome = sandbox.run(&format!("{line} --repeat-text")).ok();
    assert!(outcome.stderr.contains("was gone through"), "{outcome:?}");
    let run = sandbox.json("bench-out/run.json");
    for context in run["contexts"].as_array().unwrap() {
        let repetition = &context["repetitions"][0];
        let ran = repetition["prompt_tokens"].as_u64().unwrap() + 6;
        assert_eq!(context["context_tokens"].as_u64().unwrap(), ran);
    }
    let notes = run["labels"]["notes"].to_string();
    assert!(notes.contains("routing repeats itself"), "{notes}");
}

#[test]
fn prefill_and_decode_are_compared_with_their_predictions_by_one_sign() {
    let sandbox = sandbox();
    let line = "bench corpus.jsonl --ctx 24 -n 4 --repetitions 2 --quality-tokens 0";
    let text = sandbox.run(line).ok().stdout;
    assert!(text.contains("range in brackets"), "{text}");
    assert!(!text.contains("95%"), "{text}");
    let run = sandbox.json("bench-out/run.json");
    let context = &run["contexts"][0];
    for (predicted, error, metric) in [
        ("decode_tok_s", "prediction_error", "decode_tok_s"),
        ("prefill_tok_s", "prefill_prediction_error", "prefill_tok_s"),
    ] {
        let predicted = context["prediction"][predicted].as_f64().unwrap();
        let repetitions = context["repetitions"].as_array().unwrap();
        let sum: f64 = repetitions
            .iter()
            .map(|r| r[metric].as_f64().unwrap())
            .sum();
        let expected = predicted / (sum / 2.0) - 1.0;
        let error = context[error].as_f64().unwrap();
        assert!((error - expected).abs() < 1e-9, "{metric}");
        let shown = format!("({:+.0}%", 100.0 * error);
        assert!(text.contains(&shown), "{shown}: {text}");
    }
    // A CPU has no VRAM, whatever a plan would put there.
    let components = run["memory"]["components"].as_array().unwrap();
    assert!(
        components.iter().all(|c| c["tier"] != "vram"),
        "{components:?}"
    );
    assert!(run["memory"]["vram_budget_bytes"].is_null());
}

/// A run file of the sandbox with something of it changed.
fn write_changed(sandbox: &Sandbox, name: &str, run: &Value, change: impl Fn(&mut Value)) {
    let mut other = run.clone();
    change(&mut other);
    sandbox.write(name, other.to_string());
}

#[test]
fn a_gate_passes_only_what_was_compared_and_alike() {
    let sandbox = sandbox();
    let line = "bench corpus.jsonl --ctx 24,48 -n 4 --repetitions 6 --quality-tokens 32";
    sandbox.run(line).ok();
    let run = sandbox.json("bench-out/run.json");
    let gate = |files: &str| sandbox.run(&format!("report {files} --fail-above 5% -o report"));
    write_changed(&sandbox, "same.json", &run, |_| {});
    let outcome = gate("bench-out/run.json same.json").ok();
    assert!(outcome.stdout.contains("verdict: PASS"), "{outcome:?}");
    assert!(outcome.stdout.contains("rule: fails if"), "{outcome:?}");

    gate("bench-out/run.json").fails(2, &["only one was given"]);
    for (name, change, part) in [
        ("model", "/model/id", "model: "),
        ("machine", "/hardware/cpu/model_name", "machine: "),
        ("backend", "/labels/executed_on", "backend: "),
        ("corpus", "/settings/corpus_sha256", "corpus: "),
    ] {
        write_changed(&sandbox, "other.json", &run, |other| {
            *other.pointer_mut(change).unwrap() = json!("something else altogether");
        });
        let outcome = gate("bench-out/run.json other.json");
        outcome.fails(2, &[part, &format!("--allow-different {name}")]);
        let outcome = gate(&format!(
            "bench-out/run.json other.json --allow-different {name}"
        ));
        outcome.ok();
    }
    let fails = |change: &dyn Fn(&mut Value), part: &str| {
        write_changed(&sandbox, "worse.json", &run, change);
        let outcome = gate("bench-out/run.json worse.json");
        assert_eq!(outcome.code, Some(3), "{outcome:?}");
        assert!(outcome.stderr.contains(part), "{part}: {outcome:?}");
        assert!(outcome.stdout.contains("verdict: FAIL"), "{outcome:?}");
    };
    fails(&|r| r["contexts"] = json!([]), "missing");
    fails(
        &|r| drop(r["contexts"].as_array_mut().unwrap().pop()),
        "context at 48 context",
    );
    fails(&|r| r["contexts"][0]["repetitions"] = json!([]), "missing");
    fails(
        &|r| r["quality"]["mean_kl_nats"] = json!(0.5),
        "mean_kl_nats",
    );
    fails(&|r| r["quality"]["perplexity"] = json!(1e9), "perplexity");
    fails(
        &|r| drop(r.as_object_mut().unwrap().remove("quality")),
        "quality: missing",
    );
    fails(
        &|r| r["contexts"][0]["repetitions"][0]["output_sha256"] = json!("other"),
        "other tokens were generated",
    );
    // Both without contexts: nothing was compared, which is no pass.
    write_changed(&sandbox, "empty.json", &run, |r| r["contexts"] = json!([]));
    sandbox.write(
        "empty2.json",
        std::fs::read(sandbox.path("empty.json")).unwrap(),
    );
    let outcome = gate("empty.json empty2.json");
    assert_eq!(outcome.code, Some(3), "{outcome:?}");
}

#[test]
fn ten_percent_slower_fails_in_every_format_that_ci_reads() {
    let sandbox = sandbox();
    let line = "bench corpus.jsonl --ctx 24 -n 4 --repetitions 10 --quality-tokens 0 -q";
    let outcome = sandbox.run(line).ok();
    assert_eq!(outcome.stderr, "");
    let run = sandbox.json("bench-out/run.json");
    // Steady samples, so that the test is one of the rule and not of this machine.
    let steady = |factor: f64| {
        move |run: &mut Value| {
            let repetitions = run["contexts"][0]["repetitions"].as_array_mut().unwrap();
            let first = repetitions[0].clone();
            for (i, repetition) in repetitions.iter_mut().enumerate() {
                *repetition = first.clone();
                stretch(repetition, factor * (1.0 + 0.001 * i as f64));
            }
        }
    };
    write_changed(&sandbox, "base.json", &run, steady(1.0));
    write_changed(&sandbox, "slow.json", &run, steady(1.1));
    let line = "report base.json slow.json --fail-above 5% --ci ci -q";
    let outcome = sandbox.run(line);
    assert_eq!(outcome.code, Some(3), "{outcome:?}");
    assert!(outcome.stderr.contains("slow: decode_tok_s"), "{outcome:?}");
    assert!(!outcome.stdout.contains("wrote"), "{outcome:?}");
    let read = |name: &str| std::fs::read_to_string(sandbox.path("ci").join(name)).unwrap();
    let verdict: Value = serde_json::from_str(&read("verdict.json")).unwrap();
    assert_eq!(verdict[0]["outcome"], "fail");
    assert!(read("summary.md").contains("### ❌ fail: slow against base"));
    assert!(read("summary.md").contains('█'));
    let junit = read("junit.xml");
    assert!(
        junit.contains("<failure message=\"decode_tok_s at 24 context"),
        "{junit}"
    );
    let bigger: Value = serde_json::from_str(&read("benchmark-bigger-is-better.json")).unwrap();
    assert_eq!(bigger[0]["unit"], "tok/s");
    let bencher: Value = serde_json::from_str(&read("bencher.json")).unwrap();
    assert!(
        bencher["context 24"]["decode-tok-s"]["value"]
            .as_f64()
            .unwrap()
            > 0.0
    );
    assert!(read("openmetrics.txt").ends_with("# EOF\n"));
    let line = "report base.json base.json --fail-above 5% --json";
    let printed = sandbox.run(line).ok().json();
    assert_eq!(printed["verdicts"][0]["outcome"], "pass");
}

/// Makes a repetition take `factor` times as long.
fn stretch(repetition: &mut Value, factor: f64) {
    let scale = |value: &mut Value, by: f64| *value = json!(value.as_f64().unwrap() * by);
    for field in ["ttft_ms", "e2e_ms"] {
        scale(&mut repetition[field], factor);
    }
    for field in ["prefill_tok_s", "decode_tok_s"] {
        scale(&mut repetition[field], 1.0 / factor);
    }
    for gap in repetition["itl_ms"].as_array_mut().unwrap() {
        scale(gap, factor);
    }
}

#[test]
fn a_report_of_a_profile_alone_has_the_picture_of_its_experts() {
    let sandbox = sandbox();
    sandbox.run("profile corpus.jsonl").ok();
    let outcome = sandbox
        .run("report --profile profile.json --json -o out")
        .ok();
    let files = outcome.json()["files"].as_array().unwrap().clone();
    assert!(!files.is_empty());
    for file in files {
        assert!(sandbox.path(file.as_str().unwrap()).is_file());
    }
    assert_charts_and_tables(&sandbox.path("out"), &["report.html", "heatmap.png"]);
}

#[test]
fn doctor_writes_the_facts_it_prints() {
    let sandbox = Sandbox::new();
    let outcome = sandbox
        .run("doctor --no-measure --json -o hardware.json")
        .ok();
    let facts = outcome.json();
    assert_eq!(facts["schema"], "moectl.hardware");
    assert_eq!(facts, sandbox.json("hardware.json"));
    let shown = sandbox.run("doctor --no-measure").ok().stdout;
    assert!(shown.to_lowercase().contains("gpu"), "{shown}");
}

/// Ctrl-C once the first repetitions are done: they are kept, and the exit code tells.
#[cfg(unix)]
#[test]
fn ctrl_c_keeps_the_samples_that_there_are() {
    use std::process::Stdio;

    let sandbox = sandbox();
    let line = "bench corpus.jsonl --ctx 24,48 -n 4 --repetitions 1000000 --quality-tokens 0 \
                --placement placement.json";
    sandbox.run("plan --ctx 128 --hardware laptop-4090").ok();
    let mut child = sandbox
        .command(&line.split_whitespace().collect::<Vec<_>>())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let told = std::io::BufReader::new(child.stderr.take().unwrap());
    let loaded =
        std::io::BufRead::lines(told).find(|line| line.as_ref().unwrap().contains("by cpu"));
    assert!(loaded.is_some());
    // The measurement itself tells nothing on a pipe; this long it makes thousands of repetitions.
    std::thread::sleep(std::time::Duration::from_secs(2));
    // SAFETY: a signal to a process that we started and have not waited for.
    unsafe { libc::kill(child.id() as i32, libc::SIGINT) };
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let run = sandbox.json("bench-out/run.json");
    let contexts = run["contexts"].as_array().unwrap();
    assert_eq!(contexts.len(), 1);
    assert!(!contexts[0]["repetitions"].as_array().unwrap().is_empty());
    assert!(
        run["labels"]["notes"].to_string().contains("interrupted"),
        "{run}"
    );
    assert!(sandbox.path("bench-out/report.html").is_file());
}

#[cfg(unix)]
#[test]
fn a_build_is_compared_with_another_in_rounds_and_a_seeded_slowdown_fails() {
    let sandbox = sandbox();
    // "Another build": this one, all that it measures made five times as fast.
    let other = sandbox.path("other.sh");
    let script = format!(
        "#!/bin/sh\nMOECTL={} SLOWER=0.2 exec python3 {}/scripts/ci/slower.py \"$@\"\n",
        env!("CARGO_BIN_EXE_moectl"),
        env!("CARGO_MANIFEST_DIR")
    );
    sandbox.write("other.sh", script);
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(&other, std::fs::Permissions::from_mode(0o755)).unwrap();
    let line = "bench corpus.jsonl --ctx 48 -n 8 --repetitions 4 --quality-tokens 16 --ci ci";
    let outcome = sandbox.run(&format!("{line} --against-binary other.sh --fail-above 5%"));
    if outcome.stderr.contains("python3") {
        eprintln!("no python3; not tested");
        return;
    }
    assert_eq!(outcome.code, Some(3), "{outcome:?}");
    for part in [
        "the machine's own noise",
        "12 rounds",
        "verdict: FAIL",
        "decode_tok_s",
    ] {
        assert!(outcome.stdout.contains(part), "{part}: {outcome:?}");
    }
    for file in [
        "bench-out/report.html",
        "bench-out/base/run.json",
        "ci/junit.xml",
    ] {
        assert!(sandbox.path(file).is_file(), "{file}");
    }
    let line = "bench --against-binary absent --fail-above 5%";
    sandbox
        .run(line)
        .fails(2, &["absent: there is no such file"]);
    sandbox
        .run("bench --fail-above 5%")
        .fails(2, &["--against-binary"]);
}
