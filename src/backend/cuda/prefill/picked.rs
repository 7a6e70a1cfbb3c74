//! A short chunk: only experts that were picked come to the GPU, and the CPU computes some of them.
//!
//! The host waits for each layer's routing and knows then which experts have tokens. Those in VRAM are
//! computed where they are; of the others the CPU takes the ones with the fewest tokens, as many as it
//! ends with before the rest has been copied ([`picks_for_cpu`]). Copies go through the ring in batches.
//! The first batches of a layer are copied before its router has chosen ([`batches_ahead`]), so that the
//! bus is busy while the mixer runs.

use super::super::abi::{HostArray, HostArrays};
use super::super::device::{Device, Pinned, args};
use super::super::{geometry, variants};
use super::Admitting;
use super::chunk::{Chunk, Parts};
use super::lists::{Division, HostLists, Lists, make_lists};
use crate::backend::cpu::offload::Offload;
use crate::backend::{ModelShape, Result, Routing};
use crate::planning::Offer;
use crate::planning::execution::{Streaming, batches_ahead};
use crate::planning::sharing::picks_for_cpu;

/// What the host gives the GPU and gets from it in a layer, for chunks of up to `tokens`.
pub struct PickedHost {
    pub tokens: usize,
    lists: HostLists,
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
        Ok(PickedHost {
            tokens,
            lists: HostLists::new(device, shape, tokens)?,
            normed: device.alloc_host(tokens * shape.hidden_size)?,
            computed: device.alloc_host(tokens * shape.hidden_size)?,
        })
    }
}

