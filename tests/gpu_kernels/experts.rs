//! experts.cu: the experts of one token that the GPU computes.

use moectl::backend::cuda::abi::Format;
use moectl::backend::cuda::geometry;
use moectl::backend::{AttentionShape, DeltaNetShape, ModelShape, MoeShape, Rope};

use crate::router::Decision;
use crate::{EPS, Experts, FORMATS, Gpu, KINDS, Kind, Rng, args, check, fits, rms_norm, wide};

/// Two products and an exponential, all in f32.
const TOLERANCE: f64 = 5e-5;

/// Added to the address of a blob in host memory.
const IN_HOST: u64 = 1;

pub fn shape(dim: usize, experts: usize, k: usize) -> ModelShape {
    ModelShape {
        vocab_size: 1,
        hidden_size: dim,
        rms_norm_eps: EPS,
        mixers: Vec::new(),
        attention: AttentionShape {
            num_attention_heads: 1,
            num_key_value_heads: 1,
            head_dim: 32,
            rotary_dim: 8,
            rope: Rope::plain(1e4),
        },
        delta_net: DeltaNetShape {
            num_key_heads: 1,
            num_value_heads: 1,
            key_head_dim: 32,
            value_head_dim: 32,
            conv_kernel_dim: 4,
        },
        moe: MoeShape {
            num_experts: experts,
            num_experts_per_tok: k,
            moe_intermediate_size: 64,
            shared_expert_intermediate_size: 64,
            norm_topk_prob: true,
        },
    }
}

struct Case {
    dim: usize,
    intermediate: [usize; 2],
    formats: [Format; 2],
    k: usize,
    /// Routed ones that the GPU has
    count: usize,
    /// Every n-th routed one in host memory; 0 for none
    in_host: usize,
    kind: Kind,
    add: bool,
}

fn run(gpu: &Gpu, case: &Case, seed: u64) {
    let mut rng = Rng::new(seed);
    let Case { dim, k, count, .. } = *case;
    let what = format!(
        "dim {dim}, {:?} {:?}, {count} of {k}, host {}, {:?}",
        case.intermediate, case.formats, case.in_host, case.kind
    );
    let routed = Experts::random(
        &mut rng,
        count.max(1),
        dim,
        case.intermediate[0],
        case.formats[0],
    );
    let shared = Experts::random(&mut rng, 1, dim, case.intermediate[1], case.formats[1]);
    let mut decision: Decision = bytemuck::Zeroable::zeroed();
    decision.count = count as i32 + 1;
    decision.shared = count as i32;
    let mut buffers = Vec::new();
    let mut pinned = Vec::new();
    let routed_units = gpu.up(&routed.units());
    for e in 0..count {
        let blob = routed.blob(e);
        decision.blob[e] = if case.in_host > 0 && e % case.in_host == 0 {
            let mut host = gpu.device.alloc_host::<u8>(blob.len()).unwrap();
            host.as_mut_slice().copy_from_slice(&blob);
            pinned.push(host);
            pinned.last().unwrap().at(0) + IN_HOST
        } else {
            buffers.push(gpu.up(&blob));
            buffers.last().unwrap().address()
        };
        decision.units[e] = routed_units.at(4 * e * routed.layout.num_units as usize);
        decision.weight[e] = if e == 1 {
            1e-6
        } else {
            0.05 + 0.1 * rng.uniform()
        };
    }
    let (shared_blob, shared_units) = (gpu.up(&shared.blobs()), gpu.up(&shared.units()));
    decision.blob[count] = shared_blob.address();
    decision.units[count] = shared_units.address();
    decision.weight[count] = 0.7;
    let decision_on_device = gpu.up(&[decision]);

    let x = rng.vector(dim, case.kind);
    let scale = rng.factors(dim);
    let stride = case.intermediate[0]
        .max(case.intermediate[1])
        .next_multiple_of(64);
    let h = gpu.nans((k + 1) * stride);
    let (hidden, norm) = (gpu.up(&x), gpu.up(&scale));
    gpu.launch(
        "decode_experts_up",
        geometry::experts_up(&shape(dim, 16, k), [&routed.layout, &shared.layout]),
        args![
            hidden.address(),
            norm.address(),
            EPS,
            dim as i32,
            decision_on_device.address(),
            routed.layout,
            shared.layout,
            h.address(),
            stride as i32
        ],
    );
    let normed = rms_norm(&x, &scale);
    let found: Vec<f32> = gpu.down(&h);
    let of = |e: usize| {
        if e < count {
            (&routed, e)
        } else {
            (&shared, 0)
        }
    };
    for (e, row) in found.chunks_exact(stride).enumerate() {
        let used = match e {
            _ if e > count => 0,
            _ => of(e).0.layout.intermediate as usize,
        };
        assert!(
            row[used..].iter().all(|x| x.is_nan()),
            "{what}: h beyond {used} of {e}"
        );
        if used > 0 {
            let (experts, i) = of(e);
            let expected = experts.hidden(i, &normed);
            check(
                &format!("{what}: h of {e}"),
                &row[..used],
                &expected,
                TOLERANCE,
            );
        }
    }

    let before = rng.gausses(dim, 1.0);
    let out = gpu.up(&before);
    gpu.launch(
        "decode_experts_down",
        geometry::experts_down(dim),
        args![
            h.address(),
            stride as i32,
            k as i32,
            decision_on_device.address(),
            routed.layout,
            shared.layout,
            dim as i32,
            out.address(),
            case.add as i32
        ],
    );
    let mut expected = if case.add {
        wide(&before)
    } else {
        vec![0.0; dim]
    };
    for e in 0..=count {
        let (experts, i) = of(e);
        let down = &experts.each[i][2];
        let h = wide(&found[e * stride..e * stride + down.cols]);
        let weight = f64::from(decision.weight[e]);
        expected
            .iter_mut()
            .zip(down.times(&h))
            .for_each(|(y, x)| *y += weight * x);
    }
    check(
        &format!("{what}: down"),
        &gpu.down::<f32>(&out),
        &expected,
        TOLERANCE,
    );
}

