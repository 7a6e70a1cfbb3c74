//! One token of each of up to eight sequences: a captured graph on the GPU, and the CPU computing
//! experts beside it. What a token gets does not depend on the others.
//!
//! Per layer the graph runs about seven kernels. The router's kernel writes its choice to host
//! memory; this thread sees it, has the workers compute the experts that are not in VRAM, and sets a
//! flag that the graph waits for before it adds both parts. Nothing else is synchronised, and no GPU
//! kernel spins. An output head in RAM is the CPU's last act.

mod best;
mod dense;
mod few;
mod measure;
mod record;
mod serve;

pub use best::finds;

use std::time::{Duration, Instant};

use super::abi::{DECISION_BYTES, ExpertLayout, Handoff, MAX_BATCH, Step};
use super::arena::Arena;
use super::device::{Device, Event, Graph, Pinned, Stream};
use super::geometry::{self, AttentionParts};
use super::state::{StateLayout, TokenAt};
use super::store::ExpertStore;
use super::weights::{DenseWeights, Head};
use crate::backend::cpu::offload::Offload;
use crate::backend::cpu::threads::part_of;
use crate::backend::{DecodeTimes, LayerPicks, ModelShape, Result, Routing, StepTimes};

/// The GPU must reach the next layer within this time.
const WATCHDOG: Duration = Duration::from_secs(30);

/// A second branch of the graph.
struct Side {
    stream: Stream,
    fork: Event,
    join: Event,
}

/// What a step brings back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    Nothing,
    Logits,
    /// The best of them
    Best,
}

/// Which graph a step needs.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Kind {
    tokens: usize,
    /// Whether they are consecutive ones of one sequence, whose states stay as they are
    few: bool,
    /// The first token whose logits are computed
    head_from: usize,
    wanted: Wanted,
    /// Whether the CPU may have experts to compute
    hybrid: bool,
}

/// What a router writes on the device.
#[derive(Clone, Copy)]
struct RouterScratch {
    logits: u64,
    counter: u64,
    decision: u64,
}

/// Buffers of a decode step, each with a row for every token; addresses are the device's.
pub struct Decode {
    hidden: u64,
    step: u64,
    /// Outputs of projections: q, k, v or ba
    projected: [u64; 3],
    mixed: u64,
    router: RouterScratch,
    /// Of the router that looks ahead
    ahead: RouterScratch,
    expert_hidden: u64,
    expert_hidden_stride: usize,
    moe: u64,
    attention_partial: u64,
    attention_counters: u64,
    attention: AttentionParts,
    resident_blocks: usize,
    /// Dynamic shared memory that a block may have, bytes
    most_shared: usize,
    logits: u64,
    /// `[k + 1]`: of m misses, how many the GPU reads over PCIe
    split: u64,
    split_host: Vec<i32>,

    /// [`Step::state`] on the way to the device
    host_states: Pinned<Step>,
    embedding: Pinned<f32>,
    host_step: Pinned<Step>,
    /// `[layers, MAX_BATCH]`
    handoffs: Pinned<Handoff>,
    /// What each layer but the first will probably ask of the CPU: its router on what the experts
    /// of the layer before got
    predicted: Pinned<Handoff>,
    /// `[layers, MAX_BATCH, D]`
    handoff_x: Pinned<f32>,
    /// `[layers, tokens, D]`
    cpu_out: Pinned<f32>,
    /// `[layers]`
    done: Pinned<u32>,
    host_logits: Pinned<f32>,
    best: best::BestBuffers,
    /// What a head in RAM starts from
    host_hidden: Pinned<f32>,

    /// Hands over in every layer, even if all experts are in VRAM: to measure what that takes
    pub hand_over_always: bool,
    /// Runs routers ahead, beside the mixers; absent where that is not asked for
    side: Option<Side>,
    /// Graphs that a step is cut into: while the GPU is at one, the next is handed to the driver
    parts: usize,
    /// Each the parts of a step
    graphs: Vec<(Kind, Vec<Graph>)>,
    /// By tokens that are kept
    keep_graphs: Vec<(usize, Graph)>,
    few: few::Buffers,
    number: u32,
    pub times: DecodeTimes,
}

/// The tokens of a step, and what it brings back.
#[derive(Clone, Copy, Debug)]
pub struct Tokens<'a> {
    pub at: &'a [TokenAt],
    /// Whether they are consecutive ones of one sequence, whose states stay as they are until
    /// [`keep`](Decode::keep)
    pub few: bool,
    /// The first token whose logits are wanted
    pub head_from: usize,
    pub wanted: Wanted,
}

