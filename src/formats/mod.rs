//! Bytes on disk: checkpoints, quantised weights, and where input comes from and output goes.
//!
//! Knows no device and no model: tensors have names, dtypes, shapes and bytes, nothing more.

pub mod atomic;
pub mod bytes;
pub mod checkpoint;
pub mod corpus;
pub mod document;
pub mod dtype;
pub mod error;
mod header;
pub mod input;
pub mod lazy;
pub mod matrix;
pub mod nf4;
pub mod writer;

pub use bytes::Bytes;
pub use checkpoint::{Checkpoint, Tensor};
pub use document::{Document, DocumentError, ModelId};
pub use dtype::Dtype;
pub use error::FormatError;
pub use matrix::Matrix;
