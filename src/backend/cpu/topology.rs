//! Where workers run, and what each of them brings.

use std::hint::black_box;
use std::sync::OnceLock;
use std::thread;
use std::time::Instant;

use super::isa::{Isa, dispatch};
use super::shares::Paces;
use super::simd::{CODE_BOOK_INT16, LANES, Simd};
pub use crate::hardware::cores::{Core, CoreKind, usable as usable_cores};

/// Turns of the measurement, whose median counts: not all cores begin at once.
const TURNS: usize = 21;
const TURN_SECONDS: f64 = 1e-4;

/// Ties the calling thread to one logical CPU. Failing to is harmless: it runs elsewhere.
pub fn pin_current_thread(cpu: usize) {
    // SAFETY: a zeroed `cpu_set_t` is an empty set, and `CPU_SET` ignores numbers beyond it.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set);
    }
}

/// How workers on `cores` share work: equally where all are of one kind, else by what each kind was
/// measured to bring with all usable cores at work, once per process.
pub fn paces(cores: &[Core]) -> Paces {
    static MEASURED: OnceLock<Option<[f64; 2]>> = OnceLock::new();
    if cores.iter().all(|core| core.kind == cores[0].kind) {
        return Paces::equal(cores.len());
    }
    let by_kind = MEASURED.get_or_init(|| {
        let all = usable_cores();
        Some(means_by_kind(&all, &measure(&all)?))
    });
    match by_kind {
        Some(by_kind) => Paces::of(cores.iter().map(|core| by_kind[core.kind as usize])),
        None => Paces::equal(cores.len()),
    }
}

/// Means of performance and efficiency cores.
fn means_by_kind(cores: &[Core], rates: &[f64]) -> [f64; 2] {
    [CoreKind::Performance, CoreKind::Efficiency].map(|kind| {
        let of_kind = cores
            .iter()
            .zip(rates)
            .filter(|(core, _)| core.kind == kind);
        let (sum, count) = of_kind.fold((0.0, 0.0), |(sum, n), (_, rate)| (sum + rate, n + 1.0));
        sum / f64::max(count, 1.0)
    })
}

/// Products of NF4 per second on each core, all of them at work; `None` if threads cannot be started.
fn measure(cores: &[Core]) -> Option<Vec<f64>> {
    let isa = Isa::detect().ok()?;
    thread::scope(|scope| {
        let start = |core: &Core| {
            let cpu = core.cpu;
            let worker = thread::Builder::new().spawn_scoped(scope, move || {
                pin_current_thread(cpu);
                rate(isa)
            });
            worker.ok()
        };
        let workers: Option<Vec<_>> = cores.iter().map(start).collect();
        let rates = workers?.into_iter().map(|worker| worker.join().ok());
        rates.collect()
    })
}

/// The codes of one tile.
type Codes = [[u32; 2 * LANES]; 8];

dispatch! {
    /// Products of tiles with a token, as the kernel of one token has them.
    fn products(tiles: &[Codes], pairs: &[i32; 32]) -> [i32; LANES] = products_body, products
}

#[inline(always)]
fn products_body<S: Simd>(s: S, tiles: &[Codes], pairs: &[i32; 32]) -> [i32; LANES] {
    let table = s.word_table(&CODE_BOOK_INT16);
    let mut sum = s.splat_i32(0);
    for codes in tiles {
        for half in 0..2 {
            let [[products]] = s.dot_words::<1, 1>(table, codes, half, [pairs]);
            sum = s.add_i32(sum, products);
        }
    }
    let mut out = [0; LANES];
    s.store_i32(sum, &mut out);
    out
}

/// Products per second on the calling thread.
fn rate(isa: Isa) -> f64 {
    // A tile row of 2048 columns. Its time does not depend on the numbers in it.
    let tiles = vec![[[0; 2 * LANES]; 8]; 32];
    let turn = |calls: u32| {
        let start = Instant::now();
        for _ in 0..calls {
            black_box(products(isa, black_box(&tiles), &[0; 32]));
        }
        f64::from(calls) / start.elapsed().as_secs_f64().max(1e-9)
    };
    let calls = ((TURN_SECONDS * turn(1)) as u32).clamp(1, 1000);
    let mut rates = [0.0; TURNS].map(|_: f64| turn(calls));
    rates.sort_by(f64::total_cmp);
    rates[TURNS / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_of_one_kind_share_equally_and_others_by_the_means_of_their_kinds() {
        let core = |cpu, kind| Core { cpu, kind };
        let [p, e] = [CoreKind::Performance, CoreKind::Efficiency];
        let cores = [core(0, p), core(2, p), core(4, e), core(5, e), core(6, e)];
        let means = means_by_kind(&cores, &[11.0, 9.0, 5.0, 4.0, 3.0]);
        assert_eq!(means, [10.0, 4.0]);
        let alike = paces(&cores[..2]);
        assert_eq!([alike.part(100, 0), alike.part(100, 1)], [0..50, 50..100]);
    }

    #[test]
    fn every_core_is_measured_to_bring_something() {
        let cores = usable_cores();
        let rates = measure(&cores).unwrap();
        assert_eq!(rates.len(), cores.len());
        assert!(
            rates.iter().all(|&rate| rate.is_finite() && rate > 0.0),
            "{rates:?}"
        );
    }
}
