//! The mixture of experts: each chosen expert meets all of its tokens at once.
//!
//! Two jobs per layer: gate and up rows with SwiGLU, then down rows of all experts, added up per
//! output row in order of expert id. Slices that run from gate to down without the barrier in
//! between would need a partial result per expert and slice to give the same bits for any number
//! of threads; writing and reading those costs more than the barrier.

use std::cell::RefCell;

use super::activations::{Activations, Block, IntegerBlocks};
use super::isa::{Isa, dispatch};
use super::layout::{TILE_COLS, TILE_ROWS};
use super::linear::{Linear, Panel, View, with_panels, with_tokens_for};
use super::math::silu;
use super::simd::{Simd, lanes, lanes_mut};
use super::threads::{Parts, Pool};
use crate::backend::{Result, Routing};

/// One SwiGLU block, `down(silu(gate x) * up x)`.
pub struct Expert {
    pub gate: Linear,
    pub up: Linear,
    pub down: Linear,
}

impl Expert {
    /// Bytes that one token reads.
    pub fn bytes(&self) -> usize {
        self.gate.bytes() + self.up.bytes() + self.down.bytes()
    }

    /// Blocks of 64 intermediate values.
    pub(super) fn blocks(&self) -> usize {
        self.gate.rows.div_ceil(TILE_COLS)
    }
}

/// Buffers of one chunk, kept between calls.
#[derive(Default)]
pub struct Buffers {
    groups: Vec<Group>,
    /// Of each expert that has a group
    group_of: Vec<u32>,
    /// Tokens of all groups, and the weight of each there
    tokens: Vec<u32>,
    weights: Vec<f32>,
    /// (group, block) of each gate-and-up job
    jobs: Vec<(u32, u32)>,
    /// Intermediate values: of each group, `[blocks, tokens]`
    hidden: Vec<Block>,
    hidden_integers: IntegerBlocks,
}

/// One expert and its tokens.
struct Group {
    /// Index among the experts; their number stands for the shared expert.
    expert: usize,
    /// First of its tokens in `tokens` and `weights`
    first_token: usize,
    tokens: usize,
    /// First of its blocks in `hidden`
    first_block: usize,
}

/// One token's choice of one expert; the number of experts stands for the shared one.
#[derive(Clone, Copy, Debug)]
pub struct Pick {
    pub token: u32,
    pub expert: u16,
    pub weight: f32,
}

impl Buffers {
    /// Sorts picks, which come in ascending order of tokens, by expert; `count` experts in all, of
    /// which `expert(i)` is one.
    fn group<'a>(
        &mut self,
        count: usize,
        expert: impl Fn(usize) -> &'a Expert,
        picks: impl Iterator<Item = Pick> + Clone,
    ) {
        self.groups.clear();
        self.groups.extend((0..count).map(|expert| Group {
            expert,
            first_token: 0,
            tokens: 0,
            first_block: 0,
        }));
        for pick in picks.clone() {
            self.groups[usize::from(pick.expert)].tokens += 1;
        }
        self.groups.retain(|group| group.tokens > 0);
        let (mut token, mut block) = (0, 0);
        self.group_of.resize(count, 0);
        for (i, group) in self.groups.iter_mut().enumerate() {
            (group.first_token, group.first_block) = (token, block);
            token += group.tokens;
            block += group.tokens * expert(group.expert).blocks();
            self.group_of[group.expert] = i as u32;
        }
        self.tokens.resize(token, 0);
        self.weights.resize(token, 0.0);
        self.hidden.resize(block, [0.0; TILE_COLS]);

        // Tokens go in ascending order, so `first_token` serves as the place to write next.
        for pick in picks {
            let group = &mut self.groups[self.group_of[usize::from(pick.expert)] as usize];
            self.tokens[group.first_token] = pick.token;
            self.weights[group.first_token] = pick.weight;
            group.first_token += 1;
        }
        for group in &mut self.groups {
            group.first_token -= group.tokens;
        }

        self.jobs.clear();
        for (i, group) in self.groups.iter().enumerate() {
            let blocks = 0..expert(group.expert).blocks() as u32;
            self.jobs.extend(blocks.map(|block| (i as u32, block)));
        }
    }
}

