//! Load on a server: so many clients, each of which sends its next request when its last is answered.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Barrier, Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::ProgressBar;

use super::client::{Answer, Endpoint};
use super::prompts::{Length, Prompts};
use crate::report::record::{ConcurrentRun, ExpertCounts, Repetition};

/// What one level of concurrency is measured with.
pub struct Load<'a> {
    pub endpoint: &'a Endpoint,
    pub prompts: &'a Prompts,
    pub length: Length,
    pub max_tokens: usize,
    /// Of each client, not counted
    pub warmups: usize,
    /// Of all clients together
    pub requests: usize,
    pub concurrency: usize,
    /// No request begins after that, but for one of each client
    pub deadline: Option<Instant>,
    pub interrupted: &'a AtomicBool,
    pub bar: &'a ProgressBar,
}

/// What came of it.
pub struct Measured {
    pub run: ConcurrentRun,
    /// Why requests failed, each reason once
    pub reasons: Vec<String>,
    /// Answers whose tokens the server did not count
    pub uncounted: usize,
}

impl Load<'_> {
    /// Runs the warm-ups, then all requests, and waits for the last answer.
    pub fn run(&self) -> Measured {
        // Cut before anything is timed: the client shares its machine with what it measures, or may.
        let warm = self.cut(self.warmups * self.concurrency);
        let counted = self.cut(self.requests);
        let (next_warm, next) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let together = Barrier::new(self.concurrency);
        let began = Mutex::new(None::<Instant>);
        let done = Mutex::new(Vec::new());
        let client = || {
            while let Some(prompt) = warm.get(next_warm.fetch_add(1, Ordering::Relaxed)) {
                if !self.interrupted.load(Ordering::Relaxed) {
                    // What fails here fails again below, where it is told.
                    let _ = self.endpoint.ask(prompt, self.max_tokens);
                    self.bar.inc(1);
                }
            }
            together.wait();
            let start = *lock(&began).get_or_insert_with(Instant::now);
            while let Some(number) = self.draw(&next) {
                let answer = self.endpoint.ask(&counted[number], self.max_tokens);
                lock(&done).push((answer, start.elapsed()));
                self.bar.inc(1);
            }
        };
        std::thread::scope(|scope| {
            (0..self.concurrency).for_each(|_| _ = scope.spawn(client));
        });
        self.collect(done.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    fn cut(&self, count: usize) -> Vec<String> {
        (0..count).map(|_| self.prompts.next(self.length)).collect()
    }

    /// The number of the next request to send, if there is to be one.
    fn draw(&self, next: &AtomicUsize) -> Option<usize> {
        let number = next.fetch_add(1, Ordering::Relaxed);
        let in_time = self.deadline.is_none_or(|at| Instant::now() < at);
        let may = number < self.concurrency || in_time;
        let wanted = number < self.requests && !self.interrupted.load(Ordering::Relaxed);
        (may && wanted).then_some(number)
    }

    fn collect(&self, done: Vec<(anyhow::Result<Answer>, Duration)>) -> Measured {
        let mut measured = Measured {
            run: ConcurrentRun {
                concurrency: self.concurrency,
                ..ConcurrentRun::default()
            },
            reasons: Vec::new(),
            uncounted: 0,
        };
        for (answer, at) in done {
            match answer {
                Ok(answer) => {
                    measured.run.wall_ms = measured.run.wall_ms.max(ms(at));
                    measured.uncounted += usize::from(answer.usage.completion_tokens.is_none());
                    measured.run.requests.push(sample(&answer));
                }
                Err(error) => {
                    measured.run.failed += 1;
                    let reason = format!("{error:#}");
                    if !measured.reasons.contains(&reason) {
                        measured.reasons.push(reason);
                    }
                }
            }
        }
        measured
    }
}

/// The samples of one answer. What prefill takes is not seen from outside, so there is no rate of it.
fn sample(answer: &Answer) -> Repetition {
    let (first, last) = (answer.text_at[0], answer.text_at[answer.text_at.len() - 1]);
    let generated = answer.usage.completion_tokens;
    let generated_tokens = generated.unwrap_or(answer.text_at.len());
    let decode_s = (last - first).as_secs_f64();
    let decode_tok_s = match decode_s > 0.0 {
        true => generated_tokens.saturating_sub(1) as f64 / decode_s,
        false => 0.0,
    };
    let gaps = answer.text_at.windows(2).map(|pair| ms(pair[1] - pair[0]));
    Repetition {
        prompt_tokens: answer.usage.prompt_tokens.unwrap_or(0),
        generated_tokens,
        ttft_ms: ms(first),
        itl_ms: gaps.collect(),
        prefill_tok_s: 0.0,
        decode_tok_s,
        e2e_ms: ms(last),
        experts: ExpertCounts::default(),
        decode_split: None,
        gpu_energy_j: None,
        output_sha256: answer.text_sha256.clone(),
        cached_tokens: answer.usage.cached_tokens,
    }
}

fn ms(time: Duration) -> f64 {
    1e3 * time.as_secs_f64()
}

/// What other threads put there is whole, whatever became of them.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::super::client::Usage;
    use super::*;

    #[test]
    fn rates_are_of_tokens_also_where_several_come_in_one_event() {
        let answer = Answer {
            usage: Usage {
                prompt_tokens: Some(9),
                completion_tokens: Some(7),
                cached_tokens: Some(4),
            },
            text_at: [100, 150, 400].map(Duration::from_millis).to_vec(),
            text_sha256: String::new(),
        };
        let sample = sample(&answer);
        assert_eq!((sample.ttft_ms, sample.e2e_ms), (100.0, 400.0));
        assert_eq!(sample.itl_ms, [50.0, 250.0]);
        assert_eq!(sample.decode_tok_s, 20.0);
        assert_eq!(sample.generated_tokens, 7);
        assert_eq!(sample.cached_tokens, Some(4));
    }
}
