//! Models on the Hugging Face hub and in its cache, as huggingface_hub finds them: the same variables,
//! the same folders, one commit for all files of a run.
//!
//! Source: huggingface_hub 0.36, `constants.py`, `utils/_auth.py`, `file_download.py`.

use std::env;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hf_hub::api::Progress;
use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};

use super::source::error::SourceError;
use crate::formats::{Checkpoint, checkpoint};

/// How long the hub may take to say which commit a branch is, unless `HF_HUB_ETAG_TIMEOUT` says
/// otherwise. A cache that has everything should not wait longer.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// A file of weights on the hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteFile {
    pub name: String,
    pub bytes: u64,
    /// Of those, the ones on this machine
    pub here_bytes: u64,
}

/// One model at one revision.
pub struct Hub {
    id: String,
    /// A branch, a tag or a commit
    revision: String,
    cache: Cache,
    /// `None` when `HF_HUB_OFFLINE` is set
    api: Option<Api>,
    token: Option<String>,
    /// Found with the first file
    commit: Mutex<Option<Arc<Commit>>>,
}

/// What every file of a run is taken from.
struct Commit {
    /// `None` if the hub does not say it
    hash: Option<String>,
    /// `None` if only the cache is at hand
    api: Option<ApiRepo>,
    /// Why only the cache is at hand
    reason: String,
}

impl Hub {
    /// A model by its name, `org/name`. Touches no network.
    ///
    /// # Errors
    /// If no client can be made.
    pub fn new(name: &str, revision: Option<&str>) -> Result<Self, SourceError> {
        let cache = Cache::new(cache_folder());
        let token = token();
        let offline = is_true("HF_HUB_OFFLINE") || is_true("TRANSFORMERS_OFFLINE");
        let api = if offline {
            None
        } else {
            let mut builder = ApiBuilder::from_cache(cache.clone()).with_token(token.clone());
            if let Some(endpoint) = variable("HF_ENDPOINT") {
                builder = builder.with_endpoint(endpoint.trim_end_matches('/').into());
            }
            let api = builder.build();
            Some(api.map_err(|error| hub_error(name, "(connection)", error))?)
        };
        Ok(Hub {
            id: name.into(),
            revision: revision.unwrap_or("main").into(),
            cache,
            api,
            token,
            commit: Mutex::new(None),
        })
    }

    /// The path of a file, fetched if it is not in the cache; `None` if the model has no such file,
    /// or, for an `optional` one, if there is none in the cache and nothing else is at hand.
    ///
    /// # Errors
    /// A file that cannot be fetched; a model that the hub does not have.
    pub fn find(&self, file: &str, optional: bool) -> Result<Option<PathBuf>, SourceError> {
        let commit = self.commit()?;
        if let Some(path) = self.cached_at(&commit, file) {
            return Ok(Some(path));
        }
        // Without config.json nothing of the model is here; other files may not exist at all.
        let optional = optional && file != "config.json";
        if optional && self.is_known_to_lack(&commit, file) {
            return Ok(None);
        }
        let Some(api) = &commit.api else {
            return match optional {
                true => Ok(None),
                false => Err(self.offline(&commit, file)),
            };
        };
        match api.download(file) {
            Ok(path) => Ok(Some(path)),
            // Every model has this one; without access to a model the hub answers 401 or 403.
            Err(error) if file == "config.json" && is_refusal(&error) => Err(self.not_on_hub()),
            Err(error) if optional && has_status(&error, 404) => {
                self.remember_to_lack(&commit, file);
                Ok(None)
            }
            Err(error) => Err(hub_error(&self.id, file, error)),
        }
    }

