//! The loop over blocks, the same for every backend. Routing events leave here.

use std::ops::Range;

use crate::backend::{
    Backend, BackendError, BackendFacts, DecodeTimes, KernelTimes, LoadRates, NextLogits,
    OnRenewing, Result, Routing, SlotChange, Tuning, VramHeld, VramMeter,
};

use crate::hardware::GpuProbe;

/// Which positions of a chunk want logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitRows {
    None,
    /// Only the last token: what generation needs.
    Last,
    All,
}

impl LogitRows {
    /// Those of a chunk of `tokens`.
    pub fn of(self, tokens: usize) -> Range<usize> {
        match self {
            LogitRows::None => 0..0,
            LogitRows::Last => tokens.saturating_sub(1)..tokens,
            LogitRows::All => 0..tokens,
        }
    }
}

/// Receives what the router chose: layer, position of the chunk's first token, the choice.
pub type OnRouting<'a> = dyn FnMut(usize, usize, &Routing) + 'a;

/// A model with one sequence, whatever the backend: what the engine drives.
pub trait Runner: Send {
    /// Feeds `ids` after what the sequence has seen; returns `[rows, vocab_size]` logits.
    ///
    /// # Errors
    /// The context is full, or the backend failed.
    fn forward(
        &mut self,
        ids: &[u32],
        rows: LogitRows,
        on_routing: &mut OnRouting<'_>,
    ) -> Result<Vec<f32>>;

    /// As [`forward`](Runner::forward) of a prompt's last chunk, for whoever would have slots hold what
    /// the prompt taught: where all experts pass through the GPU anyway, `on_renewing` may change slots
    /// layer by layer, and the next call finds its experts there. Other backends allow no changes.
    fn forward_renewing(
        &mut self,
        ids: &[u32],
        rows: LogitRows,
        on_renewing: &mut OnRenewing<'_>,
    ) -> Result<Vec<f32>> {
        self.forward(ids, rows, &mut |layer, position, routing| {
            on_renewing(layer, position, routing, 0);
        })
    }

    /// As [`forward`](Runner::forward) of one token, for whoever needs no more than its `wanted` best
    /// logits: a backend that finds them itself may give only those.
    fn forward_best(
        &mut self,
        id: u32,
        _wanted: usize,
        on_routing: &mut OnRouting<'_>,
    ) -> Result<NextLogits> {
        let logits = self.forward(&[id], LogitRows::Last, on_routing)?;
        Ok(NextLogits::All(logits))
    }

    /// Forgets the sequence and makes room for one of `max_tokens`.
    fn reset(&mut self, max_tokens: usize) -> Result<()>;

    /// Tokens the sequence has seen.
    fn position(&self) -> usize;

    fn facts(&self) -> BackendFacts;

    /// Tokens of the pieces that a prompt of `tokens` is best fed in.
    fn prefill_chunk(&self, tokens: usize) -> usize;

    /// See [`Backend::load_rates`].
    fn load_rates(&self) -> Option<LoadRates> {
        None
    }

    /// See [`Backend::decode_read_bytes`].
    fn decode_read_bytes(&self, context: usize) -> Option<u64>;

    /// Where decode steps spent their time since the last call; `None` where nothing is split.
    fn take_times(&mut self) -> Option<DecodeTimes> {
        None
    }

    /// Bytes this process holds on the GPU, by the driver's figure.
    fn vram_bytes(&self) -> Option<u64> {
        None
    }

    /// The same item by item.
    fn vram_held(&self) -> Option<VramHeld> {
        None
    }

    /// The same figure for a thread that watches.
    fn vram_meter(&self) -> Option<VramMeter> {
        None
    }

    /// Fills the expert slots of each layer, `[layer][slot]`; how many of them there is room for, or
    /// `None` without a GPU.
    fn place(&mut self, _contents: &[Vec<Option<u16>>]) -> Result<Option<usize>> {
        Ok(None)
    }

    /// Chooses by measurement how misses are shared between CPU and GPU, for the experts that are in
    /// VRAM now; applies `tuning` instead where it is known. `None` where there is no choice.
    ///
    /// The sequence starts over.
    fn tune(&mut self, _tuning: Option<Tuning>) -> Result<Option<Tuning>> {
        Ok(None)
    }

    /// Prepares what the first decode step would, such as graphs. The sequence starts over.
    fn warm_up(&mut self) -> Result<()> {
        Ok(())
    }

    /// Starts copying experts into slots; what a slot held is forgotten at once.
    fn change_slots(&mut self, _changes: &[SlotChange]) -> Result<()> {
        Ok(())
    }

    /// What the backend found out about this machine while loading.
    fn notes(&self) -> Vec<String> {
        Vec::new()
    }

    /// Measures the GPU with this model, which is called `model`; `None` without one.
    fn measure(&mut self, _model: &str) -> Result<Option<GpuProbe>> {
        Ok(None)
    }

