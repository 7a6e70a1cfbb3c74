//! The `cuda` backend: dense weights, states and hot experts on the GPU, the other experts computed
//! in RAM by the CPU at the same time.
//!
//! It is driven as a whole sequence, not block by block: a decode step is one captured graph, and a
//! host call between blocks would cost more than the blocks. [`Cuda::forward`] has the contract of
//! `model::forward::Runner`; the conformance tests hold it to the same results.
//!
//! | file | is |
//! |---|---|
//! | [`device`] | memory, streams, launches, graphs; behind it the driver or the emulator |
//! | [`abi`], [`geometry`] | structures and launch sizes of `kernels/*.cu` |
//! | [`weights`], [`store`] | dense weights in VRAM, all experts in pinned RAM, some in slots |
//! | [`state`] | what a sequence carries on |
//! | [`decode`] | one token; the hand-off between GPU and CPU |
//! | [`prefill`] | chunks of tokens; experts stream over PCIe |
//! | [`measure`] | the machine's figures that plans are made from |

pub mod abi;
mod arena;
pub mod budget;
mod calibrate;
pub mod decode;
pub mod device;
#[cfg(feature = "cuda")]
pub mod driver;
#[cfg(feature = "emulate")]
pub mod emulated;
pub mod geometry;
mod measure;
mod prefill;
mod slots;
pub mod state;
mod store;
pub mod variants;
mod weights;

use std::ops::Range;

use abi::MAX_TOP_K;
use arena::Arena;
use budget::Usage;
use decode::{Decode, Model, Wanted};
use device::{Device, Stream};
use prefill::Prefill;
use state::SequenceState;
use weights::Loaded;

pub use super::Residency;
use super::cpu::offload::Offload;
use super::cpu::{CpuPrecision, Progress};
use super::{
    BackendError, BackendFacts, DecodeTimes, KernelTimes, KvDtype, ModelShape, ModelWeights,
    NextLogits, OnRenewing, Result, Routing, VramHeld, VramMeter,
};
use crate::formats::Matrix;
use crate::planning::execution::{MARGIN_BYTES, PrefillSettings};

#[derive(Clone, Debug, Default)]
pub struct CudaOptions {
    /// CPU workers, the one that drives the GPU included; one per usable core if not given
    pub threads: Option<usize>,
    /// All that the process may hold on the device, its context included; all that is free if not
    /// given
    pub vram_bytes: Option<u64>,
    /// Of experts that the CPU computes: int16 or int8
    pub cpu_precision: CpuPrecision,
    /// f16, if not given, or int8
    pub kv_dtype: Option<KvDtype>,
    pub residency: Residency,
    pub prefill: PrefillSettings,
    /// Of `m` missing experts, the GPU reads `split[m]` over PCIe; none if not given
    pub split: Option<Vec<i32>>,
    /// Whether routers look ahead, so that the CPU fetches experts early; measured if not given
    pub look_ahead: Option<bool>,
    /// Graphs that a decode step is cut into; measured if not given
    pub parts: Option<usize>,
    /// The CPU computes the output head, from RAM: its memory on the device goes to experts
    pub head_in_ram: bool,
}

/// Chunks up to this many tokens are decoded one by one: streaming all experts of a model over PCIe
/// takes as long as about eighty steps.
const MAX_STEPPED_TOKENS: usize = 48;

/// A model on a device, with one sequence.
pub struct Cuda {
    // Fields are dropped in order: buffers before the arena and streams they came from.
    prefill: Prefill,
    decode: Decode,
    state: SequenceState,
    model: Model,
    offload: Offload,
    embed_tokens: Matrix,
    options: CudaOptions,
    kv_dtype: KvDtype,
    usage: Usage,
    /// What the process held before this model
    context_bytes: u64,
    slots: slots::Slots,
    /// A failed step leaves the sequence in an unknown state.
    broken: bool,
    /// What calibration found, for who asks
    notes: Vec<String>,
    _arena: Arena,
    copies: Stream,
    device: Device,
    index: usize,
}

