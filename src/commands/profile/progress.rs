//! What is done of a profile, kept on disk, so that hours of work survive whatever ends them.
//!
//! `profile.json.partial` holds the counts after some record, replaced whole or not at all; the
//! trace grows in `NAME.partial` and is cut back to that record on resuming. Both become the real
//! files, or go, when the last record is done.

use std::fs::File;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use serde::{Deserialize, Serialize};

use crate::commands::console::Console;
use crate::formats::document::PROFILE_PROGRESS;
use crate::formats::{Document, ModelId, atomic};
use crate::planning::profile::ProfileBody;

/// Where a trace goes.
pub trait TraceSink: Write {
    /// Written so far.
    fn bytes(&mut self) -> io::Result<u64>;
}

impl TraceSink for Vec<u8> {
    fn bytes(&mut self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }
}

impl<T: TraceSink + ?Sized> TraceSink for &mut T {
    fn bytes(&mut self) -> io::Result<u64> {
        (**self).bytes()
    }
}

/// A trace under construction, or on its way to whoever reads it.
pub struct PartialTrace {
    out: BufWriter<Box<dyn Write>>,
    bytes: u64,
}

impl Write for PartialTrace {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

impl TraceSink for PartialTrace {
    fn bytes(&mut self) -> io::Result<u64> {
        // In the hands of the system, where a crash of ours does not reach it.
        self.out.flush()?;
        Ok(self.bytes)
    }
}

/// What the counts depend on; another value of any of it makes them useless.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// SHA-256 of each corpus, in order.
    pub corpora: Vec<String>,
    pub ctx_tokens: usize,
    pub generated_tokens: usize,
    /// Index from 1, and count.
    pub shard: [usize; 2],
    pub trace: bool,
    pub backend: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct ProgressBody {
    identity: Identity,
    done: Done,
}

/// Everything up to some record.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Done {
    /// Of all corpora in order, other shards' included.
    pub records: usize,
    pub trace_bytes: u64,
    pub profile: ProfileBody,
}

/// The unfinished work beside an output file.
pub struct Progress {
    path: PathBuf,
    model: ModelId,
    identity: Identity,
    every: Duration,
    saved: Instant,
    trace: Option<PathBuf>,
    /// From an earlier run.
    start: Option<Done>,
    /// After the last whole record of this one.
    done: Option<Done>,
    /// Whether a file holds anything worth keeping.
    on_disk: bool,
    /// Whether profile and trace are files: what went through a pipe cannot be gone on from.
    resumable: bool,
}

impl Progress {
    /// Finds what an earlier run of the same command left beside `output`.
    ///
    /// # Errors
    /// If there is such a file that cannot be read, or is newer than this program.
    pub fn open(
        output: &Path,
        model: &ModelId,
        identity: Identity,
        every: Duration,
        console: &Console,
    ) -> anyhow::Result<Self> {
        let path = partial(output);
        let mut progress = Progress {
            path,
            model: model.clone(),
            identity,
            every,
            saved: Instant::now(),
            trace: None,
            start: None,
            done: None,
            on_disk: false,
            resumable: !atomic::is_stream(output),
        };
        if progress.resumable && progress.path.exists() {
            progress.read(console)?;
        }
        Ok(progress)
    }

    fn read(&mut self, console: &Console) -> anyhow::Result<()> {
        let context = || format!("{}: remove it to start over", self.path.display());
        let found =
            Document::<ProgressBody>::read(&self.path, PROFILE_PROGRESS).with_context(context)?;
        found.body.done.profile.check().with_context(context)?;
        let same_model = found
            .model
            .as_ref()
            .is_some_and(|model| model.is_same_model(&self.model));
        if same_model && found.body.identity == self.identity {
            console.note(format!(
                "{}: going on after {} records",
                self.path.display(),
                found.body.done.records
            ));
            self.start = Some(found.body.done);
            self.on_disk = true;
        } else {
            console.note(format!(
                "note: {}: of another model, corpus or flags; starting over",
                self.path.display()
            ));
        }
        Ok(())
    }

