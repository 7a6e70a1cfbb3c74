//! All routed experts, once, in pinned RAM in the layout that kernels read, and copies of some of
//! them in slots of VRAM.
//!
//! A slot holds the very bytes that RAM holds, so bringing an expert in is one copy. Which expert is
//! where changes only between tokens: kernels read the table of addresses that
//! [`publish`](ExpertStore::publish) sends to the device.

use std::sync::Arc;

use bytemuck::cast_slice;

use super::abi::{ExpertLayout, Format};
use super::arena::Arena;
use super::device::{Buffer, Device, Pinned, Registered, Stream};
use crate::backend::cpu::experts::Expert;
use crate::backend::cpu::layout::Tile;
use crate::backend::cpu::linear::{Linear, Weights};
use crate::backend::cpu::memory::Huge;
use crate::backend::cpu::offload::LayerExperts;
use crate::backend::{BackendError, Result};

/// Slots start on this many bytes.
const SLOT_ALIGN: u64 = 256;

/// The routed experts of one layer in RAM.
pub struct LayerStore {
    // Fields are dropped in order: the registration before the memory, which `experts` share. Were it
    // unmapped first, another thread could map the same address meanwhile, and the driver refuses to
    // pin what it still has as pinned.
    _registered: Registered,
    pub experts: Vec<Expert>,
    /// Keeps what `host` points to alive; experts that are not tiles are copied together first.
    _memory: Memory,
    host: *const u8,
    /// Device address of the same bytes
    pub mapped: u64,
    /// `[E, num_units]` on the device
    pub units: u64,
}

// SAFETY: `host` points into `_memory`, which nobody writes.
unsafe impl Send for LayerStore {}

