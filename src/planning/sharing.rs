//! A short prompt's missing experts: some are copied to the GPU, the CPU computes the others meanwhile.
//!
//! The engine divides a layer's experts by what is here, and plans predict by it.

/// At which experts that are not in VRAM come to the GPU, or are computed in RAM, both at once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ShareRates {
    pub pcie_gb_s: f64,
    /// Of an expert's weights, and of its arithmetic, whose times add up
    pub cpu_gb_s: f64,
    pub cpu_gflops: f64,
}

impl Default for ShareRates {
    /// A laptop's, where nothing was measured.
    fn default() -> Self {
        ShareRates {
            pcie_gb_s: 25.0,
            cpu_gb_s: 50.0,
            cpu_gflops: 400.0,
        }
    }
}

/// Which of a layer's picked experts that are not in VRAM the CPU computes: those with the fewest
/// tokens, as many as it ends with no later than the others' copies.
///
/// - `missing`: experts and their numbers of tokens
/// - `bytes`, `flops`: of one expert, and of one token in it
pub fn picks_for_cpu(
    mut missing: Vec<(u16, u32)>,
    rates: &ShareRates,
    bytes: usize,
    flops: u64,
) -> Vec<u16> {
    missing.sort_unstable_by_key(|&(expert, tokens)| (tokens, expert));
    let copy_ns = bytes as f64 / rates.pcie_gb_s;
    let read_ns = bytes as f64 / rates.cpu_gb_s;
    let token_ns = flops as f64 / rates.cpu_gflops;
    let (mut cpu_ns, mut left) = (0.0, missing.len());
    let fits = |&&(_, tokens): &&(u16, u32)| {
        cpu_ns += read_ns + f64::from(tokens) * token_ns;
        left -= 1;
        cpu_ns <= left as f64 * copy_ns
    };
    let for_cpu = missing.iter().take_while(fits);
    for_cpu.map(|&(expert, _)| expert).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_computes_the_least_picked_experts_until_the_copies_are_over() {
        let rates = ShareRates {
            pcie_gb_s: 10.0,
            cpu_gb_s: 20.0,
            cpu_gflops: 1.0,
        };
        // A copy takes 100 ns; the CPU 50 ns, and 10 a token.
        let for_cpu = |missing: &[(u16, u32)]| picks_for_cpu(missing.to_vec(), &rates, 1000, 10);
        assert!(for_cpu(&[]).is_empty());
        assert!(for_cpu(&[(7, 1)]).is_empty(), "a single one is copied");
        assert_eq!(for_cpu(&[(7, 3), (2, 1), (5, 2)]), [2]);
        assert_eq!(for_cpu(&[(0, 9), (1, 9), (2, 9), (3, 9)]), [0]);
        assert!(for_cpu(&[(0, 100), (1, 99)]).is_empty());
    }
}
