//! Activations of many tokens, made by all workers.

use super::activations::{Activations, Integers};
use super::isa::Isa;
use super::layout::TILE_COLS;
use super::linear::with_panels;
use super::threads::{Parts, Pool};
use crate::backend::Result;

impl Activations {
    /// Sets all tokens; `row(t, out)` writes the `cols` activations of token `t`.
    ///
    /// # Errors
    /// If a worker thread failed.
    pub fn fill(
        &mut self,
        pool: &mut Pool,
        isa: Isa,
        tokens: usize,
        cols: usize,
        integers: Option<Integers>,
        row: &(dyn Fn(usize, &mut [f32]) + Sync),
    ) -> Result<()> {
        self.resize(isa, tokens, cols, integers);
        let kblocks = self.padded_cols() / TILE_COLS;
        let blocks = Parts::new(&mut self.blocks);
        let quantized = self.integers.parts();
        pool.run(tokens, &|t| {
            with_panels(2 * kblocks, |panels| {
                let values = panels.as_flattened_mut();
                let (values, padding) = values.split_at_mut(cols);
                row(t, values);
                padding.fill(0.0);
                let (values, _) = panels.as_flattened().as_chunks();
                for (kb, block) in values.iter().enumerate() {
                    // SAFETY: each token has blocks of its own, and is run once.
                    let out = unsafe { blocks.item(kb * tokens + t) };
                    *out = *block;
                    if let Some(kind) = integers {
                        // SAFETY: as above.
                        unsafe { quantized.quantize(isa, kind, kb * tokens + t, block) };
                    }
                }
            });
        })
    }
}
