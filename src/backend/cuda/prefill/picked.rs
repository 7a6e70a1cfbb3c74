//! A short chunk: only experts that were picked come to the GPU, and the CPU computes some of them.
//!
//! The host waits for each layer's routing and knows then which experts have tokens. Those in VRAM are
//! computed where they are; of the others the CPU takes the ones with the fewest tokens, as many as it
//! ends with before the rest has been copied ([`picks_for_cpu`]). Copies go through the ring in batches,
//! the next ones under way while one is computed. The lists that a long chunk's kernels make are made by the
//! host here, since it chooses the order: experts in VRAM, then batch after batch, then the shared expert.

use super::super::device::{Device, Pinned, Stream, args};
use super::super::{geometry, variants};
use super::chunk::Chunk;
use super::{Admitting, RING};
use crate::backend::cpu::offload::{Offload, Pick};
use crate::backend::{ModelShape, Result, Routing};
use crate::planning::execution::picks_for_cpu;

/// Tokens of a tile of the experts' products.
const TILE_TOKENS: usize = 128;

/// What the host gives the kernels of a layer, for chunks of up to `tokens`.
pub struct PickedHost {
    pub tokens: usize,
    /// `[tiles, 4]`: expert, first row, rows, 0
    tiles: Pinned<i32>,
    /// First tile of each group, and the end
    tile_offsets: Pinned<i32>,
    /// `[rows]`: token of each row
    rows: Pinned<i32>,
    /// `[T, k + 1]`: row of each pick, the shared expert's last
    positions: Pinned<i32>,
    /// `[T, k]`
    weights: Pinned<f32>,
    /// `[T, D]`: what the CPU multiplies, and what comes out
    normed: Pinned<f32>,
    computed: Pinned<f32>,
}

impl PickedHost {
    /// Lists of chunks of up to `tokens`.
    ///
    /// # Errors
    /// If memory that can be pinned is short.
    pub fn new(device: &Device, shape: &ModelShape, tokens: usize) -> Result<Self> {
        let (k, experts) = (shape.moe.num_experts_per_tok, shape.moe.num_experts);
        let tiles = (tokens * k).div_ceil(TILE_TOKENS) + experts + tokens.div_ceil(TILE_TOKENS);
        Ok(PickedHost {
            tokens,
            tiles: device.alloc_host(4 * tiles)?,
            tile_offsets: device.alloc_host(experts + 2)?,
            rows: device.alloc_host(tokens * (k + 1))?,
            positions: device.alloc_host(tokens * (k + 1))?,
            weights: device.alloc_host(tokens * k)?,
            normed: device.alloc_host(tokens * shape.hidden_size)?,
            computed: device.alloc_host(tokens * shape.hidden_size)?,
        })
    }
}

/// Who computes a layer's experts, in the order of their rows.
struct Division {
    /// Experts in VRAM, then those that are copied
    gpu: Vec<u16>,
    /// How many of `gpu` are in VRAM
    resident: usize,
    /// By expert
    for_cpu: Vec<bool>,
    /// By expert
    tokens: Vec<u32>,
}

/// A layer's lists as the host made them.
struct Lists {
    /// Rows that groups begin with: those of `gpu`, the shared expert's, the CPU's
    first_rows: Vec<usize>,
    first_tiles: Vec<usize>,
    /// Tokens for which the CPU computes something, and their picks, whose `token` counts these
    cpu_tokens: Vec<usize>,
    cpu_picks: Vec<Pick>,
}

