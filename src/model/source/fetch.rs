//! Fetching a model on purpose: what there is to fetch, file by file.

use std::path::PathBuf;

use hf_hub::api::Progress;

use super::{Files, Source, SourceError};
use crate::model::hub::RemoteFile;

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
        hub.remote_files().map(Some)
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
        hub.fetch(file, Told { progress, seen: 0 })
    }

    /// The folder that fetched files go to.
    pub fn cache_folder(&self) -> Option<PathBuf> {
        match &self.files {
            Files::Hub(hub) => Some(hub.cache_folder()),
            _ => None,
        }
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
