//! Profiles that were interrupted go on where they were, whatever ended them.
#![cfg(unix)]

use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::program::{Sandbox, small_model};

const PROFILE: &str = "profile corpus.jsonl --trace t.trace --save-every 0";

/// A sandbox with a corpus that takes some seconds, and the small model as its default.
fn sandbox() -> Sandbox {
    let sandbox = Sandbox::new();
    let line = |i: usize| {
        let words = format!("the river number {i} runs past the old mill ").repeat(12);
        format!("{{\"domain\": \"d{}\", \"text\": \"{words}\"}}\n", i % 3)
    };
    sandbox.write("corpus.jsonl", (0..400).map(line).collect::<String>());
    sandbox.write("moectl.toml", format!("model = {:?}\n", small_model()));
    sandbox
}

/// Files that are to be equal to the byte are of one time.
const EPOCH: (&str, &str) = ("SOURCE_DATE_EPOCH", "1700000000");

fn start(sandbox: &Sandbox) -> Child {
    sandbox
        .command(&PROFILE.split_whitespace().collect::<Vec<_>>())
        .env(EPOCH.0, EPOCH.1)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Waits until the saved counts have at least this many records.
fn wait_for_records(sandbox: &Sandbox, child: &mut Child, records: u64) {
    let begin = Instant::now();
    loop {
        let saved = std::fs::read(sandbox.path("profile.json.partial")).ok();
        // Replaced whole or not at all: whenever it is there, it can be read.
        let saved: Option<Value> = saved.map(|text| serde_json::from_slice(&text).unwrap());
        if saved.is_some_and(|s| s["done"]["records"].as_u64().unwrap() >= records) {
            return;
        }
        assert_eq!(child.try_wait().unwrap(), None, "it ended by itself");
        assert!(begin.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Runs the command to its end.
fn finish(sandbox: &Sandbox) -> String {
    let mut command = sandbox.command(&PROFILE.split_whitespace().collect::<Vec<_>>());
    let output = command.env(EPOCH.0, EPOCH.1).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stderr).unwrap()
}

fn profile(sandbox: &Sandbox) -> Vec<u8> {
    std::fs::read(sandbox.path("profile.json")).unwrap()
}

#[test]
fn a_killed_profile_is_resumed_and_equals_one_that_was_not() {
    let whole = sandbox();
    finish(&whole);

    let sandbox = sandbox();
    sandbox.write("profile.json", "the old file");
    for records in [3, 20] {
        let mut child = start(&sandbox);
        wait_for_records(&sandbox, &mut child, records);
        // SIGKILL: no handler runs.
        child.kill().unwrap();
        child.wait().unwrap();
        let old = std::fs::read_to_string(sandbox.path("profile.json")).unwrap();
        assert_eq!(old, "the old file");
        assert!(!sandbox.path("t.trace").exists());
    }
    // Bytes that no saved count speaks of, as a crash may leave them.
    let partial = sandbox.path("t.trace.partial");
    let mut trace = std::fs::read(&partial).unwrap();
    trace.extend_from_slice(b"half a frame");
    std::fs::write(&partial, trace).unwrap();

    let told = finish(&sandbox);
    assert!(told.contains("going on after"), "{told}");
    assert!(profile(&sandbox) == profile(&whole), "the profiles differ");
    let trace = |s: &Sandbox| std::fs::read(s.path("t.trace")).unwrap();
    assert!(trace(&sandbox) == trace(&whole), "the traces differ");
    let names = sandbox.files();
    assert!(names.iter().all(|n| !n.ends_with(".partial")), "{names:?}");
}

#[test]
fn ctrl_c_keeps_what_is_done_and_other_flags_start_over() {
    let sandbox = sandbox();
    let mut child = start(&sandbox);
    wait_for_records(&sandbox, &mut child, 5);
    // SAFETY: a signal to a process that we started and have not waited for.
    unsafe { libc::kill(child.id() as i32, libc::SIGINT) };
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(sandbox.path("profile.json.partial").exists());
    assert!(!sandbox.path("profile.json").exists());

    let outcome = sandbox.run("profile corpus.jsonl --shard 1/200").ok();
    assert!(outcome.stderr.contains("starting over"), "{outcome:?}");
    assert_eq!(
        sandbox.json("profile.json")["layers"][0]["picks"]
            .as_u64()
            .map(|p| p > 0),
        Some(true)
    );
    assert!(!sandbox.path("profile.json.partial").exists());
}

#[test]
fn unfinished_work_that_cannot_be_read_is_refused_with_the_way_out() {
    let sandbox = sandbox();
    for (text, part) in [
        ("{", "not a moectl.profile-progress file"),
        (
            "{\"schema\": \"moectl.run\", \"schema_version\": 1}",
            "is a `moectl.run` file",
        ),
        (
            "{\"schema\": \"moectl.profile-progress\", \"schema_version\": 9}",
            "update moectl",
        ),
    ] {
        sandbox.write("profile.json.partial", text);
        let outcome = sandbox.run(PROFILE);
        outcome.fails(
            1,
            &["profile.json.partial", part, "remove it to start over"],
        );
    }
}