impl Chunk<'_> {
    /// The chunk, layer by layer. With `admits` slots may change.
    ///
    /// # Errors
    /// From the driver or a worker.
    pub fn run_picked(
        &self,
        offload: &mut Offload,
        host: &mut PickedHost,
        admitting: &mut Admitting<'_>,
        admits: bool,
    ) -> Result<()> {
        let cuda = self.cuda;
        let stream = &cuda.model.stream;
        let k = cuda.model.shape.moe.num_experts_per_tok;
        self.begin()?;
        for layer in 0..cuda.model.shape.num_layers() {
            self.mixer(layer)?;
            self.route(layer)?;
            let normed = 4 * self.tokens * cuda.model.shape.hidden_size;
            let from = self.at(self.places.normed);
            // SAFETY: there is room for the chunk; read after the wait for the event.
            unsafe { stream.copy_to_host(host.normed.pointer(0).cast(), from, normed)? };
            stream.record(&cuda.prefill.routed)?;
            cuda.prefill.routed.synchronize()?;
            let routing = cuda.prefill.routing(layer, self.tokens, k);
            self.ask_for(layer, &routing, admits, admitting);
            self.picked_experts(layer, &routing, offload, host, admitting)?;
        }
        Ok(())
    }

    fn picked_experts(
        &self,
        layer: usize,
        routing: &Routing,
        offload: &mut Offload,
        host: &mut PickedHost,
        admitting: &Admitting<'_>,
    ) -> Result<()> {
        let cuda = self.cuda;
        let p = self.places;
        let shape = &cuda.model.shape;
        let dim = shape.hidden_size;
        let division = self.divide(layer, routing, admitting);
        let lists = make_lists(host, &division, routing, self.tokens);
        self.upload_lists(host, &lists)?;
        let places = self.place_experts(layer, &division)?;

        let groups = division.gpu.len();
        self.compute_groups(layer, &lists, groups, 1)?;
        self.compute_groups(layer, &lists, 0, division.resident)?;
        let per_batch = self.batch_experts();
        for (batch, first) in (division.resident..groups).step_by(per_batch).enumerate() {
            let buffer = batch % RING;
            let last = groups.min(first + per_batch);
            cuda.copies.wait(&cuda.prefill.free[buffer])?;
            for (&expert, &to) in division.gpu[first..last].iter().zip(&places[first..last]) {
                let (from, bytes) = cuda.model.store.blob(layer, usize::from(expert));
                // SAFETY: a place has room for a blob, and what was there was computed.
                unsafe { cuda.copies.copy_to_device(to, from, bytes)? };
            }
            cuda.copies.record(&cuda.prefill.ready[buffer])?;
            cuda.model.stream.wait(&cuda.prefill.ready[buffer])?;
            self.compute_groups(layer, &lists, first, last - first)?;
            for (&expert, &from) in division.gpu[first..last].iter().zip(&places[first..last]) {
                self.keep_whole(usize::from(expert), from, admitting)?;
            }
            cuda.model.stream.record(&cuda.prefill.free[buffer])?;
        }
        self.compute_in_ram(layer, &lists, offload, host)?;
        self.move_in(admitting)?;

        let (t, top) = (self.tokens as i32, shape.moe.num_experts_per_tok as i32);
        self.launch(
            "prefill_combine",
            geometry::prefill_combine(self.tokens),
            args![
                self.at(p.expert_out),
                self.at(p.positions),
                self.at(p.topk_weights),
                self.at(p.gates),
                self.at(p.hidden),
                t,
                top,
                0i32,
                dim as i32,
                dim as i32
            ],
        )
    }

    /// Experts that come through the ring together.
    fn batch_experts(&self) -> usize {
        let sizes = &self.cuda.prefill.sizes;
        let bytes = self.cuda.model.store.slot_bytes() as usize;
        (sizes.group_bytes() / bytes).max(1)
    }

    fn divide(&self, layer: usize, routing: &Routing, admitting: &Admitting<'_>) -> Division {
        let cuda = self.cuda;
        let experts = cuda.model.shape.moe.num_experts;
        let mut tokens = vec![0u32; experts];
        for &id in &routing.topk_ids {
            tokens[usize::from(id)] += 1;
        }
        let is_resident = |e: usize| cuda.model.store.resident(layer, e) != 0;
        // What slots will hold comes over PCIe in any case.
        let is_kept = |e: usize| admitting.kept.iter().any(|&(kept, _)| kept == e);
        let mut gpu: Vec<u16> = Vec::new();
        let (mut copied, mut missing) = (Vec::new(), Vec::new());
        for (e, &count) in tokens.iter().enumerate() {
            match (is_resident(e), is_kept(e)) {
                (true, _) if count > 0 => gpu.push(e as u16),
                (false, true) => copied.push(e as u16),
                (false, false) if count > 0 => missing.push((e as u16, count)),
                _ => {}
            }
        }
        let resident = gpu.len();
        let mut for_cpu = vec![false; experts];
        let bytes = cuda.model.store.layout.blob_bytes as usize;
        let sizes = &cuda.prefill.sizes;
        let rates = &cuda.prefill.rates;
        for expert in picks_for_cpu(missing.clone(), rates, bytes, sizes.expert_flops()) {
            for_cpu[usize::from(expert)] = true;
        }
        let rest = missing.iter().map(|&(e, _)| e);
        copied.extend(rest.filter(|&e| !for_cpu[usize::from(e)]));
        gpu.extend(copied);
        Division {
            gpu,
            resident,
            for_cpu,
            tokens,
        }
    }

    /// Says in the layer's table where each expert of the GPU lies or will lie: the places of all.
    fn place_experts(&self, layer: usize, division: &Division) -> Result<Vec<u64>> {
        let cuda = self.cuda;
        let experts = cuda.model.shape.moe.num_experts;
        let bytes = cuda.model.store.slot_bytes() as usize;
        let (per_batch, group_bytes) = (self.batch_experts(), cuda.prefill.sizes.group_bytes());
        let place = |i: usize, expert: u16| match i.checked_sub(division.resident) {
            None => cuda.model.store.resident(layer, usize::from(expert)),
            Some(i) => {
                let buffer = i / per_batch % RING;
                self.at(self.places.ring + buffer * group_bytes + i % per_batch * bytes)
            }
        };
        let all = division.gpu.iter().enumerate();
        let places: Vec<u64> = all.map(|(i, &expert)| place(i, expert)).collect();
        let start = layer * 2 * (experts + 1);
        let shared = cuda.model.dense.layers[layer].shared_blob;
        for part in 0..2 {
            let table = start + part * (experts + 1);
            let put = |expert: usize, address: u64| {
                // SAFETY: inside the table, which no copy reads now: the host waited for the layer before.
                unsafe { *cuda.prefill.host_blobs.pointer(table + expert) = address };
            };
            for (&expert, &address) in division.gpu.iter().zip(&places) {
                put(usize::from(expert), address);
            }
            put(experts, shared);
        }
        let from = cuda.prefill.host_blobs.pointer(start).cast();
        let to = cuda.prefill.blobs.at(8 * start);
        // SAFETY: both tables have this layer's part.
        unsafe { (cuda.model.stream).copy_to_device(to, from, 16 * (experts + 1))? };
        Ok(places)
    }

    fn upload_lists(&self, host: &PickedHost, lists: &Lists) -> Result<()> {
        let p = self.places;
        let k = self.cuda.model.shape.moe.num_experts_per_tok;
        let stream = &self.cuda.model.stream;
        let groups = lists.first_tiles.len();
        let tiles = lists.first_tiles[groups - 1];
        let rows = lists.first_rows[groups - 1];
        let send = |place: usize, from: *mut i32, count: usize, stream: &Stream| {
            // SAFETY: the workspace has room for a chunk of this length, and so has the host's list.
            unsafe { stream.copy_to_device(self.at(place), from.cast(), 4 * count) }
        };
        send(p.tiles, host.tiles.pointer(0), 4 * tiles, stream)?;
        send(p.tile_offsets, host.tile_offsets.pointer(0), groups, stream)?;
        send(p.rows, host.rows.pointer(0), rows, stream)?;
        let positions = self.tokens * (k + 1);
        send(p.positions, host.positions.pointer(0), positions, stream)?;
        let weights = host.weights.pointer(0).cast();
        send(p.topk_weights, weights, self.tokens * k, stream)
    }

    /// `count` groups of the lists: gate and up, split, down.
    fn compute_groups(
        &self,
        layer: usize,
        lists: &Lists,
        first: usize,
        count: usize,
    ) -> Result<()> {
        let cuda = self.cuda;
        let p = self.places;
        let shape = &cuda.model.shape;
        let (dim, experts) = (shape.hidden_size, shape.moe.num_experts);
        let tiles = lists.first_tiles[first + count] - lists.first_tiles[first];
        if tiles == 0 {
            return Ok(());
        }
        let (layout, shared) = (cuda.model.store.layout, cuda.model.shared_layout);
        let stride = cuda.prefill.sizes.expert_stride();
        let x = self.terms(p.high, p.low, p.scale);
        let h = self.at(p.expert_hidden);
        let units = cuda.prefill.units.at(8 * layer * (experts + 1));
        let blobs = cuda.prefill.blobs.at(16 * layer * (experts + 1));
        let (rows, all_tiles) = (self.at(p.rows), self.at(p.tiles));
        let offsets = self.at(p.tile_offsets);
        let (e, d, s) = (experts as i32, dim as i32, stride as i32);
        let (group, groups) = (first as i32, count as i32);
        let (precision, facts) = (self.precision(), &cuda.prefill.facts);
        let kernel = variants::prefill_experts_up(stride, tiles, precision, facts);
        self.launch(
            kernel.name,
            kernel.geometry,
            args![
                x[0], x[1], x[2], rows, all_tiles, offsets, blobs, units, layout, shared, e, d,
                group, groups, h, s
            ],
        )?;
        // Rows of these groups alone: others may not be there yet.
        let first_row = lists.first_rows[first];
        let row_count = lists.first_rows[first + count] - first_row;
        let all = self.terms(p.expert_high, p.expert_low, p.expert_scale);
        let skip = |address: u64, bytes: usize| match address {
            0 => 0,
            address => address + (first_row * bytes) as u64,
        };
        let part = [
            skip(all[0], 2 * stride),
            skip(all[1], 2 * stride),
            skip(all[2], 4),
        ];
        self.split(skip(h, 4 * stride), 0, part, 0, row_count, stride)?;
        let y = self.at(p.expert_out);
        let kernel = variants::prefill_experts_down(dim, self.tokens, tiles, precision, facts);
        self.launch(
            kernel.name,
            kernel.geometry,
            args![
                all[0], all[1], all[2], all_tiles, offsets, blobs, units, layout, shared, e, d, s,
                group, groups, 0i32, d, y
            ],
        )
    }

    /// The CPU's experts, whose sums become further rows.
    fn compute_in_ram(
        &self,
        layer: usize,
        lists: &Lists,
        offload: &mut Offload,
        host: &mut PickedHost,
    ) -> Result<()> {
        if lists.cpu_picks.is_empty() {
            return Ok(());
        }
        let cuda = self.cuda;
        let dim = cuda.model.shape.hidden_size;
        let x = host.normed.as_mut_slice();
        for (i, &token) in lists.cpu_tokens.iter().enumerate() {
            x.copy_within(token * dim..(token + 1) * dim, i * dim);
        }
        let count = lists.cpu_tokens.len() * dim;
        let out = &mut host.computed.as_mut_slice()[..count];
        out.fill(0.0);
        let experts = &cuda.model.store.layers[layer].experts;
        offload.add_picks(
            experts,
            &lists.cpu_picks,
            &host.normed.as_slice()[..count],
            out,
        )?;
        let first_row = lists.first_rows[lists.first_rows.len() - 1];
        let to = self.at(self.places.expert_out + 4 * first_row * dim);
        let from = host.computed.pointer(0).cast();
        // SAFETY: there are no more rows than picks and tokens; the host waits before it writes again.
        unsafe { cuda.model.stream.copy_to_device(to, from, 4 * count) }
    }
}

