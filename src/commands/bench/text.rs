//! The text that prompts are cut from: enough of it, or a refusal.

use crate::commands::Failure;
use crate::engine::Engine;
use crate::formats::corpus::Corpus;
use crate::planning::units::show_tokens;

/// Tokens of a corpus, one record after the other.
pub struct Text {
    pub ids: Vec<u32>,
    /// How often the corpus was gone through; the last time perhaps in part.
    pub times: usize,
}

/// The first `wanted` tokens of the corpus; its end is followed by its beginning if `repeat`.
///
/// # Errors
/// If there is less text, a usage error that names the corpus and both counts.
pub fn read(engine: &Engine, corpus: &Corpus, wanted: usize, repeat: bool) -> anyhow::Result<Text> {
    let mut ids = Vec::new();
    for record in corpus.records()? {
        ids.extend(engine.text().encode_content(&record?.content)?);
        if ids.len() >= wanted {
            ids.truncate(wanted);
            return Ok(Text { ids, times: 1 });
        }
    }
    let found = ids.len();
    if !repeat || found == 0 {
        return Err(Failure::Usage(format!(
            "{} holds {found} tokens, the longest context of --ctx wants {}; give more text, a shorter \
             --ctx, or --repeat-text to go through it again",
            corpus.name(),
            show_tokens(wanted as u64)
        ))
        .into());
    }
    let ids: Vec<u32> = ids.into_iter().cycle().take(wanted).collect();
    Ok(Text {
        times: wanted.div_ceil(found),
        ids,
    })
}

impl Text {
    /// What a reader of the results should know, if the text was gone through more than once.
    pub fn note(&self, corpus: &Corpus) -> Option<String> {
        (self.times > 1).then(|| {
            format!(
                "{} was gone through {} times to fill the longest context: routing repeats itself \
                 where text does",
                corpus.name(),
                self.times
            )
        })
    }
}
