//! How a prompt is executed on a GPU: what it is cut into, where the buffers of a chunk lie, and
//! whose memory they take.
//!
//! The engine carries out what is computed here and the planner predicts it, so that neither knows
//! a chunk, a ring or a margin that the other does not. Every chunk streams all experts that are not in
//! VRAM over PCIe, so fewer and longer chunks move fewer bytes; but a chunk's workspace takes the
//! place of expert slots, whose experts then stream, too.

use super::footprint::{Footprint, ShapeNumbers};
use super::precision::Precision;

/// Left free below a budget: the driver takes memory in pages, and grows a little at first launches.
pub const MARGIN_BYTES: u64 = 48 << 20;

/// The longest chunk. Above it the bus is idle most of the time on every machine that was measured,
/// and Ctrl-C waits for a chunk.
pub const MAX_CHUNK_TOKENS: usize = 16_384;
/// Chunks below it are not tried: their experts' bytes cost more than their workspace.
const MIN_CHUNK_TOKENS: usize = 256;
/// Chunks are a multiple of this, the tokens of a tile of the matrix products.
const CHUNK_UNIT: usize = 128;

/// Experts whose matrices are copied and computed together.
pub const GROUP_EXPERTS: usize = 64;
/// Groups under way. Three keep the bus busy; more ride out layers with long mixers.
pub const RING_GROUPS: usize = 5;
/// Buffers start on this many bytes.
const ALIGN: usize = 256;

/// Experts that come through the ring together where only picked ones do, and the batches under way.
pub const PICKED_BATCH: usize = 16;
pub const PICKED_RING: usize = 10;
/// Chunks below this have so few copies that half as many batches will do.
const LONG_PICKED_TOKENS: usize = 1024;

/// The longest chunk of which only the experts that were picked come to the GPU, the CPU computing
/// some of them ([`sharing`](super::sharing)). Longer ones pick nearly all experts, of so many tokens that
/// the CPU's share is small. On an H200 held to 14 GiB 512 tokens take 0.33 s this way and 0.58 the other,
/// 2,048 take 0.50 and 0.59, 4,096 take 0.60 to 0.64 and 0.60, 8,192 take 0.84 and 0.69.
pub const MAX_PICKED_TOKENS: usize = 3072;

/// Which missing experts of a chunk come over PCIe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Streaming {
    /// All, ahead of the router
    All,
    /// Of those that the router picked, what the CPU does not compute
    Picked,
}

/// Batches of a layer that are copied before its router has chosen, while the mixer runs: nearly all
/// experts are picked by a chunk long enough. By its tokens alone, as who computes an expert must not
/// depend on how far copies have got; as many as an H200 copies in that time.
pub fn batches_ahead(chunk_tokens: usize) -> usize {
    match chunk_tokens {
        0..256 => 0,
        tokens => (tokens / 64 + 6)
            .div_ceil(PICKED_BATCH)
            .min(PICKED_RING / 2),
    }
}

/// What a user may choose of a prompt's execution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrefillSettings {
    pub precision: Precision,
    /// The longest chunk, in place of [`MAX_CHUNK_TOKENS`]
    pub chunk_tokens: Option<usize>,
    /// The longest chunk of which only picked experts come to the GPU, at most [`MAX_PICKED_TOKENS`]. With
    /// none the CPU computes no expert of a prompt, whose bits then do not depend on where experts are.
    pub picked_tokens: usize,
}

impl Default for PrefillSettings {
    fn default() -> Self {
        PrefillSettings {
            precision: Precision::default(),
            chunk_tokens: None,
            picked_tokens: MAX_PICKED_TOKENS,
        }
    }
}

/// Sizes that a prompt's execution follows from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrefillSizes {
    pub shape: ShapeNumbers,
    /// One routed expert in the kernels' layout, and the part of it that gate and up take
    pub expert_bytes: usize,
    pub expert_up_bytes: usize,
    pub precision: Precision,
}

