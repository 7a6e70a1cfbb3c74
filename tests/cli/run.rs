//! `moectl run`: the JSON object, chats, stopping, streaming, interruption.

use std::io::Read;
use std::process::Stdio;
use std::time::{Duration, Instant};

use moectl::engine::TextModel;
use moectl::model::{Message, Source};
use serde_json::Value;

use crate::program::{Outcome, Sandbox, data, finish, small_model};

/// Runs the small random model: fast, and what it says means nothing.
fn small(sandbox: &Sandbox, flags: &[&str]) -> Outcome {
    let model = small_model();
    sandbox.run_args(&[&["run", "-m", model.to_str().unwrap()], flags].concat())
}

/// Runs the built-in model on `river`, greedily.
fn river(sandbox: &Sandbox, flags: &[&str]) -> Value {
    let prompt = "What is the meaning of the noun \"river\"?";
    let args = [&["run", "--json", "--temperature", "0", prompt], flags].concat();
    sandbox.run_args(&args).ok().json()
}

fn ids(value: &Value) -> Vec<u64> {
    let list = value.as_array().unwrap();
    list.iter().map(|id| id.as_u64().unwrap()).collect()
}

#[test]
fn json_has_prompt_tokens_text_reason_timings_and_experts() {
    let record = small(
        &Sandbox::new(),
        &["--json", "-n", "5", "--ignore-eos", "hello"],
    )
    .ok();
    let record = record.json();
    let (prompt, tokens) = (ids(&record["prompt_ids"]), ids(&record["token_ids"]));
    assert_eq!(tokens.len(), 5);
    assert!(record["text"].is_string());
    assert_eq!(record["finish_reason"], "length");
    assert_eq!(record["model"]["fingerprint"].as_str().unwrap().len(), 64);
    assert!(record["seed"].is_u64());
    assert!(record["peak_rss_bytes"].as_u64().unwrap() > 1 << 20);
    assert!(record.get("logprobs").is_none());
    let timings = &record["timings"];
    assert_eq!(timings["prompt_tokens"], prompt.len());
    assert_eq!(timings["generated_tokens"], 5);
    for field in [
        "prefill_ms",
        "ttft_ms",
        "decode_ms",
        "prefill_tok_s",
        "decode_tok_s",
    ] {
        assert!(timings[field].as_f64().unwrap() > 0.0, "{field}");
    }
    // Two layers, two experts a token; the last token is never fed.
    assert_eq!(record["experts"]["misses"], (prompt.len() + 4) * 2 * 2);
    assert_eq!(record["experts"]["hits"], 0);
    for field in ["h2d_bytes", "moved_bytes", "promotions"] {
        assert_eq!(record["experts"][field], 0, "{field}");
    }
    let shares = &record["experts"]["cpu_share_by_layer"];
    assert_eq!(*shares, serde_json::json!([1.0, 1.0]));
}

#[test]
fn logprobs_are_sorted_and_begin_with_the_greedy_token() {
    let flags = [
        "--json",
        "-n",
        "6",
        "--ignore-eos",
        "--temperature",
        "0",
        "--logprobs",
        "3",
    ];
    let record = small(&Sandbox::new(), &[&flags[..], &["hello"]].concat())
        .ok()
        .json();
    let steps = record["logprobs"].as_array().unwrap();
    assert_eq!(steps.len(), 6);
    for (step, id) in steps.iter().zip(ids(&record["token_ids"])) {
        let best = step.as_array().unwrap();
        assert_eq!(best.len(), 3);
        assert_eq!(best[0]["id"], id);
        let field = |i: usize, name: &str| best[i][name].as_f64().unwrap();
        let mass: f64 = (0..3).map(|i| field(i, "logprob").exp()).sum();
        assert!(mass > 0.0 && mass <= 1.0);
        for i in 1..3 {
            assert!(field(i - 1, "logit") >= field(i, "logit"));
            // Logprobs are logits less one number.
            let shift = |i| field(i, "logit") - field(i, "logprob");
            assert!((shift(i) - shift(0)).abs() < 1e-4);
        }
    }
}

