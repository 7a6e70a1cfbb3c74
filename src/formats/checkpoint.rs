//! safetensors checkpoints: one file or sharded with an index, mapped, never read as a whole.
//!
//! The headers are parsed by the `safetensors` crate, which checks lengths, offsets and overlaps.
//! What stays in memory is a compact table: 40 bytes per tensor and its name.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::Path;

use memmap2::Mmap;
use safetensors::SafeTensors;
use sha2::{Digest, Sha256};

use super::matrix::DenseMatrix;
use super::nf4::{Absmax, BLOCKSIZE, NESTED_BLOCKSIZE, Nf4Matrix, QuantState};
use super::{Bytes, Dtype, FormatError, Matrix};

/// Name of the file that maps tensors to shards.
const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
const NF4_STATE: &str = ".quant_state.bitsandbytes__nf4";
const STATE_PREFIX: &str = ".quant_state.";

/// An opened checkpoint: every tensor by name, bytes left on disk.
#[derive(Debug)]
pub struct Checkpoint {
    location: String,
    shards: Vec<Bytes>,
    /// All names, sorted, end to end.
    names: String,
    /// Sorted by name.
    entries: Vec<Entry>,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    name: (u32, u32),
    shard: u16,
    dtype: Dtype,
    ndim: u8,
    shape: [u32; 4],
    start: u64,
}

/// One tensor: a view into the mapped file.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub data: Bytes,
}

impl Checkpoint {
    /// Maps `model.safetensors`, or every shard that `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// Names the file and what is wrong with it: missing, truncated, overlapping tensors, a shard
    /// that is not there, a tensor the index promises and no shard holds.
    pub fn open(dir: &Path) -> Result<Self, FormatError> {
        let index = dir.join(INDEX);
        let single = dir.join(SINGLE);
        if index.is_file() {
            let promised = read_index(&index)?;
            let files: BTreeSet<&String> = promised.values().collect();
            let mut builder = Builder::new(dir.display().to_string());
            for file in files {
                let path = dir.join(file);
                if !path.is_file() {
                    let reason = format!("shard `{file}` is missing; download it again");
                    return Err(FormatError::Index {
                        path: index,
                        reason,
                    });
                }
                builder.add(&path, map(&path)?)?;
            }
            let checkpoint = builder.finish()?;
            if let Some((name, file)) = promised.iter().find(|(n, _)| !checkpoint.contains(n)) {
                let reason = format!("tensor `{name}` should be in `{file}` and is not");
                return Err(FormatError::Index {
                    path: index,
                    reason,
                });
            }
            Ok(checkpoint)
        } else if single.is_file() {
            let mut builder = Builder::new(single.display().to_string());
            builder.add(&single, map(&single)?)?;
            builder.finish()
        } else {
            let reason = format!("holds neither {SINGLE} nor {INDEX}; expected a model folder");
            Err(FormatError::Index {
                path: dir.into(),
                reason,
            })
        }
    }

    /// A checkpoint that is already in memory; `location` names it in errors.
    pub fn from_bytes(location: &str, bytes: Bytes) -> Result<Self, FormatError> {
        let mut builder = Builder::new(location.into());
        builder.add(Path::new(location), bytes)?;
        builder.finish()
    }

    /// The files that a shard index names, without opening them.
    ///
    /// # Errors
    /// If the index cannot be read or names anything but plain files beside it.
    pub fn shard_names(index: &Path) -> Result<BTreeSet<String>, FormatError> {
        Ok(read_index(index)?.into_values().collect())
    }

    /// Where it came from, as errors name it.
    pub fn location(&self) -> &str {
        &self.location
    }

