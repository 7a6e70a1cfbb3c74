//! Where `-o` goes, and where inputs come from: links, devices, pipes, standard streams.
#![cfg(unix)]

use std::fs;
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Stdio;

use serde_json::Value;

use crate::program::{Outcome, Sandbox, finish, small_model};

const CORPUS: &str = "{\"text\": \"one two three\"}\n{\"text\": \"four\"}\n";

/// Runs `plan` of the small model: the verb that writes a file in the least time.
fn plan(sandbox: &Sandbox, flags: &str) -> Outcome {
    let line = format!("plan --ctx 1k -m {} {flags}", small_model().display());
    sandbox.run(&line)
}

fn profile(flags: &str) -> String {
    format!("profile --ctx 64 -m {} {flags}", small_model().display())
}

fn is_placement(text: &str) -> bool {
    let value: Value = serde_json::from_str(text).unwrap();
    value["schema"] == "moectl.placement"
}

#[test]
fn a_dash_and_dev_stdout_are_standard_output_with_nothing_beside_the_file() {
    let sandbox = Sandbox::new();
    for place in ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"] {
        for flags in ["", "--json"] {
            let outcome = plan(&sandbox, &format!("-o {place} {flags}")).ok();
            assert!(is_placement(&outcome.stdout), "{place}");
            assert_eq!(outcome.stderr.contains("decode "), flags.is_empty());
        }
    }
    assert!(sandbox.files().is_empty());
    let both = plan(&sandbox, "-o - --export llama.cpp");
    both.fails(2, &["--export", "standard output"]);
    sandbox.run("bench -o -").fails(2, &["expected a folder"]);
}

/// A shell's `> file` stays the file that the shell opened.
#[test]
fn standard_output_that_is_a_file_is_written_where_it_stands() {
    let sandbox = Sandbox::new();
    sandbox.write("out", "before\n");
    let file = fs::File::options().append(true).open(sandbox.path("out"));
    let model = small_model();
    let args = ["plan", "--ctx", "1k", "-m", model.to_str().unwrap(), "-o"];
    let mut command = sandbox.command(&[&args[..], &["/dev/stdout"]].concat());
    finish(command.stdout(file.unwrap())).ok();
    let text = fs::read_to_string(sandbox.path("out")).unwrap();
    assert!(is_placement(text.strip_prefix("before\n").unwrap()));
}

#[test]
fn devices_and_pipes_are_written_in_place_and_stay() {
    let sandbox = Sandbox::new();
    plan(&sandbox, "-o /dev/null").ok();
    let null = fs::metadata("/dev/null").unwrap().file_type();
    assert!(null.is_char_device());

    let fifo = sandbox.path("fifo");
    make_fifo(&fifo);
    let reader = fifo.clone();
    let reader = std::thread::spawn(move || fs::read_to_string(reader).unwrap());
    plan(&sandbox, "-o fifo").ok();
    assert!(is_placement(&reader.join().unwrap()));
    assert!(fs::metadata(&fifo).unwrap().file_type().is_fifo());
    assert_eq!(sandbox.files(), ["fifo"]);
}

#[test]
fn links_are_written_through_and_permissions_kept() {
    let sandbox = Sandbox::new();
    let real = sandbox.write("far/real.json", "old");
    fs::set_permissions(&real, fs::Permissions::from_mode(0o640)).unwrap();
    symlink("far/real.json", sandbox.path("link")).unwrap();
    symlink("link", sandbox.path("second")).unwrap();
    symlink("far/new/made.json", sandbox.path("dangling")).unwrap();
    for (name, real) in [
        ("second", "far/real.json"),
        ("dangling", "far/new/made.json"),
    ] {
        plan(&sandbox, &format!("-o {name}")).ok();
        assert!(
            fs::symlink_metadata(sandbox.path(name))
                .unwrap()
                .is_symlink()
        );
        assert!(is_placement(
            &fs::read_to_string(sandbox.path(real)).unwrap()
        ));
    }
    assert_eq!(fs::metadata(&real).unwrap().mode() & 0o777, 0o640);
    symlink("loop", sandbox.path("loop")).unwrap();
    plan(&sandbox, "-o loop").fails(1, &["loop: cannot be written"]);

    // The trace grows beside its place and takes it at the end: by the same rules.
    fs::write(sandbox.path("corpus.jsonl"), CORPUS).unwrap();
    symlink("far/trace", sandbox.path("trace")).unwrap();
    let line = profile("corpus.jsonl -o deep/er/profile.json --trace trace");
    sandbox.run(&line).ok();
    assert!(
        fs::symlink_metadata(sandbox.path("trace"))
            .unwrap()
            .is_symlink()
    );
    assert!(sandbox.path("far/trace").is_file());
    assert!(sandbox.path("deep/er/profile.json").is_file());
}