#[test]
fn a_prompt_comes_from_the_argument_from_standard_input_or_as_ids() {
    let sandbox = Sandbox::new();
    let flags = ["--json", "-n", "4", "--temperature", "0"];
    let argument = small(&sandbox, &[&flags[..], &["three words here"]].concat()).ok();
    let argument = argument.json();
    let model = small_model();
    let line = format!("run -m {} {}", model.display(), flags.join(" "));
    let piped = sandbox.pipe(&line, "three words here").ok().json();
    let list: Vec<String> = ids(&argument["prompt_ids"])
        .iter()
        .map(u64::to_string)
        .collect();
    let by_id = small(
        &sandbox,
        &[&flags[..], &["--prompt-ids", &list.join(",")]].concat(),
    );
    let by_id = by_id.ok().json();
    for field in ["prompt_ids", "token_ids", "text"] {
        assert_eq!(argument[field], piped[field]);
        assert_eq!(argument[field], by_id[field]);
    }
    let raw = small(
        &sandbox,
        &[&flags[..], &["--raw", "three words here"]].concat(),
    );
    let raw = ids(&raw.ok().json()["prompt_ids"]);
    assert!(raw.len() < list.len(), "no template around it");
}

#[test]
fn what_is_piped_in_goes_after_the_prompt_and_files_between() {
    let sandbox = Sandbox::new();
    sandbox.write("notes.txt", "from a file\n");
    let model = small_model();
    let prompt_ids = |flags: &str, input: &str| {
        let line = format!("run -m {} --json -n 1 {flags}", model.display());
        ids(&sandbox.pipe(&line, input).ok().json()["prompt_ids"])
    };
    let given = |text: &str| {
        let outcome = small(&sandbox, &["--json", "-n", "1", text]);
        ids(&outcome.ok().json()["prompt_ids"])
    };
    let both = given("Summarise:\n\nfrom a pipe\n");
    assert_eq!(prompt_ids("Summarise:", "from a pipe\n"), both);
    assert_eq!(prompt_ids("-p Summarise:", "from a pipe\n"), both);
    let all = given("Summarise:\n\nfrom a file\n\nfrom a pipe\n");
    assert_eq!(prompt_ids("Summarise: -f notes.txt", "from a pipe\n"), all);
    assert_eq!(prompt_ids("-", "from a pipe\n"), given("from a pipe\n"));
    assert_eq!(prompt_ids("-f -", "from a pipe\n"), given("from a pipe\n"));
}

#[test]
fn a_seed_in_json_survives_readers_that_keep_numbers_as_f64() {
    let sandbox = Sandbox::new();
    let seed = |flags: &[&str]| {
        let record = small(&sandbox, &[&["--json", "-n", "1", "x"], flags].concat());
        record.ok().json()["seed"].clone()
    };
    let largest = 1u64 << 53;
    assert_eq!(seed(&["--seed", &largest.to_string()]), largest);
    assert_eq!(
        seed(&["-s", "18446744073709551615"]),
        "18446744073709551615"
    );
    for flags in [&[][..], &["--seed", "-1"]] {
        assert!(seed(flags).as_u64().unwrap() <= largest);
    }
}

#[test]
fn a_negative_number_of_tokens_is_no_limit_but_the_context() {
    let sandbox = Sandbox::new();
    let record = small(
        &sandbox,
        &["--json", "-n", "-1", "-c", "64", "--ignore-eos", "x"],
    );
    let record = record.ok().json();
    let (prompt, tokens) = (ids(&record["prompt_ids"]), ids(&record["token_ids"]));
    assert_eq!(record["finish_reason"], "length");
    assert!((64..=65).contains(&(prompt.len() + tokens.len())));
}

#[test]
fn a_seed_makes_a_run_repeatable() {
    let sandbox = Sandbox::new();
    let run = |seed: &str| {
        let flags = ["--json", "-n", "24", "--ignore-eos", "--temperature", "1.5"];
        let flags = [
            &flags[..],
            &["--top-k", "0", "--top-p", "1", "--seed", seed, "hello"],
        ];
        small(&sandbox, &flags.concat()).ok().json()["token_ids"].clone()
    };
    assert_eq!(run("7"), run("7"));
    assert_ne!(run("7"), run("8"));
}

