//! Fetching a model on purpose: what there is to fetch, file by file.

use std::path::{Path, PathBuf};

use hf_hub::api::Progress;

use super::{Files, Hub, Source, SourceError, hub_error};
use crate::formats::Checkpoint;

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";

/// A file of weights on the hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteFile {
    pub name: String,
    pub bytes: u64,
    /// Of those, the ones on this machine
    pub here_bytes: u64,
}

impl Source {
    /// The files of weights of a model on the hub, the small index fetched to know them; `None` for a
    /// model that is not from there.
    ///
    /// # Errors
    /// If the hub cannot be asked.
    pub fn remote_files(&self) -> Result<Option<Vec<RemoteFile>>, SourceError> {
        let Files::Hub(hub) = &self.files else {
            return Ok(None);
        };
        let names = match hub.find(&self.id, INDEX, true)? {
            Some(index) => Checkpoint::shard_names(&index)?.into_iter().collect(),
            None => vec![SINGLE.to_owned()],
        };
        let files = names
            .into_iter()
            .map(|name| hub.remote_file(&self.id, name));
        files.collect::<Result<_, _>>().map(Some)
    }

    /// Fetches one file, or goes on where an earlier run was interrupted.
    ///
    /// - `progress`: told of bytes that are there, those of an earlier run first
    ///
    /// # Errors
    /// If the hub cannot be asked, or the disk is full; what there is stays for the next run.
    pub fn fetch(&self, file: &str, progress: &mut dyn FnMut(u64)) -> Result<PathBuf, SourceError> {
        let Files::Hub(hub) = &self.files else {
            let folder = self.location().into();
            let file = file.into();
            return Err(SourceError::MissingFile { folder, file });
        };
        if let Some(path) = hub.cached(file) {
            return Ok(path);
        }
        let api = hub.online(&self.id, file)?;
        api.download_with_progress(file, Told { progress, seen: 0 })
            .map_err(|error| hub_error(&self.id, file, error))
    }

    /// The folder that fetched files go to.
    pub fn cache_folder(&self) -> Option<PathBuf> {
        match &self.files {
            Files::Hub(hub) => Some(hub.cache.path().clone()),
            _ => None,
        }
    }
}

impl Hub {
    fn online(&self, id: &str, file: &str) -> Result<&hf_hub::api::sync::ApiRepo, SourceError> {
        self.api.as_ref().ok_or_else(|| SourceError::Offline {
            id: id.into(),
            file: file.into(),
        })
    }

    fn remote_file(&self, id: &str, name: String) -> Result<RemoteFile, SourceError> {
        let size = |path: &Path| std::fs::metadata(path).map_or(0, |found| found.len());
        if let Some(path) = self.cached(&name) {
            let bytes = size(&path);
            return Ok(RemoteFile {
                name,
                bytes,
                here_bytes: bytes,
            });
        }
        let (api, sizes) = (self.online(id, &name)?, self.sizes.as_ref());
        let asked = sizes.expect("it is online").metadata(&api.url(&name));
        let found = asked.map_err(|error| hub_error(id, &name, error))?;
        let blob = self.cache.repo(self.repo.clone()).blob_path(found.etag());
        let bytes = found.size() as u64;
        Ok(RemoteFile {
            name,
            bytes,
            // What hf-hub keeps of a download that was interrupted.
            here_bytes: size(&blob.with_extension("part")).min(bytes),
        })
    }
}

/// Passes on what the hub's client tells.
struct Told<'a> {
    progress: &'a mut dyn FnMut(u64),
    seen: u64,
}

impl Progress for Told<'_> {
    /// Called again at each attempt, which tells anew what is there.
    fn init(&mut self, _: usize, _: &str) {
        self.seen = 0;
    }

    fn update(&mut self, bytes: usize) {
        self.seen += bytes as u64;
        (self.progress)(self.seen);
    }

    fn finish(&mut self) {}
}
