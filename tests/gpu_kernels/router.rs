//! router.cu: the choice of experts of one token, for the GPU and for the CPU.

use bytemuck::{Pod, Zeroable};
use moectl::backend::cuda::abi::{DECISION_BYTES, Format, Handoff, MAX_TOP_K, Step};
use moectl::backend::cuda::geometry;

use crate::{EPS, FORMATS, Gpu, Kind, Matrix, Rng, args, check, fits, rms_norm, sigmoid};

/// Logits are exact to f32, and so are the weights made of them.
const TOLERANCE: f64 = 2e-5;

/// `Decision` of `common.cuh`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Decision {
    pub count: i32,
    pub shared: i32,
    pub blob: [u64; MAX_TOP_K + 1],
    pub units: [u64; MAX_TOP_K + 1],
    pub weight: [f32; MAX_TOP_K + 1],
    pub padding: [f32; 1],
}

// SAFETY: plain numbers, all of which may be zero.
unsafe impl Zeroable for Decision {}
// SAFETY: any bytes are numbers, and there is no padding: the sizes below add up.
unsafe impl Pod for Decision {}

#[test]
fn a_decision_has_the_bytes_of_the_kernels_one() {
    assert_eq!(size_of::<Decision>(), DECISION_BYTES);
}

/// Softmax and choice in f64: ids and weights, best first, lower ids first among equals.
pub fn top_k(logits: &[f64], k: usize, norm: bool) -> (Vec<usize>, Vec<f64>) {
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = logits.iter().map(|x| (x - largest).exp()).sum();
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    order.truncate(k);
    let mut weights: Vec<f64> = order
        .iter()
        .map(|&e| (logits[e] - largest).exp() / total)
        .collect();
    if norm {
        let sum: f64 = weights.iter().sum();
        weights.iter_mut().for_each(|w| *w /= sum);
    }
    (order, weights)
}

struct Case {
    experts: usize,
    k: usize,
    dim: usize,
    format: Format,
    gate_format: Format,
    kind: Kind,
    norm: bool,
    /// Of `m` misses, how many the GPU reads
    split: fn(usize) -> i32,
    /// Of `n` experts, every `n`-th is in VRAM; 0 for none
    resident: usize,
    with_blobs: bool,
    with_handoff: bool,
    signal: bool,
    /// Copies of the first row, which tie
    equal_rows: usize,
}

fn run(gpu: &Gpu, case: &Case, seed: u64) {
    let mut rng = Rng::new(seed);
    let Case {
        experts, k, dim, ..
    } = *case;
    let what = format!(
        "{k} of {experts} experts, dim {dim}, {:?} {:?} {:?} norm {}",
        case.format, case.gate_format, case.kind, case.norm
    );
    let mut router = Matrix::random(&mut rng, experts, dim, case.format, 0.05);
    if case.equal_rows > 1 {
        assert_ne!(case.format, Format::Nf4Tiles);
        let bytes = router.bytes.len() / experts;
        for row in 1..case.equal_rows {
            router.bytes.copy_within(0..bytes, row * bytes);
            router.values.copy_within(0..dim, row * dim);
        }
    }
    let gate = Matrix::random(&mut rng, 1, dim, case.gate_format, 0.05);
    let x = rng.vector(dim, case.kind);
    let scale = rng.factors(dim);
    let normed = rms_norm(&x, &scale);
    let logits = router.times(&normed);
    let (ids, weights) = top_k(&logits, k, case.norm);
    let shared_weight = sigmoid(gate.times(&normed)[0]);

    let number = 77u32;
    let step = gpu.up(&[Step {
        position: 3,
        number,
        state: 0,
    }]);
    let (hidden, norm) = (gpu.up(&x), gpu.up(&scale));
    let (w, g) = (router.upload(gpu), gate.upload(gpu));
    let out = gpu.nans(experts + 1);
    let counter = gpu.zeros(4);
    let slots: Vec<u64> = (0..experts)
        .map(|e| match case.resident {
            0 => 0,
            n if e % n == 0 => 0x7000_0000 + 4096 * e as u64,
            _ => 0,
        })
        .collect();
    let slots_on_device = gpu.up(&slots);
    let (host_blobs, blob_bytes) = (0x9000_0000u64, 1088i64 * 3);
    let (units, num_units) = (0xa000_0000u64, 6);
    let (shared_blob, shared_units) = (0xb000_0000u64, 0xc000_0000u64);
    let split: Vec<i32> = (0..=k).map(case.split).collect();
    let split_on_device = gpu.up(&split);
    let decision = gpu.up(&[0x55u8; DECISION_BYTES]);
    let mut handoff = gpu.device.alloc_host::<Handoff>(1).unwrap();
    handoff.as_mut_slice()[0].ready = 5;
    let handed_x = gpu.device.alloc_host::<f32>(dim).unwrap();
    // Twice: the kernel leaves its counter ready for the next launch.
    for round in 0..2 {
        gpu.launch(
            "decode_router",
            geometry::router(&w.linear, &g.linear, case.with_handoff),
            args![
                step.address(),
                hidden.address(),
                norm.address(),
                EPS,
                dim as i32,
                w.linear,
                g.linear,
                k as i32,
                case.norm as i32,
                out.address(),
                counter.address(),
                slots_on_device.address(),
                if case.with_blobs { host_blobs } else { 0 },
                blob_bytes,
                units,
                num_units,
                shared_blob,
                shared_units,
                split_on_device.address(),
                decision.address(),
                if case.with_handoff { handoff.at(0) } else { 0 },
                if case.with_handoff { handed_x.at(0) } else { 0 },
                case.signal as i32
            ],
        );
        assert_eq!(gpu.down::<u32>(&counter), [0], "{what} round {round}");
    }
    let found: Vec<f32> = gpu.down(&out);
    check(
        &format!("{what}: logits"),
        &found[..experts],
        &logits,
        TOLERANCE,
    );

    // Who does what, as the heads of router.cu and decode.rs say.
    let misses: Vec<usize> = (0..k).filter(|&rank| slots[ids[rank]] == 0).collect();
    let read = match case.with_blobs {
        true => (split[misses.len()] as usize).min(misses.len()),
        false => 0,
    };
    let on_cpu = &misses[..misses.len() - read];
    let on_gpu: Vec<usize> = (0..k).filter(|rank| !on_cpu.contains(rank)).collect();
    let decision: Decision = bytemuck::pod_read_unaligned(&gpu.down::<u8>(&decision));
    assert_eq!(decision.count as usize, on_gpu.len() + 1, "{what}");
    assert_eq!(decision.shared as usize, on_gpu.len(), "{what}");
    for (i, &rank) in on_gpu.iter().enumerate() {
        let id = ids[rank];
        let blob = match slots[id] {
            0 => host_blobs + (id as i64 * blob_bytes) as u64 + 1,
            slot => slot,
        };
        assert_eq!(decision.blob[i], blob, "{what}: expert {id}");
        assert_eq!(
            decision.units[i],
            units + 4 * (num_units * id as i32) as u64,
            "{what}"
        );
    }
    let last = on_gpu.len();
    assert_eq!(
        (decision.blob[last], decision.units[last]),
        (shared_blob, shared_units),
        "{what}"
    );
    let mut expected: Vec<f64> = on_gpu.iter().map(|&rank| weights[rank]).collect();
    check(&what, &decision.weight[..last], &expected, TOLERANCE);
    check(
        &what,
        &decision.weight[last..=last],
        &[shared_weight],
        TOLERANCE,
    );

    if !case.with_handoff {
        return;
    }
    let handoff = handoff.as_slice()[0];
    assert_eq!(
        handoff.ready,
        if case.signal { number } else { 5 },
        "{what}"
    );
    assert_eq!(handoff.num_cpu as usize, on_cpu.len(), "{what}");
    let topk: Vec<usize> = handoff.topk_ids[..k]
        .iter()
        .map(|&id| id as usize)
        .collect();
    assert_eq!(topk, ids, "{what}");
    check(&what, &handoff.topk_weights[..k], &weights, TOLERANCE);
    let cpu_ids: Vec<usize> = handoff.cpu_ids[..on_cpu.len()]
        .iter()
        .map(|&id| id as usize)
        .collect();
    assert_eq!(
        cpu_ids,
        on_cpu.iter().map(|&rank| ids[rank]).collect::<Vec<_>>(),
        "{what}"
    );
    expected = on_cpu.iter().map(|&rank| weights[rank]).collect();
    check(
        &what,
        &handoff.cpu_weights[..on_cpu.len()],
        &expected,
        TOLERANCE,
    );
    check(
        &format!("{what}: x"),
        handed_x.as_slice(),
        &normed,
        TOLERANCE,
    );
}

