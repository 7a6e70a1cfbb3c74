//! The envelope of every JSON file this program writes, and reading one back with its checks.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::atomic::{self, Written};
use super::input;

/// What a file is, who made it, and for which model.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Document<T> {
    /// `moectl.profile`, `moectl.placement`, `moectl.run` or `moectl.hardware`
    pub schema: String,
    pub schema_version: u32,
    pub moectl_version: String,
    /// RFC 3339, UTC
    pub created: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelId>,
    #[serde(flatten)]
    pub body: T,
}

/// Which model a file speaks of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelId {
    /// As asked for: `tiny`, `org/name`, a folder
    pub id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// SHA-256 over the config and the sorted tensor names, shapes, dtypes; absent from a plan
    /// that was made from config.json alone
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<String>,
    pub config_sha256: String,
    /// The weights are random: speeds mean something, text and routing do not
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub synthetic: bool,
}

impl ModelId {
    /// Whether both speak of one model, by as much as both know of it.
    pub fn is_same_model(&self, other: &ModelId) -> bool {
        match (&self.fingerprint, &other.fingerprint) {
            (Some(mine), Some(theirs)) => mine == theirs,
            _ => self.config_sha256 == other.config_sha256,
        }
    }

    /// The first digits of what tells it from others.
    fn short(&self) -> &str {
        let hash = self.fingerprint.as_ref().unwrap_or(&self.config_sha256);
        hash.get(..12).unwrap_or(hash)
    }
}

/// Names a kind of file and the newest version of it this program reads and the one it writes.
#[derive(Clone, Copy, Debug)]
pub struct Schema {
    pub name: &'static str,
    pub version: u32,
}

pub const PROFILE: Schema = Schema {
    name: "moectl.profile",
    version: 1,
};
pub const PLACEMENT: Schema = Schema {
    name: "moectl.placement",
    version: 1,
};
pub const RUN: Schema = Schema {
    name: "moectl.run",
    version: 1,
};
/// What `profile` keeps of unfinished work.
pub const PROFILE_PROGRESS: Schema = Schema {
    name: "moectl.profile-progress",
    version: 1,
};
/// What is in the expert slots when a program ends.
pub const CACHE_STATE: Schema = Schema {
    name: "moectl.cache-state",
    version: 1,
};
pub const HARDWARE: Schema = Schema {
    name: "moectl.hardware",
    version: 1,
};

/// A JSON file that is not what it was taken for.
#[derive(Debug, Error)]
pub enum DocumentError {
    #[error("{}: {source}", path.display())]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{}: not a {schema} file: {reason}", path.display())]
    Json {
        path: PathBuf,
        schema: &'static str,
        reason: String,
    },
    #[error("{}: is a `{found}` file, expected `{expected}`", path.display())]
    Schema {
        path: PathBuf,
        found: String,
        expected: &'static str,
    },
    #[error(
        "{}: {schema} version {found}, this moectl reads up to {newest}; update moectl",
        path.display()
    )]
    Newer {
        path: PathBuf,
        schema: &'static str,
        found: u64,
        newest: u32,
    },
    #[error(
        "{}: made for model `{}` ({}…), this is `{}` ({}…); make it again for this model",
        path.display(), found.id, found.short(), expected.id, expected.short()
    )]
    OtherModel {
        path: PathBuf,
        found: Box<ModelId>,
        expected: Box<ModelId>,
    },
}

/// Source: reproducible-builds.org, SOURCE_DATE_EPOCH.
fn created() -> chrono::DateTime<chrono::Utc> {
    let epoch = std::env::var("SOURCE_DATE_EPOCH").ok();
    epoch
        .and_then(|seconds| chrono::DateTime::from_timestamp(seconds.trim().parse().ok()?, 0))
        .unwrap_or_else(chrono::Utc::now)
}

impl<T> Document<T> {
    /// What must stand above anything a person reads of it, if there is such a thing.
    pub fn label(&self) -> Option<&'static str> {
        let synthetic = self.model.as_ref().is_some_and(|model| model.synthetic);
        synthetic.then_some("SYNTHETIC WEIGHTS")
    }

    /// Wraps `body` with this program's version and the present time, or that of `SOURCE_DATE_EPOCH`,
    /// which makes files of the same work equal to the byte.
    pub fn new(schema: Schema, model: Option<ModelId>, body: T) -> Self {
        Document {
            schema: schema.name.into(),
            schema_version: schema.version,
            moectl_version: env!("CARGO_PKG_VERSION").into(),
            created: created().to_rfc3339_opts(chrono::SecondsFormat::Secs, true),
            model,
            body,
        }
    }

    /// Refuses a file that was made for another model than `expected`.
    ///
    /// # Errors
    /// [`DocumentError::OtherModel`], naming both.
    pub fn check_model(&self, path: &Path, expected: &ModelId) -> Result<(), DocumentError> {
        match &self.model {
            Some(found) if !found.is_same_model(expected) => Err(DocumentError::OtherModel {
                path: path.into(),
                found: Box::new(found.clone()),
                expected: Box::new(expected.clone()),
            }),
            _ => Ok(()),
        }
    }
}

impl<T: Serialize> Document<T> {
    /// Writes the file as [`atomic::write_with`] does.
    ///
    /// # Errors
    /// [`DocumentError::Io`], naming the path.
    pub fn write(&self, path: &Path) -> Result<Written, DocumentError> {
        atomic::write_json(path, self).map_err(|source| DocumentError::Io {
            path: path.into(),
            source,
        })
    }
}

impl<T: DeserializeOwned> Document<T> {
    /// Reads a file of the given kind, or `-`. Unknown fields are ignored, newer versions refused.
    ///
    /// # Errors
    /// Names the path and whether it is another kind of file, a newer one, or no JSON at all.
    pub fn read(path: &Path, schema: Schema) -> Result<Self, DocumentError> {
        let text = input::read(path).map_err(|source| DocumentError::Io {
            path: path.into(),
            source,
        })?;
        let wrong = |reason: String| DocumentError::Json {
            path: path.into(),
            schema: schema.name,
            reason,
        };
        let value: serde_json::Value =
            serde_json::from_slice(&text).map_err(|e| wrong(e.to_string()))?;
        match value.get("schema").and_then(|v| v.as_str()) {
            Some(found) if found == schema.name => {}
            found => {
                return Err(DocumentError::Schema {
                    path: path.into(),
                    found: found.unwrap_or("(none)").into(),
                    expected: schema.name,
                });
            }
        }
        let version = value.get("schema_version").and_then(|v| v.as_u64());
        let version = version.ok_or_else(|| wrong("no schema_version".into()))?;
        if version > u64::from(schema.version) {
            return Err(DocumentError::Newer {
                path: path.into(),
                schema: schema.name,
                found: version,
                newest: schema.version,
            });
        }
        serde_json::from_value(value).map_err(|e| wrong(e.to_string()))
    }
}