#[test]
fn text_streams_as_json_reports_it() {
    let sandbox = Sandbox::new();
    let flags = ["-n", "40", "--ignore-eos", "--seed", "5", "hello"];
    let record = small(&sandbox, &[&["--json"], &flags[..]].concat())
        .ok()
        .json();
    let shown = small(&sandbox, &flags).ok();
    assert_eq!(
        shown.stdout,
        format!("{}\n", record["text"].as_str().unwrap())
    );
    assert!(shown.stderr.starts_with("[prompt "), "{}", shown.stderr);
    for part in ["generated 40 tokens", "tok/s", "memory]"] {
        assert!(shown.stderr.contains(part), "{}", shown.stderr);
    }
    let quiet = small(&sandbox, &[&["-q"], &flags[..]].concat()).ok();
    assert_eq!((quiet.stdout, quiet.stderr.as_str()), (shown.stdout, ""));
}

#[test]
fn every_backend_thread_count_and_instruction_set_gives_the_recorded_tokens() {
    let sandbox = Sandbox::new();
    let golden: Value =
        serde_json::from_slice(&std::fs::read(data("tiny-moe/golden.json")).unwrap()).unwrap();
    let chat = &golden["prompts"]["chat"];
    let expected = &ids(&chat["greedy_ids"])[..12];
    let flags = |line: &'static str| line.split(' ').collect::<Vec<_>>();
    for line in [
        "-n 12 --backend reference",
        "-n 12 --backend cpu --threads 1",
        "-n 12 --backend cpu --threads 2",
        "-n 12 --backend cpu --cpu-precision f32",
        "-n 12",
    ] {
        let record = river(&sandbox, &flags(line));
        assert_eq!(record["prompt_ids"], chat["ids"], "{line}");
        assert_eq!(ids(&record["token_ids"]), expected, "{line}");
    }
    for isa in ["scalar", "avx2", "avxvnni", "avx512", "amx"] {
        let args = [
            "run",
            "--json",
            "--temperature",
            "0",
            "-n",
            "12",
            "--prompt-ids",
        ];
        let prompt: Vec<String> = ids(&chat["ids"]).iter().map(u64::to_string).collect();
        let prompt = prompt.join(",");
        let mut command = sandbox.command(&[&args[..], &[&prompt]].concat());
        let outcome = finish(command.env("MOECTL_ISA", isa));
        if outcome.code == Some(1) && outcome.stderr.contains("this machine has") {
            eprintln!("{isa}: not tested, this machine lacks it");
            continue;
        }
        assert_eq!(ids(&outcome.ok().json()["token_ids"]), expected, "{isa}");
    }
}

#[test]
fn the_text_ends_before_a_stop_string() {
    let sandbox = Sandbox::new();
    let whole = river(&sandbox, &["-n", "12"]);
    let text = whole["text"].as_str().unwrap();
    let middle = text.char_indices().nth(text.chars().count() / 2).unwrap().0;
    let stop: String = text[middle..].chars().take(3).collect();
    let stopped = river(
        &sandbox,
        &["-n", "12", "--stop", "never said", "--stop", &stop],
    );
    assert_eq!(stopped["text"], text.split(&stop).next().unwrap());
    assert_eq!(stopped["finish_reason"], "stop");
    let (all, some) = (ids(&whole["token_ids"]), ids(&stopped["token_ids"]));
    assert!(some.len() < all.len() && all.starts_with(&some));
}

#[test]
fn generation_ends_at_the_end_of_text_unless_told_to_go_on() {
    let sandbox = Sandbox::new();
    let ended = river(&sandbox, &["-n", "64"]);
    assert_eq!(ended["finish_reason"], "stop");
    let ended = ids(&ended["token_ids"]);
    let went_on = river(&sandbox, &["-n", "64", "--ignore-eos"]);
    assert_eq!(went_on["finish_reason"], "length");
    let went_on = ids(&went_on["token_ids"]);
    assert!(ended.len() < 64 && went_on.len() == 64 && went_on.starts_with(&ended));
}

