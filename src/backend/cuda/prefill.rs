//! Chunks of tokens.

use std::ops::Range;

use super::abi::ExpertLayout;
use super::device::{Device, Stream};
use super::{Cuda, CudaOptions};
use crate::backend::{ModelShape, Result, Routing};

pub struct Prefill {}

impl Prefill {
    pub fn new(
        _device: &Device,
        _shape: &ModelShape,
        _layouts: [&ExpertLayout; 2],
        _options: &CudaOptions,
        _stream: &Stream,
    ) -> Result<Self> {
        Ok(Prefill {})
    }

    pub fn max_tokens(&self) -> usize {
        512
    }
}

impl Cuda {
    pub(super) fn prefill_all(
        &mut self,
        ids: &[u32],
        rows: Range<usize>,
        on_routing: &mut dyn FnMut(usize, usize, &Routing),
    ) -> Result<Vec<f32>> {
        self.step_all(ids, rows, on_routing)
    }
}
