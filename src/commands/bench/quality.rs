//! Speed with quality beside it: how far the fast path is from the reference backend.

use crate::backend::LogitRows;
use crate::backend::cpu::CpuPrecision;
use crate::commands::console::Console;
use crate::commands::workloads;
use crate::engine::sampler::log_sum_exp;
use crate::engine::{BackendChoice, Engine, GpuOptions, LoadOptions};
use crate::model::Source;
use crate::report::record::Quality;

/// Tokens of text compared in one piece.
const PIECE: usize = 256;

/// Mean KL divergence and perplexities over `tokens` tokens of the built-in workloads.
///
/// # Errors
/// If the reference cannot load the model, or either engine fails.
pub fn against_reference(
    engine: &mut Engine,
    source: &Source,
    tokens: usize,
    console: &Console,
) -> anyhow::Result<Quality> {
    let options = LoadOptions {
        backend: BackendChoice::Reference,
        threads: None,
        cpu_precision: CpuPrecision::F32,
        gpu: GpuOptions::default(),
        kv_dtype: None,
        progress: &|_, _| {},
        max_tokens: PIECE,
    };
    let mut reference = Engine::load(source, &options)?;
    console.detail("comparing with the reference backend");
    let mut sums = Sums::default();
    'text: for corpus in workloads::all()? {
        for record in corpus.records()? {
            let mut ids = engine.text().encode_content(&record?.content)?;
            ids.truncate(PIECE);
            if ids.len() < 2 {
                continue;
            }
            let ours = logits(engine, &ids)?;
            let theirs = logits(&mut reference, &ids)?;
            sums.add(&ours, &theirs, &ids);
            if sums.tokens >= tokens {
                break 'text;
            }
            // A few records of every domain say more than many of one.
            if sums.tokens * 6 >= tokens * (sums.corpora + 1) {
                break;
            }
        }
        sums.corpora += 1;
    }
    let n = sums.tokens.max(1) as f64;
    Ok(Quality {
        reference: reference.backend().name,
        tokens: sums.tokens,
        mean_kl_nats: sums.kl / n,
        perplexity: (sums.loss / n).exp(),
        reference_perplexity: (sums.reference_loss / n).exp(),
    })
}

fn logits(engine: &mut Engine, ids: &[u32]) -> anyhow::Result<Vec<f32>> {
    engine.reset(ids.len())?;
    Ok(engine.forward(ids, LogitRows::All, &mut |_, _, _| {})?)
}

#[derive(Default)]
struct Sums {
    corpora: usize,
    tokens: usize,
    kl: f64,
    loss: f64,
    reference_loss: f64,
}

impl Sums {
    /// Adds every position of one text but the last, whose next token is unknown.
    fn add(&mut self, ours: &[f32], theirs: &[f32], ids: &[u32]) {
        let vocab = ours.len() / ids.len();
        for (at, &next) in ids[1..].iter().enumerate() {
            let row = at * vocab..(at + 1) * vocab;
            let (p, q) = (log_softmax(&theirs[row.clone()]), log_softmax(&ours[row]));
            self.kl += p
                .iter()
                .zip(&q)
                .map(|(p, q)| p.exp() * (p - q))
                .sum::<f64>();
            self.loss -= q[next as usize];
            self.reference_loss -= p[next as usize];
            self.tokens += 1;
        }
    }
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let normalizer = log_sum_exp(logits);
    logits.iter().map(|&l| f64::from(l) - normalizer).collect()
}