#[test]
fn router_chooses_and_hands_over() {
    let Some(gpu) = Gpu::open() else { return };
    let splits: [fn(usize) -> i32; 3] = [|_| 0, |m| m as i32, |m| m as i32 / 2];
    let sizes = [
        (2, 1),
        (2, 2),
        (3, 2),
        (4, 1),
        (5, 3),
        (8, 8),
        (10, 3),
        (16, 4),
        (16, 10),
        (15, 10),
        (33, 10),
        (64, 8),
        (512, 10),
        (513, 10),
        (1024, 32),
    ];
    for (i, (experts, k)) in sizes.into_iter().enumerate() {
        for (f, format) in FORMATS.into_iter().enumerate() {
            let dim = match (i + f) % 4 {
                0 if experts <= 16 => 2048,
                1 if format != Format::Nf4Tiles => 100,
                _ => 64 * (1 + i % 2),
            };
            let gate_format = FORMATS[(f + i % 2) % 3];
            if !fits(gate_format, dim) {
                continue;
            }
            let case = Case {
                experts,
                k,
                dim,
                format,
                gate_format,
                kind: [Kind::Normal, Kind::Outliers, Kind::Sparse][(i + f) % 3],
                norm: (i + f) % 2 == 0,
                split: splits[(i + 2 * f) % 3],
                resident: (2 * i + f) % 4,
                with_blobs: (i + f) % 5 != 4,
                with_handoff: (i + f) % 7 != 6,
                signal: i % 3 != 2,
                equal_rows: 1,
            };
            run(&gpu, &case, (10 * i + f) as u64);
        }
    }
}

#[test]
fn equal_logits_go_in_order_of_id() {
    let Some(gpu) = Gpu::open() else { return };
    for (experts, k, equal_rows, kind) in [
        (16, 4, 16, Kind::Normal),
        (16, 4, 6, Kind::Normal),
        (64, 10, 40, Kind::Normal),
        (40, 10, 1, Kind::Zeros),
    ] {
        for format in [Format::Bf16Rows, Format::F32Rows] {
            let case = Case {
                experts,
                k,
                dim: 64,
                format,
                gate_format: format,
                kind,
                norm: true,
                split: |_| 0,
                resident: 2,
                with_blobs: true,
                with_handoff: true,
                signal: true,
                equal_rows,
            };
            run(&gpu, &case, (experts + equal_rows) as u64);
        }
    }
}
