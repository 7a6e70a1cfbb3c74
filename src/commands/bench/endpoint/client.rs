//! One request to an OpenAI-compatible server, timed as its user sees it: event by event.

use std::io::{BufRead, BufReader};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// The server, as all clients share it.
pub struct Endpoint {
    agent: ureq::Agent,
    /// Without a slash at the end and without `/v1`
    base: String,
    key: Option<String>,
    model: String,
    /// What its `server` header says
    pub software: Option<String>,
    /// Whether it takes a request to go on past the end of a text
    ignore_eos: AtomicBool,
}

/// An answer, with times since its request was sent.
pub struct Answer {
    pub usage: Usage,
    /// When each event with text came
    pub text_at: Vec<Duration>,
    pub text_sha256: String,
}

/// What the server counted; a server that counts nothing leaves `completion_tokens` open.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    pub prompt_tokens: Option<usize>,
    pub completion_tokens: Option<usize>,
    pub cached_tokens: Option<usize>,
}

/// A server that says nothing for so long has broken off.
const SILENCE: Duration = Duration::from_secs(600);
/// Of an error's text, as much as belongs into a message.
const MESSAGE_CHARS: usize = 300;

impl Endpoint {
    /// Asks the server which model it serves, unless `model` is given.
    ///
    /// - `clients`: that will use it at once
    ///
    /// # Errors
    /// If there is no such server, or it serves no model.
    pub fn connect(
        url: &str,
        key: Option<String>,
        model: Option<String>,
        clients: usize,
    ) -> anyhow::Result<Self> {
        let base = url.trim_end_matches('/').trim_end_matches("/v1");
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .timeout_connect(Some(Duration::from_secs(10)))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            // Every client keeps its connection, as real ones do.
            .max_idle_connections(clients)
            .max_idle_connections_per_host(clients)
            .build()
            .new_agent();
        let mut endpoint = Endpoint {
            agent,
            base: base.to_owned(),
            key,
            model: String::new(),
            software: None,
            ignore_eos: AtomicBool::new(true),
        };
        endpoint.model = match model {
            Some(model) => model,
            None => endpoint.first_model()?,
        };
        Ok(endpoint)
    }

    pub fn model(&self) -> &str {
        &self.model
    }

    pub fn ignores_eos(&self) -> bool {
        self.ignore_eos.load(Ordering::Relaxed)
    }

    fn first_model(&mut self) -> anyhow::Result<String> {
        let url = format!("{}/v1/models", self.base);
        let mut request = self.agent.get(&url);
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let mut response = request.call().with_context(|| url.clone())?;
        let software = response.headers().get("server");
        self.software = software.and_then(|name| name.to_str().ok().map(str::to_owned));
        let status = response.status();
        let body = response
            .body_mut()
            .read_to_string()
            .with_context(|| url.clone())?;
        if status != 200 {
            bail!("{url}: HTTP {}: {}", status.as_u16(), message(&body));
        }
        let models: Value = serde_json::from_str(&body)
            .with_context(|| format!("{url}: expected a list of models"))?;
        let name = models["data"][0]["id"].as_str();
        name.map(str::to_owned)
            .with_context(|| format!("{url}: lists no model; name one with --endpoint-model"))
    }

    /// Asks for `max_tokens` tokens after a user's message.
    ///
    /// # Errors
    /// If the server refuses, breaks off or answers without any text.
    pub fn ask(&self, prompt: &str, max_tokens: usize) -> anyhow::Result<Answer> {
        loop {
            let tried = self.ignores_eos();
            match self.try_ask(prompt, max_tokens, tried)? {
                Ok(answer) => return Ok(answer),
                // Strict servers name the field that they don't know.
                Err(refusal) if tried && refusal.contains("ignore_eos") => {
                    self.ignore_eos.store(false, Ordering::Relaxed);
                }
                Err(refusal) => bail!(refusal),
            }
        }
    }

    /// The inner error is the server's refusal.
    fn try_ask(
        &self,
        prompt: &str,
        max_tokens: usize,
        ignore_eos: bool,
    ) -> anyhow::Result<Result<Answer, String>> {
        let mut body = json!({
            "model": self.model,
            "messages": [{ "role": "user", "content": prompt }],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": true,
            "stream_options": { "include_usage": true },
        });
        if ignore_eos {
            body["ignore_eos"] = true.into();
        }
        let body = body.to_string();
        let url = format!("{}/v1/chat/completions", self.base);
        let mut request = self.agent.post(&url);
        request = request.header("content-type", "application/json");
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let sent = Instant::now();
        let mut response = request.send(&body).context(url)?;
        let status = response.status().as_u16();
        if status != 200 {
            let text = response.body_mut().read_to_string().unwrap_or_default();
            return Ok(Err(format!("HTTP {status}: {}", message(&text))));
        }
        let events = BufReader::new(response.into_body().into_reader());
        read_answer(events, sent).map(Ok)
    }
}