    /// The files of weights, the small index fetched to know them.
    ///
    /// # Errors
    /// If the hub cannot be asked.
    pub fn remote_files(&self) -> Result<Vec<RemoteFile>, SourceError> {
        let single = || vec![checkpoint::SINGLE.to_owned()];
        let names = match self.cached_at(&*self.commit()?, checkpoint::SINGLE) {
            Some(_) => single(),
            None => match self.find(checkpoint::INDEX, true)? {
                Some(index) => Checkpoint::shard_names(&index)?.into_iter().collect(),
                None => single(),
            },
        };
        let files = names.into_iter().map(|name| self.remote_file(name));
        files.collect()
    }

    fn remote_file(&self, name: String) -> Result<RemoteFile, SourceError> {
        let size = |path: &Path| std::fs::metadata(path).map_or(0, |found| found.len());
        let commit = self.commit()?;
        if let Some(path) = self.cached_at(&commit, &name) {
            let bytes = size(&path);
            return Ok(RemoteFile {
                name,
                bytes,
                here_bytes: bytes,
            });
        }
        let (Some(repo), Some(api)) = (&commit.api, &self.api) else {
            return Err(self.offline(&commit, &name));
        };
        let asked = api.metadata(&repo.url(&name));
        let found = asked.map_err(|error| hub_error(&self.id, &name, error))?;
        let blob = self.folder().join("blobs").join(found.etag());
        let bytes = found.size() as u64;
        Ok(RemoteFile {
            name,
            bytes,
            // What hf-hub keeps of a download that was interrupted.
            here_bytes: size(&blob.with_extension("part")).min(bytes),
        })
    }

    /// Fetches one file, or goes on where an earlier run was interrupted.
    ///
    /// # Errors
    /// If the hub cannot be asked, or the disk is full; what there is stays for the next run.
    pub fn fetch(&self, file: &str, progress: impl Progress) -> Result<PathBuf, SourceError> {
        let commit = self.commit()?;
        if let Some(path) = self.cached_at(&commit, file) {
            return Ok(path);
        }
        let Some(api) = &commit.api else {
            return Err(self.offline(&commit, file));
        };
        let fetched = api.download_with_progress(file, progress);
        fetched.map_err(|error| hub_error(&self.id, file, error))
    }

    /// Where the cache is.
    pub fn cache_folder(&self) -> PathBuf {
        self.cache.path().clone()
    }

    /// The folder that holds all weights; `None` if they are not here and not fetched.
    ///
    /// # Errors
    /// As [`find`](Self::find).
    pub fn weights_folder(&self, fetch: bool) -> Result<Option<PathBuf>, SourceError> {
        let get = |file: &str, optional| match fetch {
            true => self.find(file, optional),
            false => Ok(self.cached_at(&*self.commit()?, file)),
        };
        let first = match get(checkpoint::SINGLE, true)? {
            Some(single) => Some(single),
            None => match get(checkpoint::INDEX, true)? {
                Some(index) => {
                    for shard in Checkpoint::shard_names(&index)? {
                        if get(&shard, false)?.is_none() {
                            return Ok(None);
                        }
                    }
                    Some(index)
                }
                None => get(checkpoint::SINGLE, false)?,
            },
        };
        Ok(first.and_then(|path| path.parent().map(Path::to_path_buf)))
    }

    /// The commit that this run takes every file from: the branch's own where the hub says so, else
    /// the one that the cache has of it.
    fn commit(&self) -> Result<Arc<Commit>, SourceError> {
        let mut known = self.commit.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(commit) = &*known {
            return Ok(Arc::clone(commit));
        }
        let commit = Arc::new(self.find_commit()?);
        *known = Some(Arc::clone(&commit));
        Ok(commit)
    }

