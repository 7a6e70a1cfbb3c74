//! Values of flags that say what they expect.

/// A whole number from 0.
///
/// # Errors
/// Anything else, in words.
pub fn whole(text: &str) -> Result<usize, String> {
    text.parse()
        .map_err(|_| "expected a whole number from 0".into())
}

/// A whole number from 1.
///
/// # Errors
/// Anything else, in words.
pub fn whole_from_1(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number) if number > 0 => Ok(number),
        _ => Err("expected a whole number from 1".into()),
    }
}

/// A number of tokens to generate, or -1 for as many as the context has room for (`usize::MAX`).
///
/// # Errors
/// Anything else, in words.
pub fn whole_or_all(text: &str) -> Result<usize, String> {
    match text {
        "-1" => Ok(usize::MAX),
        _ => text.parse().map_err(|_| {
            "expected a whole number from 0, or -1 for no limit but the context".into()
        }),
    }
}

/// The seed of a generator of random numbers; `None` for -1, a new one each time.
///
/// # Errors
/// Anything else, in words.
pub fn seed(text: &str) -> Result<Seed, String> {
    match text {
        "-1" => Ok(Seed(None)),
        _ => text
            .parse()
            .map(|seed| Seed(Some(seed)))
            .map_err(|_| "expected a whole number from 0, or -1 for a new one each run".into()),
    }
}

/// See [`seed`].
#[derive(Clone, Copy, Debug)]
pub struct Seed(pub Option<u64>);
