//! Bytes and bandwidths to milliseconds: one token of decode, one prompt of prefill.
//!
//! Every byte at the bandwidth that the kernels attain, plus the fixed cost of kernels and
//! handoffs. The terms keep their names and say what they come from, so that a measurement can be
//! held against each of them.

mod decode;
mod prefill;

use serde::{Deserialize, Serialize};

pub use decode::{
    DecodePrediction, DecodeSituation, decode, disk_layer_ms, expert_layer_ms, pay_back_picks,
    promotion_bytes_per_token,
};
pub use prefill::{PrefillPrediction, PrefillSituation, prefill};

/// One named part of a predicted time; the parts add up to the total.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Term {
    pub name: String,
    pub ms: f64,
    /// `0.90 GB at 424 GB/s`: for people, not for programs.
    #[serde(default)]
    pub from: String,
}

#[derive(Default)]
struct Terms(Vec<Term>);

impl Terms {
    fn add(&mut self, name: &str, ms: f64, from: String) {
        self.0.push(Term {
            name: name.into(),
            ms,
            from,
        });
    }

    /// `bytes` read at a bandwidth.
    fn read(&mut self, name: &str, bytes: f64, gb_s: f64) {
        self.add(name, ms(bytes, gb_s), at_rate(bytes, gb_s));
    }

    fn total(&self) -> f64 {
        self.0.iter().map(|t| t.ms).sum()
    }
}

fn at_rate(bytes: f64, gb_s: f64) -> String {
    let (unit, name) = match bytes {
        b if b >= 1e8 => (1e9, "GB"),
        b if b >= 1e5 => (1e6, "MB"),
        _ => (1e3, "kB"),
    };
    format!("{:.2} {name} at {gb_s:.0} GB/s", bytes / unit)
}

fn ms(bytes: f64, gb_s: f64) -> f64 {
    bytes / (gb_s * 1e6)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::hardware::{CopyRate, Figure, Hardware};
    use super::Term;

    /// The machines of the roofline: attained bandwidths as such, PCIe alone or not at all beside
    /// the CPU, 1.0 ms of kernels and 0.4 ms of handoffs in 48 layers.
    pub(crate) fn roofline(mut machine: Hardware, figures: [f64; 6]) -> Hardware {
        let [vram, cpu, dram, pcie, gemm, attention] = figures;
        machine.cpu.expert_kernel_gb_s.value = cpu;
        machine.cpu.dram_read_gb_s.value = dram;
        let gpu = machine.gpu.as_mut().unwrap();
        gpu.vram_gb_s.value = vram;
        gpu.weight_kernel_share.value = 1.0;
        gpu.cpu_and_pcie_gb_s = None;
        gpu.expert_wait.clear();
        gpu.gemm_tflops.value = gemm;
        gpu.attention_tflops.value = attention;
        gpu.kernel_boundary_us.value = 1000.0 / 48.0 / 7.0;
        gpu.flag_round_trip_us.value = 400.0 / 48.0;
        gpu.h2d = vec![CopyRate {
            bytes: 1,
            gb_s: Figure::modelled(pcie),
        }];
        machine
    }

    pub(crate) fn laptop() -> Hardware {
        roofline(
            Hardware::laptop_4090(),
            [461.0, 65.0, 76.0, 25.0, 40.0, 40.0],
        )
    }

    pub(crate) fn server() -> Hardware {
        roofline(
            Hardware::h100_box(),
            [2180.0, 125.0, 150.0, 52.0, 350.0, 400.0],
        )
    }

    /// Names and milliseconds of all terms, each to a billionth.
    #[track_caller]
    pub(crate) fn terms_are(found: &[Term], expected: &[(&str, f64)]) {
        let names = |terms: &mut dyn Iterator<Item = &str>| terms.collect::<Vec<_>>().join(", ");
        assert_eq!(
            names(&mut found.iter().map(|term| &*term.name)),
            names(&mut expected.iter().map(|&(name, _)| name))
        );
        for (term, &(name, ms)) in found.iter().zip(expected) {
            let off = (term.ms - ms).abs();
            assert!(off <= 1e-9 * ms, "{name}: {} ms, expected {ms}", term.ms);
        }
    }

    #[track_caller]
    pub(crate) fn near(found: f64, expected: f64, share: f64) {
        assert!(
            (found / expected - 1.0).abs() < share,
            "{found}, expected {expected}"
        );
    }
}