impl Cuda {
    /// Loads a model onto device `index` with room for one sequence of `max_tokens`.
    ///
    /// # Errors
    /// If there is no such device, or it lacks memory for what must be there.
    pub fn new(
        index: usize,
        shape: ModelShape,
        weights: &ModelWeights,
        options: CudaOptions,
        max_tokens: usize,
        progress: Progress,
    ) -> Result<Self> {
        let device = Device::open(index)?;
        let usage = Usage::of(&device, index);
        Self::on(
            device, index, usage, shape, weights, options, max_tokens, progress,
        )
    }

    /// As [`new`](Cuda::new), on a device that is open.
    #[allow(clippy::too_many_arguments)]
    pub fn on(
        device: Device,
        index: usize,
        usage: Usage,
        shape: ModelShape,
        weights: &ModelWeights,
        options: CudaOptions,
        max_tokens: usize,
        progress: Progress,
    ) -> Result<Self> {
        if shape.moe.num_experts_per_tok > MAX_TOP_K {
            return Err(BackendError::Other(format!(
                "{} experts per token; kernels take at most {MAX_TOP_K}, use --backend cpu",
                shape.moe.num_experts_per_tok
            )));
        }
        let kv_dtype = options.kv_dtype.unwrap_or(KvDtype::F16);
        if kv_dtype == KvDtype::F32 {
            return Err(BackendError::Other(
                "the cuda backend keeps keys and values in f16 or int8; change --kv-dtype".into(),
            ));
        }
        let context_bytes = usage.now()?;
        let stream = device.new_stream()?;
        let copies = device.new_stream()?;
        let mut offload = Offload::new(options.threads)?;
        let mut arena = Arena::new(&device);
        let Loaded {
            dense,
            store,
            shared_layout,
        } = weights::load(
            &device,
            &stream,
            &mut arena,
            &mut offload,
            &shape,
            weights,
            options.cpu_precision,
            options.head_in_ram,
            progress,
        )?;
        let layouts = [&store.layout, &shared_layout];
        let mut decode = Decode::new(&device, &mut arena, &shape, layouts, &stream)?;
        if let Some(split) = &options.split {
            // What is not given for many misses is as for the most that is.
            let last = split.last().copied().unwrap_or(0);
            let k = shape.moe.num_experts_per_tok;
            let all = (0..=k).map(|m| split.get(m).copied().unwrap_or(last).clamp(0, m as i32));
            decode.set_split(&all.collect::<Vec<_>>(), &stream)?;
        }
        if options.look_ahead == Some(true) {
            decode.look_ahead(true, &device)?;
        }
        decode.cut_into(options.parts.unwrap_or(1));
        let state = SequenceState::new(&device, &shape, kv_dtype, max_tokens, &stream)?;
        let prefill = Prefill::new(
            &device,
            &shape,
            &store,
            &shared_layout,
            &dense,
            options.prefill,
            &stream,
        )?;
        let mut cuda = Cuda {
            prefill,
            decode,
            state,
            model: Model {
                shape,
                dense,
                store,
                shared_layout,
                stream,
            },
            offload,
            embed_tokens: weights.embed_tokens.detached(),
            options,
            kv_dtype,
            usage,
            context_bytes,
            slots: slots::Slots::default(),
            broken: false,
            notes: Vec::new(),
            _arena: arena,
            copies,
            device,
            index,
        };
        cuda.fill_slots()?;
        cuda.calibrate()?;
        Ok(cuda)
    }

    pub fn shape(&self) -> &ModelShape {
        &self.model.shape
    }

    /// Tokens the sequence has seen.
    pub fn position(&self) -> usize {
        self.state.position
    }

    /// Experts in VRAM now.
    pub fn resident_experts(&self) -> usize {
        self.model.store.num_resident()
    }

