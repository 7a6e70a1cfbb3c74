//! A chunk of tokens: everything on the GPU, missing experts streaming over PCIe as it gets there.
//!
//! Experts that are not in VRAM pass through a ring of staging buffers, a group of neighbouring
//! experts at a time: first gate and up of all groups of a layer, then down. A second stream copies
//! as far ahead as the ring allows, so that the bus never waits for the kernels; with a few thousand
//! tokens the bus bounds the speed. How a prompt is cut, and whose memory its workspace takes, is
//! computed by [`planning::execution`](crate::planning::execution), which plans call, too.
//!
//! In a prompt's last chunk slots may admit experts that the prompt used most, without any more copies over
//! PCIe: see [`admission`].

mod admission;
mod chunk;
mod delta_rule;
mod lists;
mod picked;
mod rates;
mod streaming;

use std::cell::RefCell;
use std::ops::Range;

use super::Cuda;
use super::abi::ExpertLayout;
use super::device::{Buffer, Device, DeviceFacts, Event, Pinned, Stream};
use super::store::{ExpertStore, Held};
use super::weights::DenseWeights;
use crate::backend::{
    BackendError, Executor, ModelShape, OnAdmission, Result, Routing, SlotChange,
};
use crate::planning::Offer;
use crate::planning::execution::{
    GROUP_EXPERTS, PICKED_RING, PrefillPlan, PrefillSettings, PrefillSizes, RING_GROUPS as RING,
    Streaming, Workspace, WorkspaceMemory, prefill_plan,
};
use crate::planning::sharing::ShareRates;
use chunk::{Chunk, Parts};
use picked::PickedHost;

pub struct Prefill {
    settings: PrefillSettings,
    sizes: PrefillSizes,
    facts: DeviceFacts,
    /// `[layers, 2, E + 1]`: addresses of blobs for gate and up, and for down
    blobs: Buffer,
    host_blobs: Pinned<u64>,
    /// `[layers, E + 1]`: addresses of units
    units: Buffer,
    /// What the host gives and gets of a chunk
    host: HostBuffers,
    ready: Vec<Event>,
    free: Vec<Event>,
    /// A layer's routing is on the host
    routed: Event,
    /// What its experts get is there, and is on the host: it goes by a stream of its own, beside the router
    normed: Event,
    downloaded: Event,
    downloads: Stream,
    /// The workspace, where it is not borrowed from slots
    own: Option<Buffer>,
    /// Slots that the workspace of the chunks so far has the memory of
    borrowed: Option<Borrowed>,
    /// Of a short chunk: the host's lists, once there was one, and what they are made by
    picked: Option<PickedHost>,
    rates: ShareRates,
    /// Present while kernels are timed, one after the other
    kernel_times: Option<LaunchTimer>,
}

/// What each kernel took, all its launches together.
struct LaunchTimer {
    start: Event,
    end: Event,
    us: RefCell<Vec<(&'static str, f64)>>,
}

impl LaunchTimer {
    fn add(&self, kernel: &'static str, us: f64) {
        let mut all = self.us.borrow_mut();
        match all.iter_mut().find(|(name, _)| *name == kernel) {
            Some((_, sum)) => *sum += us,
            None => all.push((kernel, us)),
        }
    }
}

/// Host memory for chunks of up to `tokens`.
struct HostBuffers {
    tokens: usize,
    /// `[tokens, D]`
    embeddings: Pinned<f32>,
    /// `[layers, tokens, k]`
    ids: Pinned<i32>,
    weights: Pinned<f32>,
}

impl HostBuffers {
    fn new(device: &Device, shape: &ModelShape, tokens: usize) -> Result<Self> {
        let picks = shape.num_layers() * tokens * shape.moe.num_experts_per_tok;
        Ok(HostBuffers {
            tokens,
            embeddings: device.alloc_host(tokens * shape.hidden_size)?,
            ids: device.alloc_host(picks)?,
            weights: device.alloc_host(picks)?,
        })
    }
}

/// The memory of the last slots, in use as workspace.
struct Borrowed {
    address: u64,
    bytes: usize,
    /// What the slots held, and will hold again
    held: Vec<Held>,
}

/// Experts `first .. first + count` of a layer, computed by one launch.
struct Group {
    first: usize,
    count: usize,
    /// The ring buffers of their missing ones, for gate and up, and for down
    ring: Option<[usize; 2]>,
}

/// A slot's new expert.
pub struct Admission {
    change: SlotChange,
    /// Among the slots of all layers
    slot: usize,
    /// Whether the slot is used as workspace, so that nothing was copied
    is_workspace: bool,
}

/// The changes of slots in one chunk.
pub struct Admitting<'a> {
    on_admission: &'a mut OnAdmission<'a>,
    pub admissions: Vec<Admission>,
    /// Experts of the present layer and their slots, in the order of their places aside
    pub kept: Vec<(usize, usize)>,
}

