//! Why a model cannot be found or opened.

use std::path::PathBuf;

use hf_hub::api::sync::ApiError;
use thiserror::Error;

use crate::formats::FormatError;
use crate::model::config::ConfigError;
use crate::model::synth::{SpecError, SynthError};

/// A model that cannot be found or opened.
#[derive(Debug, Error)]
pub enum SourceError {
    #[error(
        "model `{spec}` is neither a folder nor of the form org/name; \
         use a folder with config.json, org/name[@revision], synth:SHAPE, or `tiny`"
    )]
    Unknown { spec: String },
    #[error("this build has no built-in model (feature `tiny-moe` is off); use --model")]
    NoBuiltin,
    #[error("{}: has no {file}; expected a model folder", folder.display())]
    MissingFile { folder: PathBuf, file: String },
    #[error("model {id}: {file} is not in the cache, and {reason}")]
    Offline {
        id: String,
        file: String,
        reason: String,
    },
    #[error("model {id}: config.json: the hub cannot be reached: {reason}")]
    Unreachable { id: String, reason: String },
    #[error(
        "{}: a git-lfs pointer, not the file itself; run `git lfs pull` in its folder",
        path.display()
    )]
    LfsPointer { path: PathBuf },
    #[error(
        "model {id}: not found on the hub at revision `{revision}`, or not open to you; \
         check the name, or set HF_TOKEN"
    )]
    NotOnHub { id: String, revision: String },
    #[error("model {id}: {file}: {source}")]
    Hub {
        id: String,
        file: String,
        source: Box<ApiError>,
    },
    #[error("{}: {source}", path.display())]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{location}: {source}")]
    Config {
        location: String,
        source: ConfigError,
    },
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error(transparent)]
    Synthetic(#[from] SynthError),
}