impl PrefillSettings {
    /// Prompts up to this many tokens go through decode steps, eight tokens to a step. On an H200 held to
    /// 14 GiB a step of eight takes 39 ms, a chunk of eight that shares its experts 50, one that streams all
    /// 560.
    pub fn stepped_tokens(&self) -> usize {
        match self.picked_tokens {
            0 => 48,
            _ => 8,
        }
    }

    /// How the missing experts of a chunk come, where `slots` hold some of `experts`.
    fn streaming(&self, chunk_tokens: usize, slots: usize, experts: usize) -> Streaming {
        match chunk_tokens <= self.picked_tokens.min(MAX_PICKED_TOKENS) && slots < experts {
            true => Streaming::Picked,
            false => Streaming::All,
        }
    }

    fn longest_chunk(&self) -> usize {
        self.chunk_tokens.unwrap_or(MAX_CHUNK_TOKENS).max(1)
    }
}

impl PrefillSizes {
    /// Of a model that is not loaded. An expert's three matrices are of one size.
    pub fn of(footprint: &Footprint, precision: Precision) -> Self {
        PrefillSizes {
            shape: footprint.shape.clone(),
            expert_bytes: footprint.expert_bytes as usize,
            expert_up_bytes: footprint.expert_bytes as usize * 2 / 3,
            precision,
        }
    }

    /// Values of a row between an expert's projections, routed or shared.
    pub fn expert_stride(&self) -> usize {
        let s = &self.shape;
        let longest = s
            .moe_intermediate_size
            .max(s.shared_expert_intermediate_size);
        (longest as usize).next_multiple_of(64)
    }

    /// Buffers of the ring.
    pub fn ring_buffers(&self, streaming: Streaming, chunk_tokens: usize) -> usize {
        match streaming {
            Streaming::All => RING_GROUPS,
            Streaming::Picked if chunk_tokens < LONG_PICKED_TOKENS => PICKED_RING / 2,
            Streaming::Picked => PICKED_RING,
        }
    }

    /// Bytes of one of them: gate and up of a group of experts, or their down; or a batch of whole experts.
    pub fn ring_buffer_bytes(&self, streaming: Streaming) -> usize {
        let part = self
            .expert_up_bytes
            .max(self.expert_bytes - self.expert_up_bytes);
        let experts = self.shape.num_experts as usize;
        match streaming {
            Streaming::All => GROUP_EXPERTS.min(experts) * part,
            Streaming::Picked => PICKED_BATCH.min(experts) * self.expert_bytes,
        }
    }

    /// Experts of a layer that a prompt's last chunk can keep for slots: 64 of 512, which are 107 MB.
    pub fn kept_experts(&self) -> usize {
        let experts = self.shape.num_experts as usize;
        (experts / 8).max(4).min(experts)
    }

    /// Arithmetic of one routed expert for one token.
    pub fn expert_flops(&self) -> u64 {
        6 * self.shape.hidden_size * self.shape.moe_intermediate_size
    }

    fn total_experts(&self) -> usize {
        let s = &self.shape;
        ((s.num_attention_layers + s.num_delta_net_layers) * s.num_experts) as usize
    }
}

/// Where the buffers of a chunk lie: offsets in bytes from the workspace's start. The mixer's and the
/// experts' buffers share their memory. Low terms are absent where products have one term.
#[derive(Clone, Debug, Default)]
pub struct Workspace {
    /// `[T, D]` f32
    pub hidden: usize,
    /// `[T, D]` f16: the terms of what a block multiplies, and a scale per token
    pub high: usize,
    pub low: Option<usize>,
    pub scale: usize,
    // Of a mixer
    pub projected: [usize; 3],
    /// q, k, v, decay and beta of a delta net; attention keeps its queries' terms and scales there
    pub conv: [usize; 5],
    pub mixed: usize,
    pub gated: usize,
    pub wide_high: usize,
    pub wide_low: Option<usize>,
    pub wide_scale: usize,
    // Of the experts
    pub normed: usize,
    pub logits: usize,
    pub topk_ids: usize,
    pub topk_weights: usize,
    pub gates: usize,
    pub counts: usize,
    pub offsets: usize,
    pub tiles: usize,
    pub tile_offsets: usize,
    pub rows: usize,
    pub positions: usize,
    pub expert_hidden: usize,
    pub expert_high: usize,
    pub expert_low: Option<usize>,
    pub expert_scale: usize,
    pub expert_out: usize,
    /// Experts that stream through, and those kept for slots
    pub ring: usize,
    pub kept: usize,
    pub bytes: usize,
}

