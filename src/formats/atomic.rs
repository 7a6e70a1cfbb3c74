//! Output files: regular files appear whole or not at all, everything else is written in place.
//!
//! A path is where users of other programs expect it: `-` and `/dev/stdout` are standard output, a
//! symbolic link is written through to its target, devices and pipes are written as they are, and
//! missing folders are made.

use std::ffi::OsStr;
use std::fs::{self, File, Metadata};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

/// What a write did to its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    New,
    /// Over a file that was there
    Replaced,
    /// To standard output, a device or a pipe
    Streamed,
}

/// Writes `path`: a regular file by way of a temporary one beside it (written, synced, renamed),
/// anything else in place.
///
/// An interruption at any point leaves the old file, or none, never half a file. A file that is
/// replaced passes its permissions and, where the system allows it, its owner on.
///
/// # Errors
/// Whatever the file system says, without the name of the temporary file, which is removed.
pub fn write_with(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> io::Result<Written> {
    match Target::of(path)? {
        Target::Stream(stream) => {
            let mut out = BufWriter::new(stream.open()?);
            write(&mut out)?;
            out.flush()?;
            Ok(Written::Streamed)
        }
        Target::File { path, old } => {
            fs::create_dir_all(folder_of(&path))?;
            let temporary = temporary_beside(&path)?;
            let file = temporary.as_file();
            let mut out = BufWriter::with_capacity(1 << 20, file);
            write(&mut out)?;
            out.flush()?;
            drop(out);
            if let Some(old) = &old {
                pass_on_permissions(old, file)?;
            }
            file.sync_all()?;
            temporary.persist(&path).map_err(|e| e.error)?;
            sync_folder(&path);
            Ok(written(old))
        }
    }
}

/// [`write_with`] of bytes that are ready.
///
/// # Errors
/// As for [`write_with`].
pub fn write(path: &Path, bytes: &[u8]) -> io::Result<Written> {
    write_with(path, |out| out.write_all(bytes))
}

/// Pretty JSON with a final newline, written as by [`write_with`].
///
/// # Errors
/// As for [`write_with`].
pub fn write_json<T: serde::Serialize>(path: &Path, value: &T) -> io::Result<Written> {
    write_with(path, |out| {
        serde_json::to_writer_pretty(&mut *out, value)?;
        out.write_all(b"\n")
    })
}

/// Gives the finished file `from` the name `path`, as if [`write_with`] had written it there.
///
/// # Errors
/// Whatever the file system says; `from` stays.
pub fn take_place(from: &Path, path: &Path) -> io::Result<Written> {
    let copy = |out: &mut dyn Write| io::copy(&mut File::open(from)?, out).map(drop);
    let Target::File { path, old } = Target::of(path)? else {
        write_with(path, copy)?;
        fs::remove_file(from)?;
        return Ok(Written::Streamed);
    };
    let file = File::options().write(true).open(from)?;
    if let Some(old) = &old {
        pass_on_permissions(old, &file)?;
    }
    file.sync_all()?;
    match fs::rename(from, &path) {
        // A link may lead to another file system.
        Err(e) if e.kind() == io::ErrorKind::CrossesDevices => {
            write_with(&path, copy)?;
            fs::remove_file(from)?;
        }
        renamed => renamed?,
    }
    sync_folder(&path);
    Ok(written(old))
}

/// Finds out before hours of work whether `path` can be written at its end; makes nothing.
///
/// # Errors
/// If `path` is a folder or protected from writing, or the folder above that exists is not writable.
pub fn check_writable(path: &Path) -> io::Result<()> {
    let Target::File { path, .. } = Target::of(path)? else {
        return Ok(());
    };
    let mut folder = folder_of(&path);
    while let Err(error) = fs::metadata(folder) {
        match error.kind() {
            io::ErrorKind::NotFound => folder = folder_of(folder),
            _ => return Err(error),
        }
    }
    tempfile::tempfile_in(folder).map(drop).map_err(unnamed)
}

/// Whether `path` is standard output, a device or a pipe: what is written to it cannot be taken back
/// or read again.
pub fn is_stream(path: &Path) -> bool {
    matches!(Target::of(path), Ok(Target::Stream(_)))
}

/// Whether `path` is the standard output of this process.
pub fn is_stdout(path: &Path) -> bool {
    matches!(Target::of(path), Ok(Target::Stream(Stream::Descriptor(1))))
}

/// Opens what [`is_stream`] for writing.
///
/// # Errors
/// Whatever the system says; a pipe waits for its reader.
pub fn open_stream(path: &Path) -> io::Result<Box<dyn Write + Send>> {
    match Target::of(path)? {
        Target::Stream(stream) => stream.open(),
        Target::File { .. } => Err(io::Error::other("is a file, expected a device or a pipe")),
    }
}

/// Where a path leads.
enum Target {
    /// All symbolic links followed
    File {
        path: PathBuf,
        old: Option<Metadata>,
    },
    Stream(Stream),
}

enum Stream {
    /// A descriptor that this process was started with
    Descriptor(i32),
    /// A device, pipe or socket
    Special(PathBuf),
}

impl Target {
    fn of(path: &Path) -> io::Result<Self> {
        const MOST_LINKS: usize = 40; // as Linux
        if path == OsStr::new("-") {
            return Ok(Target::Stream(Stream::Descriptor(1)));
        }
        let mut path = path.to_owned();
        for _ in 0..MOST_LINKS {
            if let Some(descriptor) = descriptor(&path) {
                return Ok(Target::Stream(Stream::Descriptor(descriptor)));
            }
            let found = match fs::symlink_metadata(&path) {
                Ok(found) => found,
                Err(e) if e.kind() == io::ErrorKind::NotFound && !names_a_folder(&path) => {
                    return Ok(Target::File { path, old: None });
                }
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                Err(_) => return Err(is_a_folder()),
            };
            let kind = found.file_type();
            if kind.is_symlink() {
                path = folder_of(&path).join(fs::read_link(&path)?);
            } else if kind.is_dir() {
                return Err(is_a_folder());
            } else if kind.is_file() {
                // A rename would ask the folder alone: a protected file stays as it is.
                File::options().write(true).open(&path)?;
                let old = Some(found);
                return Ok(Target::File { path, old });
            } else {
                return Ok(Target::Stream(Stream::Special(path)));
            }
        }
        Err(io::Error::other(
            "too many symbolic links, expected a file name",
        ))
    }
}

impl Stream {
    fn open(&self) -> io::Result<Box<dyn Write + Send>> {
        match self {
            // By way of the standard library, so that it stays in order with what is printed.
            Stream::Descriptor(1) => Ok(Box::new(io::stdout())),
            Stream::Descriptor(2) => Ok(Box::new(io::stderr())),
            Stream::Descriptor(other) => duplicate(*other).map(|file| Box::new(file) as _),
            Stream::Special(path) => {
                let file = File::options().write(true).open(path)?;
                Ok(Box::new(file))
            }
        }
    }
}

/// The number in `/dev/fd/N` and what `/dev/stdout` leads to. Opening such a path anew would start
/// over at the beginning of a file that a shell appends to.
fn descriptor(path: &Path) -> Option<i32> {
    let (folder, name) = (path.parent()?, path.file_name()?.to_str()?);
    let folder = folder.to_str()?;
    let own = folder == "/dev/fd"
        || folder == "/proc/self/fd"
        || folder == format!("/proc/{}/fd", std::process::id());
    (cfg!(unix) && own).then(|| name.parse().ok()).flatten()
}

#[cfg(unix)]
fn duplicate(descriptor: i32) -> io::Result<File> {
    use std::os::fd::BorrowedFd;
    if descriptor < 0 {
        return Err(io::Error::other("is no descriptor"));
    }
    // SAFETY: only borrowed for the call, which refuses a number that is not open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(descriptor) };
    Ok(borrowed.try_clone_to_owned()?.into())
}

#[cfg(not(unix))]
fn duplicate(_: i32) -> io::Result<File> {
    Err(io::Error::other("this system has no descriptors"))
}

fn written(old: Option<Metadata>) -> Written {
    match old {
        Some(_) => Written::Replaced,
        None => Written::New,
    }
}

fn is_a_folder() -> io::Error {
    io::Error::new(
        io::ErrorKind::IsADirectory,
        "is a folder, expected a file name",
    )
}

/// Whether the path ends as those of folders do.
fn names_a_folder(path: &Path) -> bool {
    let bytes = path.as_os_str().as_encoded_bytes();
    bytes.is_empty() || bytes.ends_with(b"/") || bytes.ends_with(b"/.")
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

fn pass_on_permissions(old: &Metadata, file: &File) -> io::Result<()> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::{MetadataExt, fchown};
        // Only root may give files away; others own what they replace, or could not.
        let _ = fchown(file, Some(old.uid()), Some(old.gid()));
    }
    file.set_permissions(old.permissions())
}

/// The rename itself survives a power cut only once the folder is on disk; not every file system can
/// sync a folder, and the data is already safe.
fn sync_folder(path: &Path) {
    let _ = File::open(folder_of(path)).and_then(|folder| folder.sync_all());
}

fn temporary_beside(path: &Path) -> io::Result<NamedTempFile> {
    let builder = tempfile::Builder::new();
    // 0666 less the umask, as for any file a program creates; tempfile's own default is 0600.
    #[cfg(unix)]
    let builder = {
        use std::os::unix::fs::PermissionsExt;
        let mut builder = builder;
        builder.permissions(std::fs::Permissions::from_mode(0o666));
        builder
    };
    let mut builder = builder;
    builder
        .prefix(".moectl-")
        .suffix(".tmp")
        .tempfile_in(folder_of(path))
        .map_err(unnamed)
}

/// The error without the name of a temporary file, which means nothing to a user.
fn unnamed(error: io::Error) -> io::Error {
    match error.get_ref() {
        Some(_) => error.kind().into(),
        None => error,
    }
}
