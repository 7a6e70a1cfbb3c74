//! safetensors checkpoints: one file or sharded with an index, mapped, never read as a whole.
//!
//! What stays in memory is a compact table of 40 bytes per tensor; names stay in the mapped headers.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use memmap2::Mmap;
use sha2::{Digest, Sha256};

use super::header::{self, Entry, Shard};
use super::matrix::DenseMatrix;
use super::nf4::{Absmax, NESTED_BLOCKSIZE, Nf4Matrix, QuantState, STATE_SUFFIX};
use super::{Bytes, Dtype, FormatError, Matrix, json};

/// Name of the file that maps tensors to shards.
pub const INDEX: &str = "model.safetensors.index.json";
/// Name of the only file of an unsharded checkpoint.
pub const SINGLE: &str = "model.safetensors";
/// How a file begins that stands for one kept elsewhere by git-lfs.
pub const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";
const STATE_PREFIX: &str = ".quant_state.";

/// An opened checkpoint: every tensor by name, bytes left on disk.
#[derive(Debug)]
pub struct Checkpoint {
    location: String,
    shards: Vec<Shard>,
    /// Sorted by name.
    entries: Vec<Entry>,
    /// Of each entry, whether somebody looked at its bytes
    viewed: Vec<AtomicBool>,
    /// What the index promises and no shard holds: tensor to shard. Harmless until it is asked for:
    /// an index may be of a checkpoint from which this one was made.
    absent: BTreeMap<String, String>,
}

/// One tensor: a view into the mapped file.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub data: Bytes,
}

impl Checkpoint {
    /// Maps `model.safetensors`, or else every shard that `model.safetensors.index.json` names.
    ///
    /// As in transformers the single file comes first: an index beside it is of an older save.
    /// Where several shards hold a tensor, the last shard in name order counts.
    ///
    /// # Errors
    /// Names the file and what is wrong with it: missing, truncated, overlapping tensors, a shard
    /// that is not there.
    pub fn open(dir: &Path) -> Result<Self, FormatError> {
        let index = dir.join(INDEX);
        let single = dir.join(SINGLE);
        if single.is_file() {
            let mut builder = Builder::new(single.display().to_string());
            builder.add(&single, map(&single)?)?;
            Ok(builder.finish())
        } else if index.is_file() {
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
            let mut checkpoint = builder.finish();
            let mut absent = promised;
            absent.retain(|name, _| !checkpoint.contains(name));
            checkpoint.absent = absent;
            Ok(checkpoint)
        } else {
            let reason = format!("holds neither {SINGLE} nor {INDEX}; expected a model folder");
            Err(FormatError::Index {
                path: dir.into(),
                reason,
            })
        }
    }

    /// A checkpoint that is already in memory; `location` names it in errors.
    ///
    /// # Errors
    /// A header that is damaged.
    pub fn from_bytes(location: &str, bytes: Bytes) -> Result<Self, FormatError> {
        let mut builder = Builder::new(location.into());
        builder.add(Path::new(location), bytes)?;
        Ok(builder.finish())
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
        self.find(name).map(|at| self.view(at))
    }

    /// Every tensor, and whether it was taken out so far: what a model was made of, and what nobody
    /// asked for. Of each its name, dtype, shape and bytes in the file.
    pub fn inventory(&self) -> impl Iterator<Item = (&str, Dtype, Vec<usize>, u64, bool)> {
        self.entries.iter().zip(&self.viewed).map(|(e, viewed)| {
            let bytes = e.range().len() as u64;
            let viewed = viewed.load(Ordering::Relaxed);
            (self.name(e), e.dtype, e.shape().collect(), bytes, viewed)
        })
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
    ///
    /// # Errors
    /// As for [`matrix`](Checkpoint::matrix).
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
        let blocks = n.div_ceil(state.blocksize);
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
        let blocksize = state.blocksize;
        Ok(Nf4Matrix {
            packed: packed.data.clone(),
            absmax,
            blocksize,
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
        e.name(&self.shards[usize::from(e.shard)])
    }

    fn find(&self, name: &str) -> Option<usize> {
        let found = (self.entries).binary_search_by(|e| self.name(e).cmp(name));
        found.ok()
    }

    fn view(&self, at: usize) -> Tensor {
        let e = &self.entries[at];
        self.viewed[at].store(true, Ordering::Relaxed);
        Tensor {
            dtype: e.dtype,
            shape: e.shape().collect(),
            data: self.shards[usize::from(e.shard)].data.slice(e.range()),
        }
    }

    fn missing(&self, name: &str) -> FormatError {
        match self.absent.get(name) {
            Some(shard) => FormatError::Promised {
                name: name.into(),
                location: self.location.clone(),
                shard: shard.clone(),
            },
            None => FormatError::Missing {
                name: name.into(),
                location: self.location.clone(),
            },
        }
    }
}

struct Builder {
    location: String,
    shards: Vec<Shard>,
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
        let (shard, mut entries) = header::read(path, &bytes, shard)?;
        if self.entries.is_empty() {
            self.entries = entries;
        } else {
            self.entries.append(&mut entries);
        }
        self.shards.push(shard);
        Ok(())
    }

    fn finish(self) -> Checkpoint {
        let Builder {
            location,
            shards,
            mut entries,
        } = self;
        let name = |e: &Entry| e.name(&shards[usize::from(e.shard)]);
        // The last shard's first, which is the one that stays.
        entries.sort_unstable_by(|a, b| name(a).cmp(name(b)).then(b.shard.cmp(&a.shard)));
        entries.dedup_by(|later, first| name(later) == name(first));
        Checkpoint {
            location,
            shards,
            viewed: entries.iter().map(|_| AtomicBool::new(false)).collect(),
            entries,
            absent: BTreeMap::new(),
        }
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
    if map.starts_with(LFS_POINTER) {
        let reason = "a git-lfs pointer, not the weights; run `git lfs pull` in its folder";
        return Err(FormatError::Safetensors {
            path: path.into(),
            reason: reason.into(),
        });
    }
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
        json::from_slice(&text).map_err(|e| invalid(format!("not a shard index: {e}")))?;
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