    fn find_commit(&self) -> Result<Commit, SourceError> {
        let cached = |reason: String| Commit {
            hash: self.cached_commit(),
            api: None,
            reason,
        };
        let Some(api) = &self.api else {
            return Ok(cached("HF_HUB_OFFLINE is set; unset it to fetch".into()));
        };
        let at = |hash: Option<String>| {
            let revision = hash.as_deref().unwrap_or(&self.revision);
            Commit {
                api: Some(api.repo(self.repo(revision))),
                hash,
                reason: String::new(),
            }
        };
        if is_commit(&self.revision) {
            return Ok(at(Some(self.revision.clone())));
        }
        match self.ask_for_commit(&api.repo(self.repo(&self.revision))) {
            Ok((_, Some(hash))) => {
                if self.cached_commit().as_ref() != Some(&hash) {
                    // The cache is a help, not a condition.
                    let _ = self.cache.repo(self.repo(&self.revision)).create_ref(&hash);
                }
                Ok(at(Some(hash)))
            }
            Ok((200..=399, None)) => Ok(at(None)),
            Ok((status, None)) => match self.cached_commit() {
                Some(_) => Ok(cached(format!("the hub answers {status}"))),
                None if [401, 403, 404].contains(&status) => Err(self.not_on_hub()),
                None => Err(self.unreachable(format!("http status: {status}"))),
            },
            Err(error) => match self.cached_commit() {
                Some(_) => Ok(cached(format!("the hub cannot be reached: {error}"))),
                None => Err(self.unreachable(error.to_string())),
            },
        }
    }

    /// Status and commit that the hub answers for config.json.
    fn ask_for_commit(&self, repo: &ApiRepo) -> Result<(u16, Option<String>), ureq::Error> {
        let seconds = variable("HF_HUB_ETAG_TIMEOUT").and_then(|seconds| seconds.parse().ok());
        let timeout = seconds
            .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
            .unwrap_or(ANSWER_WITHIN);
        let agent = ureq::Agent::config_builder()
            .timeout_global(Some(timeout))
            .max_redirects(0)
            .max_redirects_will_error(false)
            .http_status_as_error(false)
            .build()
            .new_agent();
        let mut request = agent.head(repo.url("config.json"));
        if let Some(token) = &self.token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let response = request.call()?;
        let hash = response.headers().get("x-repo-commit");
        let hash = hash.and_then(|hash| hash.to_str().ok()).map(str::to_owned);
        let status = response.status().as_u16();
        Ok((status, hash.filter(|hash| status < 400 && is_commit(hash))))
    }

    fn repo(&self, revision: &str) -> Repo {
        Repo::with_revision(self.id.clone(), RepoType::Model, revision.into())
    }

    /// The folder of the model in the cache.
    fn folder(&self) -> PathBuf {
        self.cache
            .path()
            .join(self.repo(&self.revision).folder_name())
    }

    /// The commit of the revision as the cache knows it.
    fn cached_commit(&self) -> Option<String> {
        let folder = self.folder();
        match std::fs::read_to_string(folder.join("refs").join(&self.revision)) {
            Ok(hash) => Some(hash.trim().to_owned()),
            Err(_) => {
                let snapshot = folder.join("snapshots").join(&self.revision);
                snapshot.is_dir().then(|| self.revision.clone())
            }
        }
    }

    fn cached_at(&self, commit: &Commit, file: &str) -> Option<PathBuf> {
        let hash = commit.hash.clone().or_else(|| self.cached_commit())?;
        let path = self.folder().join("snapshots").join(hash).join(file);
        path.exists().then_some(path)
    }

    /// Where huggingface_hub notes that a commit has no such file.
    fn no_exist(&self, commit: &Commit, file: &str) -> Option<PathBuf> {
        let hash = commit.hash.as_ref()?;
        Some(self.folder().join(".no_exist").join(hash).join(file))
    }

    fn is_known_to_lack(&self, commit: &Commit, file: &str) -> bool {
        self.no_exist(commit, file)
            .is_some_and(|path| path.exists())
    }

    fn remember_to_lack(&self, commit: &Commit, file: &str) {
        let Some(path) = self.no_exist(commit, file) else {
            return;
        };
        // Without the note the hub is asked again: no harm.
        if let Some(folder) = path.parent()
            && std::fs::create_dir_all(folder).is_ok()
        {
            let _ = std::fs::File::create(path);
        }
    }

