//! Where a model's files come from: the binary, a folder, the Hugging Face hub and its cache, or a
//! generator.

mod fetch;

use std::path::{Path, PathBuf};

use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use sha2::{Digest, Sha256};
use thiserror::Error;

pub use fetch::RemoteFile;

use super::config::{ConfigError, ModelConfig};
use super::synth::{self, Spec, SpecError, SynthError};
use crate::formats::{Checkpoint, FormatError, ModelId};

/// Name of the built-in model.
pub const BUILTIN: &str = "tiny";

/// Files of the built-in model that go with any synthetic one.
pub const TEXT_FILES: [&str; 3] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
];

/// A model whose files can be read; nothing large is read or fetched before it is asked for.
pub struct Source {
    id: String,
    revision: Option<String>,
    files: Files,
}

enum Files {
    Builtin,
    Folder(PathBuf),
    Hub(Box<Hub>),
    Synthetic(Box<Spec>),
}

struct Hub {
    cache: Cache,
    repo: Repo,
    /// `None` when `HF_HUB_OFFLINE` is set.
    api: Option<ApiRepo>,
    /// The same without the repository, which tells sizes
    sizes: Option<Api>,
}

/// A model that cannot be found or opened.
#[derive(Debug, Error)]
pub enum SourceError {
    #[error(
        "model `{spec}` is neither a folder nor of the form org/name; \
         use a folder with config.json, org/name[@revision], synth:SHAPE, or `{BUILTIN}`"
    )]
    Unknown { spec: String },
    #[error("this build has no built-in model (feature `tiny-moe` is off); use --model")]
    NoBuiltin,
    #[error("{}: has no {file}; expected a model folder", folder.display())]
    MissingFile { folder: PathBuf, file: String },
    #[error("model {id}: {file} is not in the cache and HF_HUB_OFFLINE is set; unset it to fetch")]
    Offline { id: String, file: String },
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

impl Source {
    /// What `--model` names: nothing or `tiny` for the built-in model, a folder, `synth:SHAPE`, or
    /// `org/name[@revision]` on the hub. Touches no network yet.
    ///
    /// # Errors
    /// [`SourceError::Unknown`] for anything else; a synthetic model that is impossible.
    pub fn resolve(spec: Option<&str>) -> Result<Self, SourceError> {
        let spec = spec.unwrap_or(BUILTIN);
        if spec == BUILTIN {
            if !builtin::present() {
                return Err(SourceError::NoBuiltin);
            }
            return Ok(Source {
                id: BUILTIN.into(),
                revision: None,
                files: Files::Builtin,
            });
        }
        if let Some(spec) = spec.strip_prefix(synth::PREFIX) {
            return Ok(Source::synthetic(spec.parse()?));
        }
        let folder = Path::new(spec);
        if folder.is_dir() {
            if !folder.join("config.json").is_file() {
                let file = "config.json".into();
                return Err(SourceError::MissingFile {
                    folder: folder.into(),
                    file,
                });
            }
            return Ok(Source {
                id: spec.into(),
                revision: None,
                files: Files::Folder(folder.into()),
            });
        }
        let (name, revision) = match spec.split_once('@') {
            Some((name, revision)) => (name, Some(revision.to_string())),
            None => (spec, None),
        };
        if !is_hub_name(name) {
            return Err(SourceError::Unknown { spec: spec.into() });
        }
        let hub =
            Hub::new(name, revision.as_deref()).map_err(|e| hub_error(spec, "(connection)", e))?;
        Ok(Source {
            id: name.into(),
            revision,
            files: Files::Hub(Box::new(hub)),
        })
    }

    /// A synthetic model, made when its weights are asked for.
    pub fn synthetic(spec: Spec) -> Self {
        Source {
            id: spec.to_string(),
            revision: None,
            files: Files::Synthetic(Box::new(spec)),
        }
    }

    pub fn id(&self) -> &str {
        &self.id
    }

    /// Where the files are, as errors name it.
    pub fn location(&self) -> String {
        match &self.files {
            Files::Builtin => "built-in model".into(),
            Files::Folder(folder) => folder.display().to_string(),
            Files::Hub(_) | Files::Synthetic(_) => self.id.clone(),
        }
    }

