//! What the program itself lets out: nothing of what was asked or answered, and nobody writes its log.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

/// A server of its own, with its log; ends with the test.
struct Program {
    child: Child,
    address: String,
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn start(script: &Value) -> Program {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), script.to_string()).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_moectl"))
        .args(["serve", "--port", "0", "-v", "--script"])
        .arg(file.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let line = lines.next().unwrap().unwrap();
    let address = line.split("http://").nth(1).unwrap().trim().to_owned();
    Program { child, address }
}

fn ask(program: &Program, path: &str, body: &str) -> String {
    let mut stream = TcpStream::connect(&program.address).unwrap();
    let request = format!(
        "POST {path} HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\
         user-agent: agent-secret\r\nx-secret: header-secret\r\nconnection: close\r\n\r\n{body}",
        program.address,
        body.len()
    );
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn the_log_has_a_line_per_request_and_no_word_of_it() {
    let script = json!({ "rules": [{ "reply": "answer-secret" }] });
    let mut program = start(&script);
    let body = json!({
        "model": "model-secret\nforged", "messages": [{ "role": "user", "content": "prompt-secret" }], "user": "user-secret",
    });
    let answer = ask(&program, "/v1/chat/completions", &body.to_string());
    assert!(answer.contains("answer-secret"), "{answer}");
    ask(
        &program,
        "/v1/chat/completions?key=query-secret",
        "{\"messages\": \"prompt-secret",
    );
    // Escaped, a path is one line whatever is in it.
    let answer = ask(&program, "/nothing%0d%0aforged", "{}");
    assert!(!answer.contains("\r\nforged"), "{answer}");
    let mut log = program.child.stderr.take().unwrap();
    // As a service manager ends it: what is in work is done, and the log is whole.
    let pid = program.child.id().to_string();
    let killed = Command::new("kill").args(["-TERM", &pid]).status().unwrap();
    assert!(killed.success());
    let mut text = String::new();
    log.read_to_string(&mut text).unwrap();
    assert!(!text.contains("secret"), "{text}");
    let lines = text
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let statuses: Vec<u64> = lines.filter_map(|line| line["status"].as_u64()).collect();
    assert_eq!(statuses, [200, 400, 404], "{text}");
    assert!(
        !text.lines().any(|line| line.starts_with("forged")),
        "{text}"
    );
}
