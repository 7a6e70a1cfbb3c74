//! The experts that a GPU leaves to the CPU: a layer's few, after a moment to fetch them ahead.

use std::time::{Duration, Instant};

use moectl::backend::ExpertWeights;
use moectl::backend::cpu::CpuPrecision;
use moectl::backend::cpu::offload::{Asked, Expert, LayerExperts, Offload, Requests, load_layer};

/// Together more than any cache holds.
const LAYERS: usize = 48;
const EXPERTS: usize = 64;

/// Experts of a layer's token.
const PICKS: [usize; 2] = [4, 10];

/// What the GPU takes between two layers' experts, in microseconds; 0 fetches nothing ahead.
const WINDOWS_US: [u64; 5] = [0, 30, 60, 120, 180];

const ROUNDS: usize = 20;

/// Prints, for each number of experts and each window, how long computing them takes from there.
pub fn offload(expert: &ExpertWeights) {
    let mut offload = Offload::new(None).unwrap();
    let copies = vec![expert.clone(); EXPERTS];
    let layers: Vec<LayerExperts> = (0..LAYERS)
        .map(|_| load_layer(offload.pool(), &copies, CpuPrecision::Int16).unwrap())
        .collect();
    let some = &layers[0].experts[0];
    let x: Vec<f32> = (0..some.gate.cols)
        .map(|i| (i % 17) as f32 / 17.0 - 0.5)
        .collect();
    let mut out = vec![0.0; some.down.rows];
    for picks in PICKS {
        let weights = vec![1.0 / picks as f32; picks];
        let mut times = vec![Vec::new(); WINDOWS_US.len()];
        let mut cached = Vec::new();
        for round in 0..ROUNDS {
            for (&window, times) in WINDOWS_US.iter().zip(&mut times) {
                for (layer, of_layer) in layers.iter().enumerate() {
                    let ids: Vec<i32> = (0..picks)
                        .map(|i| ((round * 29 + layer * 7 + i * 5) % EXPERTS) as i32)
                        .collect();
                    let asked = Asked {
                        ids: &ids,
                        weights: &weights,
                        x: &x,
                    };
                    let mut answer = |window| {
                        let turn = Turn {
                            experts: &of_layer.experts,
                            asked,
                            over: Instant::now() + Duration::from_micros(window),
                        };
                        let mut wait = |_: usize, fetch: &dyn Fn()| {
                            fetch();
                            while turn.asked(0, 0).is_none() {
                                std::hint::spin_loop();
                            }
                            Ok(())
                        };
                        (offload.answer(&turn, picks, &mut wait, &mut out)).unwrap();
                        1e6 * turn.over.elapsed().as_secs_f64()
                    };
                    times.push(answer(window));
                    if window == 0 {
                        cached.push(answer(0));
                    }
                }
            }
        }
        let bytes = (picks * some.bytes()) as f64;
        for (window, times) in WINDOWS_US.iter().zip(&mut times) {
            show(&format!("{picks} experts after {window} us"), bytes, times);
        }
        show(&format!("{picks} experts again"), bytes, &mut cached);
    }
}

/// The GPU's turn: fetches ahead until it is over.
struct Turn<'a> {
    experts: &'a [Expert],
    asked: Asked<'a>,
    over: Instant,
}

impl Requests for Turn<'_> {
    fn layers(&self) -> usize {
        1
    }

    fn tokens(&self) -> usize {
        1
    }

    fn experts(&self, _: usize) -> &[Expert] {
        self.experts
    }

    fn predicted(&self, _: usize, _: usize) -> Option<&[i32]> {
        Some(self.asked.ids)
    }

    fn asked(&self, _: usize, _: usize) -> Option<Asked<'_>> {
        (Instant::now() >= self.over).then_some(self.asked)
    }

    fn answered(&self, _: usize) {}
}

fn show(name: &str, bytes: f64, us: &mut [f64]) {
    us.sort_unstable_by(f64::total_cmp);
    let at = |share: f64| us[(share * (us.len() - 1) as f64) as usize];
    println!(
        "offload {name:<28} {:>7.1} us [{:.1}, {:.1}]  {:>6.1} GB/s",
        at(0.5),
        at(0.1),
        at(0.9),
        bytes / at(0.5) / 1e3
    );
}
