//! Writing a safetensors file whose tensors are computed one after the other, in any order.
//!
//! Shapes are known before the work, so every tensor has its place and is written when it is
//! ready. A few small tensors (the JSON states) get their length from the work: they are kept and
//! come last, and the header is written in the room left for the longest they can be.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::path::Path;

use serde_json::{Map, Value, json};

use super::lazy::Lazy;
use super::{Bytes, Dtype};

/// A tensor to be written.
#[derive(Clone, Debug)]
pub struct Planned {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
}

impl Planned {
    pub fn len_bytes(&self) -> u64 {
        self.shape.iter().map(|&d| d as u64).product::<u64>() * self.dtype.size_bytes() as u64
    }
}

/// A file under construction: create it, [`Writer::write`] every tensor once, [`Writer::finish`].
pub struct Writer {
    file: File,
    /// In file order
    planned: Vec<Planned>,
    /// Offset in the data and length of each planned tensor not written yet
    waiting: BTreeMap<String, (u64, usize)>,
    /// Longest that each tensor of unknown length may become
    late: BTreeMap<String, usize>,
    /// Those that arrived
    arrived: BTreeMap<String, Vec<u8>>,
    header_len: u64,
    data_len: u64,
}

impl Writer {
    /// Starts a file at `path`, which is of no use to a reader before [`Writer::finish`].
    ///
    /// - `late`: names of U8 tensors whose length is not known, and the longest they may become
    ///
    /// # Errors
    /// Whatever the file system says.
    pub fn create(
        path: &Path,
        mut planned: Vec<Planned>,
        late: BTreeMap<String, usize>,
    ) -> io::Result<Self> {
        // Wide types first: all data stays aligned, as readers that view it in place like it.
        planned.sort_by(|a, b| {
            let key = |t: &Planned| std::cmp::Reverse(t.dtype.size_bytes());
            key(a).cmp(&key(b)).then_with(|| a.name.cmp(&b.name))
        });
        let mut waiting = BTreeMap::new();
        let mut data_len = 0;
        for tensor in &planned {
            let len = tensor.len_bytes();
            waiting.insert(tensor.name.clone(), (data_len, len as usize));
            data_len += len;
        }
        let longest = header(&planned, late.iter().map(|(name, len)| (name, *len)));
        Ok(Writer {
            file: File::create_new(path)?,
            planned,
            waiting,
            late,
            arrived: BTreeMap::new(),
            header_len: longest.len().next_multiple_of(8) as u64,
            data_len,
        })
    }

    /// Writes one tensor to its place.
    ///
    /// # Errors
    /// Whatever the file system says.
    pub fn write(&mut self, name: &str, data: &[u8]) -> io::Result<()> {
        if let Some(longest) = self.late.remove(name) {
            assert!(data.len() <= longest, "`{name}` is longer than planned");
            self.arrived.insert(name.into(), data.to_vec());
            return Ok(());
        }
        let planned = self.waiting.remove(name);
        let (offset, len) = planned.unwrap_or_else(|| panic!("`{name}` is not awaited"));
        assert_eq!(data.len(), len, "length of `{name}`");
        self.file
            .seek(SeekFrom::Start(8 + self.header_len + offset))?;
        self.file.write_all(data)
    }

    /// Writes what was kept and the header, syncs the file; returns the bytes of its tensors.
    ///
    /// # Errors
    /// Whatever the file system says.
    pub fn finish(mut self) -> io::Result<u64> {
        assert!(
            self.waiting.is_empty() && self.late.is_empty(),
            "tensors are missing"
        );
        let late: Vec<u8> = self.arrived.values().flatten().copied().collect();
        self.file
            .seek(SeekFrom::Start(8 + self.header_len + self.data_len))?;
        self.file.write_all(&late)?;

        let lengths = self.arrived.iter().map(|(name, data)| (name, data.len()));
        let mut header = header(&self.planned, lengths).into_bytes();
        assert!(header.len() as u64 <= self.header_len);
        header.resize(self.header_len as usize, b' ');
        self.file.rewind()?;
        self.file.write_all(&self.header_len.to_le_bytes())?;
        self.file.write_all(&header)?;
        self.file.sync_all()?;
        Ok(self.data_len + late.len() as u64)
    }
}

/// A whole safetensors file in memory of its own, each tensor filled when it is first read.
///
/// - `planned`: in file order, the wide types first
/// - `fill`: given the number of a tensor and its bytes; gives the same ones each time
///
/// # Errors
/// If the system has no room for it.
pub fn in_memory(
    planned: &[&Planned],
    fill: impl Fn(usize, &mut [u8]) + Send + Sync + 'static,
) -> io::Result<Bytes> {
    let mut header = header(planned.iter().copied(), std::iter::empty()).into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.append(&mut header);
    let mut end = file.len();
    let ranges = planned.iter().map(|tensor| {
        let start = end;
        end += tensor.len_bytes() as usize;
        start..end
    });
    let ranges = ranges.collect();
    Ok(Lazy::new(&file, ranges, Box::new(fill))?.into())
}

fn header<'a>(
    planned: impl IntoIterator<Item = &'a Planned>,
    late: impl Iterator<Item = (&'a String, usize)>,
) -> String {
    let mut header = Map::new();
    // transformers refuses a file that does not say so.
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut start = 0;
    let mut insert = |name: &str, dtype: Dtype, shape: &[usize], len: u64| {
        let tensor = json!({
            "dtype": dtype.name(),
            "shape": shape,
            "data_offsets": [start, start + len],
        });
        start += len;
        header.insert(name.into(), tensor);
    };
    for tensor in planned {
        insert(
            &tensor.name,
            tensor.dtype,
            &tensor.shape,
            tensor.len_bytes(),
        );
    }
    for (name, len) in late {
        insert(name, Dtype::U8, &[len], len as u64);
    }
    Value::Object(header).to_string()
}