/// `hidden += sum_k weight_k * expert_k(x) + gate * shared(x)`.
///
/// - `x`: the normed tokens, integer form included if any matrix reads it
/// - `gates`: `[T]`, the sigmoid of the shared expert's gate
/// - `all_tokens`: 0, 1, 2, .. at least T of them
/// - `out`: `[T, hidden_size]`
///
/// # Errors
/// If a worker thread failed.
#[allow(clippy::too_many_arguments)]
pub fn add_experts(
    pool: &mut Pool,
    isa: Isa,
    experts: &[Expert],
    shared: &Expert,
    routing: &Routing,
    gates: &[f32],
    x: &Activations,
    all_tokens: &[u32],
    buffers: &mut Buffers,
    out: &mut [f32],
) -> Result<()> {
    let k = routing.num_experts_per_tok;
    let shared_id = experts.len() as u16;
    let expert = |id: usize| experts.get(id).unwrap_or(shared);
    let routed = (routing.topk_ids.iter().zip(&routing.topk_weights)).enumerate();
    let routed = routed.map(|(i, (&expert, &weight))| Pick {
        token: (i / k) as u32,
        expert,
        weight,
    });
    let of_all = gates.iter().enumerate().map(|(token, &weight)| Pick {
        token: token as u32,
        expert: shared_id,
        weight,
    });
    buffers.group(experts.len() + 1, expert, routed.chain(of_all));
    let nothing = || Ok(());
    add_groups(
        pool,
        isa,
        expert,
        gates.len(),
        x,
        all_tokens,
        buffers,
        nothing,
        out,
    )
}

/// `out += sum over picks of weight * expert(x)`, of routed experts alone; picks in ascending order
/// of tokens.
///
/// - `x`: `[T]` normed tokens, integer form included if any matrix reads it
/// - `all_tokens`: 0, 1, 2, .. at least T of them
/// - `beside`: runs on this thread while the others begin
/// - `out`: `[T, hidden_size]`
///
/// # Errors
/// If a worker thread failed.
#[allow(clippy::too_many_arguments)]
pub fn add_picks(
    pool: &mut Pool,
    isa: Isa,
    experts: &[Expert],
    picks: &[Pick],
    x: &Activations,
    all_tokens: &[u32],
    buffers: &mut Buffers,
    beside: impl FnOnce() -> Result<()>,
    out: &mut [f32],
) -> Result<()> {
    let expert = |id: usize| &experts[id];
    buffers.group(experts.len(), expert, picks.iter().copied());
    add_groups(
        pool, isa, expert, x.tokens, x, all_tokens, buffers, beside, out,
    )
}

/// The groups' experts, each with all of its tokens. Runs `beside` on this thread meanwhile.
#[allow(clippy::too_many_arguments)]
fn add_groups<'a>(
    pool: &mut Pool,
    isa: Isa,
    expert: impl Fn(usize) -> &'a Expert + Sync,
    token_count: usize,
    x: &Activations,
    all_tokens: &[u32],
    buffers: &mut Buffers,
    beside: impl FnOnce() -> Result<()>,
    out: &mut [f32],
) -> Result<()> {
    let Buffers {
        groups,
        tokens,
        weights,
        jobs,
        hidden,
        hidden_integers,
        ..
    } = buffers;
    let expert_of = |group: &Group| expert(group.expert);
    let Some(first) = groups.first() else {
        return beside();
    };
    let down = &expert_of(first).down;
    let (rows, tile_rows) = (down.rows, down.tile_rows());
    let integers = (groups.iter()).find_map(|g| expert_of(g).down.reads_integers());
    hidden_integers.resize(isa, hidden.len(), integers);

    {
        let hidden = Parts::new(hidden);
        let quantized = hidden_integers.parts();
        let run_job = |job: usize| {
            let (group, block) = (&groups[jobs[job].0 as usize], jobs[job].1 as usize);
            let expert = expert_of(group);
            let first = group.first_block + block * group.tokens;
            let range = first..first + group.tokens;
            let tokens = &tokens[group.first_token..group.first_token + group.tokens];
            // SAFETY: jobs are pairs of group and block, each of which has blocks of its own.
            let hidden = unsafe { hidden.slice(range.clone()) };
            gate_and_up(isa, expert, block, x.view(), tokens, hidden);
            if let Some(kind) = expert.down.reads_integers() {
                for (i, h) in range.zip(hidden) {
                    // SAFETY: as above.
                    unsafe { quantized.quantize(isa, kind, i, h) };
                }
            }
        };
        pool.run_beside(jobs.len(), &run_job, beside)??;
    }

    assert_eq!(out.len(), token_count * rows);
    let out = Parts::new(out);
    let at_once = down_rows_at_once(token_count, tile_rows, pool.threads());
    pool.run(tile_rows.div_ceil(at_once), &|job| {
        let job_rows = job * at_once..tile_rows.min((job + 1) * at_once);
        SUMS.with_borrow_mut(|sums| {
            sums.clear();
            sums.resize(job_rows.len() * token_count, [0.0; TILE_ROWS]);
            for group in groups.iter() {
                let expert = expert_of(group);
                let blocks = group.first_block..group.first_block + group.tokens * expert.blocks();
                let h = hidden_integers.view(group.tokens, hidden, blocks);
                let range = group.first_token..group.first_token + group.tokens;
                let (tokens, weights) = (&tokens[range.clone()], &weights[range]);
                with_panels(group.tokens, |c| {
                    let all = &all_tokens[..group.tokens];
                    for (tile_row, sums) in job_rows.clone().zip(sums.chunks_exact_mut(token_count))
                    {
                        expert.down.tile_row(isa, tile_row, h, all, c);
                        add_weighted(isa, c, tokens, weights, sums);
                    }
                });
            }
            for (tile_row, sums) in job_rows.zip(sums.chunks_exact(token_count)) {
                let first = tile_row * TILE_ROWS;
                let last = rows.min(first + TILE_ROWS);
                for (t, sum) in sums.iter().enumerate() {
                    // SAFETY: each job has output rows of its own, and is run once.
                    let out = unsafe { out.slice(t * rows + first..t * rows + last) };
                    for (out, sum) in out.iter_mut().zip(sum) {
                        *out += sum;
                    }
                }
            }
        });
    })
}