/// A bump allocator over offsets.
struct Bump(usize);

impl Bump {
    fn take(&mut self, bytes: usize) -> usize {
        let start = self.0;
        self.0 += bytes.next_multiple_of(ALIGN);
        start
    }

    fn floats(&mut self, count: usize) -> usize {
        self.take(4 * count)
    }
}

impl Workspace {
    /// Of a chunk of `tokens`.
    pub fn new(sizes: &PrefillSizes, tokens: usize, streaming: Streaming) -> Self {
        let padded = (sizes.shape.hidden_size as usize).next_multiple_of(64);
        let low = |at: &mut Bump, bytes: usize| {
            (sizes.precision == Precision::Exact).then(|| at.take(bytes))
        };
        let mut at = Bump(0);
        let mut places = Workspace {
            hidden: at.floats(tokens * sizes.shape.hidden_size as usize),
            high: at.take(2 * tokens * padded),
            low: low(&mut at, 2 * tokens * padded),
            scale: at.floats(tokens),
            ..Workspace::default()
        };
        let start = at.0;
        places.place_mixer(&mut at, sizes, tokens, low);
        let mixer_end = std::mem::replace(&mut at.0, start);
        places.place_experts(&mut at, sizes, tokens, streaming, low);
        at.0 = at.0.max(mixer_end);
        places.ring =
            at.take(sizes.ring_buffers(streaming, tokens) * sizes.ring_buffer_bytes(streaming));
        // Picked experts go from the ring to their slots.
        places.kept = match streaming {
            Streaming::All => at.take(sizes.kept_experts() * sizes.expert_bytes),
            Streaming::Picked => at.0,
        };
        places.bytes = at.0;
        places
    }

    fn place_mixer(
        &mut self,
        at: &mut Bump,
        sizes: &PrefillSizes,
        t: usize,
        low: impl Fn(&mut Bump, usize) -> Option<usize>,
    ) {
        let s = Dims::of(&sizes.shape);
        let wide = s.value_dim.max(s.q_dim);
        let wide_padded = wide.next_multiple_of(64);
        self.projected = [
            at.floats(t * (2 * s.key_dim + 2 * s.value_dim).max(2 * s.q_dim)),
            at.floats(t * (2 * s.value_heads).max(s.kv_dim)),
            at.floats(t * s.kv_dim),
        ];
        let key_or_query = (4 * t * s.key_dim).max(2 * t * s.q_dim);
        self.conv = [
            at.take(key_or_query),
            at.take(key_or_query),
            at.floats(t * s.value_dim),
            at.floats(t * s.value_heads.max(s.heads)),
            at.floats(t * s.value_heads),
        ];
        self.mixed = at.floats(t * wide);
        self.gated = at.floats(t * s.value_dim);
        self.wide_high = at.take(2 * t * wide_padded);
        self.wide_low = low(at, 2 * t * wide_padded);
        self.wide_scale = at.floats(t);
    }

