//! Where the buffers of a chunk lie in its workspace.

use super::super::abi::ExpertLayout;
use crate::backend::ModelShape;

/// Buffers start on this many bytes.
const ALIGN: usize = 256;

/// Where buffers lie in the workspace: offsets in bytes.
#[derive(Clone, Debug, Default)]
pub struct Places {
    pub hidden: usize,
    pub high: usize,
    pub low: usize,
    pub scale: usize,
    // Of a mixer
    pub projected: [usize; 3],
    pub conv: [usize; 5],
    pub mixed: usize,
    pub gated: usize,
    pub wide_high: usize,
    pub wide_low: usize,
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
    pub expert_low: usize,
    pub expert_scale: usize,
    pub expert_out: usize,
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

impl Places {
    pub fn new(
        shape: &ModelShape,
        layouts: [&ExpertLayout; 2],
        tokens: usize,
        [ring, kept]: [usize; 2],
    ) -> Self {
        let t = tokens;
        let dim = shape.hidden_size;
        let padded = dim.next_multiple_of(64);
        let (attention, net, moe) = (&shape.attention, &shape.delta_net, &shape.moe);
        let k = moe.num_experts_per_tok;
        let experts = moe.num_experts;
        let wide = net.value_dim().max(attention.o_proj_cols());
        let wide_padded = wide.next_multiple_of(64);
        let mut at = Bump(0);
        let mut p = Places {
            hidden: at.floats(t * dim),
            high: at.take(2 * t * padded),
            low: at.take(2 * t * padded),
            scale: at.floats(t),
            ..Places::default()
        };
        let start = at.0;

        p.projected = [
            at.floats(t * net.qkvz_rows().max(attention.q_proj_rows())),
            at.floats(t * net.ba_rows().max(attention.kv_rows())),
            at.floats(t * attention.kv_rows()),
        ];
        // Attention keeps its queries, two f16 and a scale per head, where the conv has its own.
        let query_bytes = 2 * t * attention.o_proj_cols();
        p.conv = [
            at.take((4 * t * net.key_dim()).max(query_bytes)),
            at.take((4 * t * net.key_dim()).max(query_bytes)),
            at.floats(t * net.value_dim()),
            at.floats(t * net.num_value_heads.max(attention.num_attention_heads)),
            at.floats(t * net.num_value_heads),
        ];
        p.mixed = at.floats(t * wide);
        p.gated = at.floats(t * net.value_dim());
        p.wide_high = at.take(2 * t * wide_padded);
        p.wide_low = at.take(2 * t * wide_padded);
        p.wide_scale = at.floats(t);
        let mixer_end = at.0;

        at.0 = start;
        let rows = t * (k + 1);
        let stride = stride(layouts);
        p.normed = at.floats(t * dim);
        p.logits = at.floats(t * experts);
        p.topk_ids = at.floats(t * k);
        p.topk_weights = at.floats(t * k);
        p.gates = at.floats(t);
        p.counts = at.floats(t.div_ceil(64) * experts);
        p.offsets = at.floats(experts + 2);
        p.tiles = at.take(16 * ((t * k).div_ceil(128) + experts + t.div_ceil(128)));
        p.tile_offsets = at.floats(experts + 2);
        p.rows = at.floats(rows);
        p.positions = at.floats(rows);
        p.expert_high = at.take(2 * rows * stride);
        p.expert_low = at.take(2 * rows * stride);
        p.expert_scale = at.floats(rows);
        // The products of down take the place of what gate and up gave, which was split by then.
        p.expert_hidden = at.0;
        p.expert_out = at.0;
        at.floats(rows * dim.max(stride));
        at.0 = at.0.max(mixer_end);
        p.ring = at.take(ring);
        p.kept = at.take(kept);
        p.bytes = at.0;
        p
    }
}

pub fn stride(layouts: [&ExpertLayout; 2]) -> usize {
    let intermediate = layouts.map(|l| l.intermediate as usize);
    intermediate[0].max(intermediate[1]).next_multiple_of(64)
}