/// Tile rows of all experts' down projections in one job.
///
/// Several, where there are many tokens, so that an expert's activations are read once for them; not
/// so many that workers wait for the last one, or that their sums leave the L2 cache.
fn down_rows_at_once(tokens: usize, tile_rows: usize, threads: usize) -> usize {
    const JOBS_PER_THREAD: usize = 4;
    if tokens <= TILE_ROWS {
        return 1;
    }
    (tile_rows / (JOBS_PER_THREAD * threads)).clamp(1, 4)
}

thread_local! {
    static SUMS: RefCell<Vec<Panel>> = const { RefCell::new(Vec::new()) };
}

/// `hidden[i] = silu(gate x) * up x` for 64 intermediate rows and the tokens `tokens[i]`.
fn gate_and_up(
    isa: Isa,
    expert: &Expert,
    block: usize,
    x: View,
    tokens: &[u32],
    hidden: &mut [Block],
) {
    with_tokens_for(isa, [&expert.gate, &expert.up], x, tokens, |x, tokens| {
        with_panels(2 * tokens.len(), |panels| {
            let (gate, up) = panels.split_at_mut(tokens.len());
            for half in 0..2 {
                let tile_row = 2 * block + half;
                expert.gate.tile_row(isa, tile_row, x, tokens, gate);
                expert.up.tile_row(isa, tile_row, x, tokens, up);
                swiglu(isa, gate, up, half, hidden);
            }
        });
    });
}

dispatch! {
    /// `silu(gate) * up` into half `half` of each block.
    pub(super) fn swiglu(gate: &[Panel], up: &[Panel], half: usize, hidden: &mut [Block]) = swiglu_body
}

#[inline(always)]
fn swiglu_body<S: Simd>(s: S, gate: &[Panel], up: &[Panel], half: usize, hidden: &mut [Block]) {
    for ((gate, up), hidden) in gate.iter().zip(up).zip(hidden) {
        let hidden = &mut lanes_mut(hidden)[2 * half..2 * half + 2];
        for ((gate, up), h) in lanes(gate).iter().zip(lanes(up)).zip(hidden) {
            s.store(s.mul(silu(s, s.load(gate)), s.load(up)), h);
        }
    }
}

dispatch! {
    /// `sums[tokens[i]] += weights[i] * c[i]`
    pub(super) fn add_weighted(c: &[Panel], tokens: &[u32], weights: &[f32], sums: &mut [Panel])
        = add_weighted_body
}

#[inline(always)]
fn add_weighted_body<S: Simd>(
    s: S,
    c: &[Panel],
    tokens: &[u32],
    weights: &[f32],
    sums: &mut [Panel],
) {
    for ((c, &token), &weight) in c.iter().zip(tokens).zip(weights) {
        let weight = s.splat(weight);
        for (c, sum) in lanes(c).iter().zip(lanes_mut(&mut sums[token as usize])) {
            s.store(s.mul_add(s.load(c), weight, s.load(sum)), sum);
        }
    }
}
