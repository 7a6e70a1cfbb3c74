//! Where a model's files come from: the binary, a folder, the Hugging Face hub and its cache, or a
//! generator.

pub(super) mod error;
mod fetch;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

pub use super::hub::RemoteFile;
pub use error::SourceError;

use super::config::ModelConfig;
use super::hub::{Hub, is_hub_name};
use super::synth::{self, Spec};
use crate::formats::checkpoint::LFS_POINTER;
use crate::formats::{Checkpoint, ModelId};

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

impl Source {
    /// What `--model` names: nothing or `tiny` for the built-in model, a folder, `synth:SHAPE`, or
    /// `org/name[@revision]` on the hub. Touches no network yet.
    ///
    /// # Errors
    /// [`SourceError::Unknown`] for anything else; a synthetic model that is impossible.
    pub fn resolve(spec: Option<&str>) -> Result<Self, SourceError> {
        Source::resolve_os(spec.map(OsStr::new))
    }

    /// [`resolve`](Self::resolve) of what the system gives, which need not be UTF-8.
    ///
    /// # Errors
    /// As [`resolve`](Self::resolve).
    pub fn resolve_os(spec: Option<&OsStr>) -> Result<Self, SourceError> {
        let path = spec.unwrap_or(OsStr::new(BUILTIN));
        // Only a folder may have a name that is not UTF-8.
        let spec = &*path.to_string_lossy();
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
        let folder = Path::new(path);
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
        let hub = Hub::new(name, revision.as_deref())?;
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
            Files::Hub(hub) => hub.find(file, true)?,
            Files::Synthetic(spec) if file == "config.json" => return Ok(Some(spec.config_json())),
            Files::Synthetic(_) => {
                let text = TEXT_FILES.contains(&file).then(|| builtin::read(file));
                return Ok(text.flatten().map(<[u8]>::to_vec));
            }
        };
        path.map(read_small).transpose()
    }

    /// Like [`Source::read`] for a file the model cannot do without.
    ///
    /// # Errors
    /// If there is no such file, or it cannot be read.
    pub fn read_required(&self, file: &str) -> Result<Vec<u8>, SourceError> {
        self.read(file)?.ok_or_else(|| SourceError::MissingFile {
            folder: self.location().into(),
            file: file.into(),
        })
    }

    /// The checked config.json.
    ///
    /// # Errors
    /// As for reading it; fields that are missing or wrong.
    pub fn config(&self) -> Result<ModelConfig, SourceError> {
        ModelConfig::parse(&self.read_required("config.json")?).map_err(|source| {
            SourceError::Config {
                location: self.location(),
                source,
            }
        })
    }

    /// Opens the weights; from the hub they are fetched first, with a progress bar.
    ///
    /// # Errors
    /// Weights that are missing or damaged, or cannot be fetched.
    pub fn checkpoint(&self) -> Result<Checkpoint, SourceError> {
        self.open_checkpoint(true)?
            .ok_or_else(|| SourceError::MissingFile {
                folder: self.location().into(),
                file: "model.safetensors".into(),
            })
    }

    /// The weights if they are on this machine already: planning needs only the headers, and can
    /// do without them.
    ///
    /// # Errors
    /// Weights that are damaged.
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
            Files::Hub(hub) => hub.weights_folder(fetch)?,
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

    /// The folder that the files lie in, as far as they are on this machine.
    ///
    /// # Errors
    /// If the hub cannot say which commit is meant.
    pub fn folder(&self) -> Result<Option<PathBuf>, SourceError> {
        match &self.files {
            Files::Folder(folder) => Ok(Some(folder.clone())),
            Files::Hub(hub) => {
                let config = hub.find("config.json", true)?;
                Ok(config.and_then(|path| path.parent().map(Path::to_path_buf)))
            }
            Files::Builtin | Files::Synthetic(_) => Ok(None),
        }
    }

    /// How other files refer to this model, by its weights where they are at hand.
    ///
    /// # Errors
    /// As for [`config`](Source::config).
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

fn read_small(path: PathBuf) -> Result<Vec<u8>, SourceError> {
    match std::fs::read(&path) {
        Ok(bytes) if bytes.starts_with(LFS_POINTER) => Err(SourceError::LfsPointer { path }),
        Ok(bytes) => Ok(bytes),
        Err(source) => Err(SourceError::Io { path, source }),
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
