//! Corpora: JSON lines of text, prompts or conversations, read by streaming.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use thiserror::Error;

use super::input::{self, Spooled};
use super::json;

/// One line of a corpus.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// The line's own `id`, or `line N`
    pub id: String,
    /// `unlabelled` where the line has none
    pub domain: String,
    pub content: Content,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    /// Plain text: everything is context.
    Text(String),
    /// Plain text that a model continues.
    Prompt(String),
    /// A conversation, for the model's chat template.
    Messages(Box<Conversation>),
}

/// What a line gives to the chat template.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Conversation {
    pub messages: Vec<Value>,
    /// JSON array of function descriptions
    pub tools: Option<Value>,
    /// JSON array of texts to refer to
    pub documents: Option<Value>,
    /// Further variables of the template, such as `enable_thinking`
    pub chat_template_kwargs: Option<Map<String, Value>>,
}

/// Fields with text that a model would be trained on, which is not read here.
const TEXT_FIELDS: [&str; 8] = [
    "completion",
    "response",
    "answer",
    "output",
    "chosen",
    "rejected",
    "functions",
    "conversations",
];

/// A checked corpus: every line was read once and is well formed.
#[derive(Clone, Debug)]
pub struct Corpus {
    name: String,
    origin: Origin,
    pub records: usize,
    /// Lines per domain
    pub domains: BTreeMap<String, usize>,
    /// Fields with text that some lines have and nobody reads, with the number of such lines
    pub unread: BTreeMap<&'static str, usize>,
    pub sha256: String,
}

#[derive(Clone, Debug)]
enum Origin {
    File(PathBuf),
    /// Standard input or a pipe
    Spooled(Spooled),
    Static(&'static str),
}

#[derive(Debug, Error)]
pub enum CorpusError {
    #[error("{name}: {source}")]
    Io {
        name: String,
        source: std::io::Error,
    },
    #[error("{name}:{line}: {reason}")]
    Line {
        name: String,
        line: usize,
        reason: String,
    },
    #[error(
        "{name}: holds no records; expected one JSON object per line with \
         `text`, `prompt` or `messages`"
    )]
    Empty { name: String },
}

#[derive(Deserialize)]
struct Line {
    id: Option<Value>,
    domain: Option<String>,
    text: Option<String>,
    prompt: Option<String>,
    messages: Option<Vec<Value>>,
    tools: Option<Value>,
    documents: Option<Value>,
    chat_template_kwargs: Option<Map<String, Value>>,
    #[serde(flatten)]
    others: Map<String, Value>,
}

impl Corpus {
    /// Reads the file once: counts, hashes and checks every line. `-` is standard input.
    ///
    /// # Errors
    /// The first malformed line by number; a file without records.
    pub fn open(path: &Path) -> Result<Self, CorpusError> {
        let name = match path == OsStr::new("-") {
            true => "standard input".into(),
            false => path.display().to_string(),
        };
        match Spooled::from_stream(path) {
            Ok(Some(spooled)) => Self::check(name, Origin::Spooled(spooled)),
            Ok(None) => Self::check(name, Origin::File(path.into())),
            Err(source) => Err(CorpusError::Io { name, source }),
        }
    }

    /// A corpus that is part of the program.
    ///
    /// # Errors
    /// A line that is no record; no record at all.
    pub fn from_static(name: &str, text: &'static str) -> Result<Self, CorpusError> {
        Self::check(name.into(), Origin::Static(text))
    }

    fn check(name: String, origin: Origin) -> Result<Self, CorpusError> {
        let mut corpus = Corpus {
            name,
            origin,
            records: 0,
            domains: BTreeMap::new(),
            unread: BTreeMap::new(),
            sha256: String::new(),
        };
        let mut hash = Sha256::new();
        io::copy(&mut corpus.reader()?, &mut hash).map_err(|e| corpus.io(e))?;
        corpus.sha256 = format!("{:x}", hash.finalize());
        let mut domains = BTreeMap::new();
        let mut unread = BTreeMap::new();
        for line in corpus.lines()? {
            let (record, others) = line?;
            *domains.entry(record.domain).or_insert(0) += 1;
            for field in others {
                *unread.entry(field).or_insert(0) += 1;
            }
        }
        corpus.unread = unread;
        corpus.records = domains.values().sum();
        corpus.domains = domains;
        if corpus.records == 0 {
            return Err(CorpusError::Empty { name: corpus.name });
        }
        Ok(corpus)
    }

