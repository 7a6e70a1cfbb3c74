//! moectl runs large mixture-of-experts language models on one small GPU plus system RAM, and
//! tells beforehand how fast it will be.
//!
//! This page is the map. `moectl --help` is the manual.
//!
//! # Data flow
//!
//! ```text
//! checkpoint --formats--> weights --model--> blocks --backend--> logits --engine--> tokens
//!                                              |  routing events (layer, position, experts, weights)
//!                                              v
//! planning: trace -> stats, hit curves -> knapsack over VRAM, by a cost model -> placement
//! ```
//!
//! A checkpoint is mapped, never read as a whole: [`formats`] hands out views. [`model`] gives
//! them roles and shapes. A [`backend`] computes blocks and runs sequences over them. The
//! [`engine`] turns logits into tokens and text. What the router picks leaves the loop over blocks
//! as events, which [`planning`] counts, simulates caches on, and turns into a placement.
//!
//! # Layers
//!
//! Imports point one way: `commands -> engine -> model -> backend -> formats`.
//!
//! | module | is | does not know |
//! |---|---|---|
//! | [`formats`] | safetensors, NF4, corpora, JSON envelopes, atomic writes | devices, models |
//! | [`backend`] | the blocks on one kind of hardware: [`backend::reference`], the oracle, [`backend::cpu`], own SIMD kernels, and `backend::cuda`, own kernels in `kernels/` | tensor names, text |
//! | [`model`] | config, weights by role, tokenizer, chat template, synthetic models | hardware |
//! | [`engine`] | sessions, kept prefixes, whose turn it is, sampling, streaming, stopping, carrying out the cache's decisions | flags, files of results |
//! | [`planning`] | traces, statistics, policies and the cache they drive, simulator, cost model, knapsack | files, clocks, GPUs |
//! | [`hardware`] | facts and measured bandwidths of this machine | models |
//! | [`report`] | records, statistics, tables, charts | how anything was computed |
//! | [`server`] | HTTP: who may ask, the wire formats of each API, tool calls, grammars, metrics | how tokens are computed |
//! | [`commands`], [`cli`] | flags and flow of each verb | how blocks are computed |
//!
//! # Invariants
//!
//! - The seam to a backend is the block, not the tensor op: inside a block a backend fuses as it
//!   likes.
//! - A sequence is a value of an [`backend::Executor`]: made, forked, parked, restored from a
//!   snapshot, each is as if it were alone, bit for bit when fed in the same pieces. `cpu` and
//!   `reference` come by through the loop over blocks ([`backend::BlockExecutor`]); `cuda` runs a decode
//!   step as one captured graph that knows no sequence, and the CPU and the GPU meet once per layer,
//!   through flags in pinned memory.
//! - What one owner's prompts left behind ([`engine::prefix`]) no other's can find.
//! - A token chosen from the best logits ([`backend::BestLogits`]) is the one that all logits give.
//! - A step takes a token of each of up to eight sequences, or a few of one that may be taken back, and
//!   reads weights once for all; each token gets the bits that it gets alone.
//! - Feeding a sequence in other pieces changes no result beyond rounding, and greedy tokens not
//!   at all.
//! - Which weights are quantised is decided per tensor from the file, never from the config.
//! - Bad input is an error that names file, place and way out; a panic is a bug of ours.
//! - A regular file is written whole or not at all, through links and with its permissions; devices,
//!   pipes and `-` are written in place ([`formats::atomic`]). Inputs may be `-` or a pipe
//!   ([`formats::input`]).
//! - Simulated and real caches are the same [`planning::cache`] driven by the same policy.
//! - The server reaches the model through [`engine::service`] only, whatever schedules requests inside.
//! - What a request asks for and cannot be enforced is refused, never loosened.
//! - Every figure of a machine says whether it was measured or modelled
//!   ([`planning::hardware`]), and so does every plan made from it.
//! - An estimate is never shown as a measurement, nor synthetic data without the word.
//!
//! # Families of models
//!
//! A family is a [`model::families`] file: what its config class defaults to, what its tensors are called,
//! and in which of a few ways its blocks differ (norms, gates, shared expert, layout of a delta net).
//! Backends know none of them: [`model::weights`] gives every family the blocks of Qwen3-Next. Of the
//! commit that added the second and the third family, counted with `git show --numstat`, some 430 lines
//! outside of `model/families` are theirs: 189 gather rows of stored matrices ([`formats::gathered`]), 147
//! load, 39 make synthetic ones, 35 read config.json, 20 are in backends: 215 a family, beside a JSON
//! shape of 55 lines.
//!
//! # Absent on purpose
//!
//! Training, other quantisations than NF4, several GPUs, a chat page.

#![warn(clippy::undocumented_unsafe_blocks)]

pub mod backend;
pub mod cli;
pub mod commands;
pub mod engine;
pub mod formats;
pub mod hardware;
pub mod model;
pub mod planning;
pub mod report;
pub mod server;
