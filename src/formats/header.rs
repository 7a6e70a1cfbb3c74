//! The header of a safetensors file, read into a compact table without copying a name.
//!
//! The `safetensors` crate keeps maps of owned names, which for a model of many small experts are
//! a sizeable part of the file, and its errors rarely say which of 450,000 tensors is at fault.

use std::borrow::Cow;
use std::fmt;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

use super::{Bytes, Dtype, FormatError};

/// Longest header that is parsed, as in the reference implementation.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Dimensions that are told apart: an image patch embedding has five, no weight that is read more
/// than three. What lies beyond is multiplied into the last.
pub const MAX_DIMS: usize = 5;

/// One tensor of a file; 56 bytes, since a large checkpoint has half a million of them.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    name: NamePlace,
    shape: [u32; MAX_DIMS],
    /// Of its first byte in the file
    start: u64,
    pub shard: u16,
    pub dtype: Dtype,
    ndim: u8,
}

/// Where a tensor's name stands: offset and length.
#[derive(Clone, Copy, Debug)]
enum NamePlace {
    /// In the file
    Header(u32, u32),
    /// Among the names of the file that are written with JSON escapes
    Escaped(u32, u32),
}

/// A file of tensors, as far as their names need it.
#[derive(Clone, Debug)]
pub struct Shard {
    pub data: Bytes,
    /// The names that the header writes with escapes, unescaped, one after the other
    escaped_names: String,
}

impl Entry {
    /// Its name, in the `shard` it was read from.
    pub fn name<'a>(&self, shard: &'a Shard) -> &'a str {
        let (bytes, at, len): (&[u8], _, _) = match self.name {
            NamePlace::Header(at, len) => (&shard.data, at, len),
            NamePlace::Escaped(at, len) => (shard.escaped_names.as_bytes(), at, len),
        };
        std::str::from_utf8(&bytes[at as usize..][..len as usize])
            .expect("part of a header that was UTF-8 when it was read")
    }

    pub fn shape(&self) -> impl ExactSizeIterator<Item = usize> {
        let shape = self.shape.into_iter().take(usize::from(self.ndim));
        shape.map(|d| d as usize)
    }

    /// First byte in the file and the one after the last.
    pub fn range(&self) -> std::ops::Range<usize> {
        let start = self.start as usize;
        let elements: u64 = self.shape().map(|d| d as u64).product();
        start..start + (elements * self.dtype.bits() / 8) as usize
    }
}

/// Reads and checks the header of `file`: every tensor lies in the file, and none overlaps another.
///
/// # Errors
/// Names `path`, and the tensor if it is one tensor's fault.
pub fn read(path: &Path, file: &Bytes, shard: u16) -> Result<(Shard, Vec<Entry>), FormatError> {
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
        escaped_names: String::new(),
        // Each tensor's description ends in one brace: room for all, in one piece.
        entries: Vec::with_capacity(header.bytes().filter(|b| *b == b'}').count()),
    };
    let mut json = serde_json::Deserializer::from_str(header);
    json.deserialize_map(&mut reader)
        .and_then(|()| json.end())
        .map_err(|e| invalid(format!("header: {e}")))?;
    let Reader {
        mut entries,
        escaped_names,
        ..
    } = reader;
    let data_len = data.len();
    let shard = Shard {
        data: file.clone(),
        escaped_names,
    };
    keep_the_last_of_each_name(&shard, &mut entries);
    check_cover(&shard, &mut entries, 8 + length, data_len).map_err(invalid)?;
    Ok((shard, entries))
}