    /// What a user should know: text that nobody reads.
    pub fn notes(&self) -> impl Iterator<Item = String> {
        let note = |(field, lines): (&&str, &usize)| {
            format!(
                "note: {}: `{field}` of {lines} lines is not read",
                self.name
            )
        };
        self.unread.iter().map(note)
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// The records in file order, read line by line; blank lines are skipped.
    ///
    /// # Errors
    /// If the file cannot be opened.
    pub fn records(
        &self,
    ) -> Result<impl Iterator<Item = Result<Record, CorpusError>>, CorpusError> {
        Ok(self.lines()?.map(|line| Ok(line?.0)))
    }

    /// The records, each with the fields of its line that are text and not read.
    fn lines(
        &self,
    ) -> Result<impl Iterator<Item = Result<(Record, Vec<&'static str>), CorpusError>>, CorpusError>
    {
        let name = self.name.clone();
        let lines = BufReader::with_capacity(1 << 20, self.reader()?)
            .lines()
            .enumerate();
        Ok(lines.filter_map(move |(at, line)| {
            let number = at + 1;
            match line {
                Ok(line) if line.trim().is_empty() => None,
                Ok(line) => {
                    let line = line.strip_prefix('\u{feff}').unwrap_or(&line);
                    Some(parse(line, number).map_err(|reason| CorpusError::Line {
                        name: name.clone(),
                        line: number,
                        reason,
                    }))
                }
                Err(e) if e.kind() == io::ErrorKind::InvalidData => {
                    let reason = "not valid UTF-8".into();
                    Some(Err(CorpusError::Line {
                        name: name.clone(),
                        line: number,
                        reason,
                    }))
                }
                Err(source) => Some(Err(CorpusError::Io {
                    name: name.clone(),
                    source,
                })),
            }
        }))
    }

    fn reader(&self) -> Result<Box<dyn Read + Send>, CorpusError> {
        match &self.origin {
            Origin::File(path) => input::open(path).map_err(|e| self.io(e)),
            Origin::Spooled(spooled) => Ok(Box::new(spooled.reader())),
            Origin::Static(text) => Ok(Box::new(Cursor::new(text.as_bytes()))),
        }
    }

    fn io(&self, source: std::io::Error) -> CorpusError {
        CorpusError::Io {
            name: self.name.clone(),
            source,
        }
    }
}

fn parse(line: &str, number: usize) -> Result<(Record, Vec<&'static str>), String> {
    let line: Line = json::from_slice(line.as_bytes())
        .map_err(|e| format!("not a JSON object of the form expected: {e}"))?;
    let content = match (line.text, line.prompt, line.messages) {
        (Some(text), None, None) => Content::Text(text),
        (None, Some(prompt), None) => Content::Prompt(prompt),
        (None, None, Some(messages)) => Content::Messages(Box::new(Conversation {
            messages,
            tools: line.tools.map(tool_list).transpose()?,
            documents: line.documents,
            chat_template_kwargs: line.chat_template_kwargs,
        })),
        (None, None, None) => return Err("has none of `text`, `prompt`, `messages`".into()),
        _ => return Err("has more than one of `text`, `prompt`, `messages`".into()),
    };
    let id = match line.id {
        Some(Value::String(id)) => id,
        Some(other) => other.to_string(),
        None => format!("line {number}"),
    };
    let unread = TEXT_FIELDS.into_iter();
    let unread = unread.filter(|field| line.others.get(*field).is_some_and(|v| !v.is_null()));
    let record = Record {
        id,
        domain: line.domain.unwrap_or_else(|| "unlabelled".into()),
        content,
    };
    Ok((record, unread.collect()))
}

/// Tools as a list; data sets whose columns have one type keep it as JSON inside of a string.
fn tool_list(tools: Value) -> Result<Value, String> {
    let list = match &tools {
        Value::String(text) => {
            json::from_slice(text.as_bytes()).map_err(|e| format!("tools: not valid JSON: {e}"))?
        }
        _ => tools,
    };
    match list.is_array() {
        true => Ok(list),
        false => Err("tools: expected a list of function descriptions".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_line_is_named_by_number() {
        for (text, expected) in [
            ("{\"text\": \"a\"}\n{oops\n", "c:2: not a JSON object"),
            ("\n\n{\"id\": 1}", "c:3: has none of"),
            (
                "{\"text\": \"a\", \"prompt\": \"b\"}",
                "c:1: has more than one of",
            ),
            ("  \n\n", "c: holds no records"),
        ] {
            let error = Corpus::from_static("c", text).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
    }

    #[test]
    fn records_carry_id_domain_and_content() {
        let text = "{\"id\": 7, \"domain\": \"code\", \"prompt\": \"fn\"}\n{\"messages\": []}";
        let corpus = Corpus::from_static("c", text).unwrap();
        let records: Vec<Record> = corpus.records().unwrap().map(Result::unwrap).collect();
        assert_eq!(records[0].id, "7");
        assert_eq!(records[0].content, Content::Prompt("fn".into()));
        assert_eq!(records[1].domain, "unlabelled");
        assert_eq!(corpus.domains["code"], 1);
    }

    #[test]
    fn conversations_carry_what_their_template_needs() {
        let text = r#"{"messages": [], "tools": [{"name": "f"}], "documents": [{"title": "t"}],
            "chat_template_kwargs": {"enable_thinking": false}, "completion": "c"}"#
            .replace('\n', "");
        let listed = Box::leak(text.into_boxed_str());
        let quoted = "{\"messages\": [], \"tools\": \"[{\\\"name\\\": \\\"f\\\"}]\"}";
        for line in [&*listed, quoted] {
            let corpus = Corpus::from_static("c", line).unwrap();
            let record = corpus.records().unwrap().next().unwrap().unwrap();
            let Content::Messages(conversation) = record.content else {
                panic!("{record:?}");
            };
            assert_eq!(conversation.tools.unwrap()[0]["name"], "f");
            if line == quoted {
                continue;
            }
            assert_eq!(conversation.documents.unwrap()[0]["title"], "t");
            let variables = conversation.chat_template_kwargs.unwrap();
            assert_eq!(variables["enable_thinking"], false);
            assert_eq!(corpus.unread["completion"], 1);
        }
        let error = Corpus::from_static("c", r#"{"messages": [], "tools": "x"}"#).unwrap_err();
        assert!(
            error.to_string().starts_with("c:1: tools: not valid JSON"),
            "{error}"
        );
    }
}
