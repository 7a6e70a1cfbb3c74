//! Instruction sets against each other, a millisecond each in turn.

use moectl::backend::cpu::CpuPrecision;
use moectl::backend::cpu::activations::{Activations, Integers};
use moectl::backend::cpu::isa::Isa;
use moectl::backend::cpu::linear::Panels;
use moectl::backend::cpu::load::load;
use moectl::backend::cpu::threads::Pool;

use super::{activations, nf4, own, project};

/// Turns of each instruction set.
const ROUNDS: usize = 150;

/// One instruction set at work on one product.
struct Side {
    isa: Isa,
    x: Activations,
    /// That take a millisecond
    calls: usize,
    /// Of each turn, in units of 1e9 a second
    rates: Vec<f64>,
}

/// Products of NF4 on one core with weights in L2, on every instruction set but plain Rust.
pub fn instruction_sets() {
    let isas: Vec<Isa> = Isa::available().split_off(1);
    let mut pool = Pool::new(Some(1)).unwrap();
    let forms = [
        ("nf4-int16", CpuPrecision::Int16, Integers::Int16),
        ("nf4-wide", CpuPrecision::Int16, Integers::Wide),
        ("nf4-int8", CpuPrecision::Int8, Integers::Int8),
    ];
    println!("GB/s of weights up to 4 tokens, else GFLOP/s: median, 90th percentile, best;");
    println!("median of each turn's ratio to the first instruction set");
    for (form, precision, integers) in forms {
        for tokens in [1, 2, 3, 4, 6, 8, 10, 12, 16, 32, 64, 512] {
            // One call is a small part of a turn, or one.
            let rows = (512 * 16 / tokens / 32 * 32).clamp(64, 512);
            let matrix = nf4(rows, 2048);
            let mut linear = load(&mut pool, &[(&matrix, precision)]).unwrap().remove(0);
            linear.integers = integers;
            let units = match tokens {
                ..=4 => linear.bytes() as f64,
                _ => 2.0 * (rows * 2048 * tokens) as f64,
            };
            let mut panels = Panels::default();
            let mut sides: Vec<Side> = Vec::new();
            for &isa in &isas {
                let x = activations(&mut pool, isa, tokens, 2048, linear.reads_integers());
                let mut side = Side {
                    isa,
                    x,
                    calls: 1,
                    rates: Vec::new(),
                };
                let mut turn = |side: &Side| {
                    let start = own();
                    for _ in 0..side.calls {
                        project(&mut pool, isa, &linear, &side.x, &mut panels);
                    }
                    (own() - start) / side.calls as f64
                };
                turn(&side);
                side.calls = (0.001 / turn(&side)).round().max(1.0) as usize;
                sides.push(side);
            }
            for round in 0..ROUNDS {
                // Each goes first as often as the others.
                for turn in 0..sides.len() {
                    let at = (round + turn) % isas.len();
                    let side = &mut sides[at];
                    let start = own();
                    for _ in 0..side.calls {
                        project(&mut pool, side.isa, &linear, &side.x, &mut panels);
                    }
                    let seconds = (own() - start) / side.calls as f64;
                    side.rates.push(units / seconds / 1e9);
                }
            }
            report(&format!("{form:<9} M={tokens:<3}"), &sides);
        }
    }
}

fn report(case: &str, sides: &[Side]) {
    for side in sides {
        let sorted = |mut values: Vec<f64>| {
            values.sort_by(f64::total_cmp);
            values
        };
        let first = sides[0].rates.iter();
        let ratios = sorted(side.rates.iter().zip(first).map(|(a, b)| a / b).collect());
        let rates = sorted(side.rates.clone());
        let [median, p90, best] = [ROUNDS / 2, ROUNDS * 9 / 10, ROUNDS - 1].map(|i| rates[i]);
        println!(
            "{case} {:<8} {median:>7.2} {p90:>7.2} {best:>7.2}  ratio {:.2}",
            side.isa.name(),
            ratios[ROUNDS / 2]
        );
    }
}
