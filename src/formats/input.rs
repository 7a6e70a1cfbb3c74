//! Input files: `-` is standard input, and what can be read only once may be read again.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;

/// Opens a file, a pipe, or `-` for standard input.
///
/// # Errors
/// Whatever the system says.
pub fn open(path: &Path) -> io::Result<Box<dyn Read + Send>> {
    match path == OsStr::new("-") {
        true => Ok(Box::new(io::stdin())),
        false => Ok(Box::new(File::open(path)?)),
    }
}

/// All bytes of a file, a pipe, or `-` for standard input.
///
/// # Errors
/// Whatever the system says.
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(path)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// What came through a pipe, kept in a nameless temporary file for readers that start anew.
#[derive(Clone, Debug)]
pub struct Spooled {
    file: Arc<File>,
}

impl Spooled {
    /// Reads `path` to its end if it can be read only once; `None` for a regular file.
    ///
    /// # Errors
    /// Whatever the system says, of the input or the temporary folder.
    pub fn from_stream(path: &Path) -> io::Result<Option<Self>> {
        if path != OsStr::new("-") && std::fs::metadata(path)?.is_file() {
            return Ok(None);
        }
        let mut file = tempfile::tempfile()?;
        io::copy(&mut open(path)?, &mut file)?;
        let file = Arc::new(file);
        Ok(Some(Spooled { file }))
    }

    /// A reader at the beginning, beside any others.
    pub fn reader(&self) -> impl Read + Send + use<> {
        SpooledReader {
            file: self.file.clone(),
            position: 0,
        }
    }
}

struct SpooledReader {
    file: Arc<File>,
    position: u64,
}

impl Read for SpooledReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        #[cfg(unix)]
        let read = std::os::unix::fs::FileExt::read_at(&*self.file, buffer, self.position)?;
        #[cfg(windows)]
        let read = std::os::windows::fs::FileExt::seek_read(&*self.file, buffer, self.position)?;
        self.position += read as u64;
        Ok(read)
    }
}