    fn place_experts(
        &mut self,
        at: &mut Bump,
        sizes: &PrefillSizes,
        t: usize,
        streaming: Streaming,
        low: impl Fn(&mut Bump, usize) -> Option<usize>,
    ) {
        let s = &sizes.shape;
        let (dim, experts) = (s.hidden_size as usize, s.num_experts as usize);
        let k = s.num_experts_per_tok as usize;
        let rows = t * (k + 1);
        let stride = sizes.expert_stride();
        self.normed = at.floats(t * dim);
        self.logits = at.floats(t * experts);
        self.topk_ids = at.floats(t * k);
        self.topk_weights = at.floats(t * k);
        self.gates = at.floats(t);
        self.counts = at.floats(t.div_ceil(64) * experts);
        self.offsets = at.floats(experts + 2);
        self.tiles = at.take(16 * ((t * k).div_ceil(128) + experts + t.div_ceil(128)));
        self.tile_offsets = at.floats(experts + 2);
        self.rows = at.floats(rows);
        self.positions = at.floats(rows);
        self.expert_high = at.take(2 * rows * stride);
        self.expert_low = low(at, 2 * rows * stride);
        self.expert_scale = at.floats(rows);
        // Where all experts' gate and up come first, the products of down take the place of what those gave,
        // which was split by then; where whole experts come batch by batch, there is both at once.
        self.expert_hidden = match streaming {
            Streaming::Picked => at.floats(rows * stride),
            Streaming::All => at.0,
        };
        self.expert_out = at.0;
        at.floats(rows * dim.max(stride));
    }
}

/// Widths of the mixers' activations.
struct Dims {
    key_dim: usize,
    value_dim: usize,
    value_heads: usize,
    q_dim: usize,
    kv_dim: usize,
    heads: usize,
}

impl Dims {
    fn of(s: &ShapeNumbers) -> Self {
        Dims {
            key_dim: (s.linear_num_key_heads * s.linear_key_head_dim) as usize,
            value_dim: (s.linear_num_value_heads * s.linear_value_head_dim) as usize,
            value_heads: s.linear_num_value_heads as usize,
            q_dim: (s.num_attention_heads * s.head_dim) as usize,
            kv_dim: (s.num_key_value_heads * s.head_dim) as usize,
            heads: s.num_attention_heads as usize,
        }
    }
}

/// Whose memory a prompt's workspace is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WorkspaceMemory {
    /// Memory of its own, this many bytes
    Own(usize),
    /// That of expert slots, whose experts come back after the prompt
    Slots,
}

/// What is left on a GPU for expert slots and a prompt's workspace.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    pub bytes: u64,
    /// Slots that a placement would fill, however many fit
    pub wanted_slots: usize,
    pub slot_bytes: u64,
    /// The longest prompt
    pub context_tokens: usize,
    pub settings: PrefillSettings,
}

/// Whose memory the workspace takes: its own where there is room for all slots beside it, or too few
/// slots to borrow from.
///
/// # Errors
/// The bytes that are missing for the smallest workspace.
pub fn workspace_memory(sizes: &PrefillSizes, room: &Room) -> Result<WorkspaceMemory, u64> {
    let longest = room.context_tokens.clamp(1, room.settings.longest_chunk());
    let slots = (room.wanted_slots as u64).min(room.bytes / room.slot_bytes.max(1)) as usize;
    let bytes = |tokens, slots| {
        let streaming = (room.settings).streaming(tokens, slots, sizes.total_experts());
        Workspace::new(sizes, tokens, streaming).bytes as u64
    };
    // Room for a chunk either way: slots may be emptied, or all be filled, while the memory stays.
    let longest_picked = longest.min(room.settings.picked_tokens.min(MAX_PICKED_TOKENS));
    let largest = bytes(longest, sizes.total_experts()).max(bytes(longest_picked.max(1), 0));
    let smallest = bytes(longest.min(MIN_CHUNK_TOKENS), slots);
    let wanted_bytes = room.wanted_slots as u64 * room.slot_bytes;
    if wanted_bytes + largest <= room.bytes {
        return Ok(WorkspaceMemory::Own(largest as usize));
    }
    if wanted_bytes >= smallest && room.bytes >= 2 * smallest {
        return Ok(WorkspaceMemory::Slots);
    }
    if smallest > room.bytes {
        return Err(smallest - room.bytes);
    }
    let beside_slots = room.bytes.saturating_sub(wanted_bytes);
    let own = largest.min(beside_slots.max(room.bytes / 2).max(smallest));
    Ok(WorkspaceMemory::Own(own as usize))
}