/// What a step works on: the weights, and the stream it is added to.
pub struct Model {
    pub shape: ModelShape,
    pub dense: DenseWeights,
    pub store: ExpertStore,
    pub shared_layout: ExpertLayout,
    pub stream: Stream,
}

impl Decode {
    /// Buffers for steps of a model of this shape, whose routed and shared experts lie as `layouts`
    /// say.
    ///
    /// # Errors
    /// If memory is short on either side.
    pub fn new(
        device: &Device,
        arena: &mut Arena,
        shape: &ModelShape,
        layouts: [&ExpertLayout; 2],
        stream: &Stream,
    ) -> Result<Self> {
        let (dim, layers) = (shape.hidden_size, shape.num_layers());
        let (attention, net) = (&shape.attention, &shape.delta_net);
        let k = shape.moe.num_experts_per_tok;
        let mut floats = |count: usize| arena.alloc(4 * MAX_BATCH * count, stream);
        let multiprocessors = device.facts().multiprocessors as usize;
        let parts = geometry::attention_parts(attention, multiprocessors);
        let intermediate = layouts.map(|l| l.intermediate as usize);
        let stride = intermediate[0].max(intermediate[1]).next_multiple_of(64);
        Ok(Decode {
            hidden: floats(dim)?,
            step: floats(size_of::<Step>() / 4)?,
            projected: [
                floats(attention.q_proj_rows())?,
                floats(attention.kv_rows().max(net.ba_rows()))?,
                floats(attention.kv_rows())?,
            ],
            mixed: floats(net.value_dim().max(attention.o_proj_cols()))?,
            router: RouterScratch {
                logits: floats(shape.moe.num_experts + 1)?,
                counter: floats(1)?,
                decision: floats(DECISION_BYTES / 4)?,
            },
            ahead: RouterScratch {
                logits: floats(shape.moe.num_experts + 1)?,
                counter: floats(1)?,
                decision: floats(DECISION_BYTES / 4)?,
            },
            expert_hidden: floats((k + 1) * stride)?,
            expert_hidden_stride: stride,
            moe: floats(dim)?,
            attention_partial: floats(parts.partial)?,
            attention_counters: floats(parts.counters)?,
            attention: parts,
            resident_blocks: geometry::resident_blocks(&device.facts()),
            most_shared: geometry::most_shared_bytes(&device.facts()),
            logits: floats(shape.vocab_size)?,
            split: arena.alloc(4 * (k + 1), stream)?,
            split_host: vec![0; k + 1],
            host_states: device.alloc_host(MAX_BATCH)?,
            embedding: device.alloc_host(MAX_BATCH * dim)?,
            host_step: device.alloc_host(MAX_BATCH)?,
            handoffs: device.alloc_host(layers * MAX_BATCH)?,
            predicted: device.alloc_host(layers * MAX_BATCH)?,
            handoff_x: device.alloc_host(layers * MAX_BATCH * dim)?,
            cpu_out: device.alloc_host(layers * MAX_BATCH * dim)?,
            done: device.alloc_host(layers)?,
            host_logits: device.alloc_host(MAX_BATCH * shape.vocab_size)?,
            best: best::BestBuffers::new(device, arena, shape.vocab_size, stream)?,
            host_hidden: device.alloc_host(MAX_BATCH * dim)?,
            hand_over_always: false,
            side: None,
            parts: 1,
            graphs: Vec::new(),
            keep_graphs: Vec::new(),
            few: few::Buffers::new(arena, shape, stream)?,
            number: 0,
            times: DecodeTimes::default(),
        })
    }

    /// Of `m` missing experts, the GPU reads `split[m]` over PCIe instead of leaving them to the
    /// CPU.
    ///
    /// # Errors
    /// If the driver reports one.
    pub fn set_split(&mut self, split: &[i32], stream: &Stream) -> Result<()> {
        assert_eq!(split.len(), self.split_host.len());
        self.split_host.copy_from_slice(split);
        let bytes: &[u8] = bytemuck::cast_slice(split);
        // SAFETY: the table has this size, and the copy is awaited.
        unsafe { stream.copy_to_device(self.split, bytes.as_ptr(), bytes.len())? };
        stream.synchronize()
    }

    /// Has routers look a layer ahead, so that the CPU can fetch what it will probably have to
    /// compute while the GPU runs the mixer in between.
    ///
    /// # Errors
    /// If the driver reports one.
    pub fn look_ahead(&mut self, on: bool, device: &Device) -> Result<()> {
        self.forget_graphs();
        self.side = match on {
            true => Some(Side {
                stream: device.new_stream()?,
                fork: device.new_event()?,
                join: device.new_event()?,
            }),
            false => None,
        };
        Ok(())
    }