    /// Tensor names in ascending order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().map(|e| self.name(e))
    }

    pub fn contains(&self, name: &str) -> bool {
        self.find(name).is_some()
    }

    /// The tensor of that name, if there is one.
    pub fn get(&self, name: &str) -> Option<Tensor> {
        self.find(name).map(|e| self.view(e))
    }

    /// The tensor of that name.
    ///
    /// # Errors
    /// [`FormatError::Missing`].
    pub fn tensor(&self, name: &str) -> Result<Tensor, FormatError> {
        self.get(name).ok_or_else(|| self.missing(name))
    }

    /// A float tensor of that shape, widened to f32.
    ///
    /// # Errors
    /// Missing, not a float type, or of another shape.
    pub fn vector(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, FormatError> {
        let tensor = self.tensor(name)?;
        check_float(name, tensor.dtype)?;
        check_shape(name, &tensor.shape, shape)?;
        let mut out = vec![0.0; tensor.shape.iter().product()];
        tensor.dtype.widen(&tensor.data, &mut out);
        Ok(out)
    }

    /// The weight `name` of shape `[rows, cols]`, quantised or not: the file decides.
    ///
    /// # Errors
    /// Missing, of another shape or dtype, or with a damaged quantisation state.
    pub fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix, FormatError> {
        self.part(name, &[rows, cols], 0, rows, cols)
    }

    /// Rows `row..row + rows` of expert `expert` in a fused weight `[experts, all_rows, cols]`.
    pub fn fused_expert(
        &self,
        name: &str,
        shape: [usize; 3],
        expert: usize,
        row: usize,
        rows: usize,
    ) -> Result<Matrix, FormatError> {
        let [experts, all_rows, cols] = shape;
        assert!(expert < experts && row + rows <= all_rows);
        self.part(name, &shape, (expert * all_rows + row) * cols, rows, cols)
    }

    fn part(
        &self,
        name: &str,
        shape: &[usize],
        first: usize,
        rows: usize,
        cols: usize,
    ) -> Result<Matrix, FormatError> {
        let tensor = self.tensor(name)?;
        if let Some(state) = self.quant_state(name)? {
            check_shape(name, &state.shape, shape)?;
            return self
                .nf4_part(name, &tensor, &state, first, rows, cols)
                .map(Matrix::Nf4);
        }
        check_float(name, tensor.dtype)?;
        check_shape(name, &tensor.shape, shape)?;
        let width = tensor.dtype.size_bytes();
        let data = tensor
            .data
            .slice(first * width..(first + rows * cols) * width);
        Ok(Matrix::Dense(DenseMatrix {
            data,
            dtype: tensor.dtype,
            rows,
            cols,
        }))
    }

    /// The quantisation state of weight `name`; `None` for a plain tensor.
    ///
    /// # Errors
    /// A state of another kind than nf4, a damaged one, or one that is missing where the codes
    /// show that there should be one.
    pub fn quant_state(&self, name: &str) -> Result<Option<QuantState>, FormatError> {
        if let Some(json) = self.get(&format!("{name}{NF4_STATE}")) {
            return QuantState::parse(name, &json.data).map(Some);
        }
        let prefix = format!("{name}{STATE_PREFIX}");
        let at = self
            .entries
            .partition_point(|e| self.name(e) < prefix.as_str());
        if let Some(other) = self.entries.get(at).map(|e| self.name(e))
            && let Some(kind) = other.strip_prefix(&prefix)
        {
            return Err(FormatError::QuantType {
                name: name.into(),
                found: kind.into(),
            });
        }
        if self.contains(&format!("{name}.absmax")) {
            let reason = format!("`{name}.absmax` is there, `{name}{NF4_STATE}` is not");
            return Err(FormatError::QuantState {
                name: name.into(),
                reason,
            });
        }
        Ok(None)
    }

    fn nf4_part(
        &self,
        name: &str,
        packed: &Tensor,
        state: &QuantState,
        first: usize,
        rows: usize,
        cols: usize,
    ) -> Result<Nf4Matrix, FormatError> {
        let n: usize = state.shape.iter().product();
        // quant_storage may call the same bytes bf16, f16 or f32.
        if packed.data.len() < n.div_ceil(2) || packed.data.len() > n.div_ceil(2) + 3 {
            let reason = format!(
                "{} bytes of codes, expected {} for shape {:?}",
                packed.data.len(),
                n.div_ceil(2),
                state.shape
            );
            return Err(FormatError::QuantState {
                name: name.into(),
                reason,
            });
        }
        let blocks = n.div_ceil(BLOCKSIZE);
        let side = |suffix: &str, dtype, len| {
            let side = format!("{name}.{suffix}");
            let tensor = self.tensor(&side)?;
            check_dtype(&side, tensor.dtype, dtype)?;
            check_shape(&side, &tensor.shape, &[len])?;
            Ok::<_, FormatError>(tensor.data)
        };
        let absmax = match &state.nested {
            None => Absmax::Plain(side("absmax", Dtype::F32, blocks)?),
            Some(nested) => Absmax::Nested {
                codes: side("absmax", Dtype::U8, blocks)?,
                nested_absmax: side(
                    "nested_absmax",
                    Dtype::F32,
                    blocks.div_ceil(NESTED_BLOCKSIZE),
                )?,
                quant_map: side("nested_quant_map", Dtype::F32, 256)?,
                offset: nested.nested_offset as f32,
            },
        };
        Ok(Nf4Matrix {
            packed: packed.data.clone(),
            absmax,
            first,
            rows,
            cols,
        })
    }

    /// SHA-256 over `config` and every tensor's name, dtype and shape, in name order: the same
    /// model in another sharding has the same fingerprint.
    pub fn fingerprint(&self, config: &[u8]) -> String {
        let mut hash = Sha256::new();
        hash.update(config);
        for e in &self.entries {
            let shape = &e.shape[..usize::from(e.ndim)];
            hash.update(format!("\n{} {} {shape:?}", self.name(e), e.dtype.name()));
        }
        format!("{:x}", hash.finalize())
    }

    fn name(&self, e: &Entry) -> &str {
        &self.names[e.name.0 as usize..e.name.1 as usize]
    }

    fn find(&self, name: &str) -> Option<&Entry> {
        let at = self
            .entries
            .binary_search_by(|e| self.name(e).cmp(name))
            .ok()?;
        Some(&self.entries[at])
    }

    fn view(&self, e: &Entry) -> Tensor {
        let shape: Vec<usize> = e.shape[..usize::from(e.ndim)]
            .iter()
            .map(|&d| d as usize)
            .collect();
        let start = e.start as usize;
        let len = shape.iter().product::<usize>() * e.dtype.size_bytes();
        let data = self.shards[usize::from(e.shard)].slice(start..start + len);
        Tensor {
            dtype: e.dtype,
            shape,
            data,
        }
    }

    fn missing(&self, name: &str) -> FormatError {
        FormatError::Missing {
            name: name.into(),
            location: self.location.clone(),
            hint: String::new(),
        }
    }
}

