//! How many repetitions there is time for, and what is left of it.

use std::time::{Duration, Instant};

/// Time of a measurement, dealt out to contexts by their length.
pub struct Pace {
    started: Instant,
    limit: Option<Duration>,
    /// Ascending, in tokens
    contexts: Vec<usize>,
    /// Runs per context: warm-ups and repetitions, of all variants
    runs: usize,
    /// Seconds of the last run at each context that was reached
    seconds: Vec<f64>,
}

impl Pace {
    /// - `limit`: of all contexts together; `None` for as long as it takes
    pub fn new(contexts: &[usize], runs: usize, limit: Option<Duration>) -> Self {
        Pace {
            started: Instant::now(),
            limit,
            contexts: contexts.to_vec(),
            runs,
            seconds: Vec::new(),
        }
    }

    /// What context `at` may take, of what is left for it and those after it.
    pub fn share(&self, at: usize) -> Option<Duration> {
        let left = self.limit?.saturating_sub(self.started.elapsed());
        let rest: usize = self.contexts[at..].iter().sum();
        Some(left.mul_f64(self.contexts[at] as f64 / rest.max(1) as f64))
    }

    /// A run at context `at` took so long.
    pub fn took(&mut self, at: usize, time: Duration) {
        self.seconds.resize(at + 1, 0.0);
        self.seconds[at] = time.as_secs_f64();
    }

    /// Seconds of a run at context `at`, measured or scaled from the last context: attention makes long
    /// prompts dearer per token.
    pub fn estimate(&self, at: usize) -> Option<f64> {
        let known = self.seconds.len().checked_sub(1)?.min(at);
        let longer = self.contexts[at] as f64 / self.contexts[known] as f64;
        Some(self.seconds[known] * longer.powf(1.5))
    }

    /// Seconds until the end, with `done` runs of context `at` behind.
    pub fn left(&self, at: usize, done: usize) -> Option<f64> {
        let runs = |i: usize| {
            if i == at {
                self.runs.saturating_sub(done)
            } else {
                self.runs
            }
        };
        let each = (at..self.contexts.len()).map(|i| Some(self.estimate(i)? * runs(i) as f64));
        let estimated = each.sum::<Option<f64>>()?;
        let limit = self.limit.map_or(f64::INFINITY, |limit| {
            limit.saturating_sub(self.started.elapsed()).as_secs_f64()
        });
        // The last run begun within the limit may end beyond it.
        Some(estimated.min(limit))
    }
}

/// `about 3 min left`, for a progress bar.
pub fn show_left(seconds: f64) -> String {
    match seconds {
        s if s < 90.0 => format!("about {} s left", s.ceil()),
        s => format!("about {} min left", (s / 60.0).ceil()),
    }
}

/// `90s`, `6m`, `1h` or seconds.
///
/// # Errors
/// What was found and what is expected, if it is no duration.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || "expected a time such as 90s, 6m or 1h".to_string();
    let (number, unit) = match text.find(|c: char| c.is_ascii_alphabetic()) {
        Some(at) => text.split_at(at),
        None => (text, "s"),
    };
    let scale = match unit {
        "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        _ => return Err(wrong()),
    };
    let seconds = number.trim().parse::<f64>().map_err(|_| wrong())? * scale;
    match seconds > 0.0 && seconds < 1e9 {
        true => Ok(Duration::from_secs_f64(seconds)),
        false => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_goes_to_contexts_by_their_length() {
        let minutes = |n: u64| Duration::from_secs(60 * n);
        let mut pace = Pace::new(&[32_768, 131_072], 11, Some(minutes(5)));
        let share = pace.share(0).unwrap().as_secs_f64();
        assert!((share - 60.0).abs() < 1.0, "{share}");
        assert_eq!(pace.left(0, 0), None);
        pace.took(0, Duration::from_secs(2));
        assert_eq!(pace.estimate(1), Some(16.0));
        let left = pace.left(0, 6).unwrap();
        assert!((left - (5.0 * 2.0 + 11.0 * 16.0)).abs() < 1.0, "{left}");
        assert!(Pace::new(&[64], 2, None).share(0).is_none());
    }

    #[test]
    fn durations_are_read_in_seconds_minutes_and_hours() {
        for (text, seconds) in [
            ("90s", 90),
            ("6m", 360),
            ("1h", 3600),
            ("45", 45),
            ("2min", 120),
        ] {
            assert_eq!(
                parse_duration(text),
                Ok(Duration::from_secs(seconds)),
                "{text}"
            );
        }
        for text in ["", "0s", "-1m", "6d", "soon"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
        assert_eq!(show_left(61.2), "about 62 s left");
        assert_eq!(show_left(125.0), "about 3 min left");
    }
}