    /// Cuts a step into so many graphs, or one per layer where layers are fewer.
    pub fn cut_into(&mut self, parts: usize) {
        self.forget_graphs();
        self.parts = parts;
    }

    /// The tokens of a step are of the sequences whose states lie at these device addresses from now on.
    ///
    /// # Errors
    /// If the driver reports one.
    pub fn point_at(&mut self, bases: &[u64], stream: &Stream) -> Result<()> {
        let states = &mut self.host_states.as_mut_slice()[..bases.len()];
        if states.iter().zip(bases).all(|(s, &base)| s.state == base) {
            return Ok(());
        }
        // The last copy from here is done: every step ends with a wait, and so does a switch.
        for (step, &base) in states.iter_mut().zip(bases) {
            step.state = base;
        }
        let from = self.host_states.pointer(0).cast::<u8>();
        // What else is in a step is written anew in each.
        // SAFETY: both have room for so many, and the copy is awaited.
        unsafe { stream.copy_to_device(self.step, from, size_of::<Step>() * bases.len())? };
        stream.synchronize()
    }

    /// Graphs hold addresses of experts' tables and places in a layout of states: they are made anew
    /// after one of these changed.
    pub fn forget_graphs(&mut self) {
        self.graphs.clear();
        self.keep_graphs.clear();
    }

    /// Feeds one token of each sequence, or a few of one, to which [`point_at`](Decode::point_at) points.
    /// `embedding(out)` writes their embeddings, `[tokens, D]`. What was wanted is then in
    /// [`logits_of`](Decode::logits_of) or [`best`](Decode::best). `on_routing` is told of token, layer and
    /// choice. The caller counts the positions on.
    ///
    /// # Errors
    /// If the driver, a worker or the watchdog reports one; the sequences are lost then.
    pub fn step(
        &mut self,
        model: &Model,
        offload: &mut Offload,
        layout: &StateLayout,
        Tokens {
            at,
            few,
            head_from,
            wanted,
        }: Tokens<'_>,
        embedding: impl FnOnce(&mut [f32]),
        on_routing: &mut dyn FnMut(usize, usize, &Routing),
    ) -> Result<()> {
        let start = Instant::now();
        let tokens = at.len();
        assert!((1..=MAX_BATCH).contains(&tokens) && head_from < tokens);
        self.number += 1;
        embedding(&mut self.embedding.as_mut_slice()[..tokens * model.shape.hidden_size]);
        let steps = self.host_step.as_mut_slice().iter_mut();
        for ((step, at), known) in steps.zip(at).zip(self.host_states.as_slice()) {
            assert_eq!(known.state, at.state);
            *step = Step {
                position: at.position as i32,
                number: self.number,
                // Not copied: it is there already.
                state: at.state,
            };
        }
        let kind = Kind {
            tokens,
            few,
            head_from,
            wanted,
            hybrid: self.hand_over_always || !model.store.all_resident(),
        };
        let index = self.graphs_for(kind, model, layout)?;
        // Without the CPU's part nothing is left to do but to hand over all of them.
        let at_once = if kind.hybrid { 1 } else { usize::MAX };
        for graph in self.graphs[index].1.iter().take(at_once) {
            // SAFETY: the graph was recorded for states of this layout, and each of `states` is one.
            unsafe { model.stream.launch_graph(graph)? };
        }
        let launched = Instant::now();
        let mut times = StepTimes {
            tokens,
            launch_s: (launched - start).as_secs_f64(),
            ..StepTimes::default()
        };
        if kind.hybrid {
            let served = self.serve(model, offload, tokens, index, &mut times);
            if let Err(error) = served {
                // The graph must end, or the next call of the driver would wait for ever; and no flag
                // may be left for the next step, where a graph that never ran would have taken it back.
                let layers = 0..model.shape.num_layers();
                layers.clone().for_each(|layer| self.set_done(layer, 1));
                model.stream.synchronize().ok();
                layers.for_each(|layer| self.set_done(layer, 0));
                return Err(error);
            }
        }
        let served = Instant::now();
        model.stream.synchronize()?;
        if wanted == Wanted::Logits {
            self.finish_head(model, offload, tokens - head_from)?;
        }
        let end = Instant::now();
        times.tail_s = (end - served).as_secs_f64();
        times.total_s = (end - start).as_secs_f64();
        self.times.add_step(&times);
        for token in 0..tokens {
            self.tell_routing(model, kind, token, &mut |layer, routing| {
                on_routing(token, layer, routing);
            });
        }
        Ok(())
    }