/// As [`workspace_memory`], for a plan that knows its slots but not what they leave free: few slots
/// leave room for a workspace.
pub fn planned_memory(
    sizes: &PrefillSizes,
    slots: usize,
    prompt_tokens: usize,
    settings: &PrefillSettings,
) -> WorkspaceMemory {
    let smallest = prefill_plan(sizes, WorkspaceMemory::Slots, 0, prompt_tokens, settings);
    match slots > 2 * smallest.borrowed_slots {
        true => WorkspaceMemory::Slots,
        false => WorkspaceMemory::Own(usize::MAX),
    }
}

/// How one prompt is executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrefillPlan {
    pub chunk_tokens: usize,
    pub streaming: Streaming,
    pub workspace_bytes: usize,
    /// Slots whose memory the workspace takes meanwhile
    pub borrowed_slots: usize,
}

/// Cuts a prompt of `prompt_tokens` into equal chunks, of which there are as few as move the fewest
/// bytes over PCIe: each chunk streams what is not in VRAM, and what was borrowed comes back once.
///
/// `slots` hold experts. Where no workspace fits, the shortest chunk's is given: callers of
/// [`workspace_memory`] have made sure that it does.
pub fn prefill_plan(
    sizes: &PrefillSizes,
    memory: WorkspaceMemory,
    slots: usize,
    prompt_tokens: usize,
    settings: &PrefillSettings,
) -> PrefillPlan {
    let total = sizes.total_experts();
    let mut best: Option<(usize, PrefillPlan)> = None;
    for (chunks, chunk) in cuts(prompt_tokens.max(1), settings.longest_chunk()) {
        let streaming = settings.streaming(chunk, slots, total);
        let workspace_bytes = Workspace::new(sizes, chunk, streaming).bytes;
        let borrowed_slots = match memory {
            WorkspaceMemory::Own(_) => 0,
            WorkspaceMemory::Slots => workspace_bytes.div_ceil(sizes.expert_bytes.max(1)),
        };
        let plan = PrefillPlan {
            chunk_tokens: chunk,
            streaming,
            workspace_bytes,
            borrowed_slots,
        };
        let fits = match memory {
            WorkspaceMemory::Own(bytes) => workspace_bytes <= bytes,
            WorkspaceMemory::Slots => borrowed_slots <= slots,
        };
        let streamed = total - slots.saturating_sub(borrowed_slots).min(total);
        let cost = match fits {
            true => chunks * streamed + borrowed_slots,
            false => usize::MAX,
        };
        // What does not fit is kept only as the last resort: the shorter, the better.
        if best
            .as_ref()
            .is_none_or(|&(least, _)| cost < least || (cost == usize::MAX && least == usize::MAX))
        {
            best = Some((cost, plan));
        }
    }
    best.expect("there is a cut").1
}

