//! moectl: large mixture-of-experts language models on one small GPU plus system RAM.

pub mod backend;
pub mod commands;
pub mod formats;
