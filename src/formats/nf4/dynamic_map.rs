//! The 8-bit code book of double quantisation, and how bitsandbytes looks codes up in it.

use std::sync::LazyLock;

/// 256 ascending values in (-1, 1]: finer towards 0, over seven powers of ten.
///
/// Computed as `create_dynamic_map` of bitsandbytes does it in torch, bit for bit.
pub static DYNAMIC_MAP: LazyLock<[f32; 256]> = LazyLock::new(|| {
    const SCALES: [f32; 7] = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0];
    let mut values = vec![0.0, 1.0];
    for (i, scale) in SCALES.into_iter().enumerate() {
        let bounds = linspace_from_a_tenth(2usize.pow(i as u32) + 1);
        for pair in bounds.windows(2) {
            let middle = (pair[0] + pair[1]) / 2.0;
            values.extend([scale * middle, -scale * middle]);
        }
    }
    values.sort_unstable_by(f32::total_cmp);
    values
        .try_into()
        .expect("2 values and 2 * (1 + 2 + … + 64) make 256")
});

/// `torch.linspace(0.1, 1.0, n)`: from both ends towards the middle, each a fused multiply-add.
fn linspace_from_a_tenth(n: usize) -> Vec<f32> {
    const START: f32 = 0.1;
    let step = (1.0 - START) / (n - 1) as f32;
    let from_start = |t: usize| step.mul_add(t as f32, START);
    let from_end = |t: usize| (-step).mul_add((n - 1 - t) as f32, 1.0);
    (0..n)
        .map(|t| {
            if t < n / 2 {
                from_start(t)
            } else {
                from_end(t)
            }
        })
        .collect()
}

/// Code of each of 65,536 evenly spaced values in [-1, 1]: the number of midpoints below it.
static CODES: LazyLock<Box<[u8]>> = LazyLock::new(|| {
    let midpoints: Vec<f32> = DYNAMIC_MAP
        .windows(2)
        .map(|pair| 0.5 * (pair[0] + pair[1]))
        .collect();
    (0..=u16::MAX)
        .map(|k| {
            let x = -1.0 + 2.0 * f32::from(k) / f32::from(u16::MAX);
            midpoints.partition_point(|m| *m < x) as u8
        })
        .collect()
});

/// 8-bit code of `u` in [-1, 1], by table.
///
/// Not always the nearest value of the map: bitsandbytes 0.50 rounds `u` to 16 bits first.
pub fn code(u: f32) -> u8 {
    let index = (u + 1.0) * 0.5 * f32::from(u16::MAX) + 0.5;
    CODES[index as usize]
}

#[cfg(test)]
mod tests {
    use sha2::{Digest, Sha256};

    use super::*;

    #[test]
    fn dynamic_map_has_the_bits_of_bitsandbytes() {
        let bytes: Vec<u8> = DYNAMIC_MAP.iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(
            format!("{:x}", Sha256::digest(bytes)),
            "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"
        );
    }
}