struct Builder {
    location: String,
    shards: Vec<Bytes>,
    tensors: Vec<(String, Entry)>,
}

impl Builder {
    fn new(location: String) -> Self {
        Builder {
            location,
            shards: Vec::new(),
            tensors: Vec::new(),
        }
    }

    fn add(&mut self, path: &Path, bytes: Bytes) -> Result<(), FormatError> {
        let invalid = |reason: String| FormatError::Safetensors {
            path: path.into(),
            reason,
        };
        let (header_len, metadata) =
            SafeTensors::read_metadata(&bytes).map_err(|e| invalid(describe(&e, &bytes)))?;
        let shard =
            u16::try_from(self.shards.len()).map_err(|_| invalid("too many shards".into()))?;
        for (name, info) in metadata.tensors() {
            let dtype = dtype_of(info.dtype).ok_or_else(|| FormatError::Dtype {
                name: name.clone(),
                found: format!("{:?}", info.dtype),
                expected: "F32, F16, BF16, U8, I8, I32 or I64".into(),
            })?;
            let mut shape = [0u32; 4];
            if info.shape.len() > 4 || info.shape.iter().any(|&d| u32::try_from(d).is_err()) {
                return Err(invalid(format!(
                    "tensor `{name}` has shape {:?}",
                    info.shape
                )));
            }
            for (to, &from) in shape.iter_mut().zip(&info.shape) {
                *to = from as u32;
            }
            let entry = Entry {
                name: (0, 0),
                shard,
                dtype,
                ndim: info.shape.len() as u8,
                shape,
                start: (8 + header_len + info.data_offsets.0) as u64,
            };
            self.tensors.push((name, entry));
        }
        self.shards.push(bytes);
        Ok(())
    }

    fn finish(mut self) -> Result<Checkpoint, FormatError> {
        self.tensors.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        if let Some(pair) = self.tensors.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            let reason = format!("tensor `{}` is in two shards", pair[0].0);
            return Err(FormatError::Index {
                path: self.location.into(),
                reason,
            });
        }
        let mut names = String::with_capacity(self.tensors.iter().map(|(n, _)| n.len()).sum());
        let mut entries = Vec::with_capacity(self.tensors.len());
        for (name, mut entry) in self.tensors {
            let start = names.len() as u32;
            names.push_str(&name);
            entry.name = (start, names.len() as u32);
            entries.push(entry);
        }
        Ok(Checkpoint {
            location: self.location,
            shards: self.shards,
            names,
            entries,
        })
    }
}