    /// One of the model's small files; `None` if the model has no such file.
    ///
    /// # Errors
    /// If it exists and cannot be read or fetched.
    pub fn read(&self, file: &str) -> Result<Option<Vec<u8>>, SourceError> {
        let path = match &self.files {
            Files::Builtin => return Ok(builtin::read(file).map(<[u8]>::to_vec)),
            Files::Folder(folder) => Some(folder.join(file)).filter(|path| path.is_file()),
            Files::Hub(hub) => hub.find(&self.id, file, true)?,
            Files::Synthetic(spec) if file == "config.json" => return Ok(Some(spec.config_json())),
            Files::Synthetic(_) => {
                let text = TEXT_FILES.contains(&file).then(|| builtin::read(file));
                return Ok(text.flatten().map(<[u8]>::to_vec));
            }
        };
        path.map(|path| std::fs::read(&path).map_err(|source| SourceError::Io { path, source }))
            .transpose()
    }

    /// Like [`Source::read`] for a file the model cannot do without.
    pub fn read_required(&self, file: &str) -> Result<Vec<u8>, SourceError> {
        self.read(file)?.ok_or_else(|| SourceError::MissingFile {
            folder: self.location().into(),
            file: file.into(),
        })
    }

    /// The checked config.json.
    pub fn config(&self) -> Result<ModelConfig, SourceError> {
        ModelConfig::parse(&self.read_required("config.json")?).map_err(|source| {
            SourceError::Config {
                location: self.location(),
                source,
            }
        })
    }

    /// Opens the weights; from the hub they are fetched first, with a progress bar.
    pub fn checkpoint(&self) -> Result<Checkpoint, SourceError> {
        self.open_checkpoint(true)?
            .ok_or_else(|| SourceError::MissingFile {
                folder: self.location().into(),
                file: "model.safetensors".into(),
            })
    }

    /// The weights if they are on this machine already: planning needs only the headers, and can
    /// do without them.
    pub fn local_checkpoint(&self) -> Result<Option<Checkpoint>, SourceError> {
        self.open_checkpoint(false)
    }

    fn open_checkpoint(&self, fetch: bool) -> Result<Option<Checkpoint>, SourceError> {
        let folder = match &self.files {
            Files::Builtin => {
                let Some(bytes) = builtin::read("model.safetensors") else {
                    return Err(SourceError::NoBuiltin);
                };
                return Ok(Some(Checkpoint::from_bytes(
                    "built-in model",
                    bytes.into(),
                )?));
            }
            Files::Folder(folder) => Some(folder.clone()),
            Files::Hub(hub) => hub.weights_folder(&self.id, fetch)?,
            Files::Synthetic(spec) => return Ok(Some(spec.checkpoint()?)),
        };
        let has_weights = |folder: &PathBuf| {
            ["model.safetensors", "model.safetensors.index.json"]
                .iter()
                .any(|file| folder.join(file).is_file())
        };
        match folder.filter(|folder| fetch || has_weights(folder)) {
            Some(folder) => Ok(Some(Checkpoint::open(&folder)?)),
            None => Ok(None),
        }
    }

    /// How other files refer to this model, by its weights where they are at hand.
    pub fn model_id(&self, checkpoint: Option<&Checkpoint>) -> Result<ModelId, SourceError> {
        let synthetic = self.config()?.synthetic;
        let config = self.read_required("config.json")?;
        Ok(ModelId {
            id: self.id.clone(),
            revision: self.revision.clone(),
            fingerprint: checkpoint.map(|checkpoint| checkpoint.fingerprint(&config)),
            config_sha256: format!("{:x}", Sha256::digest(&config)),
            synthetic,
        })
    }
}

impl Hub {
    fn new(name: &str, revision: Option<&str>) -> Result<Self, ApiError> {
        let revision = revision.unwrap_or("main").to_string();
        let repo = Repo::with_revision(name.into(), RepoType::Model, revision);
        let offline = std::env::var("HF_HUB_OFFLINE")
            .is_ok_and(|v| !matches!(v.to_lowercase().as_str(), "" | "0" | "false" | "no"));
        let sizes = if offline {
            None
        } else {
            let mut builder = ApiBuilder::from_env();
            if let Ok(token) = std::env::var("HF_TOKEN") {
                builder = builder.with_token(Some(token));
            }
            Some(builder.build()?)
        };
        Ok(Hub {
            cache: Cache::from_env(),
            api: sizes.as_ref().map(|api| api.repo(repo.clone())),
            sizes,
            repo,
        })
    }

    /// The file in the cache, by branch or by commit.
    fn cached(&self, file: &str) -> Option<PathBuf> {
        let repo = self.cache.repo(self.repo.clone());
        repo.get(file).or_else(|| {
            let by_commit = repo.pointer_path(self.repo.revision()).join(file);
            by_commit.exists().then_some(by_commit)
        })
    }