    fn offline(&self, commit: &Commit, file: &str) -> SourceError {
        SourceError::Offline {
            id: self.id.clone(),
            file: file.into(),
            reason: commit.reason.clone(),
        }
    }

    fn not_on_hub(&self) -> SourceError {
        SourceError::NotOnHub {
            id: self.id.clone(),
            revision: self.revision.clone(),
        }
    }

    fn unreachable(&self, reason: String) -> SourceError {
        SourceError::Unreachable {
            id: self.id.clone(),
            reason,
        }
    }
}

/// `org/name` as the hub allows it.
pub fn is_hub_name(name: &str) -> bool {
    let parts: Vec<&str> = name.split('/').collect();
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    parts.len() == 2
        && parts
            .iter()
            .all(|p| !p.is_empty() && !p.starts_with('.') && p.chars().all(allowed))
}

fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|b| b.is_ascii_hexdigit())
}

/// A variable that is set to something.
fn variable(name: &str) -> Option<String> {
    let value = env::var(name).ok()?;
    let value = value.trim();
    (!value.is_empty()).then(|| value.to_owned())
}

/// What huggingface_hub takes for yes.
fn is_true(name: &str) -> bool {
    variable(name).is_some_and(|v| ["1", "ON", "YES", "TRUE"].contains(&v.to_uppercase().as_str()))
}

/// `HF_HOME`, else `huggingface` in the user's cache.
fn home() -> PathBuf {
    if let Some(home) = folder_variable("HF_HOME") {
        return home;
    }
    let cache = folder_variable("XDG_CACHE_HOME");
    let cache = cache.unwrap_or_else(|| expanded("~/.cache"));
    cache.join("huggingface")
}

/// The variables that name the cache, the one that counts most first: those of transformers, which it
/// heeds up to 4.57, then those of huggingface_hub.
const CACHE_VARIABLES: [&str; 5] = [
    "TRANSFORMERS_CACHE",
    "PYTORCH_TRANSFORMERS_CACHE",
    "PYTORCH_PRETRAINED_BERT_CACHE",
    "HF_HUB_CACHE",
    "HUGGINGFACE_HUB_CACHE",
];

fn cache_folder() -> PathBuf {
    let named = CACHE_VARIABLES.into_iter().find_map(folder_variable);
    named.unwrap_or_else(|| home().join("hub"))
}

/// The user's token: of the environment, else the one that `hf auth login` saved.
fn token() -> Option<String> {
    if is_true("HF_HUB_DISABLE_IMPLICIT_TOKEN") {
        return None;
    }
    // A mounted secret ends in a newline, which no header may hold.
    let clean = |token: String| {
        let token = token.replace(['\r', '\n'], "").trim().to_owned();
        (!token.is_empty()).then_some(token)
    };
    let saved = || {
        let path = folder_variable("HF_TOKEN_PATH").unwrap_or_else(|| home().join("token"));
        std::fs::read_to_string(path).ok()
    };
    variable("HF_TOKEN")
        .or_else(|| variable("HUGGING_FACE_HUB_TOKEN"))
        .and_then(clean)
        .or_else(|| saved().and_then(clean))
}

fn folder_variable(name: &str) -> Option<PathBuf> {
    let value = env::var_os(name).filter(|value| !value.is_empty())?;
    Some(match value.to_str() {
        Some(text) => expanded(text),
        None => value.into(),
    })
}

/// A path with a leading `~` as the user's home.
fn expanded(path: &str) -> PathBuf {
    match (path.strip_prefix('~'), env::home_dir()) {
        (Some(rest), Some(home)) if rest.is_empty() || rest.starts_with('/') => {
            home.join(rest.trim_start_matches('/'))
        }
        _ => path.into(),
    }
}

fn is_refusal(error: &ApiError) -> bool {
    [401, 403, 404]
        .iter()
        .any(|&status| has_status(error, status))
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
