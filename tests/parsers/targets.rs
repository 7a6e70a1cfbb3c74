//! Every parser that reads somebody's file, each as a function of bytes: for the fuzzers in `fuzz/` and
//! for the test beside this file. What they check is that nothing panics, whatever the bytes are.

use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use moectl::formats::corpus::Corpus;
use moectl::formats::document::{CACHE_STATE, HARDWARE, PLACEMENT, PROFILE, PROFILE_PROGRESS, RUN};
use moectl::formats::nf4::QuantState;
use moectl::formats::{Checkpoint, Document};
use moectl::model::{
    ChatTemplate, GenerationConfig, ModelConfig, TemplateInputs, Tokenizer, TokenizerFiles, weights,
};
use moectl::planning::{
    CacheState, Footprint, Hardware, Placement, ProfileBody, TraceReader, footprint::ShapeNumbers,
};
use moectl::report::record::RunBody;
use serde_json::{Value, json};

pub type Parser = fn(&[u8]);

/// The parsers by the names of their fuzz targets.
pub const PARSERS: &[(&str, Parser)] = &[
    ("safetensors", safetensors),
    ("index", index),
    ("quant_state", quant_state),
    ("config", config),
    ("generation_config", generation_config),
    ("tokenizer_config", tokenizer_config),
    ("tokenizer", tokenizer),
    ("template", template),
    ("corpus", corpus),
    ("trace", trace),
    ("profile", profile),
    ("placement", placement),
    ("cache_state", cache_state),
    ("run", run),
    ("hardware", hardware),
];

/// The parser of that name.
///
/// # Panics
/// If there is none.
#[allow(dead_code)] // for the fuzzers
pub fn parser(name: &str) -> Parser {
    let found = PARSERS.iter().find(|(known, _)| *known == name);
    found.unwrap_or_else(|| panic!("no parser `{name}`")).1
}

/// The smallest recorded model: its config, weights and tokenizer are what others are read against.
fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .map(|folder| folder.join("tests/data/goldens/tiny-c/nf4"))
        .find(|folder| folder.is_dir())
        .expect("the recorded models are in the repository")
}

fn tiny_file(name: &str) -> Vec<u8> {
    fs::read(tiny().join(name)).unwrap()
}

/// A file of its own for each thread that holds `bytes`.
fn with_file(name: &str, bytes: &[u8], use_it: impl FnOnce(&Path)) {
    let id = format!("{}-{:?}", std::process::id(), std::thread::current().id());
    let folder = std::env::temp_dir().join(format!("moectl-parsers-{id}"));
    fs::create_dir_all(&folder).unwrap();
    let path = folder.join(name);
    fs::write(&path, bytes).unwrap();
    use_it(&path);
    let _ = fs::remove_file(path);
    let _ = fs::remove_dir(folder);
}

fn safetensors(bytes: &[u8]) {
    static CONFIG: LazyLock<ModelConfig> =
        LazyLock::new(|| ModelConfig::parse(&tiny_file("config.json")).unwrap());
    let Ok(checkpoint) = Checkpoint::from_bytes("a file", bytes.to_vec().into()) else {
        return;
    };
    for name in checkpoint.names() {
        let tensor = checkpoint.tensor(name).unwrap();
        let _ = checkpoint.quant_state(name);
        if let [rows, cols] = tensor.shape[..]
            && let Ok(matrix) = checkpoint.matrix(name, rows, cols)
            && rows * cols < 1 << 16
        {
            assert_eq!(matrix.dequantize().len(), rows * cols);
        }
        if let [n] = tensor.shape[..] {
            let _ = checkpoint.vector(name, &[n]);
        }
    }
    let _ = weights::problems(&checkpoint, &CONFIG);
    let _ = checkpoint.fingerprint(b"");
}

fn index(bytes: &[u8]) {
    with_file("model.safetensors.index.json", bytes, |path| {
        let _ = Checkpoint::shard_names(path);
        let _ = Checkpoint::open(path.parent().unwrap());
    });
}

fn quant_state(bytes: &[u8]) {
    if let Ok(state) = QuantState::parse("w", bytes) {
        let again = QuantState::parse("w", state.to_json().as_bytes());
        assert_eq!(again.unwrap().shape, state.shape);
    }
}

fn config(bytes: &[u8]) {
    if let Ok(config) = ModelConfig::parse(bytes) {
        let _ = Footprint::published(&config.shape.numbers());
    }
    let _ = GenerationConfig::from_bytes(None, bytes);
}

