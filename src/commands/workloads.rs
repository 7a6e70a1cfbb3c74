//! The corpora that come with the program.

use crate::formats::corpus::{Corpus, CorpusError};
use crate::model::Source;
use crate::model::source::BUILTIN;
use crate::planning::units::show_tokens;

macro_rules! workloads {
    ($($name:literal),*) => {
        /// Name and text of each built-in corpus.
        const BUILT_IN: &[(&str, &str)] =
            &[$(($name, include_str!(concat!("../../workloads/", $name, ".jsonl")))),*];
    };
}

workloads!("chat", "code", "math", "prose", "multilingual", "long");

/// The corpus of long documents: text enough for any context of the built-in model.
pub const LONG: &str = "long";

/// Tokens of the longest text that the built-in model was trained on.
const TRAINED_CONTEXT: usize = 8192;

/// What must be said of a context beyond that.
pub fn beyond_training(source: &Source, context: usize) -> Option<String> {
    (source.id() == BUILTIN && context > TRAINED_CONTEXT).then(|| {
        format!(
            "the built-in model was trained on {} tokens: beyond, speed and memory mean something, the \
             text and its quality do not",
            show_tokens(TRAINED_CONTEXT as u64)
        )
    })
}

/// All built-in corpora.
///
/// # Errors
/// If one is damaged.
pub fn all() -> Result<Vec<Corpus>, CorpusError> {
    BUILT_IN
        .iter()
        .map(|(name, text)| Corpus::from_static(name, text))
        .collect()
}

/// The built-in corpus of that name, if there is one.
pub fn by_name(name: &str) -> Option<Result<Corpus, CorpusError>> {
    let (name, text) = BUILT_IN.iter().find(|(n, _)| *n == name)?;
    Some(Corpus::from_static(name, text))
}