    fn find(&self, id: &str, file: &str, optional: bool) -> Result<Option<PathBuf>, SourceError> {
        if let Some(path) = self.cached(file) {
            return Ok(Some(path));
        }
        let Some(api) = &self.api else {
            // Without config.json nothing of the model is here; other files may not exist at all.
            if file == "config.json" || !optional {
                return Err(SourceError::Offline {
                    id: id.into(),
                    file: file.into(),
                });
            }
            return Ok(None);
        };
        match api.download(file) {
            Ok(path) => Ok(Some(path)),
            // Every model has this one; without access to a model the hub answers 401 or 403.
            Err(error)
                if file == "config.json"
                    && [401, 403, 404].iter().any(|&s| has_status(&error, s)) =>
            {
                Err(SourceError::NotOnHub {
                    id: id.into(),
                    revision: self.repo.revision().into(),
                })
            }
            Err(error) if optional && has_status(&error, 404) => Ok(None),
            Err(error) => Err(hub_error(id, file, error)),
        }
    }

    /// The snapshot folder that holds all weights; `None` if they are not here and not fetched.
    fn weights_folder(&self, id: &str, fetch: bool) -> Result<Option<PathBuf>, SourceError> {
        const INDEX: &str = "model.safetensors.index.json";
        const SINGLE: &str = "model.safetensors";
        let get = |file: &str, optional| match fetch {
            true => self.find(id, file, optional),
            false => Ok(self.cached(file)),
        };
        let first = match get(INDEX, true)? {
            Some(index) => {
                for shard in Checkpoint::shard_names(&index)? {
                    if get(&shard, false)?.is_none() {
                        return Ok(None);
                    }
                }
                Some(index)
            }
            None => get(SINGLE, false)?,
        };
        Ok(first.and_then(|path| path.parent().map(Path::to_path_buf)))
    }
}

/// `org/name` as the hub allows it.
fn is_hub_name(name: &str) -> bool {
    let parts: Vec<&str> = name.split('/').collect();
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    parts.len() == 2
        && parts
            .iter()
            .all(|p| !p.is_empty() && !p.starts_with('.') && p.chars().all(allowed))
}

/// Whether the hub answered with this HTTP status. The client's error type is not ours to match
/// on: its text is `http status: 404`.
fn has_status(error: &ApiError, status: u16) -> bool {
    match error {
        ApiError::RequestError(error) => error.to_string().ends_with(&format!("status: {status}")),
        ApiError::TooManyRetries(error) => has_status(error, status),
        _ => false,
    }
}

fn hub_error(id: &str, file: &str, source: ApiError) -> SourceError {
    SourceError::Hub {
        id: id.into(),
        file: file.into(),
        source: Box::new(source),
    }
}

/// A file of the built-in model, if this build has one.
pub(super) fn builtin_file(file: &str) -> Option<&'static [u8]> {
    builtin::read(file)
}

/// Files that are part of the program: the text files always, the weights by feature.
mod builtin {
    macro_rules! file {
        ($name:literal) => {
            Some(include_bytes!(concat!("../../workloads/tiny-moe/", $name)).as_slice())
        };
    }

    /// Whether the built-in model can run.
    pub fn present() -> bool {
        weights().is_some()
    }

    #[cfg(feature = "tiny-moe")]
    fn weights() -> Option<&'static [u8]> {
        file!("model.safetensors")
    }

    /// A build without it takes the weights from the folder that `MOECTL_TINY_MOE` names.
    #[cfg(not(feature = "tiny-moe"))]
    fn weights() -> Option<&'static [u8]> {
        static WEIGHTS: std::sync::OnceLock<Option<Vec<u8>>> = std::sync::OnceLock::new();
        let read = || {
            let folder = std::path::PathBuf::from(std::env::var_os("MOECTL_TINY_MOE")?);
            std::fs::read(folder.join("model.safetensors")).ok()
        };
        WEIGHTS.get_or_init(read).as_deref()
    }

    pub fn read(file: &str) -> Option<&'static [u8]> {
        match file {
            "config.json" => file!("config.json"),
            "generation_config.json" => file!("generation_config.json"),
            "tokenizer.json" => file!("tokenizer.json"),
            "tokenizer_config.json" => file!("tokenizer_config.json"),
            "model.safetensors" => weights(),
            _ => None,
        }
    }
}
