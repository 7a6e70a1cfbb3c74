//! What opening a checkpoint costs, and how much of it the reference backend expands at a time.

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Instant;

use moectl::backend::reference::Reference;
use moectl::backend::{Backend, Routing};
use moectl::formats::Checkpoint;
use moectl::model::Source;
use moectl::model::weights;

/// Counts bytes on the heap, now and at most.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is the system allocator's; only numbers are kept.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(now, Relaxed);
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promise, passed on.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static HEAP: Counting = Counting;

/// One measurement at a time: the counters are the process's.
static TURN: Mutex<()> = Mutex::new(());

/// Bytes of heap that the opened checkpoint holds, and those that opening took at most.
fn cost(dir: &Path) -> (usize, usize) {
    let before = NOW.load(Relaxed);
    PEAK.store(before, Relaxed);
    let checkpoint = Checkpoint::open(dir).unwrap();
    let cost = (NOW.load(Relaxed) - before, PEAK.load(Relaxed) - before);
    drop(checkpoint);
    cost
}

#[track_caller]
fn assert_cheap(dir: &Path, percent: f64) {
    let size = std::fs::metadata(dir.join("model.safetensors"))
        .unwrap()
        .len();
    let start = Instant::now();
    let (retained, peak) = cost(dir);
    let of_size = |bytes| 100.0 * bytes as f64 / size as f64;
    println!(
        "{size} bytes: {retained} retained ({:.2}%), {peak} at most ({:.2}%), {:?}",
        of_size(retained),
        of_size(peak),
        start.elapsed()
    );
    assert!(of_size(retained) < percent && of_size(peak) < percent);
    assert!(start.elapsed().as_secs() < 10);
}

/// Sizes of a Qwen3-Next model.
struct Shape {
    vocab: u64,
    hidden: u64,
    layers: u64,
    experts: u64,
    intermediate: u64,
    /// query and value heads of a full-attention layer, and their size
    heads: [u64; 3],
    /// key and value heads of a linear-attention layer, and their size
    linear_heads: [u64; 3],
}

/// Name, dtype, shape and bytes of every tensor in the published NF4 layout.
fn nf4_layout(s: &Shape) -> Vec<(String, &'static str, Vec<u64>, u64)> {
    let mut tensors = Vec::new();
    let mut push = |name: String, dtype, shape: Vec<u64>| {
        let width = match dtype {
            "U8" => 1,
            "BF16" => 2,
            _ => 4,
        };
        let bytes = shape.iter().product::<u64>() * width;
        tensors.push((name, dtype, shape, bytes));
    };
    let mut linears = Vec::new();
    let d = s.hidden;
    push("lm_head.weight".into(), "BF16", vec![s.vocab, d]);
    push("model.embed_tokens.weight".into(), "BF16", vec![s.vocab, d]);
    push("model.norm.weight".into(), "BF16", vec![d]);
    for i in 0..s.layers {
        let layer = format!("model.layers.{i}");
        push(format!("{layer}.input_layernorm.weight"), "BF16", vec![d]);
        push(
            format!("{layer}.post_attention_layernorm.weight"),
            "BF16",
            vec![d],
        );
        push(
            format!("{layer}.mlp.gate.weight"),
            "BF16",
            vec![s.experts, d],
        );
        linears.push((format!("{layer}.mlp.shared_expert_gate"), 1, d));
        let shared = std::iter::once(format!("{layer}.mlp.shared_expert"));
        for mlp in shared.chain((0..s.experts).map(|e| format!("{layer}.mlp.experts.{e}"))) {
            linears.push((format!("{mlp}.gate_proj"), s.intermediate, d));
            linears.push((format!("{mlp}.up_proj"), s.intermediate, d));
            linears.push((format!("{mlp}.down_proj"), d, s.intermediate));
        }
        if i % 4 == 3 {
            let [q, kv, size] = s.heads;
            let attention = format!("{layer}.self_attn");
            push(format!("{attention}.q_norm.weight"), "BF16", vec![size]);
            push(format!("{attention}.k_norm.weight"), "BF16", vec![size]);
            linears.push((format!("{attention}.q_proj"), 2 * q * size, d));
            linears.push((format!("{attention}.k_proj"), kv * size, d));
            linears.push((format!("{attention}.v_proj"), kv * size, d));
            linears.push((format!("{attention}.o_proj"), d, q * size));
        } else {
            let [k, v, size] = s.linear_heads;
            let attention = format!("{layer}.linear_attn");
            push(format!("{attention}.A_log"), "BF16", vec![v]);
            push(format!("{attention}.dt_bias"), "BF16", vec![v]);
            push(format!("{attention}.norm.weight"), "BF16", vec![size]);
            push(
                format!("{attention}.conv1d.weight"),
                "BF16",
                vec![(2 * k + v) * size, 1, 4],
            );
            linears.push((format!("{attention}.in_proj_qkvz"), 2 * (k + v) * size, d));
            linears.push((format!("{attention}.in_proj_ba"), 2 * v, d));
            linears.push((format!("{attention}.out_proj"), d, v * size));
        }
    }
    for (module, rows, cols) in linears {
        let blocks = (rows * cols).div_ceil(64);
        let name = format!("{module}.weight");
        push(format!("{name}.absmax"), "U8", vec![blocks]);
        push(
            format!("{name}.nested_absmax"),
            "F32",
            vec![blocks.div_ceil(256)],
        );
        push(format!("{name}.nested_quant_map"), "F32", vec![256]);
        push(format!("{name}.quant_map"), "F32", vec![16]);
        push(
            format!("{name}.quant_state.bitsandbytes__nf4"),
            "U8",
            vec![170],
        );
        push(name, "U8", vec![rows * cols / 2, 1]);
    }
    tensors
}