#[test]
fn experts_of_every_format_place_and_number() {
    let Some(gpu) = Gpu::open() else { return };
    let sizes = [
        (64, [64, 64]),
        (128, [64, 128]),
        (320, [192, 64]),
        (192, [512, 320]),
        (2048, [64, 64]),
        (100, [36, 100]),
    ];
    let mut seed = 0;
    for (i, (dim, intermediate)) in sizes.into_iter().enumerate() {
        for (f, format) in FORMATS.into_iter().enumerate() {
            for shared_format in [format, FORMATS[(f + 1) % 3]] {
                let all = [dim, intermediate[0], intermediate[1]];
                if ![format, shared_format]
                    .iter()
                    .all(|&f| all.iter().all(|&n| fits(f, n)))
                {
                    continue;
                }
                for (c, count) in [0, 1, 4, 10].into_iter().enumerate() {
                    seed += 1;
                    let case = Case {
                        dim,
                        intermediate,
                        formats: [format, shared_format],
                        k: 10,
                        count,
                        in_host: (i + f + c) % 3,
                        kind: KINDS[(seed as usize) % KINDS.len()],
                        add: seed % 2 == 0,
                    };
                    run(&gpu, &case, seed);
                }
            }
        }
    }
    // As many as there may be.
    for format in FORMATS {
        let case = Case {
            dim: 64,
            intermediate: [64, 64],
            formats: [format, format],
            k: 32,
            count: 32,
            in_host: 2,
            kind: Kind::Normal,
            add: true,
        };
        run(&gpu, &case, 999);
    }
}

#[test]
fn combine_adds_both_parts_and_takes_the_flag_back() {
    let Some(gpu) = Gpu::open() else { return };
    for dim in [4, 64, 100, 1024, 1028, 2048] {
        for (with_gpu, with_flag) in [(true, true), (false, true), (true, false)] {
            let mut rng = Rng::new(dim as u64);
            let [a, b, c] = [1.0, 100.0, 1e-3].map(|scale| rng.gausses(dim, scale));
            let mut cpu = gpu.device.alloc_host::<f32>(dim).unwrap();
            cpu.as_mut_slice().copy_from_slice(&b);
            let mut flag = gpu.device.alloc_host::<u32>(1).unwrap();
            flag.as_mut_slice()[0] = 1;
            let (from_gpu, hidden) = (gpu.up(&a), gpu.up(&c));
            gpu.launch(
                "decode_combine",
                geometry::combine(dim),
                args![
                    if with_gpu { from_gpu.address() } else { 0 },
                    cpu.at(0),
                    if with_flag { flag.at(0) } else { 0 },
                    hidden.address(),
                    dim as i32
                ],
            );
            assert_eq!(flag.as_slice(), [u32::from(!with_flag)]);
            let expected: Vec<f64> = (0..dim)
                .map(|i| {
                    f64::from(c[i]) + f64::from(b[i]) + if with_gpu { a[i].into() } else { 0.0 }
                })
                .collect();
            check(
                &format!("{dim}"),
                &gpu.down::<f32>(&hidden),
                &expected,
                1e-6,
            );
        }
    }
}
