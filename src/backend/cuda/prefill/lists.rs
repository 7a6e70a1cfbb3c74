//! Who computes a layer's picked experts in a short chunk, and the lists that kernels read.
//!
//! A long chunk's lists are made by kernels; here the host makes them, since it chooses the order: experts in
//! VRAM, then those that are copied, then the shared expert.

use super::super::device::{Device, Pinned};
use crate::backend::cpu::offload::Pick;
use crate::backend::{ModelShape, Result, Routing};

/// Tokens of a tile of the experts' products.
const TILE_TOKENS: usize = 128;

/// The kernels' lists of picks.
pub struct HostLists {
    /// `[tiles, 4]`: expert, first row, rows, 0
    pub tiles: Pinned<i32>,
    /// First tile of each group, and the end
    pub tile_offsets: Pinned<i32>,
    /// `[rows]`: token of each row
    pub rows: Pinned<i32>,
    /// `[T, k + 1]`: row of each pick, the shared expert's last
    pub positions: Pinned<i32>,
    /// `[T, k]`
    pub weights: Pinned<f32>,
}

impl HostLists {
    /// For chunks of up to `tokens`.
    ///
    /// # Errors
    /// If pinned memory is short.
    pub fn new(device: &Device, shape: &ModelShape, tokens: usize) -> Result<Self> {
        let (k, experts) = (shape.moe.num_experts_per_tok, shape.moe.num_experts);
        let tiles = (tokens * k).div_ceil(TILE_TOKENS) + experts + tokens.div_ceil(TILE_TOKENS);
        Ok(HostLists {
            tiles: device.alloc_host(4 * tiles)?,
            tile_offsets: device.alloc_host(experts + 2)?,
            rows: device.alloc_host(tokens * (k + 1))?,
            positions: device.alloc_host(tokens * (k + 1))?,
            weights: device.alloc_host(tokens * k)?,
        })
    }
}

/// Who computes a layer's experts, in the order of their rows.
pub struct Division {
    /// Experts in VRAM, then those that are copied
    pub gpu: Vec<u16>,
    /// How many of `gpu` are in VRAM
    pub resident: usize,
    /// By expert
    pub for_cpu: Vec<bool>,
    /// By expert
    pub tokens: Vec<u32>,
}

impl Division {
    /// Experts that come over PCIe, in the order in which they do
    pub fn copied(&self) -> &[u16] {
        &self.gpu[self.resident..]
    }
}

/// A layer's lists as the host made them.
pub struct Lists {
    /// Rows that groups begin with: those of `gpu`, the shared expert's, the CPU's
    pub first_rows: Vec<usize>,
    pub first_tiles: Vec<usize>,
    /// Tokens for which the CPU computes something, and their picks, whose `token` counts these
    pub cpu_tokens: Vec<u32>,
    pub cpu_picks: Vec<Pick>,
}

/// Sorts a layer's picks by the division's order, and makes the kernels' lists of them.
pub fn make_lists(
    host: &mut HostLists,
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
            lists.cpu_tokens.push(token as u32);
        }
        rows[shared_row + token] = token as i32;
        positions[token * (k + 1) + k] = (shared_row + token) as i32;
    }
    lists
}