/// Of equal keys the last counts, in Python's JSON and in the reference implementation.
fn keep_the_last_of_each_name(shard: &Shard, entries: &mut Vec<Entry>) {
    // By indices: a stable sort of the entries would take half their memory again.
    let mut order: Vec<u32> = (0..entries.len() as u32).collect();
    let name = |i: u32| entries[i as usize].name(shard);
    order.sort_unstable_by(|&a, &b| name(a).cmp(name(b)).then(a.cmp(&b)));
    let mut earlier: Vec<u32> = (order.windows(2))
        .filter(|pair| name(pair[0]) == name(pair[1]))
        .map(|pair| pair[0])
        .collect();
    earlier.sort_unstable();
    let mut i = 0;
    entries.retain(|_| {
        i += 1;
        earlier.binary_search(&(i - 1)).is_err()
    });
}

/// The tensors must cover the data without overlap or gap: nothing hides in such a file.
fn check_cover(
    shard: &Shard,
    entries: &mut [Entry],
    data_start: usize,
    data_len: usize,
) -> Result<(), String> {
    let name = |e: &Entry| e.name(shard).to_owned();
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
    escaped_names: String,
    entries: Vec<Entry>,
}

/// A string of the header: a part of it, or a copy where it is written with escapes.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

#[derive(Deserialize)]
struct Description<'a> {
    #[serde(borrow)]
    dtype: Cow<'a, str>,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

impl<'de> Visitor<'de> for &mut Reader<'de> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object of tensors by name")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(Text(name)) = map.next_key()? {
            if name == "__metadata__" {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            let blame = |reason| serde::de::Error::custom(format!("tensor `{name}`: {reason}"));
            let found = map
                .next_value()
                .map_err(|e: A::Error| blame(e.to_string()))?;
            let place = self.place(&name);
            let entry = self.entry(place, &found).map_err(blame)?;
            self.entries.push(entry);
        }
        Ok(())
    }
}

impl Reader<'_> {
    /// Where `name` can be read later: in the header that it was borrowed from, or among the names
    /// that are kept because they were written with escapes.
    fn place(&mut self, name: &str) -> NamePlace {
        if self
            .header
            .as_bytes()
            .as_ptr_range()
            .contains(&name.as_ptr())
        {
            // The header starts at byte 8 of the file.
            let at = 8 + name.as_ptr().addr() - self.header.as_ptr().addr();
            return NamePlace::Header(at as u32, name.len() as u32);
        }
        let at = self.escaped_names.len();
        self.escaped_names.push_str(name);
        NamePlace::Escaped(at as u32, name.len() as u32)
    }

    fn entry(&self, name: NamePlace, found: &Description) -> Result<Entry, String> {
        let dtype = Dtype::parse(&found.dtype)
            .ok_or_else(|| format!("dtype {}, which safetensors does not have", found.dtype))?;
        let (start, end) = found.data_offsets;
        let bits = found
            .shape
            .iter()
            .try_fold(dtype.bits(), |n, &d| n.checked_mul(d));
        let bytes = bits.filter(|n| n % 8 == 0).map(|n| n / 8);
        let mut shape = [0; MAX_DIMS];
        let last = found.shape.len().min(MAX_DIMS).saturating_sub(1);
        let beyond = found.shape.iter().skip(last);
        let beyond = beyond.fold(1u64, |n, &d| n.saturating_mul(d));
        let dims = found.shape.iter().take(last).copied();
        let dims = dims.chain((!found.shape.is_empty()).then_some(beyond));
        for (to, from) in shape.iter_mut().zip(dims) {
            *to = u32::try_from(from)
                .map_err(|_| format!("shape {:?} is beyond any real tensor", found.shape))?;
        }
        // Far beyond any file, and far from overflow in the sums to come.
        if end > 1 << 60 || bytes.is_none() || end.checked_sub(start) != bytes {
            return Err(format!(
                "bytes {start} to {end} for shape {:?} of {}",
                found.shape,
                dtype.name()
            ));
        }
        Ok(Entry {
            name,
            shape,
            start: 8 + self.header.len() as u64 + start,
            shard: self.shard,
            dtype,
            ndim: found.shape.len().min(MAX_DIMS) as u8,
        })
    }
}