    /// Where the time of decode steps went since the last call.
    pub fn take_times(&mut self) -> DecodeTimes {
        std::mem::take(&mut self.decode.times)
    }

    /// What calibration found.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Records the graph of a step that samples; the sequence starts over.
    pub fn warm_up(&mut self) -> Result<()> {
        self.state.clear(&self.model.stream)?;
        self.forward_best(0, 1, &mut |_, _, _| {})?;
        self.take_times();
        self.state.clear(&self.model.stream)
    }

    /// What each kernel of a decode step and of a chunk of a prompt takes; the sequence starts over.
    pub fn kernel_times(&mut self) -> Result<KernelTimes> {
        let decode_us = self.decode.kernel_times(&self.model, &self.state)?;
        self.decode.forget_graphs();
        let (prefill_tokens, prefill_us) = self.prefill_kernel_times()?;
        self.give_slots_back()?;
        self.state.clear(&self.model.stream)?;
        Ok(KernelTimes {
            decode_us,
            prefill_tokens,
            prefill_us,
        })
    }

    /// Bytes that this process holds on the device, by the driver's figure.
    pub fn used_bytes(&self) -> Result<u64> {
        self.usage.now()
    }

    /// The same item by item.
    pub fn held(&self) -> Result<VramHeld> {
        let held = VramHeld {
            context_bytes: self.context_bytes,
            sequence_bytes: self.state.bytes(),
            slots_bytes: self.model.store.slots_bytes() as u64,
            other_bytes: 0,
            margin_bytes: MARGIN_BYTES,
        };
        let known = held.context_bytes + held.sequence_bytes + held.slots_bytes;
        Ok(VramHeld {
            other_bytes: self.used_bytes()?.saturating_sub(known),
            ..held
        })
    }

    /// [`used_bytes`](Cuda::used_bytes) for a thread that watches.
    pub fn meter(&self) -> VramMeter {
        let usage = self.usage.clone();
        Box::new(move || usage.now().ok())
    }

    pub fn facts(&self) -> BackendFacts {
        BackendFacts {
            name: format!("cuda:{}", self.index),
            kernels: Some(format!(
                "{}, prefill {}, {} {} for experts in RAM",
                self.device.facts().name,
                self.options.prefill.precision.name(),
                self.offload.isa().name(),
                self.options.cpu_precision.name()
            )),
            threads: self.offload.threads(),
        }
    }

    /// Forgets the sequence and makes room for one of `max_tokens`.
    pub fn reset(&mut self, max_tokens: usize) -> Result<()> {
        self.model.stream.synchronize().ok();
        self.broken = false;
        if max_tokens <= self.state.max_tokens && 2 * max_tokens > self.state.max_tokens {
            self.state.max_tokens = max_tokens;
            return self.state.clear(&self.model.stream);
        }
        // Slots give their memory back first, then get what the new context leaves.
        self.decode.forget_graphs();
        self.model
            .store
            .set_slots(&self.device, 0, &self.model.stream)?;
        let (shape, format) = (&self.model.shape, self.kv_dtype);
        self.state = SequenceState::new(&self.device, shape, format, 1, &self.model.stream)?;
        self.state =
            SequenceState::new(&self.device, shape, format, max_tokens, &self.model.stream)?;
        self.fill_slots()
    }

    /// Feeds `ids` after what the sequence has seen; `[rows, vocab_size]` logits of the tokens
    /// `rows` of this chunk.
    ///
    /// `on_routing` gets layer, position of the first token it covers, and the choice.
    ///
    /// # Errors
    /// The context is full, or driver, worker or watchdog report an error.
    pub fn forward(
        &mut self,
        ids: &[u32],
        rows: Range<usize>,
        on_routing: &mut dyn FnMut(usize, usize, &Routing),
    ) -> Result<Vec<f32>> {
        self.feed(ids.len(), |cuda| match ids.len() {
            ..=MAX_STEPPED_TOKENS => cuda.step_all(ids, rows, on_routing),
            _ => {
                let on_routing = &mut |layer: usize, position: usize, routing: &Routing, _| {
                    on_routing(layer, position, routing);
                    Vec::new()
                };
                cuda.prefill_all(ids, rows, false, on_routing)
            }
        })
    }