    /// The graphs of such a step, recorded where there are none yet: their place in the list.
    fn graphs_for(&mut self, kind: Kind, model: &Model, layout: &StateLayout) -> Result<usize> {
        if let Some(index) = self.graphs.iter().position(|(k, _)| *k == kind) {
            return Ok(index);
        }
        let layers = model.shape.num_layers();
        let parts = self.parts.clamp(1, layers);
        let graphs = (0..parts).map(|part| {
            let layers = part_of(layers, parts, part);
            (model.stream).capture(|| self.record(model, layout, kind, layers, &[]))
        });
        let graphs = graphs.collect::<Result<_>>()?;
        self.graphs.push((kind, graphs));
        Ok(self.graphs.len() - 1)
    }

    /// What the routers chose for a token of the last step, and where its experts were.
    fn tell_routing(
        &mut self,
        model: &Model,
        kind: Kind,
        token: usize,
        on_routing: &mut dyn FnMut(usize, &Routing),
    ) {
        let k = model.shape.moe.num_experts_per_tok;
        let mut routing = Routing {
            num_experts_per_tok: k,
            ..Routing::default()
        };
        for layer in 0..model.shape.num_layers() {
            let handoff = &self.handoffs.as_slice()[layer * MAX_BATCH + token];
            routing.topk_ids.clear();
            routing
                .topk_ids
                .extend(handoff.topk_ids[..k].iter().map(|&id| id as u16));
            routing.topk_weights.clear();
            routing.topk_weights.extend(&handoff.topk_weights[..k]);
            let cpu = handoff.num_cpu as u64;
            if kind.hybrid && self.side.is_some() && layer > 0 {
                let predicted = &self.predicted.as_slice()[layer * MAX_BATCH + token];
                let known = &predicted.cpu_ids[..(predicted.num_cpu.max(0) as usize).min(k)];
                let asked = &handoff.cpu_ids[..(handoff.num_cpu.max(0) as usize).min(k)];
                self.times.predicted += asked.iter().filter(|id| known.contains(id)).count() as u64;
            }
            let missing = (routing.topk_ids.iter())
                .filter(|&&id| model.store.resident(layer, usize::from(id)) == 0)
                .count() as u64;
            let picks = LayerPicks {
                vram: k as u64 - missing,
                cpu,
                pcie: missing - cpu.min(missing),
            };
            let blob_bytes = model.store.layout.blob_bytes as u64;
            self.times.add_picks(layer, picks, blob_bytes);
            on_routing(layer, &routing);
        }
    }

    /// All logits of a token of the last step, counted from the first whose were wanted: `[V]`.
    pub fn logits_of(&self, token: usize) -> &[f32] {
        let vocab_size = self.host_logits.as_slice().len() / MAX_BATCH;
        &self.host_logits.as_slice()[token * vocab_size..(token + 1) * vocab_size]
    }

    /// Logits of the residual stream at device address `hidden`, `[D]`; waits.
    ///
    /// # Errors
    /// If the driver or a worker reports one.
    pub fn head_of(&mut self, model: &Model, offload: &mut Offload, hidden: u64) -> Result<&[f32]> {
        self.record_head(model, hidden, 1)?;
        self.fetch_logits(model, offload, 1)?;
        Ok(self.logits_of(0))
    }

    /// Brings all logits of the last head, of its first tokens; waits.
    ///
    /// # Errors
    /// If the driver or a worker reports one.
    pub fn fetch_logits(
        &mut self,
        model: &Model,
        offload: &mut Offload,
        tokens: usize,
    ) -> Result<()> {
        self.record_logits(model, tokens)?;
        model.stream.synchronize()?;
        self.finish_head(model, offload, tokens)
    }

    /// What is left of the head once the GPU is done: all of it, where it is in RAM.
    fn finish_head(&mut self, model: &Model, offload: &mut Offload, tokens: usize) -> Result<()> {
        let Head::Ram { linear, norm } = &model.dense.lm_head else {
            return Ok(());
        };
        let (dim, eps) = (model.shape.hidden_size, model.shape.rms_norm_eps);
        let hidden = &self.host_hidden.as_slice()[..tokens * dim];
        let logits = &mut self.host_logits.as_mut_slice()[..tokens * model.shape.vocab_size];
        offload.head(linear, hidden, norm, eps, logits)
    }
}