#[test]
fn missing_folders_are_made() {
    let sandbox = Sandbox::new();
    plan(&sandbox, "-o a/b/placement.json --sweep 1G..2G").ok();
    assert!(sandbox.path("a/b/sweep.csv").is_file());
    let synth = "synth tiny x/y/model --layers 2 --experts 4 --experts-per-tok 2";
    let outcome = sandbox.run(synth);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert!(sandbox.path("x/y/model/config.json").is_file());
}

#[test]
fn what_is_replaced_without_having_been_named_is_said() {
    let sandbox = Sandbox::new();
    let replacing = "replacing the file that was there";
    let first = plan(&sandbox, "").ok().stderr;
    assert!(first.contains("wrote placement.json") && !first.contains(replacing));
    let second = plan(&sandbox, "").ok().stderr;
    assert!(second.contains(&format!("wrote placement.json, {replacing}")));
    let named = plan(&sandbox, "-o placement.json").ok().stderr;
    assert!(!named.contains(replacing), "{named}");
    let report = "report --placement placement.json";
    assert!(!sandbox.run(report).ok().stderr.contains("replacing"));
    let again = sandbox.run(report).ok().stderr;
    assert!(again.contains("report: replacing report.html"), "{again}");
}

#[test]
fn an_error_names_the_users_path_and_no_temporary_file() {
    let sandbox = Sandbox::new();
    // A disk without room.
    let full = plan(&sandbox, "-o /dev/full");
    full.fails(1, &["/dev/full: ", "No space left"]);
    sandbox.write("file", "");
    for path in ["file/placement.json", ".", "/proc/placement.json"] {
        let outcome = plan(&sandbox, &format!("-o {path}"));
        let message = outcome.stderr.clone();
        outcome.fails(1, &[path, "cannot be written"]);
        assert!(!message.contains(".moectl-"), "{message}");
    }
}

#[test]
fn a_corpus_and_every_json_input_may_come_through_a_pipe() {
    let sandbox = Sandbox::new();
    sandbox.write("corpus.jsonl", CORPUS);
    sandbox.run(&profile("corpus.jsonl -o file.json")).ok();
    let counts = |name: &str| sandbox.json(name)["layers"].clone();
    for (i, input) in ["-", "/dev/stdin"].iter().enumerate() {
        let name = format!("pipe{i}.json");
        sandbox
            .pipe(&profile(&format!("{input} -o {name}")), CORPUS)
            .ok();
        assert_eq!(counts(&name), counts("file.json"), "{input}");
    }
    let fifo = sandbox.path("fifo");
    make_fifo(&fifo);
    let writer = std::thread::spawn(move || fs::write(fifo, CORPUS).unwrap());
    sandbox.run(&profile("fifo -o fifo.json")).ok();
    writer.join().unwrap();
    assert_eq!(counts("fifo.json"), counts("file.json"));
    sandbox
        .pipe(&profile("-"), "")
        .fails(1, &["standard input: holds no records"]);

    let text = fs::read_to_string(sandbox.path("file.json")).unwrap();
    let line = format!(
        "plan --ctx 1k -m {} --profile - -o -",
        small_model().display()
    );
    assert!(is_placement(&sandbox.pipe(&line, &text).ok().stdout));
}

#[test]
fn a_trace_streams_to_whoever_reads_it() {
    let sandbox = Sandbox::new();
    sandbox.write("corpus.jsonl", CORPUS);
    sandbox
        .run(&profile("corpus.jsonl --trace file.trace"))
        .ok();
    let model = small_model();
    let args = ["profile", "--ctx", "64", "-m", model.to_str().unwrap()];
    let mut child = sandbox
        .command(&[&args[..], &["corpus.jsonl", "--trace", "-"]].concat())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut streamed = Vec::new();
    child
        .stdout
        .take()
        .unwrap()
        .read_to_end(&mut streamed)
        .unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(streamed, fs::read(sandbox.path("file.trace")).unwrap());
}

fn make_fifo(path: &Path) {
    let path = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    // SAFETY: a string that ends with 0 and lives through the call.
    assert_eq!(unsafe { libc::mkfifo(path.as_ptr(), 0o600) }, 0);
}