/// Chunks and their length: one, two, ... equal ones of at most `longest` tokens.
fn cuts(tokens: usize, longest: usize) -> impl Iterator<Item = (usize, usize)> {
    let fewest = tokens.div_ceil(longest);
    let most = tokens.div_ceil(MIN_CHUNK_TOKENS.min(longest)).max(fewest);
    (fewest..=most).map(move |chunks| {
        let even = tokens.div_ceil(chunks).next_multiple_of(CHUNK_UNIT);
        let chunk = even.min(longest).min(tokens);
        (tokens.div_ceil(chunk), chunk)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::planning::footprint::tests::qwen3_next_80b;

    fn sizes(precision: Precision) -> PrefillSizes {
        PrefillSizes::of(&qwen3_next_80b(), precision)
    }

    #[test]
    fn one_term_needs_less_memory_per_token() {
        let bytes =
            |precision, tokens| Workspace::new(&sizes(precision), tokens, Streaming::All).bytes;
        let per_token = |p| (bytes(p, 16_384) - bytes(p, 8192)) / 8192;
        assert_eq!(per_token(Precision::Exact), 151_816);
        assert_eq!(per_token(Precision::F16), 139_528);
        let fixed = bytes(Precision::F16, 1);
        assert!((460e6..470e6).contains(&(fixed as f64)), "{fixed}");
        // Picked experts need a shorter ring, and none aside.
        let picked = Workspace::new(&sizes(Precision::F16), 1, Streaming::Picked).bytes;
        assert!((133e6..135e6).contains(&(picked as f64)), "{picked}");
    }

    #[test]
    fn a_long_prompt_has_equal_chunks_and_a_short_one_borrows_for_its_own_length() {
        let plan = |slots, tokens| {
            let memory = WorkspaceMemory::Slots;
            prefill_plan(
                &sizes(Precision::F16),
                memory,
                slots,
                tokens,
                &PrefillSettings::default(),
            )
        };
        let long = plan(7000, 32_768);
        assert_eq!(long.chunk_tokens, 16_384);
        assert_eq!(plan(7000, 20_000).chunk_tokens, 10_112);
        let short = plan(7000, 512);
        assert_eq!(
            (short.chunk_tokens, short.streaming),
            (512, Streaming::Picked)
        );
        assert_eq!(long.streaming, Streaming::All);
        assert_eq!(
            plan(24_576, 512).streaming,
            Streaming::All,
            "none is missing"
        );
        assert!(short.borrowed_slots < 350 && long.borrowed_slots > 1500);
        // Few slots: what fits.
        let small = plan(600, 32_768);
        assert!(small.borrowed_slots <= 600 && small.chunk_tokens >= 2048);
        assert_eq!(plan(0, 600).chunk_tokens, 256, "nothing fits");
    }

    #[test]
    fn a_given_chunk_is_an_upper_bound() {
        let memory = WorkspaceMemory::Slots;
        let plan = |tokens, chunk| {
            let settings = PrefillSettings {
                chunk_tokens: Some(chunk),
                ..PrefillSettings::default()
            };
            prefill_plan(&sizes(Precision::F16), memory, 7000, tokens, &settings).chunk_tokens
        };
        assert_eq!(plan(32_768, 4096), 4096);
        assert_eq!(plan(100, 64), 64);
        assert_eq!(plan(10, 64), 10);
        assert_eq!(plan(70, 24), 24);
    }

    #[test]
    fn the_workspace_is_its_own_where_slots_leave_room_or_are_few() {
        let sizes = sizes(Precision::F16);
        let room = |bytes: u64, wanted_slots| Room {
            bytes,
            wanted_slots,
            slot_bytes: 1_671_168,
            context_tokens: 32_768,
            settings: PrefillSettings::default(),
        };
        let largest = Workspace::new(&sizes, MAX_CHUNK_TOKENS, Streaming::All).bytes;
        let memory = |bytes, slots| workspace_memory(&sizes, &room(bytes, slots));
        assert_eq!(memory(60 << 30, 24_576), Ok(WorkspaceMemory::Own(largest)));
        assert_eq!(memory(11 << 30, 24_576), Ok(WorkspaceMemory::Slots));
        assert_eq!(memory(11 << 30, 0), Ok(WorkspaceMemory::Own(largest)));
        assert!(
            matches!(memory(300 << 20, 24_576), Ok(WorkspaceMemory::Own(bytes)) if bytes <= 300 << 20)
        );
        let smallest = Workspace::new(&sizes, MIN_CHUNK_TOKENS, Streaming::Picked).bytes as u64;
        assert_eq!(memory(smallest - 1, 7000), Err(1));
    }

    #[test]
    fn every_cut_covers_the_prompt() {
        for tokens in [1, 127, 128, 129, 255, 257, 5000, 16_385, 262_144] {
            for longest in [1, 24, 64, 4096, MAX_CHUNK_TOKENS] {
                for (chunks, chunk) in cuts(tokens, longest).take(3000) {
                    assert!(chunk > 0 && chunk <= longest && chunks == tokens.div_ceil(chunk));
                }
            }
        }
    }
}
