//! The kernel against the one on vectors, bit for bit: on AMX where there is one, else emulated.

use super::*;
use crate::backend::cpu::CpuPrecision;
use crate::backend::cpu::activations::{Activations, Integers};
use crate::backend::cpu::isa::Isa;
use crate::backend::cpu::layout::TILE_COLS;
use crate::backend::cpu::linear::{Linear, with_tokens_for};
use crate::backend::cpu::load::load;
use crate::backend::cpu::tests::{random_nf4, random_vector};
use crate::backend::cpu::threads::Pool;

/// With and without AMX.
fn isas() -> Option<(Isa, Isa)> {
    let (found, amx) = (*Isa::available().last()?, emulator::amx());
    match (found, amx) {
        (_, None) => eprintln!("skipped: no AVX-512"),
        (Isa::Amx(_), _) => eprintln!("on AMX"),
        _ => eprintln!("no AMX: emulated"),
    }
    let amx = amx?;
    let Isa::Amx(proof) = amx else { unreachable!() };
    Some((amx, Isa::Avx512(proof.avx512())))
}

fn linear(pool: &mut Pool, rows: usize, cols: usize, integers: Integers) -> Linear {
    let matrix = random_nf4(rows, cols, (rows + cols) as u64);
    let precision = match integers {
        Integers::Int8 => CpuPrecision::Int8,
        _ => CpuPrecision::Int16,
    };
    let mut linear = load(pool, &[(&matrix, precision)]).unwrap().remove(0);
    linear.integers = integers;
    assert_eq!(linear.reads_integers(), Some(integers));
    linear
}

/// Ordinary tokens, and by turns some with the largest integers, zeros, and what is no number.
fn inputs(pool: &mut Pool, isa: Isa, tokens: usize, linear: &Linear) -> Activations {
    let cols = linear.cols;
    let mut x = random_vector(tokens * cols, tokens as u64);
    for (t, x) in x.chunks_exact_mut(cols).enumerate() {
        let block = &mut x[cols - TILE_COLS..];
        match t % 11 {
            2 => block[5] = 300.0,
            4 => {
                block.fill(0.0);
                block[40] = -1.0;
            }
            5 => {
                block.fill(0.0);
                block[t % TILE_COLS] = 1.0;
            }
            6 => block.fill(-0.75),
            7 => block.fill(0.0),
            8 => block[9] = f32::NAN,
            9 => block[63] = f32::NEG_INFINITY,
            10 => block.fill(1e-30),
            _ => {}
        }
    }
    let mut out = Activations::default();
    out.fill(
        pool,
        isa,
        tokens,
        cols,
        linear.reads_integers(),
        &|t, row| {
            row.copy_from_slice(&x[t * cols..(t + 1) * cols]);
        },
    )
    .unwrap();
    out
}

/// All tile rows, as bits.
fn product(isa: Isa, linear: &Linear, x: &Activations, tokens: &[u32]) -> Vec<u32> {
    let mut c = vec![[f32::NAN; TILE_ROWS]; tokens.len()];
    let mut out = Vec::new();
    // One more than there are: that one is zeros.
    for tile_row in 0..=linear.tile_rows() {
        with_tokens_for(isa, [linear; 2], x.view(), tokens, |x, tokens| {
            linear.tile_row(isa, tile_row, x, tokens, &mut c);
        });
        out.extend(c.as_flattened().iter().map(|v| v.to_bits()));
    }
    out
}

const KINDS: [Integers; 3] = [Integers::Int8, Integers::Int16, Integers::Wide];

#[test]
fn any_number_of_tokens_gives_the_bits_of_vectors() {
    let Some((amx, avx512)) = isas() else { return };
    let mut pool = Pool::new(Some(1)).unwrap();
    for kind in KINDS {
        let linear = linear(&mut pool, 33, 128, kind);
        for tokens in (1..=50).chain([63, 64, 65, 70, 96, 130]) {
            let x = inputs(&mut pool, amx, tokens, &linear);
            let all: Vec<u32> = (0..tokens as u32).collect();
            let found = product(amx, &linear, &x, &all);
            let expected = product(avx512, &linear, &x, &all);
            assert!(found == expected, "{kind:?}, {tokens} tokens");
        }
    }
}

#[test]
fn matrices_of_any_shape_give_the_bits_of_vectors() {
    let Some((amx, avx512)) = isas() else { return };
    let mut pool = Pool::new(Some(1)).unwrap();
    for kind in KINDS {
        for rows in [16, 17, 31, 32, 33, 48, 70] {
            for cols in [64, 128, 192, 512] {
                let linear = linear(&mut pool, rows, cols, kind);
                let x = inputs(&mut pool, amx, 40, &linear);
                // Any tokens in any order, as experts have them.
                for tokens in [8, 16, 19] {
                    let some: Vec<u32> = (0..tokens).map(|t| (t * 23 + 7) % 40).collect();
                    let found = product(amx, &linear, &x, &some);
                    let expected = product(avx512, &linear, &x, &some);
                    assert!(
                        found == expected,
                        "{kind:?} {rows} x {cols}, {tokens} tokens"
                    );
                }
            }
        }
    }
}

#[test]
fn the_pool_gives_the_bits_of_vectors() {
    use crate::backend::cpu::linear::Panels;

    let Some((amx, avx512)) = isas() else { return };
    let mut pool = Pool::new(None).unwrap();
    let linear = linear(&mut pool, 200, 128, Integers::Wide);
    let x = inputs(&mut pool, amx, 37, &linear);
    let all: Vec<u32> = (0..37).collect();
    let [found, expected] = [amx, avx512].map(|isa| {
        let mut panels = Panels::default();
        panels
            .project(&mut pool, isa, &[&linear], x.view(), &all)
            .unwrap();
        let mut rows = vec![0.0; 200];
        let token = |t| {
            panels.copy_rows(0, t, 0..200, &mut rows);
            rows.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
        };
        (0..37).map(token).collect::<Vec<_>>()
    });
    assert!(found == expected);
}

#[test]
fn experts_with_scattered_tokens_give_the_bits_of_vectors() {
    use crate::backend::Routing;
    use crate::backend::cpu::experts::{Buffers, Expert, add_experts};

    const TOKENS: usize = 300;
    let Some((amx, avx512)) = isas() else { return };
    let mut pool = Pool::new(None).unwrap();
    for kind in KINDS {
        let mut expert = |size| Expert {
            gate: linear(&mut pool, size, 128, kind),
            up: linear(&mut pool, size, 128, kind),
            down: linear(&mut pool, 128, size, kind),
        };
        let (experts, shared) = ([64, 128, 64].map(&mut expert), expert(64));
        // The first expert has many tokens, the second some, the last too few for tiles.
        let id = |t: usize| match t % 60 {
            7 => 2,
            t if t % 3 == 0 => 1,
            _ => 0,
        };
        let routing = Routing {
            num_experts_per_tok: 1,
            topk_ids: (0..TOKENS).map(id).collect(),
            topk_weights: vec![0.5; TOKENS],
        };
        let all: Vec<u32> = (0..TOKENS as u32).collect();
        let [found, expected] = [amx, avx512].map(|isa| {
            let x = inputs(&mut pool, isa, TOKENS, &shared.gate);
            let mut out = vec![0.0; TOKENS * 128];
            add_experts(
                &mut pool,
                isa,
                &experts,
                &shared,
                &routing,
                &[0.25; TOKENS],
                &x,
                &all,
                &mut Buffers::default(),
                &mut out,
            )
            .unwrap();
            out.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
        });
        assert!(found == expected, "{kind:?}");
    }
}