/// Reads to the end, so that the connection can be used again.
fn read_answer(mut events: impl BufRead, sent: Instant) -> anyhow::Result<Answer> {
    let mut answer = Answer {
        usage: Usage::default(),
        text_at: Vec::new(),
        text_sha256: String::new(),
    };
    let mut hash = Sha256::new();
    let mut line = String::new();
    loop {
        line.clear();
        let read = events.read_line(&mut line);
        // Before anything is done with it: parsing is not the server's time.
        let at = sent.elapsed();
        if read.context("the answer broke off")? == 0 {
            break;
        }
        let Some(data) = line.strip_prefix("data:").map(str::trim) else {
            continue;
        };
        if data == "[DONE]" {
            continue;
        }
        let event: Value = serde_json::from_str(data)
            .with_context(|| format!("an event is no JSON: {}", message(data)))?;
        if let Some(error) = event.get("error").filter(|error| !error.is_null()) {
            bail!("{}", message(&error.to_string()));
        }
        if let Some(text) = text_of(&event) {
            answer.text_at.push(at);
            hash.update(text);
        }
        if event["usage"].is_object() {
            answer.usage = usage_of(&event["usage"]);
        }
    }
    if answer.text_at.is_empty() {
        bail!("the answer has no text");
    }
    answer.text_sha256 = format!("{:x}", hash.finalize());
    Ok(answer)
}

/// The new text of an event, also of one that thinks aloud.
fn text_of(event: &Value) -> Option<&str> {
    let delta = &event["choices"][0]["delta"];
    ["content", "reasoning_content", "reasoning"]
        .iter()
        .filter_map(|field| delta[*field].as_str())
        .find(|text| !text.is_empty())
}

fn usage_of(usage: &Value) -> Usage {
    let number = |value: &Value| value.as_u64().map(|n| n as usize);
    Usage {
        prompt_tokens: number(&usage["prompt_tokens"]),
        completion_tokens: number(&usage["completion_tokens"]),
        cached_tokens: number(&usage["prompt_tokens_details"]["cached_tokens"]),
    }
}

/// What an error's body says, shortened.
fn message(body: &str) -> String {
    let parsed: Option<Value> = serde_json::from_str(body).ok();
    let said = parsed.as_ref().and_then(|value| {
        let error = value.get("error").unwrap_or(value);
        let message = error.get("message").unwrap_or(error);
        message.as_str()
    });
    let text = said.unwrap_or(body).trim();
    match text.char_indices().nth(MESSAGE_CHARS) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(stream: &str) -> anyhow::Result<Answer> {
        read_answer(stream.as_bytes(), Instant::now())
    }

    #[test]
    fn events_with_text_are_timed_and_others_are_not() {
        let answer = read(concat!(
            "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n",
            ": ping\n\n",
            "data: {\"choices\":[{\"delta\":{\"reasoning_content\":\"hm\"}}]}\r\n\r\n",
            "data:{\"choices\":[{\"delta\":{\"content\":\"yes\"}}],\"usage\":null}\n\n",
            "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n",
            "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":3,",
            "\"prompt_tokens_details\":{\"cached_tokens\":2}}}\n\n",
            "data: [DONE]\n\n",
        ))
        .unwrap();
        assert_eq!(answer.text_at.len(), 2);
        assert_eq!(answer.usage.prompt_tokens, Some(7));
        assert_eq!(answer.usage.completion_tokens, Some(3));
        assert_eq!(answer.usage.cached_tokens, Some(2));
        let expected = format!("{:x}", Sha256::digest("hmyes"));
        assert_eq!(answer.text_sha256, expected);
    }

    #[test]
    fn what_is_no_answer_says_why() {
        let reason = |stream| read(stream).err().unwrap().to_string();
        assert_eq!(reason(""), "the answer has no text");
        assert_eq!(
            reason("data: {\"error\":{\"message\":\"no more\"}}\n\n"),
            "no more"
        );
        assert_eq!(reason("data: oops\n\n"), "an event is no JSON: oops");
        assert_eq!(message(&"ä".repeat(400)).chars().count(), 303);
        assert_eq!(message("{\"detail\":\"x\"}"), "{\"detail\":\"x\"}");
    }
}