/// A model folder with a true header and a hole for data; `None` where files have no holes.
fn sparse_model(shape: &Shape) -> Option<(tempfile::TempDir, PathBuf)> {
    let dir = tempfile::tempdir().unwrap();
    let mut header = String::from(r#"{"__metadata__":{"format":"pt"}"#);
    let mut end = 0;
    for (name, dtype, shape, bytes) in nf4_layout(shape) {
        let start = end;
        end += bytes;
        header += &format!(
            r#","{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{start},{end}]}}"#
        );
    }
    header.push('}');
    let mut out = BufWriter::new(File::create(dir.path().join("model.safetensors")).unwrap());
    out.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    out.write_all(header.as_bytes()).unwrap();
    let size = 8 + header.len() as u64 + end;
    if let Err(e) = out.into_inner().unwrap().set_len(size) {
        println!("skipped: no file of {size} bytes here: {e}");
        return None;
    }
    let path = dir.path().into();
    Some((dir, path))
}

#[test]
fn opening_the_80b_model_costs_a_thousandth_of_its_size() {
    let _turn = TURN.lock().unwrap();
    let shape = Shape {
        vocab: 151_936,
        hidden: 2048,
        layers: 48,
        experts: 512,
        intermediate: 512,
        heads: [16, 2, 256],
        linear_heads: [16, 32, 128],
    };
    assert_eq!(
        nf4_layout(&shape).len(),
        74_391 + 5 * (74_391 - 3 - 48 * 3 - 36 * 4 - 12 * 2)
    );
    let Some((_keep, dir)) = sparse_model(&shape) else {
        return;
    };
    assert_cheap(&dir, 0.1);
}

#[test]
fn opening_a_model_of_many_small_experts_costs_under_five_percent() {
    let _turn = TURN.lock().unwrap();
    let shape = Shape {
        vocab: 4096,
        hidden: 256,
        layers: 8,
        experts: 64,
        intermediate: 64,
        heads: [4, 1, 64],
        linear_heads: [4, 8, 32],
    };
    let Some((_keep, dir)) = sparse_model(&shape) else {
        return;
    };
    assert_cheap(&dir, 5.0);
}

#[test]
fn the_reference_backend_expands_one_expert_at_a_time() {
    let _turn = TURN.lock().unwrap();
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/workloads/tiny-moe");
    let source = Source::resolve(Some(folder)).unwrap();
    let shape = source.config().unwrap().shape;
    let weights = weights::load(&source.checkpoint().unwrap(), &source.config().unwrap()).unwrap();
    let experts = shape.moe.num_experts;
    let expert_bytes = 3 * shape.moe.moe_intermediate_size * shape.hidden_size * size_of::<f32>();
    // One token that picks every expert of the layer.
    let routing = Routing {
        num_experts_per_tok: experts,
        topk_ids: (0..experts as u16).collect(),
        topk_weights: vec![1.0 / experts as f32; experts],
    };
    let mut backend = Reference::new(shape, weights);
    let mut hidden = backend.embed(&[5]).unwrap();
    backend.experts(0, &mut hidden, &routing).unwrap();
    let before = NOW.load(Relaxed);
    PEAK.store(before, Relaxed);
    backend.experts(1, &mut hidden, &routing).unwrap();
    let peak = PEAK.load(Relaxed) - before;
    println!("{peak} bytes at most, an expert has {expert_bytes} in f32");
    assert!(peak < expert_bytes, "{peak} of {expert_bytes}");
}