impl<'a> Admitting<'a> {
    pub fn new(on_admission: &'a mut OnAdmission<'a>) -> Self {
        Admitting {
            on_admission,
            admissions: Vec::new(),
            kept: Vec::new(),
        }
    }
}

impl Prefill {
    /// Buffers and tables for the prompts of a model.
    ///
    /// # Errors
    /// If memory is short on either side.
    pub fn new(
        device: &Device,
        shape: &ModelShape,
        store: &ExpertStore,
        shared_layout: &ExpertLayout,
        dense: &DenseWeights,
        settings: PrefillSettings,
        stream: &Stream,
    ) -> Result<Self> {
        let (layers, experts) = (shape.num_layers(), shape.moe.num_experts);
        let sizes = PrefillSizes {
            shape: shape.numbers(),
            expert_bytes: store.layout.blob_bytes as usize,
            expert_up_bytes: store.layout.down_offset as usize,
            precision: settings.precision,
        };
        let widest = store.layout.intermediate.max(shared_layout.intermediate) as usize;
        assert!(widest <= sizes.expert_stride(), "layouts are of this shape");
        let mut units = Vec::with_capacity(layers * (experts + 1));
        for (layer, dense) in store.layers.iter().zip(&dense.layers) {
            let stride = 4 * store.layout.num_units as u64;
            units.extend((0..experts as u64).map(|e| layer.units + e * stride));
            units.push(dense.shared_units);
        }
        let events = || {
            (0..RING.max(PICKED_RING))
                .map(|_| device.new_event())
                .collect::<Result<Vec<_>>>()
        };
        Ok(Prefill {
            settings,
            sizes,
            facts: device.facts(),
            blobs: device.alloc(8 * layers * 2 * (experts + 1), stream)?,
            host_blobs: device.alloc_host(layers * 2 * (experts + 1))?,
            units: device.upload(&units, stream)?,
            host: HostBuffers::new(device, shape, 1)?,
            ready: events()?,
            free: events()?,
            routed: device.new_event()?,
            normed: device.new_event()?,
            downloaded: device.new_event()?,
            downloads: device.new_stream()?,
            own: None,
            borrowed: None,
            picked: None,
            rates: ShareRates::default(),
            kernel_times: None,
        })
    }

    pub fn settings(&self) -> &PrefillSettings {
        &self.settings
    }

    pub fn sizes(&self) -> &PrefillSizes {
        &self.sizes
    }

    /// How a prompt of `tokens` is executed with so many slots.
    pub fn plan(&self, slots: usize, tokens: usize) -> PrefillPlan {
        let memory = match &self.own {
            Some(buffer) => WorkspaceMemory::Own(buffer.bytes()),
            None => WorkspaceMemory::Slots,
        };
        prefill_plan(&self.sizes, memory, slots, tokens, &self.settings)
    }

    /// Takes memory of its own for the workspace, or gives it back.
    ///
    /// # Errors
    /// If the device's memory is short.
    pub fn set_workspace(
        &mut self,
        memory: WorkspaceMemory,
        device: &Device,
        stream: &Stream,
    ) -> Result<()> {
        assert!(self.borrowed.is_none(), "slots have their memory");
        self.own = None;
        if let WorkspaceMemory::Own(bytes) = memory {
            self.own = Some(device.alloc(bytes, stream)?);
        }
        Ok(())
    }

    /// Slots are about to be made anew: nothing is given back.
    pub fn forget_borrowed(&mut self) {
        self.borrowed = None;
    }

    /// What the router chose in `layer`, once that is on the host.
    fn routing(&self, layer: usize, tokens: usize, k: usize) -> Routing {
        let start = layer * self.host.tokens * k;
        let range = start..start + tokens * k;
        let ids = &self.host.ids.as_slice()[range.clone()];
        Routing {
            num_experts_per_tok: k,
            topk_ids: ids.iter().map(|&id| id as u16).collect(),
            topk_weights: self.host.weights.as_slice()[range].to_vec(),
        }
    }
}