/// A layer's experts, once its router has chosen.
struct Work<'a> {
    layer: usize,
    routing: &'a Routing,
    division: &'a Division,
    lists: &'a Lists,
    /// What is copied, batch by batch, and how many batches went through the ring before
    batches: Vec<&'a [u16]>,
    first_batch: usize,
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
        let (layers, k) = (
            cuda.model.shape.num_layers(),
            cuda.model.shape.moe.num_experts_per_tok,
        );
        self.begin()?;
        let mut first_batch = 0;
        let mut ahead = self.send_ahead(0, first_batch)?;
        for layer in 0..layers {
            self.mixer(layer)?;
            self.expert_norm(layer)?;
            self.download_normed(&host.normed)?;
            self.route(layer)?;
            cuda.model.stream.record(&cuda.prefill.routed)?;
            cuda.prefill.routed.synchronize()?;
            let routing = cuda.prefill.routing(layer, self.tokens, k);
            let division = self.divide(layer, &routing, &ahead);
            let lists = make_lists(&mut host.lists, &division, &routing, self.tokens);
            let work = Work {
                layer,
                routing: &routing,
                division: &division,
                lists: &lists,
                batches: division.copied().chunks(self.batch_experts()).collect(),
                first_batch,
            };
            self.upload_lists(&work, &host.lists)?;
            let sent = ahead.len().div_ceil(self.batch_experts());
            if let Some(first) = work.batches.get(sent) {
                self.send(layer, first_batch + sent, first)?;
            }
            cuda.prefill.downloaded.synchronize()?;
            self.compute_in_ram(&work, offload, &host.normed, &mut host.computed, || {
                let own = sent + 1..work.batches.len().min(self.ring_buffers());
                for batch in own {
                    self.send(layer, first_batch + batch, work.batches[batch])?;
                }
                self.compute_on_gpu(&work, admitting, admits)?;
                first_batch += work.batches.len();
                ahead = self.send_ahead(layer + 1, first_batch)?;
                Ok(())
            })?;
            self.combine()?;
        }
        Ok(())
    }

    /// Starts bringing what the layer's experts get to the host.
    fn download_normed(&self, to: &Pinned<f32>) -> Result<()> {
        let prefill = self.cuda.prefill;
        let bytes = 4 * self.tokens * self.cuda.model.shape.hidden_size;
        let from = self.at(self.places.normed);
        self.cuda.model.stream.record(&prefill.normed)?;
        prefill.downloads.wait(&prefill.normed)?;
        // SAFETY: there is room for the chunk; read after the wait for the event. The next layer's norm comes
        // after its router's wait on the host, by when this has been waited for.
        unsafe { (prefill.downloads).copy_to_host(to.pointer(0).cast(), from, bytes)? };
        prefill.downloads.record(&prefill.downloaded)
    }

    /// Copies the first batches of a layer's missing experts while its mixer runs, in order of their ids: which
    /// ones hardly matters to a chunk that picks nearly all.
    fn send_ahead(&self, layer: usize, first_batch: usize) -> Result<Vec<u16>> {
        if layer == self.cuda.model.shape.num_layers() {
            return Ok(Vec::new());
        }
        let store = &self.cuda.model.store;
        let experts = self.cuda.model.shape.moe.num_experts;
        let missing = (0..experts).filter(|&e| store.resident(layer, e) == 0);
        let count = batches_ahead(self.tokens) * self.batch_experts();
        let ahead: Vec<u16> = missing.take(count).map(|e| e as u16).collect();
        for (batch, experts) in ahead.chunks(self.batch_experts()).enumerate() {
            self.send(layer, first_batch + batch, experts)?;
        }
        Ok(ahead)
    }

    /// Copies a batch of experts into its ring buffer.
    fn send(&self, layer: usize, batch: usize, experts: &[u16]) -> Result<()> {
        let Parts {
            prefill,
            model,
            copies,
            ..
        } = self.cuda;
        let buffer = batch % self.ring_buffers();
        copies.wait(&prefill.free[buffer])?;
        // Neighbours in one copy: each takes the host 3 us.
        let neighbours = |a: &u16, b: &u16| a + 1 == *b;
        let mut i = 0;
        for run in experts.chunk_by(neighbours) {
            let (from, bytes) = model.store.blob(layer, usize::from(run[0]));
            let pitch = model.store.slot_bytes() as usize;
            let to = self.in_batch(batch, i);
            // SAFETY: blobs of neighbours follow each other, places have room for a blob each, and what was
            // there was computed.
            unsafe {
                match pitch == bytes {
                    true => copies.copy_to_device(to, from, bytes * run.len())?,
                    false => (0..run.len()).try_for_each(|e| {
                        copies.copy_to_device(to + (e * pitch) as u64, from.add(e * bytes), bytes)
                    })?,
                }
            }
            i += run.len();
        }
        copies.record(&prefill.ready[buffer])
    }

    /// Where expert `i` of a batch lies in the ring.
    fn in_batch(&self, batch: usize, i: usize) -> u64 {
        let Parts { prefill, model, .. } = self.cuda;
        let bytes = prefill.sizes.ring_buffer_bytes(Streaming::Picked);
        let buffer = batch % self.ring_buffers() * bytes;
        self.at(self.places.ring + buffer + i * model.store.slot_bytes() as usize)
    }

    fn ring_buffers(&self) -> usize {
        (self.cuda.prefill.sizes).ring_buffers(Streaming::Picked, self.chunk_tokens)
    }

    /// The GPU's experts, batch by batch of what is copied, and the changes of slots.
    fn compute_on_gpu(
        &self,
        work: &Work<'_>,
        admitting: &mut Admitting<'_>,
        admits: bool,
    ) -> Result<()> {
        let cuda = self.cuda;
        let (layer, division, lists) = (work.layer, work.division, work.lists);
        self.compute_groups(layer, lists, division.gpu.len(), 1)?;
        self.compute_groups(layer, lists, 0, division.resident)?;
        // Slots get no experts but those that come over PCIe anyway.
        let mut offered = vec![false; cuda.model.shape.moe.num_experts];
        (division.copied().iter()).for_each(|&e| offered[usize::from(e)] = true);
        let offer = Offer {
            at_most: if admits {
                cuda.prefill.sizes.kept_experts()
            } else {
                0
            },
            experts: Some(&offered),
        };
        self.ask_for(layer, work.routing, offer, admitting);

        let ring = self.ring_buffers();
        let mut first = division.resident;
        for (i, experts) in work.batches.iter().enumerate() {
            let batch = work.first_batch + i;
            cuda.model.stream.wait(&cuda.prefill.ready[batch % ring])?;
            self.compute_groups(layer, lists, first, experts.len())?;
            first += experts.len();
            for (place, &expert) in experts.iter().enumerate() {
                self.move_whole(usize::from(expert), self.in_batch(batch, place), admitting)?;
            }
            cuda.model.stream.record(&cuda.prefill.free[batch % ring])?;
            if let Some(later) = work.batches.get(i + ring) {
                self.send(layer, batch + ring, later)?;
            }
        }
        Ok(())
    }

    /// Adds what the experts gave to the tokens.
    fn combine(&self) -> Result<()> {
        let p = self.places;
        let shape = &self.cuda.model.shape;
        let dim = shape.hidden_size as i32;
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
                dim,
                dim
            ],
        )
    }

    /// Experts that come through the ring together.
    fn batch_experts(&self) -> usize {
        let buffer = (self.cuda.prefill.sizes).ring_buffer_bytes(Streaming::Picked);
        (buffer / self.cuda.model.store.slot_bytes() as usize).max(1)
    }

    /// - `ahead`: experts that are on their way already
    fn divide(&self, layer: usize, routing: &Routing, ahead: &[u16]) -> Division {
        let cuda = self.cuda;
        let experts = cuda.model.shape.moe.num_experts;
        let mut tokens = vec![0u32; experts];
        for &id in &routing.topk_ids {
            tokens[usize::from(id)] += 1;
        }
        let picked = (0..experts).filter(|&e| tokens[e] > 0);
        let (mut gpu, missing): (Vec<u16>, Vec<u16>) = picked
            .map(|e| e as u16)
            .partition(|&e| cuda.model.store.resident(layer, usize::from(e)) != 0);
        let missing: Vec<(u16, u32)> = (missing.into_iter())
            .filter(|e| !ahead.contains(e))
            .map(|e| (e, tokens[usize::from(e)]))
            .collect();
        let resident = gpu.len();
        let mut for_cpu = vec![false; experts];
        let bytes = cuda.model.store.layout.blob_bytes as usize;
        let (sizes, rates) = (&cuda.prefill.sizes, &cuda.prefill.rates);
        for expert in picks_for_cpu(missing.clone(), rates, bytes, sizes.expert_flops()) {
            for_cpu[usize::from(expert)] = true;
        }
        let rest = missing.iter().map(|&(e, _)| e);
        gpu.extend(ahead);
        gpu.extend(rest.filter(|&e| !for_cpu[usize::from(e)]));
        Division {
            gpu,
            resident,
            for_cpu,
            tokens,
        }
    }

    /// Brings the layer's lists to the GPU, and says in its table where each expert lies or will lie.
    fn upload_lists(&self, work: &Work<'_>, host: &HostLists) -> Result<()> {
        let (p, lists, prefill) = (self.places, work.lists, self.cuda.prefill);
        let groups = lists.first_tiles.len();
        let (tiles, rows) = (lists.first_tiles[groups - 1], lists.first_rows[groups - 1]);
        let (k, experts) = self.picks_of();
        let picks = self.tokens * k;
        let table = work.layer * 2 * (experts + 1);
        self.write_places(work, table);
        let array = |from: u64, to: u64, words: usize| HostArray {
            from,
            to,
            count: words as i64,
        };
        let list = |from: &Pinned<i32>, to, words| array(from.at(0), self.at(to), words);
        self.fetch(&[
            list(&host.tiles, p.tiles, 4 * tiles),
            list(&host.tile_offsets, p.tile_offsets, groups),
            list(&host.rows, p.rows, rows),
            list(&host.positions, p.positions, picks + self.tokens),
            array(host.weights.at(0), self.at(p.topk_weights), picks),
            array(
                prefill.host_blobs.at(table),
                prefill.blobs.at(8 * table),
                4 * (experts + 1),
            ),
        ])
    }

    fn write_places(&self, work: &Work<'_>, table: usize) {
        let cuda = self.cuda;
        let (store, division) = (&cuda.model.store, work.division);
        let experts = cuda.model.shape.moe.num_experts;
        let per_batch = self.batch_experts();
        let shared = cuda.model.dense.layers[work.layer].shared_blob;
        for part in 0..2 {
            let put = |expert: usize, address: u64| {
                let i = table + part * (experts + 1) + expert;
                // SAFETY: inside the table, which nobody reads now: the host waited for the layer before.
                unsafe { *cuda.prefill.host_blobs.pointer(i) = address };
            };
            for (i, &expert) in division.gpu.iter().enumerate() {
                let expert = usize::from(expert);
                let address = match i.checked_sub(division.resident) {
                    None => store.resident(work.layer, expert),
                    Some(i) => self.in_batch(work.first_batch + i / per_batch, i % per_batch),
                };
                put(expert, address);
            }
            put(experts, shared);
        }
    }

    /// Fetches arrays from host memory.
    fn fetch(&self, arrays: &[HostArray]) -> Result<()> {
        let mut all = HostArrays::default();
        all.each[..arrays.len()].copy_from_slice(arrays);
        let longest = arrays.iter().map(|array| array.count).max();
        let geometry = geometry::prefill_fetch(longest.unwrap_or(0) as usize);
        self.launch("prefill_fetch", geometry, args![all])
    }

    /// Picks of a token, and experts.
    fn picks_of(&self) -> (usize, usize) {
        let moe = &self.cuda.model.shape.moe;
        (moe.num_experts_per_tok, moe.num_experts)
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

    /// The CPU's experts, whose sums become further rows; `beside` runs while workers begin.
    fn compute_in_ram(
        &self,
        work: &Work<'_>,
        offload: &mut Offload,
        normed: &Pinned<f32>,
        computed: &mut Pinned<f32>,
        beside: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let cuda = self.cuda;
        let lists = work.lists;
        let dim = cuda.model.shape.hidden_size;
        let count = lists.cpu_tokens.len() * dim;
        let experts = &cuda.model.store.layers[work.layer].experts;
        offload.compute_picks(
            experts,
            &lists.cpu_picks,
            &lists.cpu_tokens,
            normed.as_slice(),
            beside,
            &mut computed.as_mut_slice()[..count],
        )?;
        if count == 0 {
            return Ok(());
        }
        let first_row = lists.first_rows[lists.first_rows.len() - 1];
        self.fetch(&[HostArray {
            from: computed.at(0),
            to: self.at(self.places.expert_out + 4 * first_row * dim),
            count: count as i64,
        }])
    }
}
