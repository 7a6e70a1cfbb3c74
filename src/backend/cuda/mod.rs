//! The `cuda` backend: dense weights, states and hot experts on the GPU, the other experts computed
//! in RAM by the CPU at the same time.
//!
//! It is an [`Executor`](super::Executor) by itself, not block by block: a decode step is one captured
//! graph, and a host call between blocks would cost more than the blocks. The graph knows no sequence: a
//! step names the one whose states it works on. The conformance tests hold it to the same results.
//!
//! | file | is |
//! |---|---|
//! | [`device`] | memory, streams, launches, graphs |
//! | [`driver`] | behind them: the real driver, or the emulator |
//! | [`abi`], [`geometry`] | structures and launch sizes of `kernels/*.cu` |
//! | [`limits`] | models that the kernels compute; others are refused |
//! | [`weights`], [`store`] | dense weights in VRAM, all experts in pinned RAM, some in slots |
//! | [`layout`], [`state`], [`saved`] | what sequences carry on, on the device and in RAM |
//! | [`executor`] | sequences, batches, slots and figures, as the engine asks for them |
//! | [`decode`] | a token of each of some sequences, or a few of one; the hand-off between GPU and CPU |
//! | [`prefill`] | chunks of tokens; experts stream over PCIe |
//! | [`measure`] | the machine's figures that plans are made from |

pub mod abi;
mod arena;
pub mod budget;
mod calibrate;
pub mod decode;
pub mod device;
pub mod driver;
mod executor;
mod few;
pub mod geometry;
pub mod layout;
pub mod limits;
mod measure;
mod prefill;
mod saved;
mod slots;
pub mod state;
mod store;
pub mod variants;
mod weights;

use arena::Arena;
use budget::Usage;
use decode::{Decode, Model, Tokens, Wanted};
use device::{Device, Stream};
use prefill::Prefill;
use state::{StateLayout, StatePool, TokenAt};
use weights::Loaded;

pub use super::Residency;
use super::cpu::offload::Offload;
use super::cpu::{CpuPrecision, Progress};
use super::{BackendError, KvDtype, ModelShape, ModelWeights, Result, Routing};
use crate::formats::Matrix;
use crate::planning::execution::PrefillSettings;

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

/// A model on a device, with room for some sequences.
pub struct Cuda {
    // Fields are dropped in order: buffers before the arena and streams they came from.
    prefill: Prefill,
    decode: Decode,
    states: StatePool,
    /// Of the last piece, if it may be taken back
    tentative: Option<few::Tentative>,
    model: Model,
    offload: Offload,
    embed_tokens: Matrix,
    options: CudaOptions,
    kv_dtype: KvDtype,
    usage: Usage,
    /// What the process held before this model
    context_bytes: u64,
    slots: slots::Slots,
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
    /// [`BackendError::Unsupported`] for a shape beyond the kernels' [`limits`]; if there is no such
    /// device, or it lacks memory for what must be there.
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
    ///
    /// # Errors
    /// As for [`new`](Cuda::new).
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
        limits::check(&shape)?;
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
        let layout = StateLayout::new(&shape, kv_dtype, max_tokens);
        budget::check(&usage, options.vram_bytes, layout.bytes)?;
        let states = StatePool::new(&device, layout, [1, max_tokens], &stream)?;
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
            states,
            tentative: None,
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
            notes: Vec::new(),
            _arena: arena,
            copies,
            device,
            index,
        };
        cuda.point_at_active()?;
        cuda.fill_slots()?;
        if !cuda.is_too_small_to_time() {
            cuda.measure_share_rates()?;
        }
        cuda.calibrate()?;
        Ok(cuda)
    }

    /// Experts in VRAM now.
    pub fn resident_experts(&self) -> usize {
        self.model.store.num_resident()
    }

    /// Forgets all sequences; steps that measure work on an empty one.
    fn forget_sequences(&mut self) -> Result<()> {
        self.tentative = None;
        self.states.remove_all(&self.model.stream)?;
        self.point_at_active()
    }

    /// Has kernels work on the active state.
    fn point_at_active(&mut self) -> Result<()> {
        let base = self.states.active().base();
        self.decode.point_at(&[base], &self.model.stream)
    }

    /// Whether so many best logits are found on the device.
    fn finds_best(&self, wanted: usize) -> bool {
        let here = matches!(self.model.dense.lm_head, weights::Head::Vram(_));
        here && decode::finds(&self.model.shape, wanted)
    }

    /// A step of one token of the active sequence.
    fn step_one(
        &mut self,
        id: u32,
        wanted: Wanted,
        on_routing: &mut dyn FnMut(usize, usize, &Routing),
    ) -> Result<()> {
        let at = TokenAt::next_of(self.states.active());
        let tokens = Tokens {
            at: &[at],
            few: false,
            head_from: 0,
            wanted,
        };
        self.step(&[id], tokens, &mut |_, layer, routing| {
            on_routing(layer, at.position, routing);
        })?;
        self.states.active_mut().position += 1;
        Ok(())
    }

    /// A step of the tokens `ids`, to whose states kernels point. Told of token, layer and choice.
    fn step(
        &mut self,
        ids: &[u32],
        tokens: Tokens<'_>,
        on_routing: &mut dyn FnMut(usize, usize, &Routing),
    ) -> Result<()> {
        let dim = self.model.shape.hidden_size;
        let embedding = |out: &mut [f32]| {
            for (&id, out) in ids.iter().zip(out.chunks_exact_mut(dim)) {
                let id = id as usize;
                self.embed_tokens.dequantize_rows(id..id + 1, out);
            }
        };
        let layout = &self.states.layout;
        (self.decode).step(
            &self.model,
            &mut self.offload,
            layout,
            tokens,
            embedding,
            on_routing,
        )
    }
}