    /// What each GPU kernel takes; the sequence starts over.
    fn kernel_times(&mut self) -> Result<KernelTimes> {
        Ok(KernelTimes::default())
    }
}

/// A backend and the state of the sequence it is working on.
pub struct Sequence<B: Backend> {
    pub backend: B,
    pub state: B::State,
    position: usize,
    max_tokens: usize,
}

impl<B: Backend> Sequence<B> {
    /// An empty sequence with room for `max_tokens`.
    pub fn new(backend: B, max_tokens: usize) -> Result<Self> {
        let state = backend.new_state(max_tokens)?;
        Ok(Sequence {
            backend,
            state,
            position: 0,
            max_tokens,
        })
    }
}

impl<B: Backend> Runner for Sequence<B> {
    fn forward(
        &mut self,
        ids: &[u32],
        rows: LogitRows,
        on_routing: &mut OnRouting<'_>,
    ) -> Result<Vec<f32>> {
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let needed = self.position + ids.len();
        if needed > self.max_tokens {
            return Err(BackendError::ContextFull {
                needed,
                capacity: self.max_tokens,
            });
        }
        let mut hidden = self.backend.embed(ids)?;
        for layer in 0..self.backend.shape().num_layers() {
            self.backend.mixer(layer, &mut hidden, &mut self.state)?;
            let routing = self.backend.router(layer, &hidden)?;
            on_routing(layer, self.position, &routing);
            self.backend.experts(layer, &mut hidden, &routing)?;
        }
        self.position = needed;
        match rows {
            LogitRows::None => Ok(Vec::new()),
            _ => self.backend.head(&hidden, rows.of(ids.len())),
        }
    }

    fn reset(&mut self, max_tokens: usize) -> Result<()> {
        self.state = self.backend.new_state(max_tokens)?;
        self.position = 0;
        self.max_tokens = max_tokens;
        Ok(())
    }

    fn position(&self) -> usize {
        self.position
    }

    fn facts(&self) -> BackendFacts {
        self.backend.facts()
    }

    fn prefill_chunk(&self, _: usize) -> usize {
        self.backend.prefill_chunk()
    }

    fn load_rates(&self) -> Option<LoadRates> {
        self.backend.load_rates()
    }

    fn decode_read_bytes(&self, context: usize) -> Option<u64> {
        self.backend.decode_read_bytes(context)
    }
}

/// The cuda backend drives a whole sequence by itself: its decode step is one graph.
#[cfg(any(feature = "cuda", feature = "emulate"))]
impl Runner for crate::backend::cuda::Cuda {
    fn forward(
        &mut self,
        ids: &[u32],
        rows: LogitRows,
        on_routing: &mut OnRouting<'_>,
    ) -> Result<Vec<f32>> {
        self.forward(ids, rows.of(ids.len()), on_routing)
    }

    fn forward_renewing(
        &mut self,
        ids: &[u32],
        rows: LogitRows,
        on_renewing: &mut OnRenewing<'_>,
    ) -> Result<Vec<f32>> {
        self.forward_renewing(ids, rows.of(ids.len()), on_renewing)
    }

    fn forward_best(
        &mut self,
        id: u32,
        wanted: usize,
        on_routing: &mut OnRouting<'_>,
    ) -> Result<NextLogits> {
        self.forward_best(id, wanted, on_routing)
    }

    fn reset(&mut self, max_tokens: usize) -> Result<()> {
        self.reset(max_tokens)
    }

    fn position(&self) -> usize {
        self.position()
    }

    fn facts(&self) -> BackendFacts {
        self.facts()
    }

    fn decode_read_bytes(&self, _: usize) -> Option<u64> {
        None
    }

    fn prefill_chunk(&self, tokens: usize) -> usize {
        self.prefill_chunk(tokens)
    }

    fn take_times(&mut self) -> Option<DecodeTimes> {
        Some(self.take_times())
    }

    fn vram_bytes(&self) -> Option<u64> {
        self.used_bytes().ok()
    }

    fn vram_held(&self) -> Option<VramHeld> {
        self.held().ok()
    }

    fn vram_meter(&self) -> Option<VramMeter> {
        Some(self.meter())
    }

    fn place(&mut self, contents: &[Vec<Option<u16>>]) -> Result<Option<usize>> {
        self.place(contents).map(Some)
    }

    fn tune(&mut self, tuning: Option<Tuning>) -> Result<Option<Tuning>> {
        self.tune(tuning)
    }

    fn warm_up(&mut self) -> Result<()> {
        self.warm_up()
    }

    fn change_slots(&mut self, changes: &[SlotChange]) -> Result<()> {
        self.change_slots(changes)
    }

    fn notes(&self) -> Vec<String> {
        self.notes().to_vec()
    }

    fn measure(&mut self, model: &str) -> Result<Option<GpuProbe>> {
        self.measure(model).map(Some)
    }

    fn kernel_times(&mut self) -> Result<KernelTimes> {
        self.kernel_times()
    }
}