/// Sorts a layer's picks by the division's order, and makes the kernels' lists of them.
fn make_lists(
    host: &mut PickedHost,
    division: &Division,
    routing: &Routing,
    tokens: usize,
) -> Lists {
    let k = routing.num_experts_per_tok;
    let mut lists = Lists {
        first_rows: vec![0],
        first_tiles: vec![0],
        cpu_tokens: Vec::new(),
        cpu_picks: Vec::new(),
    };
    let mut next_row = vec![0usize; division.tokens.len()];
    let shared = (division.tokens.len() as i32, tokens);
    let of_experts = division.gpu.iter().map(|&e| {
        let count = division.tokens[usize::from(e)] as usize;
        (i32::from(e), count)
    });
    let tiles = host.tiles.as_mut_slice();
    let offsets = host.tile_offsets.as_mut_slice();
    let (mut row, mut tile) = (0, 0);
    for (group, (expert, count)) in of_experts.chain([shared]).enumerate() {
        offsets[group] = tile as i32;
        if let Some(next) = next_row.get_mut(expert as usize) {
            *next = row;
        }
        for first in (0..count).step_by(TILE_TOKENS) {
            let rows = TILE_TOKENS.min(count - first) as i32;
            tiles[4 * tile..][..4].copy_from_slice(&[expert, (row + first) as i32, rows, 0]);
            tile += 1;
        }
        row += count;
        lists.first_rows.push(row);
        lists.first_tiles.push(tile);
    }
    offsets[division.gpu.len() + 1] = tile as i32;

    let shared_row = row - tokens;
    let (rows, positions) = (host.rows.as_mut_slice(), host.positions.as_mut_slice());
    let weights = host.weights.as_mut_slice();
    for token in 0..tokens {
        let mut of_cpu = false;
        for rank in 0..k {
            let pick = token * k + rank;
            let expert = routing.topk_ids[pick];
            let position = &mut positions[token * (k + 1) + rank];
            weights[pick] = routing.topk_weights[pick];
            if !division.for_cpu[usize::from(expert)] {
                let next = &mut next_row[usize::from(expert)];
                rows[*next] = token as i32;
                *position = *next as i32;
                *next += 1;
                continue;
            }
            // The first such pick stands for the CPU's sum, the others for nothing.
            lists.cpu_picks.push(Pick {
                token: lists.cpu_tokens.len() as u32,
                expert,
                weight: weights[pick],
            });
            let sum_row = row + lists.cpu_tokens.len();
            (*position, weights[pick]) = match of_cpu {
                false => (sum_row as i32, 1.0),
                true => ((shared_row + token) as i32, 0.0),
            };
            of_cpu = true;
        }
        if of_cpu {
            lists.cpu_tokens.push(token);
        }
        rows[shared_row + token] = token as i32;
        positions[token * (k + 1) + k] = (shared_row + token) as i32;
    }
    lists
}
