//! `moectl bench --endpoint` against servers on loopback: ours, and strict ones that know less.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::process::{Command, Output};

use moectl::formats::Document;
use moectl::formats::document::RUN;
use moectl::report::RunBody;
use moectl::server::guard::Keys;
use tempfile::TempDir;

use crate::client::{built_in, reply, scripted};

fn bench(url: &str, folder: &TempDir, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_moectl"))
        .args(["bench", "--endpoint", url, "-o"])
        .arg(folder.path())
        .args(args)
        .env_remove("OPENAI_API_KEY")
        .output()
        .unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn record(folder: &TempDir) -> RunBody {
    let path = folder.path().join("run.json");
    Document::<RunBody>::read(&path, RUN).unwrap().body
}

#[test]
fn every_request_of_a_sweep_is_in_run_json_and_the_report_shows_the_levels() {
    let folder = TempDir::new().unwrap();
    let url = format!("http://{}/v1/", built_in().address);
    let sweep = ["--ctx", "96", "-n", "8", "--concurrency", "3,1"];
    let output = bench(
        &url,
        &folder,
        &[&sweep[..], &["--repetitions", "4"]].concat(),
    );
    assert!(output.status.success(), "{}", stderr(&output));
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(table.contains("at once"), "{table}");
    let run = record(&folder);
    let context = &run.contexts[0];
    assert_eq!(context.context_tokens, 96);
    assert_eq!(context.repetitions.len(), 4);
    let together = &context.concurrent[0];
    assert_eq!(
        (
            together.concurrency,
            together.requests.len(),
            together.failed
        ),
        (3, 12, 0)
    );
    for request in context.repetitions.iter().chain(&together.requests) {
        assert_eq!(request.generated_tokens, 8, "ignore_eos");
        // 88 of the text that the length was fitted on; other text has longer words or shorter ones.
        assert!((66..=110).contains(&request.prompt_tokens), "{request:?}");
        assert!(request.ttft_ms > 0.0 && request.e2e_ms >= request.ttft_ms);
        assert!(request.e2e_ms <= together.wall_ms.max(60e3));
        assert!(request.itl_ms.len() < 8);
        assert!(request.cached_tokens.unwrap() < 24, "only the template's");
    }
    assert_eq!(run.endpoint.unwrap().url, url);
    let report = std::fs::read_to_string(folder.path().join("report.md")).unwrap();
    assert!(report.contains("## Requests at once"), "{report}");
    assert!(folder.path().join("concurrency.png").exists());
    let requests = std::fs::read_to_string(folder.path().join("requests.csv")).unwrap();
    assert_eq!(requests.lines().count(), 1 + 4 + 12);
}

#[test]
fn a_server_that_refuses_or_is_not_there_is_named_with_its_reason() {
    let folder = TempDir::new().unwrap();
    let server = scripted(reply("one two three"), |options| {
        options.keys = Keys::new(["secret".to_owned()]);
    });
    let url = format!("http://{}", server.address);
    let output = bench(&url, &folder, &["--ctx", "64", "-n", "4"]);
    assert_eq!(output.status.code(), Some(1));
    let reason = stderr(&output);
    assert!(
        reason.contains("401") && reason.contains("API key"),
        "{reason}"
    );
    let keys = folder.path().join("keys");
    std::fs::write(&keys, "# mine\nsecret\n").unwrap();
    let keys = keys.to_str().unwrap();
    let small = [
        "--ctx",
        "64",
        "-n",
        "4",
        "--concurrency",
        "2",
        "--repetitions",
        "2",
    ];
    let output = bench(
        &url,
        &folder,
        &[&small[..], &["--endpoint-key-file", keys]].concat(),
    );
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(record(&folder).contexts[0].concurrent[0].requests.len(), 4);
    let nobody = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let output = bench(&format!("http://{nobody}"), &folder, &[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains(&nobody.to_string()),
        "{}",
        stderr(&output)
    );
}

/// Answers as servers do that know nothing but their specification: no `ignore_eos`, no model named.
fn strict_server() -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let answer = |stream: std::net::TcpStream| {
        let mut reader = BufReader::new(&stream);
        let (mut line, mut length) = (String::new(), 0);
        while reader.read_line(&mut line).unwrap_or(0) > 2 {
            let lower = line.to_ascii_lowercase();
            if let Some(value) = lower.strip_prefix("content-length:") {
                length = value.trim().parse().unwrap();
            }
            line.clear();
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).unwrap();
        let (status, text) = match String::from_utf8_lossy(&body).contains("ignore_eos") {
            true => (
                "400 Bad Request",
                "{\"error\":{\"message\":\"Unrecognized: ignore_eos\"}}".to_owned(),
            ),
            false => {
                let event = |text| {
                    format!("data: {{\"choices\":[{{\"delta\":{{\"content\":\"{text}\"}}}}]}}\n\n")
                };
                let usage = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":60,\"completion_tokens\":4}}\n\n";
                (
                    "200 OK",
                    event("ab") + &event("cd") + usage + "data: [DONE]\n\n",
                )
            }
        };
        let head = format!(
            "HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
            text.len()
        );
        let _ = (&stream).write_all((head + &text).as_bytes());
    };
    std::thread::spawn(move || {
        listener.incoming().flatten().for_each(|stream| {
            std::thread::spawn(move || answer(stream));
        });
    });
    address
}

#[test]
fn a_strict_server_is_measured_without_what_it_does_not_know_and_that_is_said() {
    let folder = TempDir::new().unwrap();
    let url = format!("http://{}", strict_server());
    let args = [
        "--ctx",
        "64",
        "-n",
        "4",
        "--concurrency",
        "1,2",
        "--repetitions",
        "3",
    ];
    let output = bench(
        &url,
        &folder,
        &[&args[..], &["--endpoint-model", "m"]].concat(),
    );
    assert!(output.status.success(), "{}", stderr(&output));
    let run = record(&folder);
    assert!(!run.endpoint.unwrap().ignore_eos);
    let notes = run.labels.notes.join("\n");
    assert!(notes.contains("ignore_eos"), "{notes}");
    assert!(notes.contains("36 tokens came in 18 events"), "{notes}");
}