fn map(path: &Path) -> Result<Bytes, FormatError> {
    let io = |source| FormatError::Io {
        path: path.into(),
        source,
    };
    let file = File::open(path).map_err(io)?;
    // SAFETY: a mapped file that another program truncates faults on access. Checkpoints are
    // written once and never changed in place, and every loader of safetensors relies on that.
    let map = unsafe { Mmap::map(&file) }.map_err(io)?;
    Ok(Bytes::from(map))
}

fn read_index(path: &Path) -> Result<BTreeMap<String, String>, FormatError> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let text = std::fs::read(path).map_err(|source| FormatError::Io {
        path: path.into(),
        source,
    })?;
    let invalid = |reason: String| FormatError::Index {
        path: path.into(),
        reason,
    };
    let index: Index =
        serde_json::from_slice(&text).map_err(|e| invalid(format!("not a shard index: {e}")))?;
    if index.weight_map.is_empty() {
        return Err(invalid("names no tensors".into()));
    }
    // A shard is a file beside the index: nothing else may be opened on a checkpoint's word.
    if let Some(file) = index.weight_map.values().find(|f| !is_plain_file_name(f)) {
        return Err(invalid(format!("shard `{file}` is not a plain file name")));
    }
    Ok(index.weight_map)
}

fn is_plain_file_name(name: &str) -> bool {
    Path::new(name).file_name().is_some_and(|file| file == name)
}

/// The crate's error, with the numbers a user needs to see.
fn describe(error: &safetensors::SafeTensorError, bytes: &[u8]) -> String {
    use safetensors::SafeTensorError as E;
    let claimed = bytes.first_chunk().map(|b| u64::from_le_bytes(*b));
    match (error, claimed) {
        (E::HeaderTooSmall, _) | (_, None) => {
            format!("{} bytes, too short to hold a header", bytes.len())
        }
        (E::HeaderTooLarge, Some(n)) => format!("header of {n} bytes, at most 100,000,000 allowed"),
        (E::InvalidHeaderLength, Some(n)) => {
            format!(
                "header of {n} bytes in a file of {}; truncated?",
                bytes.len()
            )
        }
        (E::MetadataIncompleteBuffer, Some(n)) => format!(
            "tensors end elsewhere than the file: {} bytes after a header of {n}; truncated?",
            (bytes.len() as u64).saturating_sub(8 + n)
        ),
        (E::InvalidOffset(name), _) => {
            format!("tensor `{name}` overlaps its neighbour or leaves a gap")
        }
        (other, _) => other.to_string(),
    }
}

fn dtype_of(dtype: safetensors::Dtype) -> Option<Dtype> {
    Some(match dtype {
        safetensors::Dtype::F32 => Dtype::F32,
        safetensors::Dtype::F16 => Dtype::F16,
        safetensors::Dtype::BF16 => Dtype::Bf16,
        safetensors::Dtype::U8 => Dtype::U8,
        safetensors::Dtype::I8 => Dtype::I8,
        safetensors::Dtype::I32 => Dtype::I32,
        safetensors::Dtype::I64 => Dtype::I64,
        _ => return None,
    })
}

fn check_float(name: &str, found: Dtype) -> Result<(), FormatError> {
    if found.is_float() {
        return Ok(());
    }
    Err(FormatError::Dtype {
        name: name.into(),
        found: found.name().into(),
        expected: "BF16, F16 or F32".into(),
    })
}

fn check_dtype(name: &str, found: Dtype, expected: Dtype) -> Result<(), FormatError> {
    if found == expected {
        return Ok(());
    }
    Err(FormatError::Dtype {
        name: name.into(),
        found: found.name().into(),
        expected: expected.name().into(),
    })
}

fn check_shape(name: &str, found: &[usize], expected: &[usize]) -> Result<(), FormatError> {
    if found == expected {
        return Ok(());
    }
    Err(FormatError::Shape {
        name: name.into(),
        found: found.to_vec(),
        expected: expected.to_vec(),
    })
}
