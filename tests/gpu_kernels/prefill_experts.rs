//! moe_prefill.cu: the experts of chunks of tokens.

use moectl::backend::cuda::abi::{Format, HostArray, HostArrays};
use moectl::backend::cuda::geometry;
use moectl::backend::cuda::variants;
use moectl::planning::Precision;

use crate::prefill::{TOKENS, TOLERANCE, TOLERANCE_FAST, split, tokens_of_all_kinds};
use crate::{Experts, FORMATS, Gpu, Rng, args, check, variants_of, wide};

struct MoeCase {
    tokens: usize,
    experts: usize,
    k: usize,
    dim: usize,
    intermediate: [usize; 2],
    formats: [Format; 2],
    /// Experts that nobody picks, the first ones, and whether all tokens pick the same
    shy: usize,
    crowd: bool,
}

fn run_experts(gpu: &Gpu, case: &MoeCase, seed: u64) {
    let mut rng = Rng::new(seed);
    let MoeCase {
        tokens,
        experts,
        k,
        dim,
        ..
    } = *case;
    let what = format!(
        "{tokens} tokens, {k} of {experts}, dim {dim}, {:?} {:?}",
        case.intermediate, case.formats
    );
    let routed = Experts::random(
        &mut rng,
        experts,
        dim,
        case.intermediate[0],
        case.formats[0],
    );
    let shared = Experts::random(&mut rng, 1, dim, case.intermediate[1], case.formats[1]);
    let mut ids: Vec<i32> = Vec::new();
    for t in 0..tokens {
        let mut some: Vec<i32> = (case.shy as i32..experts as i32).collect();
        if !case.crowd || t % 16 == 15 {
            for i in 0..k {
                let j = i + rng.below(some.len() - i);
                some.swap(i, j);
            }
        }
        ids.extend(&some[..k]);
    }
    let weights: Vec<f32> = (0..tokens * k).map(|_| 0.01 + rng.uniform()).collect();
    let gates: Vec<f32> = (0..tokens).map(|_| rng.uniform()).collect();
    let x = tokens_of_all_kinds(&mut rng, tokens, dim);
    let before = rng.gausses(tokens * dim, 1.0);

    // Sorted by expert, by token within one; then all of them for the shared one.
    let (t, top, e) = (tokens as i32, k as i32, experts as i32);
    let all_rows = tokens * (k + 1);
    let ids_on_device = gpu.up(&ids);
    let counts = gpu.up(&vec![-1i32; tokens.div_ceil(64) * experts]);
    let offsets = gpu.up(&vec![-1i32; experts + 2]);
    let tile_offsets = gpu.up(&vec![-1i32; experts + 2]);
    let max_tiles = (tokens * k).div_ceil(128) + experts + tokens.div_ceil(128);
    let tiles = gpu.up(&vec![-1i32; 4 * max_tiles]);
    let (rows, positions) = (
        gpu.up(&vec![-1i32; all_rows]),
        gpu.up(&vec![-1i32; all_rows]),
    );
    let chunks = geometry::prefill_group(experts, tokens);
    gpu.launch(
        "prefill_group_count",
        chunks,
        args![ids_on_device.address(), t, top, e, counts.address()],
    );
    gpu.launch(
        "prefill_group_scan",
        geometry::rows(1, 1024),
        args![
            counts.address(),
            t,
            top,
            e,
            offsets.address(),
            tiles.address(),
            tile_offsets.address()
        ],
    );
    gpu.launch(
        "prefill_group_scatter",
        chunks,
        args![
            ids_on_device.address(),
            t,
            top,
            e,
            counts.address(),
            rows.address(),
            positions.address()
        ],
    );
    let mut expected_rows = Vec::new();
    let mut expected_offsets = Vec::new();
    let mut expected_positions = vec![0; all_rows];
    for expert in 0..=experts {
        expected_offsets.push(expected_rows.len() as i32);
        for token in 0..tokens {
            let picks = &ids[token * k..(token + 1) * k];
            let rank = match expert {
                _ if expert == experts => Some(k),
                _ => picks.iter().position(|&id| id == expert as i32),
            };
            if let Some(rank) = rank {
                expected_positions[token * (k + 1) + rank] = expected_rows.len() as i32;
                expected_rows.push(token as i32);
            }
        }
    }
    expected_offsets.push(expected_rows.len() as i32);
    assert_eq!(gpu.down::<i32>(&rows), expected_rows, "{what}");
    assert_eq!(gpu.down::<i32>(&positions), expected_positions, "{what}");
    assert_eq!(gpu.down::<i32>(&offsets), expected_offsets, "{what}");
    let (found_tiles, found_offsets): (Vec<i32>, Vec<i32>) =
        (gpu.down(&tiles), gpu.down(&tile_offsets));
    assert!(found_offsets[experts + 1] as usize <= max_tiles, "{what}");
    for expert in 0..=experts {
        let mut next = expected_offsets[expert];
        for tile in found_offsets[expert]..found_offsets[expert + 1] {
            let tile = &found_tiles[4 * tile as usize..][..4];
            assert_eq!(tile[0], expert as i32, "{what}: tile");
            assert!((0..=128).contains(&tile[2]), "{what}: tile of {}", tile[2]);
            assert!(
                tile[2] == 0 || tile[1] == next,
                "{what}: tile at {}",
                tile[1]
            );
            next += tile[2];
        }
        assert_eq!(
            next,
            expected_offsets[expert + 1],
            "{what}: tiles of {expert}"
        );
    }

    let split_x = split(gpu, &x, None, tokens, None);
    let (blobs, shared_blob) = (gpu.up(&routed.blobs()), gpu.up(&shared.blobs()));
    let (units, shared_units) = (gpu.up(&routed.units()), gpu.up(&shared.units()));
    let table = |each: u64, base: u64, last: u64| -> Vec<u64> {
        (0..experts as u64)
            .map(|e| base + e * each)
            .chain([last])
            .collect()
    };
    let blob_table = gpu.up(&table(
        routed.layout.blob_bytes as u64,
        blobs.address(),
        shared_blob.address(),
    ));
    let unit_table = gpu.up(&table(
        4 * routed.layout.num_units as u64,
        units.address(),
        shared_units.address(),
    ));
    let stride = case.intermediate[0]
        .max(case.intermediate[1])
        .next_multiple_of(64);
    // As the engine does: the shared expert, then groups of others.
    let cut = experts / 3;
    let bound = |count: usize| (tokens * k.min(count)).div_ceil(128) + count;
    let groups = [
        (experts, 1, tokens.div_ceil(128)),
        (0, cut, bound(cut)),
        (cut, experts - cut, bound(experts - cut)),
    ];
    let of = |expert: usize| {
        if expert < experts {
            (&routed, expert)
        } else {
            (&shared, 0)
        }
    };
    let mut expected_hidden = Vec::new();
    for expert in 0..=experts {
        let (set, i) = of(expert);
        let range = expected_offsets[expert] as usize..expected_offsets[expert + 1] as usize;
        for &token in &expected_rows[range] {
            let token = token as usize;
            let mut h = set.hidden(i, &wide(&x[token * dim..(token + 1) * dim]));
            h.resize(stride, 0.0);
            expected_hidden.push(h);
        }
    }
    // Of one precision, up and down of the same device.
    let up = |bound| {
        variants_of(gpu, |precision, facts| {
            variants::prefill_experts_up(stride, bound, precision, facts)
        })
    };
    let down = |rows, bound| {
        variants_of(gpu, |precision, facts| {
            variants::prefill_experts_down(rows, tokens, bound, precision, facts)
        })
    };
    for (variant, (kernel, precision)) in up(1).into_iter().enumerate() {
        let suffix = kernel.name.trim_start_matches("prefill_experts_up");
        let tolerance = match precision {
            Precision::Exact => TOLERANCE,
            Precision::F16 => TOLERANCE_FAST,
        };
        let is_fast = precision == Precision::F16;
        let h = gpu.nans(all_rows * stride);
        for (first, count, bound) in groups {
            if count == 0 {
                continue;
            }
            let (kernel, _) = up(bound)[variant];
            gpu.launch(
                kernel.name,
                kernel.geometry,
                args![
                    split_x.high.address(),
                    split_x.low.address(),
                    split_x.scale.address(),
                    rows.address(),
                    tiles.address(),
                    tile_offsets.address(),
                    blob_table.address(),
                    unit_table.address(),
                    routed.layout,
                    shared.layout,
                    e,
                    dim as i32,
                    first as i32,
                    count as i32,
                    h.address(),
                    stride as i32
                ],
            );
        }
        let h: Vec<f32> = gpu.down(&h);
        for (row, expected) in expected_hidden.iter().enumerate() {
            let found = &h[row * stride..(row + 1) * stride];
            // A product of two: twice as far off.
            check(
                &format!("{what}: up{suffix} {row}"),
                found,
                expected,
                4.0 * tolerance,
            );
        }

        let split_h = split(gpu, &h, None, all_rows, None);
        let mut y = vec![f32::NAN; all_rows * dim];
        // All rows at once, and where there are enough, in two parts.
        let parts = if dim >= 128 {
            vec![(0, 64), (64, dim - 64)]
        } else {
            vec![(0, dim)]
        };
        for &(first_row, row_count) in &parts {
            let part = gpu.nans(all_rows * row_count);
            for (first, count, bound) in groups {
                if count == 0 {
                    continue;
                }
                let (kernel, _) = down(row_count, bound)[variant];
                gpu.launch(
                    kernel.name,
                    kernel.geometry,
                    args![
                        split_h.high.address(),
                        split_h.low.address(),
                        split_h.scale.address(),
                        tiles.address(),
                        tile_offsets.address(),
                        blob_table.address(),
                        unit_table.address(),
                        routed.layout,
                        shared.layout,
                        e,
                        dim as i32,
                        stride as i32,
                        first as i32,
                        count as i32,
                        first_row as i32,
                        row_count as i32,
                        part.address()
                    ],
                );
            }
            for (row, part) in gpu.down::<f32>(&part).chunks_exact(row_count).enumerate() {
                y[row * dim + first_row..][..row_count].copy_from_slice(part);
            }
        }
        for expert in 0..=experts {
            let (set, i) = of(expert);
            let down = &set.each[i][2];
            for row in expected_offsets[expert] as usize..expected_offsets[expert + 1] as usize {
                let h = wide(&h[row * stride..row * stride + down.cols]);
                let what = format!("{what}: down{suffix} {row}");
                check(
                    &what,
                    &y[row * dim..(row + 1) * dim],
                    &down.times(&h),
                    tolerance,
                );
            }
        }
        if is_fast {
            continue;
        }

        let (weights_on_device, gates_on_device) = (gpu.up(&weights), gpu.up(&gates));
        let hidden = gpu.up(&before);
        for &(first_row, row_count) in &parts {
            let part: Vec<f32> = (0..all_rows)
                .flat_map(|row| y[row * dim + first_row..][..row_count].to_vec())
                .collect();
            let part = gpu.up(&part);
            gpu.launch(
                "prefill_combine",
                geometry::prefill_combine(tokens),
                args![
                    part.address(),
                    positions.address(),
                    weights_on_device.address(),
                    gates_on_device.address(),
                    hidden.address(),
                    t,
                    top,
                    first_row as i32,
                    row_count as i32,
                    dim as i32
                ],
            );
        }
        let hidden: Vec<f32> = gpu.down(&hidden);
        for token in 0..tokens {
            let mut expected = wide(&before[token * dim..(token + 1) * dim]);
            for rank in 0..=k {
                let row = expected_positions[token * (k + 1) + rank] as usize;
                let weight = if rank < k {
                    weights[token * k + rank]
                } else {
                    gates[token]
                };
                let y = &y[row * dim..(row + 1) * dim];
                expected
                    .iter_mut()
                    .zip(y)
                    .for_each(|(x, &y)| *x += f64::from(weight) * f64::from(y));
            }
            let found = &hidden[token * dim..(token + 1) * dim];
            check(&format!("{what}: combine {token}"), found, &expected, 1e-6);
        }
    }
}

