//! safetensors checkpoints: one file or sharded with an index, mapped, never read as a whole.
//!
//! What stays in memory is a compact table of 40 bytes per tensor; names stay in the mapped headers.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::Path;

use memmap2::Mmap;
use sha2::{Digest, Sha256};

use super::header::{self, Entry};
use super::matrix::DenseMatrix;
use super::nf4::{Absmax, BLOCKSIZE, NESTED_BLOCKSIZE, Nf4Matrix, QuantState, STATE_SUFFIX};
use super::{Bytes, Dtype, FormatError, Matrix};

/// Name of the file that maps tensors to shards.
pub const INDEX: &str = "model.safetensors.index.json";
/// Name of the only file of an unsharded checkpoint.
pub const SINGLE: &str = "model.safetensors";
const STATE_PREFIX: &str = ".quant_state.";

/// An opened checkpoint: every tensor by name, bytes left on disk.
#[derive(Debug)]
pub struct Checkpoint {
    location: String,
    shards: Vec<Bytes>,
    /// Sorted by name.
    entries: Vec<Entry>,
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

    /// The float tensor `name` of that shape, widened to f32.
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
        if let Some(json) = self.get(&format!("{name}{STATE_SUFFIX}")) {
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
            let reason = format!("`{name}.absmax` is there, `{name}{STATE_SUFFIX}` is not");
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
            let shape: Vec<usize> = e.shape().collect();
            hash.update(format!("\n{} {} {shape:?}", self.name(e), e.dtype.name()));
        }
        format!("{:x}", hash.finalize())
    }

    fn name(&self, e: &Entry) -> &str {
        let name = e.name(&self.shards[usize::from(e.shard)]);
        std::str::from_utf8(name).expect("part of a header that was UTF-8 when it was mapped")
    }

    fn find(&self, name: &str) -> Option<&Entry> {
        let at = self
            .entries
            .binary_search_by(|e| self.name(e).cmp(name))
            .ok()?;
        Some(&self.entries[at])
    }

    fn view(&self, e: &Entry) -> Tensor {
        Tensor {
            dtype: e.dtype,
            shape: e.shape().collect(),
            data: self.shards[usize::from(e.shard)].slice(e.range()),
        }
    }

    fn missing(&self, name: &str) -> FormatError {
        FormatError::Missing {
            name: name.into(),
            location: self.location.clone(),
        }
    }
}

struct Builder {
    location: String,
    shards: Vec<Bytes>,
    entries: Vec<Entry>,
}

impl Builder {
    fn new(location: String) -> Self {
        Builder {
            location,
            shards: Vec::new(),
            entries: Vec::new(),
        }
    }

    fn add(&mut self, path: &Path, bytes: Bytes) -> Result<(), FormatError> {
        let shard = u16::try_from(self.shards.len()).map_err(|_| FormatError::Safetensors {
            path: path.into(),
            reason: "shard 65536, at most 65535 allowed".into(),
        })?;
        let mut entries = header::read(path, &bytes, shard)?;
        if self.entries.is_empty() {
            self.entries = entries;
        } else {
            self.entries.append(&mut entries);
        }
        self.shards.push(bytes);
        Ok(())
    }

    fn finish(self) -> Result<Checkpoint, FormatError> {
        let Builder {
            location,
            shards,
            mut entries,
        } = self;
        let name = |e: &Entry| e.name(&shards[usize::from(e.shard)]);
        entries.sort_unstable_by(|a, b| name(a).cmp(name(b)));
        if let Some(pair) = entries.windows(2).find(|p| name(&p[0]) == name(&p[1])) {
            let reason = format!(
                "tensor `{}` is there twice",
                String::from_utf8_lossy(name(&pair[0]))
            );
            return Err(FormatError::Index {
                path: location.into(),
                reason,
            });
        }
        Ok(Checkpoint {
            location,
            shards,
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
    Ok(Bytes::of_file(map))
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
