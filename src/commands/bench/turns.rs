//! What kept prefixes are worth: the first token of a conversation's second turn beside that of its
//! new text alone, and what it takes to keep a sequence in RAM and to bring it back.

use std::time::Instant;

use crate::engine::{DEFAULT_PREFIX_CACHE_BYTES, Engine};
use crate::planning::units::show_tokens;
use crate::report::stats::median;

/// The longest first turn; more takes minutes on a CPU and says nothing new.
const MOST_TOKENS: usize = 32 << 10;
/// Less text is no conversation.
pub const LEAST_TOKENS: usize = 64;
/// Of the second turn's new text.
const SUFFIX_TOKENS: usize = 256;
/// Prefixes that are used in turn, each of at most so many tokens.
const PREFIXES: usize = 4;
const PREFIX_TOKENS: usize = 8 << 10;
const REPETITIONS: usize = 3;

/// Milliseconds and tokens.
#[derive(Clone, Debug, Default)]
pub struct Turns {
    pub prefix_tokens: usize,
    pub suffix_tokens: usize,
    /// First token of the suffix in, logits of its last out, with nothing before it
    pub alone_ms: f64,
    /// The same after the prefix, bringing that back from RAM included
    pub second_ms: f64,
    /// Copying the prefix to RAM, keys and values included
    pub first_snapshot_ms: f64,
    /// The same once its whole pages are there: states, and the last page
    pub snapshot_ms: f64,
    pub restore_ms: f64,
    /// Of [`PREFIXES`] that were used once, those that were found the second time
    pub found: usize,
}

fn ms(began: Instant) -> f64 {
    1e3 * began.elapsed().as_secs_f64()
}

/// Opens a session on `prompt` and feeds what is not known of it: the tokens that were, and the time.
fn first_token(engine: &mut Engine, prompt: &[u32], salt: u64) -> anyhow::Result<(usize, f64)> {
    let began = Instant::now();
    let mut session = engine.open(prompt, &[], salt)?;
    let known = session.tokens().len();
    let quiet = &mut |_: usize, _: usize, _: &_| {};
    while (engine.prefill_piece(&mut session, prompt, quiet)?).is_none() {}
    let took = ms(began);
    engine.close(session);
    Ok((known, took))
}

/// Measures with the beginning of `text`, at least [`LEAST_TOKENS`] of it; sequences and kept prefixes
/// are dropped.
///
/// # Errors
/// The engine's.
pub fn measure(engine: &mut Engine, text: &[u32]) -> anyhow::Result<Turns> {
    let total = (text.len() - 1).min(MOST_TOKENS);
    let suffix_tokens = SUFFIX_TOKENS.min(total / 4).max(1);
    let prefix_tokens = total - suffix_tokens;
    let mut turns = Turns {
        prefix_tokens,
        suffix_tokens,
        ..Turns::default()
    };
    // Nothing is kept meanwhile, so that nothing but what is timed copies.
    engine.set_prefix_cache(0);
    engine.reserve(1, total + 1)?;
    let prefix = &text[..prefix_tokens];
    let suffixes: Vec<&[u32]> = (0..REPETITIONS)
        .map(|i| &text[prefix_tokens - i..total - i])
        .collect();
    let mut alone = Vec::new();
    for suffix in &suffixes {
        alone.push(first_token(engine, suffix, 0)?.1);
    }
    turns.alone_ms = median(&alone).unwrap_or(0.0);

    let quiet = &mut |_: usize, _: usize, _: &_| {};
    let mut session = engine.open(prefix, &[], 0)?;
    while (engine.prefill_piece(&mut session, prefix, quiet)?).is_none() {}
    let began = Instant::now();
    engine.park(&mut session)?;
    turns.first_snapshot_ms = ms(began);
    let began = Instant::now();
    engine.unpark(&mut session)?;
    turns.restore_ms = ms(began);
    engine.decode(&mut session, text[0], None, quiet)?;
    let began = Instant::now();
    engine.park(&mut session)?;
    turns.snapshot_ms = ms(began);

    engine.set_prefix_cache(usize::MAX / 2);
    let seen = session.tokens().to_vec();
    engine.close(session);
    let mut second = Vec::new();
    for suffix in &suffixes {
        let prompt = [&seen, &suffix[1..]].concat();
        second.push(first_token(engine, &prompt, 0)?.1);
    }
    turns.second_ms = median(&second).unwrap_or(0.0);

    let length = PREFIX_TOKENS.min(total / PREFIXES);
    for turn in 0..2 {
        for (i, prefix) in text[..total]
            .chunks_exact(length)
            .take(PREFIXES)
            .enumerate()
        {
            let next = &text[total - 1 - i..total];
            let prompt = match turn {
                0 => prefix.to_vec(),
                _ => [prefix, next].concat(),
            };
            let (known, _) = first_token(engine, &prompt, 1)?;
            turns.found += usize::from(turn == 1 && known >= length);
        }
    }
    engine.set_prefix_cache(DEFAULT_PREFIX_CACHE_BYTES);
    Ok(turns)
}

impl Turns {
    /// Two lines for a reader.
    pub fn lines(&self) -> [String; 2] {
        let tokens = |tokens: usize| show_tokens(tokens as u64);
        [
            format!(
                "second turn: {} new tokens after {} kept ones: first token after {:.1} ms, {:.1} ms without \
                 any before them; {} of {PREFIXES} prefixes in turn were found",
                tokens(self.suffix_tokens),
                tokens(self.prefix_tokens),
                self.second_ms,
                self.alone_ms,
                self.found
            ),
            format!(
                "kept prefix: snapshot {:.1} ms, {:.1} ms the first time, with all keys and values; restored \
                 in {:.1} ms",
                self.snapshot_ms, self.first_snapshot_ms, self.restore_ms
            ),
        ]
    }
}