    /// As [`forward`](Cuda::forward) of a prompt's last chunk: while experts stream in, `on_renewing` is
    /// asked what slots shall hold, once per layer. Where they do not, it may change none.
    ///
    /// # Errors
    /// As [`forward`](Cuda::forward).
    pub fn forward_renewing(
        &mut self,
        ids: &[u32],
        rows: Range<usize>,
        on_renewing: &mut OnRenewing<'_>,
    ) -> Result<Vec<f32>> {
        if ids.len() <= MAX_STEPPED_TOKENS {
            return self.forward(ids, rows, &mut |layer, position, routing| {
                on_renewing(layer, position, routing, 0);
            });
        }
        let renews = !self.model.store.all_resident();
        self.feed(ids.len(), |cuda| {
            cuda.prefill_all(ids, rows, renews, on_renewing)
        })
    }

    /// Has `work` feed `tokens` tokens, if they fit; what it leaves after an error is lost.
    fn feed<T>(&mut self, tokens: usize, work: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if self.broken {
            return Err(BackendError::Other(
                "the sequence was lost with an earlier error; start a new one".into(),
            ));
        }
        let needed = self.state.position + tokens;
        if needed > self.state.max_tokens {
            return Err(BackendError::ContextFull {
                needed,
                capacity: self.state.max_tokens,
            });
        }
        self.broken = true;
        let result = work(self)?;
        self.broken = false;
        Ok(result)
    }

    /// Feeds one token, for whoever needs only its `wanted` best logits; all of them where the device
    /// does not look for so many.
    ///
    /// # Errors
    /// As [`forward`](Cuda::forward).
    pub fn forward_best(
        &mut self,
        id: u32,
        wanted: usize,
        on_routing: &mut dyn FnMut(usize, usize, &Routing),
    ) -> Result<NextLogits> {
        let here = matches!(self.model.dense.lm_head, weights::Head::Vram(_));
        if !here || !decode::finds(&self.model.shape, wanted) {
            return Ok(NextLogits::All(self.forward(&[id], 0..1, on_routing)?));
        }
        self.feed(1, |cuda| {
            cuda.give_slots_back()?;
            cuda.settle_slots()?;
            cuda.step(id, Wanted::Best, on_routing)?;
            (cuda.decode).best(&cuda.model, &mut cuda.offload, wanted)
        })
    }

    /// Tokens one after the other, each a decode step.
    fn step_all(
        &mut self,
        ids: &[u32],
        rows: Range<usize>,
        on_routing: &mut dyn FnMut(usize, usize, &Routing),
    ) -> Result<Vec<f32>> {
        let mut logits = Vec::with_capacity(rows.len() * self.model.shape.vocab_size);
        self.give_slots_back()?;
        self.settle_slots()?;
        for (i, &id) in ids.iter().enumerate() {
            let wanted = rows.contains(&i);
            let brings = if wanted {
                Wanted::Logits
            } else {
                Wanted::Nothing
            };
            self.step(id, brings, on_routing)?;
            if wanted {
                logits.extend_from_slice(self.decode.logits());
            }
        }
        Ok(logits)
    }

    fn step(
        &mut self,
        id: u32,
        wanted: Wanted,
        on_routing: &mut dyn FnMut(usize, usize, &Routing),
    ) -> Result<()> {
        let position = self.state.position;
        self.decode.step(
            &self.model,
            &mut self.offload,
            &mut self.state,
            wanted,
            |out| {
                let id = id as usize;
                self.embed_tokens.dequantize_rows(id..id + 1, out);
            },
            &mut |layer, routing| on_routing(layer, position, routing),
        )
    }
}