    /// The trace to write to: cut back to the last record that counts, or new; a device or a pipe
    /// itself.
    ///
    /// # Errors
    /// If a file cannot be read or written.
    pub fn open_trace(&mut self, path: &Path) -> anyhow::Result<PartialTrace> {
        if atomic::is_stream(path) {
            self.resumable = false;
            self.start = None;
            let stream = atomic::open_stream(path).with_context(|| path.display().to_string())?;
            return Ok(PartialTrace {
                out: BufWriter::new(stream),
                bytes: 0,
            });
        }
        let partial = partial(path);
        let context = || partial.display().to_string();
        let length = std::fs::metadata(&partial).map_or(0, |m| m.len());
        let keep = match &self.start {
            Some(start) if length >= start.trace_bytes => start.trace_bytes,
            // Someone removed it: the counts without the trace are only half of what is asked for.
            _ => {
                self.start = None;
                0
            }
        };
        make_folder(&partial)?;
        let mut file = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&partial)
            .with_context(context)?;
        file.set_len(keep).with_context(context)?;
        file.seek(SeekFrom::End(0)).with_context(context)?;
        self.trace = Some(partial);
        Ok(PartialTrace {
            out: BufWriter::with_capacity(1 << 18, Box::new(file)),
            bytes: keep,
        })
    }

    /// What an earlier run did; once.
    pub fn take_start(&mut self) -> Option<Done> {
        self.done.clone_from(&self.start);
        self.start.take()
    }

    /// Notes a record as done, and saves all if it is time.
    ///
    /// # Errors
    /// If a file cannot be read or written.
    pub fn record_done(
        &mut self,
        records: usize,
        counts: &ProfileBody,
        trace_bytes: u64,
    ) -> anyhow::Result<()> {
        self.done = Some(Done {
            records,
            trace_bytes,
            profile: counts.clone(),
        });
        if self.saved.elapsed() >= self.every {
            self.save()?;
        }
        Ok(())
    }

    /// Puts what is done on disk; false if there is nothing yet.
    ///
    /// # Errors
    /// If a file cannot be read or written.
    pub fn save(&mut self) -> anyhow::Result<bool> {
        let Some(done) = self.done.as_ref().filter(|_| self.resumable) else {
            return Ok(self.on_disk);
        };
        if let Some(trace) = &self.trace {
            // The counts must never speak of bytes that a power cut can still take.
            let file = File::options().write(true).open(trace)?;
            file.sync_data()
                .with_context(|| trace.display().to_string())?;
        }
        let body = ProgressBody {
            identity: self.identity.clone(),
            done: done.clone(),
        };
        Document::new(PROFILE_PROGRESS, Some(self.model.clone()), body).write(&self.path)?;
        self.saved = Instant::now();
        self.on_disk = true;
        Ok(true)
    }

    /// The profile is written: the trace takes its name, and the rest goes.
    ///
    /// # Errors
    /// If a file cannot be read or written.
    pub fn finish(mut self, trace: Option<&Path>) -> anyhow::Result<()> {
        if let (Some(partial), Some(path)) = (self.trace.take(), trace) {
            atomic::take_place(&partial, path).with_context(|| path.display().to_string())?;
        }
        if self.path.exists() {
            std::fs::remove_file(&self.path).with_context(|| self.path.display().to_string())?;
        }
        Ok(())
    }
}

impl Drop for Progress {
    /// A trace without counts is of no use to anyone.
    fn drop(&mut self) {
        if let (Some(trace), false) = (&self.trace, self.on_disk) {
            let _ = std::fs::remove_file(trace);
        }
    }
}

/// Makes the folders above a file.
fn make_folder(path: &Path) -> anyhow::Result<()> {
    let folder = path.parent().unwrap_or(Path::new(""));
    std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())
}

fn partial(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".partial");
    name.into()
}