impl Cuda {
    /// Microseconds of each kernel of a chunk, the last of a prompt that fills the context, and its tokens;
    /// kernels run one after the other, and what streams is waited for between them. The sequence is lost.
    pub(super) fn prefill_kernel_times(&mut self) -> Result<(usize, Vec<(&'static str, f64)>)> {
        let context = self.states.max_tokens();
        let tokens = self.prefill_chunk(context);
        let vocab = self.model.shape.vocab_size as u32;
        // As far apart as random ones, so that routers pick many experts.
        let ids: Vec<u32> = (0..tokens as u32)
            .map(|i| i.wrapping_mul(2_654_435_761) % vocab)
            .collect();
        self.states.active_mut().position = context - tokens;
        self.prefill.kernel_times = Some(LaunchTimer {
            start: self.device.new_event()?,
            end: self.device.new_event()?,
            us: RefCell::default(),
        });
        let result = self.prefill_all(&ids, 0..0, false, &mut |_, _, _, _| Vec::new());
        let times = self.prefill.kernel_times.take();
        result?;
        Ok((
            tokens,
            times.map_or(Vec::new(), |times| times.us.into_inner()),
        ))
    }

    /// A piece of a prompt, in chunks. With `admits` slots may change in the last of them. Where the
    /// prompt ends, and logits are wanted, slots in use as workspace get their experts back.
    pub(super) fn prefill_all(
        &mut self,
        ids: &[u32],
        rows: Range<usize>,
        admits: bool,
        on_routing: &mut OnAdmission<'_>,
    ) -> Result<Vec<f32>> {
        self.finish_slots()?;
        let ends = admits || !rows.is_empty();
        let plan = self.prefill.plan(self.model.store.num_slots(), ids.len());
        let base = self.workspace(plan.workspace_bytes)?;
        if self.prefill.host.tokens < plan.chunk_tokens {
            let shape = &self.model.shape;
            self.prefill.host = HostBuffers::new(&self.device, shape, plan.chunk_tokens)?;
        }
        let places = Workspace::new(&self.prefill.sizes, plan.chunk_tokens, plan.streaming);
        let mut logits = Vec::with_capacity(rows.len() * self.model.shape.vocab_size);
        let mut admitted = false;
        for (i, piece) in ids.chunks(plan.chunk_tokens).enumerate() {
            let first = i * plan.chunk_tokens;
            let last = first + piece.len() == ids.len();
            let inside = |row: usize| row.clamp(first, first + piece.len()) - first;
            let rows = inside(rows.start)..inside(rows.end);
            let chunk = (base, &places, &plan, piece);
            let admissions =
                self.prefill_chunk_at(chunk, rows, &mut logits, admits && last, on_routing)?;
            admitted |= !admissions.is_empty();
            self.note_admissions(&admissions);
        }
        if ends {
            self.give_slots_back()?;
        }
        if admitted {
            self.model.store.publish(&self.model.stream)?;
            self.model.stream.synchronize()?;
        }
        Ok(logits)
    }

    /// The address of a workspace: its own, or that of the last slots, which then hold no experts
    /// until [`give_slots_back`](Cuda::give_slots_back).
    fn workspace(&mut self, bytes: usize) -> Result<u64> {
        if let Some(own) = &self.prefill.own {
            return match bytes <= own.bytes() {
                true => Ok(own.address()),
                false => Err(BackendError::Other(format!(
                    "a prompt's shortest chunk needs {bytes} bytes on the GPU, {} are set aside;                      raise --vram",
                    own.bytes()
                ))),
            };
        }
        match &self.prefill.borrowed {
            Some(borrowed) if bytes <= borrowed.bytes => return Ok(borrowed.address),
            Some(_) => self.give_slots_back()?,
            None => {}
        }
        let (address, held) = self.model.store.borrow(bytes);
        self.prefill.borrowed = Some(Borrowed {
            address,
            bytes,
            held,
        });
        self.model.store.publish(&self.model.stream)?;
        Ok(address)
    }

    /// Slots in use as workspace get their experts back.
    pub(super) fn give_slots_back(&mut self) -> Result<()> {
        let Some(borrowed) = self.prefill.borrowed.take() else {
            return Ok(());
        };
        for (slot, (layer, expert)) in borrowed.held {
            self.model
                .store
                .fetch(layer, expert, slot, &self.model.stream)?;
        }
        self.model.store.publish(&self.model.stream)?;
        self.model.stream.synchronize()
    }

    fn prefill_chunk_at(
        &mut self,
        (base, places, plan, ids): (u64, &Workspace, &PrefillPlan, &[u32]),
        rows: Range<usize>,
        logits: &mut Vec<f32>,
        admits: bool,
        on_routing: &mut OnAdmission<'_>,
    ) -> Result<Vec<Admission>> {
        let dim = self.model.shape.hidden_size;
        let position = self.states.active().position;
        // The last chunk's copies from here are done: every chunk ends with a wait.
        let embeddings = &mut self.prefill.host.embeddings.as_mut_slice()[..ids.len() * dim];
        for (&id, out) in ids.iter().zip(embeddings.chunks_exact_mut(dim)) {
            let id = id as usize;
            self.embed_tokens.dequantize_rows(id..id + 1, out);
        }
        let picked = plan.streaming == Streaming::Picked;
        let (groups, mut host) = match picked {
            true => (Vec::new(), Some(self.picked_host(ids.len())?)),
            false => (self.plan_groups(base + places.ring as u64)?, None),
        };
        let chunk = Chunk {
            cuda: Parts {
                prefill: &self.prefill,
                model: &self.model,
                states: &self.states,
                slots: &self.slots,
                copies: &self.copies,
            },
            places,
            base,
            tokens: ids.len(),
            chunk_tokens: plan.chunk_tokens,
            position,
        };
        // Of a short chunk routing is told layer by layer, whether slots may change or not.
        let mut admitting = (admits || picked).then(|| Admitting::new(on_routing));
        match (&mut host, &mut admitting) {
            (Some(host), Some(admitting)) => {
                chunk.run_picked(&mut self.offload, host, admitting, admits)?;
            }
            (_, admitting) => chunk.run(&groups, admitting.as_mut())?,
        }
        let admissions = admitting.map(|admitting| admitting.admissions);
        self.prefill.picked = host.or(self.prefill.picked.take());
        for row in rows {
            let hidden = base + (places.hidden + 4 * row * dim) as u64;
            let row = (self.decode).head_of(&self.model, &mut self.offload, hidden)?;
            logits.extend_from_slice(row);
        }
        self.model.stream.synchronize()?;
        self.copies.synchronize()?;
        self.states.active_mut().position += ids.len();

        if let Some(admissions) = admissions {
            return Ok(admissions);
        }
        let k = self.model.shape.moe.num_experts_per_tok;
        for layer in 0..self.model.shape.num_layers() {
            let routing = self.prefill.routing(layer, ids.len(), k);
            on_routing(layer, position, &routing, Offer::of_any(0));
        }
        Ok(Vec::new())
    }

    /// The host's lists for a short chunk.
    fn picked_host(&mut self, tokens: usize) -> Result<PickedHost> {
        match self.prefill.picked.take() {
            Some(host) if host.tokens >= tokens => Ok(host),
            _ => PickedHost::new(&self.device, &self.model.shape, tokens),
        }
    }

    /// Cuts every layer's experts into groups, and says where each expert will be found: those that
    /// stream, in the ring.
    fn plan_groups(&mut self, ring: u64) -> Result<Vec<Vec<Group>>> {
        let (layers, experts) = (
            self.model.shape.num_layers(),
            self.model.shape.moe.num_experts,
        );
        let prefill = &mut self.prefill;
        let group_bytes = prefill.sizes.ring_buffer_bytes(Streaming::All);
        let layout = self.model.store.layout;
        let (up_bytes, blob_bytes) = (layout.down_offset as u64, layout.blob_bytes as u64);
        let blobs = prefill.host_blobs.as_mut_slice();
        let mut all = Vec::with_capacity(layers);
        let mut used = 0;
        for layer in 0..layers {
            let table = &mut blobs[layer * 2 * (experts + 1)..(layer + 1) * 2 * (experts + 1)];
            let (up, down) = table.split_at_mut(experts + 1);
            let missing = |e: usize| self.model.store.resident(layer, e) == 0;
            let size = match (0..experts).any(missing) {
                true => GROUP_EXPERTS,
                false => experts,
            };
            let mut groups: Vec<Group> = (0..experts)
                .step_by(size)
                .map(|first| Group {
                    first,
                    count: size.min(experts - first),
                    ring: None,
                })
                .collect();
            // Ring buffers go round in the order of use: gate and up of all groups, then down.
            for part in 0..2 {
                for group in &mut groups {
                    if (group.first..group.first + group.count).any(missing) {
                        group.ring.get_or_insert([0; 2])[part] = used % RING;
                        used += 1;
                    }
                }
            }
            for group in &groups {
                for e in group.first..group.first + group.count {
                    let resident = self.model.store.resident(layer, e);
                    (up[e], down[e]) = match group.ring {
                        Some(buffers) if resident == 0 => {
                            let buffer = buffers.map(|b| ring + (b * group_bytes) as u64);
                            let i = (e - group.first) as u64;
                            let down_at = buffer[1] + i * (blob_bytes - up_bytes);
                            (buffer[0] + i * up_bytes, down_at.wrapping_sub(up_bytes))
                        }
                        _ => (resident, resident),
                    };
                }
            }
            (up[experts], down[experts]) = {
                let shared = self.model.dense.layers[layer].shared_blob;
                (shared, shared)
            };
            all.push(groups);
        }
        let bytes = size_of_val(&*blobs);
        let from = blobs.as_ptr().cast();
        // SAFETY: both tables have this size; the host's changes after the chunk's last wait only.
        unsafe {
            self.model
                .stream
                .copy_to_device(prefill.blobs.address(), from, bytes)?
        };
        Ok(all)
    }
}