#[test]
fn the_second_turn_of_a_chat_knows_the_first() {
    let sandbox = Sandbox::new();
    let turns = [
        "What is the meaning of the noun \"river\"?",
        "And of \"house\"?",
    ];
    let line = "run --chat --temperature 0 -n 16";
    let chat = sandbox
        .pipe(line, &format!("{}\n\n{}\n", turns[0], turns[1]))
        .ok();
    let closing: Vec<&str> = chat.stderr.lines().collect();
    assert_eq!(closing.len(), 2, "one closing line per turn: {closing:?}");

    let first = river(&sandbox, &["-n", "16"]);
    let first = first["text"].as_str().unwrap();
    // The same conversation, as the template writes it, in one prompt.
    let text = TextModel::load(&Source::resolve(None).unwrap()).unwrap();
    let history = [
        Message::new("user", turns[0]),
        Message::new("assistant", first),
        Message::new("user", turns[1]),
    ];
    let prompt = text.encode_chat(&history).unwrap();
    let prompt: Vec<String> = prompt.iter().map(u32::to_string).collect();
    let line = format!(
        "run --json --temperature 0 -n 16 --prompt-ids {}",
        prompt.join(",")
    );
    let second = sandbox.run(&line).ok().json();
    let second = second["text"].as_str().unwrap();
    assert_eq!(chat.stdout, format!("{first}\n{second}\n"));

    // After /reset the first turn is as new.
    let input = format!("{}\n/reset\n{}\n", turns[0], turns[0]);
    let reset = sandbox
        .pipe("run --chat --temperature 0 -n 16", &input)
        .ok();
    assert_eq!(reset.stdout, format!("{first}\n{first}\n"));
}

/// A generation that takes long, with its first byte of output already out.
fn started(sandbox: &Sandbox) -> std::process::Child {
    let args = [
        "run",
        "--ignore-eos",
        "-n",
        "4000",
        "--ctx",
        "8k",
        "--seed",
        "1",
        "hello",
    ];
    let mut child = sandbox
        .command(&[&args[..], &["--backend", "reference"]].concat())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let stdout = child.stdout.as_mut().unwrap();
    stdout.read_exact(&mut [0]).unwrap();
    child
}

#[test]
#[cfg(unix)]
fn an_interrupt_ends_with_what_there_is_and_code_130() {
    let mut child = started(&Sandbox::new());
    let sent = Instant::now();
    // SAFETY: a signal to a child that has not been waited for, so the id is its own.
    assert_eq!(unsafe { libc::kill(child.id() as i32, libc::SIGINT) }, 0);
    let mut rest = String::new();
    child
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut rest)
        .unwrap();
    let outcome = Outcome::from(child.wait_with_output().unwrap());
    assert!(sent.elapsed() < Duration::from_secs(5));
    assert_eq!(outcome.code, Some(130), "{outcome:?}");
    assert!(rest.ends_with('\n'));
    assert!(outcome.stderr.starts_with("[prompt "), "{outcome:?}");
    assert_eq!(outcome.stderr.lines().count(), 1, "{outcome:?}");
}

#[test]
fn a_reader_that_leaves_ends_the_run_quietly() {
    let mut child = started(&Sandbox::new());
    let left = Instant::now();
    drop(child.stdout.take());
    let outcome = Outcome::from(child.wait_with_output().unwrap());
    assert!(left.elapsed() < Duration::from_secs(5));
    assert_eq!((outcome.code, outcome.stderr.as_str()), (Some(0), ""));
}

#[test]
fn a_model_without_a_chat_template_continues_text_and_refuses_a_chat() {
    let sandbox = Sandbox::new();
    let model = sandbox.model("m");
    std::fs::remove_file(model.join("tokenizer_config.json")).unwrap();
    let run = |line: &str| sandbox.pipe(&format!("run -m m -n 2 {line}"), "hello\n");
    run("").ok();
    run("--chat").fails(1, &["m: has no chat template"]);
    run("--system x").fails(1, &["m: has no chat template"]);
}