#[test]
fn experts_of_every_format_and_number_of_tokens() {
    let Some(gpu) = Gpu::open() else { return };
    let mut seed = 0;
    for (i, tokens) in TOKENS.into_iter().enumerate() {
        for (f, format) in FORMATS.into_iter().enumerate() {
            let (experts, k) = [(2, 1), (3, 2), (10, 3), (16, 4), (16, 10)][(i + 2 * f) % 5];
            let (dim, intermediate) = match (i + f) % 4 {
                0 => (64, [64, 64]),
                1 => (128, [64, 128]),
                2 => (192, [192, 64]),
                _ if format == Format::Nf4Tiles => (64, [128, 64]),
                _ => (100, [36, 100]),
            };
            let shared_format = match dim {
                100 => format,
                _ => FORMATS[(f + i % 2) % 3],
            };
            seed += 1;
            let case = MoeCase {
                tokens,
                experts,
                k,
                dim,
                intermediate,
                formats: [format, shared_format],
                shy: if experts - k > 2 { 2 } else { 0 },
                crowd: (i + f) % 3 == 2,
            };
            run_experts(&gpu, &case, seed);
        }
    }
}

#[test]
fn many_tokens_for_few_experts_take_several_tiles() {
    let Some(gpu) = Gpu::open() else { return };
    let tokens = if gpu.emulated { 300 } else { 1000 };
    for format in [Format::Nf4Tiles, Format::Bf16Rows] {
        let case = MoeCase {
            tokens,
            experts: 3,
            k: 2,
            dim: 64,
            intermediate: [64, 64],
            formats: [format, format],
            shy: 0,
            crowd: true,
        };
        run_experts(&gpu, &case, 500);
    }
    if !gpu.emulated {
        let case = MoeCase {
            tokens: 500,
            experts: 64,
            k: 10,
            dim: 2048,
            intermediate: [512, 512],
            formats: [Format::Nf4Tiles, Format::Nf4Tiles],
            shy: 3,
            crowd: false,
        };
        run_experts(&gpu, &case, 501);
    }
}

#[test]
fn arrays_in_host_memory_are_fetched_at_any_length_and_offset() {
    let Some(gpu) = Gpu::open() else { return };
    let mut from = gpu.device.alloc_host::<u32>(70_000).unwrap();
    let mut rng = Rng::new(5);
    from.as_mut_slice().fill_with(|| rng.below(1 << 30) as u32);
    let before = vec![7u32; 70_000];
    let to = gpu.up(&before);
    // First word in host memory, first on the device, words; of those that do not overlap there.
    let arrays = [
        (0, 0, 1),
        (4, 8, 4),
        (1, 17, 9),
        (8, 32, 64_001),
        (3, 64_040, 2),
        (0, 0, 0),
    ];
    let mut all = HostArrays::default();
    let mut expected = before;
    for (array, (first, at, count)) in all.each.iter_mut().zip(arrays) {
        *array = HostArray {
            from: from.at(first),
            to: to.address() + 4 * at as u64,
            count: count as i64,
        };
        expected[at..at + count].copy_from_slice(&from.as_slice()[first..first + count]);
    }
    gpu.launch("prefill_fetch", geometry::prefill_fetch(64_001), args![all]);
    assert_eq!(gpu.down::<u32>(&to), expected);
}