enum Memory {
    Tiles(#[allow(dead_code)] Arc<Huge<Tile<u16>>>),
    Rows(#[allow(dead_code)] Huge<u8>),
}

pub struct ExpertStore {
    pub layout: ExpertLayout,
    pub layers: Vec<LayerStore>,
    num_experts: usize,
    slots: Option<Buffer>,
    slot_bytes: u64,
    /// Of each slot, the (layer, expert) it holds
    holds: Vec<Option<(u32, u32)>>,
    /// `[layers, E]`: device address of each expert's slot, or 0
    table: Pinned<u64>,
    device_table: Buffer,
}

/// Form, rows and bytes of a matrix of experts.
fn describe(linear: &Linear) -> Result<(Format, usize)> {
    let format = match &linear.weights {
        Weights::Nf4Int16(_) => Format::Nf4Tiles,
        Weights::Bf16(_) => Format::Bf16Rows,
        Weights::F32(_) => Format::F32Rows,
        Weights::Nf4F32(_) => {
            return Err(BackendError::Other(
                "the cuda backend computes experts in int16 on the CPU; \
                 use --cpu-precision int16, or --backend cpu"
                    .into(),
            ));
        }
    };
    Ok((format, linear.bytes()))
}

/// The bytes of a matrix as kernels read them.
pub fn weight_bytes(linear: &Linear) -> &[u8] {
    match &linear.weights {
        Weights::Nf4Int16(tiles) => cast_slice(&tiles.arena[tiles.range.clone()]),
        Weights::Nf4F32(tiles) => cast_slice(&tiles.arena[tiles.range.clone()]),
        Weights::Bf16(w) => cast_slice(w.as_flattened()),
        Weights::F32(w) => cast_slice(w.as_flattened()),
    }
}

/// The units of a matrix's tile rows; none unless it is in tiles.
pub fn units(linear: &Linear) -> &[f32] {
    match &linear.weights {
        Weights::Nf4Int16(tiles) => &tiles.units,
        _ => &[],
    }
}

/// The layout of `expert`.
///
/// # Errors
/// If its matrices do not have one form.
pub fn layout_of(expert: &Expert) -> Result<ExpertLayout> {
    let (format, gate) = describe(&expert.gate)?;
    let (up_format, up) = describe(&expert.up)?;
    let (down_format, down) = describe(&expert.down)?;
    if format != up_format || format != down_format {
        return Err(BackendError::Other(format!(
            "an expert has matrices as {format:?}, {up_format:?} and {down_format:?}; \
             the cuda backend needs one form, use --backend cpu"
        )));
    }
    let gate_units = units(&expert.gate).len();
    let up_units = units(&expert.up).len();
    Ok(ExpertLayout {
        up_offset: gate as i64,
        down_offset: (gate + up) as i64,
        blob_bytes: (gate + up + down) as i64,
        intermediate: expert.gate.rows as i32,
        format: format as i32,
        up_unit: gate_units as i32,
        down_unit: (gate_units + up_units) as i32,
        num_units: (gate_units + up_units + units(&expert.down).len()) as i32,
        padding: 0,
    })
}

/// Gate, up and down of one expert, one after the other.
pub fn blob_of(expert: &Expert) -> Vec<u8> {
    [&expert.gate, &expert.up, &expert.down]
        .into_iter()
        .flat_map(weight_bytes)
        .copied()
        .collect()
}

/// Units of gate, up and down.
pub fn units_of(expert: &Expert) -> Vec<f32> {
    [&expert.gate, &expert.up, &expert.down]
        .into_iter()
        .flat_map(units)
        .copied()
        .collect()
}

impl LayerStore {
    /// Pins the experts of a layer, which must all have `layout`.
    ///
    /// # Errors
    /// If an expert has another layout, or memory is short.
    pub fn new(
        device: &Device,
        arena: &mut Arena,
        loaded: LayerExperts,
        layout: &ExpertLayout,
        stream: &Stream,
    ) -> Result<Self> {
        let LayerExperts {
            experts,
            arena: tiles,
        } = loaded;
        for expert in &experts {
            if layout_of(expert)? != *layout {
                return Err(BackendError::Other(
                    "experts differ in size or form; the cuda backend needs equal ones, \
                     use --backend cpu"
                        .into(),
                ));
            }
        }
        let blob_bytes = layout.blob_bytes as usize;
        let bytes = experts.len() * blob_bytes;
        let (memory, host) = match tiles {
            Some(tiles) => {
                assert_eq!(
                    size_of_val::<[_]>(&tiles),
                    bytes,
                    "experts lie side by side"
                );
                let host = tiles.as_ptr().cast::<u8>();
                (Memory::Tiles(tiles), host)
            }
            None => {
                let mut rows = Huge::<u8>::zeroed(bytes)?;
                for (expert, out) in experts.iter().zip(rows.chunks_exact_mut(blob_bytes)) {
                    out.copy_from_slice(&blob_of(expert));
                }
                let host = rows.as_ptr();
                (Memory::Rows(rows), host)
            }
        };
        let units: Vec<f32> = experts.iter().flat_map(units_of).collect();
        let units = arena.upload(&units, stream)?;
        // SAFETY: `memory` moves into the same struct, where it outlives the registration.
        let registered = unsafe { device.register(host.cast_mut(), bytes)? };
        Ok(LayerStore {
            mapped: registered.address(),
            _registered: registered,
            experts,
            _memory: memory,
            host,
            units,
        })
    }
}

/// A slot, and the (layer, expert) in it.
pub type Held = (usize, (usize, usize));

impl ExpertStore {
    /// All layers' experts; none is in a slot.
    ///
    /// # Errors
    /// If memory is short.
    pub fn new(
        device: &Device,
        layout: ExpertLayout,
        layers: Vec<LayerStore>,
        stream: &Stream,
    ) -> Result<Self> {
        let num_experts = layers.first().map_or(0, |l| l.experts.len());
        let entries = layers.len() * num_experts;
        Ok(ExpertStore {
            slot_bytes: (layout.blob_bytes as u64).next_multiple_of(SLOT_ALIGN),
            layout,
            layers,
            num_experts,
            slots: None,
            holds: Vec::new(),
            table: device.alloc_host(entries)?,
            device_table: device.alloc(entries * size_of::<u64>(), stream)?,
        })
    }

    /// Bytes of one slot.
    pub fn slot_bytes(&self) -> u64 {
        self.slot_bytes
    }

    pub fn num_slots(&self) -> usize {
        self.holds.len()
    }

    /// Makes `count` empty slots, in place of those there were.
    ///
    /// # Errors
    /// If the device's memory is short.
    pub fn set_slots(&mut self, device: &Device, count: usize, stream: &Stream) -> Result<()> {
        self.table.as_mut_slice().fill(0);
        self.holds.clear();
        self.slots = None;
        if count > 0 {
            self.slots = Some(device.alloc(count * self.slot_bytes as usize, stream)?);
        }
        self.holds.resize(count, None);
        self.publish(stream)
    }

    /// Address of slot `slot`.
    pub fn slot_address(&self, slot: usize) -> u64 {
        let slots = self.slots.as_ref().expect("there are slots");
        slots.at(slot * self.slot_bytes as usize)
    }

    /// Where expert `expert` of `layer` is on the device now; 0 if it is only in RAM.
    pub fn resident(&self, layer: usize, expert: usize) -> u64 {
        self.table.as_slice()[layer * self.num_experts + expert]
    }

    /// Whether the device holds every expert.
    pub fn all_resident(&self) -> bool {
        self.table.as_slice().iter().all(|&address| address != 0)
    }

    /// Number of experts that the device holds.
    pub fn num_resident(&self) -> usize {
        self.holds.iter().flatten().count()
    }

    /// Starts copying an expert into `slot`, whose old content is forgotten. Kernels see the change
    /// after the next [`publish`](ExpertStore::publish), which must come after the copy.
    ///
    /// # Errors
    /// If the driver reports one.
    pub fn fetch(
        &mut self,
        layer: usize,
        expert: usize,
        slot: usize,
        stream: &Stream,
    ) -> Result<()> {
        self.start_fetch(layer, expert, slot, stream)?;
        self.arrived(layer, expert, slot);
        Ok(())
    }

    /// Starts copying an expert into `slot`, whose old content is forgotten. It counts as there only
    /// after [`arrived`](ExpertStore::arrived); kernels that run meanwhile must not use the slot.
    ///
    /// # Errors
    /// If the driver reports one.
    pub fn start_fetch(
        &mut self,
        layer: usize,
        expert: usize,
        slot: usize,
        stream: &Stream,
    ) -> Result<()> {
        self.evict(slot);
        let (from, bytes) = self.blob(layer, expert);
        // SAFETY: the blob lives as long as `self`, and the slot is `blob_bytes` long.
        unsafe { stream.copy_to_device(self.slot_address(slot), from, bytes) }
    }

    /// `slot` now holds an expert.
    pub fn arrived(&mut self, layer: usize, expert: usize, slot: usize) {
        // Another slot may have had it since.
        if self.resident(layer, expert) == 0 {
            let address = self.slot_address(slot);
            self.holds[slot] = Some((layer as u32, expert as u32));
            self.table.as_mut_slice()[layer * self.num_experts + expert] = address;
        }
    }

    /// Forgets what `slot` holds.
    pub fn evict(&mut self, slot: usize) {
        if let Some((layer, expert)) = self.holds[slot].take() {
            let entry = layer as usize * self.num_experts + expert as usize;
            self.table.as_mut_slice()[entry] = 0;
        }
    }

    /// Bytes of all slots.
    pub fn slots_bytes(&self) -> usize {
        self.slots.as_ref().map_or(0, Buffer::bytes)
    }

    /// Empties the last slots, `bytes` of them, for other use: their address, and what was in them.
    /// Kernels see that after the next [`publish`](ExpertStore::publish).
    pub fn borrow(&mut self, bytes: usize) -> (u64, Vec<Held>) {
        let count = bytes.div_ceil(self.slot_bytes as usize);
        assert!(count <= self.holds.len(), "there are slots to borrow");
        let first = self.holds.len() - count;
        let mut held = Vec::new();
        for slot in first..self.holds.len() {
            if let Some(expert) = self.holds(slot) {
                held.push((slot, expert));
                self.evict(slot);
            }
        }
        (self.slot_address(first), held)
    }

    /// What `slot` holds.
    pub fn holds(&self, slot: usize) -> Option<(usize, usize)> {
        self.holds[slot].map(|(layer, expert)| (layer as usize, expert as usize))
    }

    /// An expert's bytes in pinned RAM.
    pub fn blob(&self, layer: usize, expert: usize) -> (*const u8, usize) {
        let bytes = self.layout.blob_bytes as usize;
        assert!(expert < self.num_experts);
        // SAFETY: the layer has `num_experts` blobs there.
        (
            unsafe { self.layers[layer].host.add(expert * bytes) },
            bytes,
        )
    }

    /// Sends the table of addresses to the device, behind the copies before it on `stream`.
    ///
    /// # Errors
    /// If the driver reports one.
    pub fn publish(&self, stream: &Stream) -> Result<()> {
        let bytes = size_of_val(self.table.as_slice());
        if bytes == 0 {
            return Ok(());
        }
        let from = self.table.pointer(0).cast::<u8>();
        // SAFETY: both tables have this size and live as long as `self`.
        unsafe { stream.copy_to_device(self.device_table.address(), from, bytes) }
    }

    /// Device address of a layer's `[E]` slot addresses.
    pub fn device_table(&self, layer: usize) -> u64 {
        self.device_table
            .at(layer * self.num_experts * size_of::<u64>())
    }
}
