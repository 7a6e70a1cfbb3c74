//! The header of a safetensors file, read into a compact table without copying a name.
//!
//! The `safetensors` crate keeps maps of owned names, which for a model of many small experts are
//! a sizeable part of the file, and its errors rarely say which of 450,000 tensors is at fault.

use std::fmt;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

use super::{Bytes, Dtype, FormatError};

/// Longest header that is parsed, as in the reference implementation.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Most dimensions a tensor may have.
pub const MAX_DIMS: usize = 4;

/// One tensor of a file; 40 bytes, since a large checkpoint has half a million of them.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// Where its name stands in the file: offset and length
    name: (u32, u32),
    shape: [u32; MAX_DIMS],
    /// Of its first byte in the file
    start: u64,
    pub shard: u16,
    pub dtype: Dtype,
    ndim: u8,
}

impl Entry {
    /// Its name, in the `file` it was read from.
    pub fn name<'a>(&self, file: &'a [u8]) -> &'a [u8] {
        &file[self.name.0 as usize..][..self.name.1 as usize]
    }

    pub fn shape(&self) -> impl ExactSizeIterator<Item = usize> {
        let shape = self.shape.into_iter().take(usize::from(self.ndim));
        shape.map(|d| d as usize)
    }

    /// First byte in the file and the one after the last.
    pub fn range(&self) -> std::ops::Range<usize> {
        let start = self.start as usize;
        let len = self.shape().product::<usize>() * self.dtype.size_bytes();
        start..start + len
    }
}

/// Reads and checks the header of `file`: every tensor lies in the file, and none overlaps another.
///
/// # Errors
/// Names `path`, and the tensor if it is one tensor's fault.
pub fn read(path: &Path, file: &Bytes, shard: u16) -> Result<Vec<Entry>, FormatError> {
    let invalid = |reason: String| FormatError::Safetensors {
        path: path.into(),
        reason,
    };
    let Some((length, rest)) = file.split_first_chunk() else {
        let reason = format!("{} bytes, too short to hold a header", file.len());
        return Err(invalid(reason));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES {
        return Err(invalid(format!(
            "header of {length} bytes, at most {MAX_HEADER_BYTES} allowed"
        )));
    }
    let length = length as usize;
    let Some((header, data)) = rest.split_at_checked(length) else {
        return Err(invalid(format!(
            "header of {length} bytes in a file of {}; truncated?",
            file.len()
        )));
    };
    let header = std::str::from_utf8(header)
        .map_err(|e| invalid(format!("header is not UTF-8 text: {e}")))?;

    let mut reader = Reader {
        header,
        shard,
        // Each tensor's description ends in one brace: room for all, in one piece.
        entries: Vec::with_capacity(header.bytes().filter(|b| *b == b'}').count()),
    };
    let mut json = serde_json::Deserializer::from_str(header);
    json.deserialize_map(&mut reader)
        .and_then(|()| json.end())
        .map_err(|e| invalid(format!("header: {e}")))?;
    let mut entries = reader.entries;
    check_cover(file, &mut entries, 8 + length, data.len()).map_err(invalid)?;
    Ok(entries)
}

/// The tensors must cover the data without overlap or gap: nothing hides in such a file.
fn check_cover(
    file: &[u8],
    entries: &mut [Entry],
    data_start: usize,
    data_len: usize,
) -> Result<(), String> {
    let name = |e: &Entry| String::from_utf8_lossy(e.name(file)).into_owned();
    entries.sort_unstable_by_key(|e| (e.start, e.range().end));
    let mut end = data_start;
    let mut previous: Option<&Entry> = None;
    for entry in &*entries {
        let range = entry.range();
        if range.start != end {
            let what = if range.start < end {
                "overlaps"
            } else {
                "leaves a gap after"
            };
            let neighbour = previous.map_or("the header".into(), |e| format!("`{}`", name(e)));
            return Err(format!(
                "tensor `{}` {what} {neighbour}: starts at byte {} of the data, expected {}",
                name(entry),
                range.start - data_start,
                end - data_start
            ));
        }
        end = range.end;
        previous = Some(entry);
    }
    let expected = end - data_start;
    if expected != data_len {
        return Err(format!(
            "{data_len} bytes of data, expected {expected}; {}",
            if data_len < expected {
                "truncated? download it again"
            } else {
                "the header does not account for the rest"
            }
        ));
    }
    Ok(())
}

struct Reader<'a> {
    header: &'a str,
    shard: u16,
    entries: Vec<Entry>,
}

#[derive(Deserialize)]
struct Description<'a> {
    dtype: &'a str,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

impl<'de> Visitor<'de> for &mut Reader<'de> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object of tensors by name")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        // A borrowed key: names with escaped characters, which no writer has reason for, fail here.
        while let Some(name) = map.next_key::<&'de str>()? {
            if name == "__metadata__" {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            let blame = |reason| serde::de::Error::custom(format!("tensor `{name}`: {reason}"));
            let found = map
                .next_value()
                .map_err(|e: A::Error| blame(e.to_string()))?;
            self.entries.push(self.entry(name, &found).map_err(blame)?);
        }
        Ok(())
    }
}

impl Reader<'_> {
    fn entry(&self, name: &str, found: &Description) -> Result<Entry, String> {
        let dtype = Dtype::parse(found.dtype).ok_or_else(|| {
            format!(
                "dtype {}, expected F32, F16, BF16, U8, I8, I32 or I64",
                found.dtype
            )
        })?;
        if found.shape.len() > MAX_DIMS {
            return Err(format!(
                "shape {:?}, expected at most {MAX_DIMS} dimensions",
                found.shape
            ));
        }
        let mut shape = [0; MAX_DIMS];
        for (to, &from) in shape.iter_mut().zip(&found.shape) {
            *to = u32::try_from(from)
                .map_err(|_| format!("shape {:?} is beyond any real tensor", found.shape))?;
        }
        let (start, end) = found.data_offsets;
        let bytes = found
            .shape
            .iter()
            .try_fold(dtype.size_bytes() as u64, |n, &d| n.checked_mul(d));
        // Far beyond any file, and far from overflow in the sums to come.
        if end > 1 << 60 || bytes.is_none() || end.checked_sub(start) != bytes {
            return Err(format!(
                "bytes {start} to {end} for shape {:?} of {}",
                found.shape,
                dtype.name()
            ));
        }
        // The name is borrowed from the header, which starts at byte 8 of the file.
        let at = 8 + name.as_ptr().addr() - self.header.as_ptr().addr();
        Ok(Entry {
            name: (at as u32, name.len() as u32),
            shape,
            start: 8 + self.header.len() as u64 + start,
            shard: self.shard,
            dtype,
            ndim: found.shape.len() as u8,
        })
    }
}
