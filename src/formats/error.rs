//! What can be wrong with a file of weights.

use std::path::PathBuf;

use thiserror::Error;

/// A checkpoint that cannot be read as what it claims to be.
///
/// Every message names the file or tensor, what was found and what was expected.
#[derive(Debug, Error)]
pub enum FormatError {
    #[error("{}: {source}", path.display())]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{}: not a valid safetensors file: {reason}", path.display())]
    Safetensors { path: PathBuf, reason: String },
    #[error("{}: {reason}", path.display())]
    Index { path: PathBuf, reason: String },
    #[error("tensor `{name}` is missing from {location}")]
    Missing { name: String, location: String },
    #[error(
        "tensor `{name}` is missing from {location}: the index has it in `{shard}`, which does not \
         hold it; download the shard again"
    )]
    Promised {
        name: String,
        location: String,
        shard: String,
    },
    #[error("tensor `{name}`: shape {found:?}, expected {expected:?}")]
    Shape {
        name: String,
        found: Vec<usize>,
        expected: Vec<usize>,
    },
    #[error("tensor `{name}`: dtype {found}, expected {expected}")]
    Dtype {
        name: String,
        found: String,
        expected: String,
    },
    #[error("tensor `{name}`: damaged quantisation state: {reason}")]
    QuantState { name: String, reason: String },
    #[error(
        "tensor `{name}`: quantisation `{found}` is not supported; supported: bitsandbytes nf4"
    )]
    QuantType { name: String, found: String },
    #[error("tensor `{name}`: {what} is {found}, expected a finite number")]
    NotFinite {
        name: String,
        what: String,
        found: f32,
    },
}
