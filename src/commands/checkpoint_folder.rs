//! Writing a checkpoint folder: sharded, computed by all cores, whole or not there at all.

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::mpsc;

use anyhow::{Context, Result, anyhow, bail, ensure};
use rayon::prelude::*;
use serde::Serialize;
use serde_json::{Map, json};
use tempfile::TempDir;

use crate::formats::checkpoint::{INDEX, SINGLE};
use crate::formats::writer::{Planned, Writer};
use crate::formats::{Bytes, FormatError, atomic};

/// Tensors that are computed together and go to one file.
pub trait Job: Sync {
    /// The tensors, and name and greatest length of the one whose length depends on the work.
    fn planned(&self) -> (Vec<Planned>, Option<(String, usize)>);

    /// Names and bytes of all of them.
    fn tensors(&self) -> Result<Vec<(String, Bytes)>, FormatError>;
}

/// A checkpoint folder under construction beside the place it will take.
pub struct CheckpointFolder {
    temporary: TempDir,
    dst: PathBuf,
}

/// What was written.
pub struct Written {
    /// Of all tensors
    pub bytes: u64,
    pub files: usize,
}

impl CheckpointFolder {
    /// Finds out whether `dst` can be written, and starts.
    ///
    /// # Errors
    /// A `dst` that holds files, or a place for it that is not writable.
    pub fn create(dst: &Path) -> Result<Self> {
        check_vacant(dst)?;
        let parent = match dst.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let temporary = fs::create_dir_all(parent)
            .and_then(|()| temporary_folder(parent))
            // The name of the temporary folder means nothing to a user.
            .map_err(|e| anyhow!("{}: cannot be created: {}", dst.display(), e.kind()))?;
        Ok(CheckpointFolder {
            temporary,
            dst: dst.into(),
        })
    }

    /// Where the files are for now.
    pub fn path(&self) -> &Path {
        self.temporary.path()
    }

    /// Carries out all jobs and writes their tensors and, for several files, the index.
    ///
    /// Holds a few jobs' tensors at a time, one for each thread.
    ///
    /// - `done`: told of each job; `Break` stops the work
    ///
    /// # Errors
    /// A job's, a stop asked for by `done`, or whatever the file system says.
    pub fn write<J: Job>(
        &self,
        jobs: Vec<J>,
        max_shard_bytes: u64,
        done: &mut dyn FnMut(&J) -> ControlFlow<()>,
    ) -> Result<Written> {
        let shards = split(jobs, max_shard_bytes);
        let mut bytes = 0;
        let mut index = Map::new();
        for (i, shard) in shards.iter().enumerate() {
            let file = match shards.len() {
                1 => SINGLE.to_string(),
                n => format!("model-{:05}-of-{n:05}.safetensors", i + 1),
            };
            bytes += self.write_shard(&file, shard, done)?;
            for job in shard {
                let (planned, late) = job.planned();
                let names = planned.into_iter().map(|t| t.name).chain(late.map(|l| l.0));
                index.extend(names.map(|name| (name, json!(file))));
            }
        }
        if shards.len() > 1 {
            index.sort_keys();
            let index = json!({
                "metadata": {"total_size": bytes},
                "weight_map": index,
            });
            self.write_json(INDEX, &index)?;
        }
        let files = shards.len();
        Ok(Written { bytes, files })
    }

    /// Computes the tensors of one file on all cores and writes each as it comes.
    fn write_shard<J: Job>(
        &self,
        file: &str,
        jobs: &[J],
        done: &mut dyn FnMut(&J) -> ControlFlow<()>,
    ) -> Result<u64> {
        let mut planned = Vec::new();
        let mut late = BTreeMap::new();
        for job in jobs {
            let (tensors, state) = job.planned();
            planned.extend(tensors);
            late.extend(state);
        }
        let cannot_write = || self.dst.join(file).display().to_string();
        let mut writer =
            Writer::create(&self.path().join(file), planned, late).with_context(cannot_write)?;
        // A full channel holds the workers back, so finished tensors do not pile up.
        let (sender, receiver) = mpsc::sync_channel(1);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                // A closed channel means that the other side gave up; the reason is reported there.
                let _ = jobs
                    .par_iter()
                    .try_for_each_with(sender, |sender, job| sender.send((job, job.tensors())));
            });
            for (job, tensors) in receiver {
                for (name, data) in tensors? {
                    writer.write(&name, &data).with_context(cannot_write)?;
                }
                if done(job).is_break() {
                    bail!("interrupted; nothing was written");
                }
            }
            Ok(())
        })?;
        writer.finish().with_context(cannot_write)
    }

    /// Writes a small file beside the tensors.
    ///
    /// # Errors
    /// Whatever the file system says, of the place that the file will have.
    pub fn write_file(&self, name: &str, bytes: &[u8]) -> Result<()> {
        atomic::write(&self.path().join(name), bytes)
            .with_context(|| self.dst.join(name).display().to_string())?;
        Ok(())
    }

    /// As [`CheckpointFolder::write_file`], of JSON.
    ///
    /// # Errors
    /// As for [`CheckpointFolder::write_file`].
    pub fn write_json(&self, name: &str, value: &impl Serialize) -> Result<()> {
        atomic::write_json(&self.path().join(name), value)
            .with_context(|| self.dst.join(name).display().to_string())?;
        Ok(())
    }

    /// Gives the folder its name.
    ///
    /// # Errors
    /// If something took its place meanwhile.
    pub fn finish(self) -> Result<()> {
        let dst = &self.dst;
        if dst.exists() {
            fs::remove_dir(dst).with_context(|| dst.display().to_string())?;
        }
        fs::rename(self.temporary.path(), dst)
            .with_context(|| format!("{}: cannot be created", dst.display()))?;
        // It has another name now: nothing is left to remove.
        let _ = self.temporary.keep();
        Ok(())
    }
}

/// Cuts the jobs into files of at most the greatest size; a job's tensors stay together.
fn split<J: Job>(jobs: Vec<J>, max_shard_bytes: u64) -> Vec<Vec<J>> {
    let mut shards = vec![Vec::new()];
    let mut filled = 0;
    for job in jobs {
        let (planned, late) = job.planned();
        let bytes = planned.iter().map(Planned::len_bytes).sum::<u64>()
            + late.map_or(0, |(_, longest)| longest as u64);
        if filled > 0 && filled + bytes > max_shard_bytes {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        shards.last_mut().expect("starts with one").push(job);
    }
    shards
}

fn check_vacant(dst: &Path) -> Result<()> {
    match fs::read_dir(dst) {
        Ok(mut entries) => ensure!(
            entries.next().is_none(),
            "{}: holds files already; choose another folder or empty it",
            dst.display()
        ),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(e).with_context(|| dst.display().to_string()),
    }
    Ok(())
}

fn temporary_folder(parent: &Path) -> std::io::Result<TempDir> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".moectl-").suffix(".tmp");
    // 0777 less the umask, as for any folder a program creates; tempfile's own default is 0700.
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(fs::Permissions::from_mode(0o777));
    }
    builder.tempdir_in(parent)
}
