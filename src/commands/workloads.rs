//! The corpora that come with the program.

use crate::formats::corpus::{Corpus, CorpusError};

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

/// All built-in corpora.
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