fn generation_config(bytes: &[u8]) {
    if let Ok(config) = GenerationConfig::from_bytes(Some(bytes), b"{}") {
        let _ = config.notes().count();
        let _ = config.suppressed.after(&[1, 2, 3], true).count();
    }
}

fn tokenizer_config(bytes: &[u8]) {
    static TOKENIZER: LazyLock<Vec<u8>> = LazyLock::new(|| tiny_file("tokenizer.json"));
    // Split: the first half as one file, the second as another.
    let (one, other) = bytes.split_at(bytes.len() / 2);
    for (config, map) in [(bytes, None), (one, Some(other))] {
        let read = |file: &str| {
            Ok(match file {
                "tokenizer_config.json" => Some(config.to_vec()),
                "special_tokens_map.json" | "added_tokens.json" => map.map(<[u8]>::to_vec),
                _ => None,
            })
        };
        let Ok(files) = TokenizerFiles::read(&TOKENIZER, read) else {
            continue;
        };
        let _ = ChatTemplate::from_bytes(files.config.as_deref(), None);
        if let Ok(tokenizer) = Tokenizer::from_bytes(&TOKENIZER, files.config.as_deref()) {
            let _ = tokenizer.encode("Hello <|im_end|> world");
        }
    }
}

fn tokenizer(bytes: &[u8]) {
    let Ok(tokenizer) = Tokenizer::from_bytes(bytes, None) else {
        return;
    };
    if let Ok(ids) = tokenizer.encode_document("Hello <|im_end|>  wörld\n") {
        let _ = tokenizer.decode(&ids, true);
        for id in ids {
            let _ = tokenizer.token_bytes(id);
        }
    }
}

fn template(bytes: &[u8]) {
    let Ok(Some(template)) = ChatTemplate::from_bytes(None, Some(bytes)) else {
        return;
    };
    let call = json!({"function": {"name": "f", "arguments": {"x": 1e-6, "l": [1, null, "é"]}}});
    let messages = [
        json!({"role": "system", "content": "s"}),
        json!({"role": "user", "content": " Hi\n"}),
        json!({"role": "assistant", "content": null, "tool_calls": [call]}),
    ];
    let tools = json!([{"name": "f", "parameters": {"type": "object"}}]);
    let variables = json!({"i": 7, "s": " Ab\n", "l": [3, 1, 2], "d": {"b": 1, "a": [2.5]}});
    let inputs = TemplateInputs {
        tools: Some(&tools),
        variables: variables.as_object(),
        add_generation_prompt: true,
        ..TemplateInputs::default()
    };
    let _ = template.render_with::<Value>(&messages, &inputs);
}

fn corpus(bytes: &[u8]) {
    with_file("corpus.jsonl", bytes, |path| {
        if let Ok(corpus) = Corpus::open(path) {
            assert!(corpus.records().unwrap().all(|record| record.is_ok()));
        }
    });
}

fn trace(bytes: &[u8]) {
    if let Ok(reader) = TraceReader::new(Cursor::new(bytes))
        && let Ok((trace, _)) = reader.read_all()
    {
        let _ = trace.documents();
        let _ = trace.tokens();
    }
}

fn profile(bytes: &[u8]) {
    with_file("profile.json", bytes, |path| {
        if let Ok(document) = Document::<ProfileBody>::read(path, PROFILE) {
            let _ = document.body.check();
        }
        let _ = Document::<Value>::read(path, PROFILE_PROGRESS);
    });
}

fn placement(bytes: &[u8]) {
    static FOOTPRINT: LazyLock<Footprint> = LazyLock::new(|| {
        let config = ModelConfig::parse(&tiny_file("config.json")).unwrap();
        let numbers: ShapeNumbers = config.shape.numbers();
        Footprint::published(&numbers)
    });
    with_file("placement.json", bytes, |path| {
        if let Ok(document) = Document::<Placement>::read(path, PLACEMENT) {
            let _ = document.body.check(&FOOTPRINT);
        }
    });
}

fn cache_state(bytes: &[u8]) {
    with_file("cache.json", bytes, |path| {
        let _ = Document::<CacheState>::read(path, CACHE_STATE);
    });
}

fn run(bytes: &[u8]) {
    with_file("run.json", bytes, |path| {
        let _ = Document::<RunBody>::read(path, RUN);
    });
}

fn hardware(bytes: &[u8]) {
    with_file("hardware.json", bytes, |path| {
        if let Ok(document) = Document::<Value>::read(path, HARDWARE)
            && let Ok(machine) = serde_json::from_value::<Hardware>(document.body)
        {
            let _ = machine.check();
        }
    });
}
