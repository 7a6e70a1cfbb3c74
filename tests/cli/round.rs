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
    let outcome = sandbox.run("plan --trace t.trace --ctx 256 --json").ok();
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
    let outcome = sandbox.run("plan --trace cut.trace --ctx 256");
    assert!(outcome.ok().stderr.contains("cut.trace: cut off"));
}

#[test]
fn the_chosen_policy_is_never_a_point_below_static_or_lru_on_held_out_text() {
    // The built-in model, because its router is trained.
    let sandbox = Sandbox::new();
    sandbox.run("profile --trace t.trace").ok();
    let plan = sandbox.run("plan --trace t.trace --vram 2G --ctx 1k --json");
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
    sandbox.run("plan --profile profile.json --ctx 128").ok();
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
            for part in ["slower.json: ", "% worse", "decode_tok_s"] {
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

    // Where the text ends before the context, its last tokens are the ones decoded.
    sandbox.write(
        "corpus.jsonl",
        r#"{"text": "one two three four five six seven eight"}"#,
    );
    let (_, [prompt, decoded], _, outcome) = bench(2, "--ctx 64");
    assert!(prompt > 0 && prompt < 58 && decoded == 6, "{prompt}");
    let note = format!("holds {} tokens, 64 were asked for", prompt + decoded);
    assert!(outcome.stderr.contains(&note), "{note}: {outcome:?}");
    sandbox.write("corpus.jsonl", r#"{"text": "one"}"#);
    let line = "bench corpus.jsonl --model synth:tiny?layers=2&experts=8 -n 6 --ctx 64";
    let parts = ["to decode after it", "--continuation sampled"];
    sandbox.run(line).fails(2, &parts);
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
