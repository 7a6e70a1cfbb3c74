//! Random numbers by position: every tensor can be made by any thread, in any pieces.

use std::sync::LazyLock;

/// The increment of SplitMix64, 2^64 divided by the golden ratio.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// An endless sequence of random words with random access, one per seed and name.
///
/// Word `i` is the output of SplitMix64 after `i` steps: two multiplications for eight bytes.
///
/// Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
#[derive(Clone, Copy, Debug)]
pub struct Stream {
    start: u64,
}

impl Stream {
    pub fn new(seed: u64, name: &str) -> Self {
        let step = |hash, byte: &u8| mix(hash ^ u64::from(*byte));
        Stream {
            start: name.as_bytes().iter().fold(mix(seed), step),
        }
    }

    pub fn word(self, i: u64) -> u64 {
        mix(self.start.wrapping_add(i.wrapping_mul(GOLDEN)))
    }

    /// Fills `out` with the bytes of the words from `first` on.
    pub fn bytes(self, first: u64, out: &mut [u8]) {
        let (words, rest) = out.as_chunks_mut::<8>();
        for (i, word) in (first..).zip(&mut *words) {
            *word = self.word(i).to_le_bytes();
        }
        let last = self.word(first + words.len() as u64).to_le_bytes();
        rest.copy_from_slice(&last[..rest.len()]);
    }

    /// Uniform values in `0..1`, from `first` on, one per word.
    pub fn unit(self, first: u64) -> impl Iterator<Item = f64> {
        (first..).map(move |i| (self.word(i) >> 11) as f64 / (1u64 << 53) as f64)
    }

    /// Values of the normal distribution, four per word, from word `first` on.
    pub fn normal(self, first: u64) -> impl Iterator<Item = f32> {
        let table: &[f32; 65536] = &NORMAL;
        (first..).flat_map(move |i| {
            let word = self.word(i);
            [0, 16, 32, 48].map(|shift| table[(word >> shift) as u16 as usize])
        })
    }
}

fn mix(word: u64) -> u64 {
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// 65,536 draws from the normal distribution, by Box and Muller, and their negatives: looked up
/// by 16 random bits, they are a normal source that costs a load, with a mean of exactly 0.
static NORMAL: LazyLock<Box<[f32; 65536]>> = LazyLock::new(|| {
    let mut unit = Stream::new(0, "normal").unit(0);
    let mut draw = || unit.next().expect("is endless");
    let mut table = Box::new([0.0; 65536]);
    for four in table.as_chunks_mut::<4>().0 {
        let radius = (-2.0 * (1.0 - draw()).ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * draw()).sin_cos();
        let (a, b) = ((radius * cos) as f32, (radius * sin) as f32);
        *four = [a, b, -a, -b];
    }
    table
});

/// `N` values of the normal distribution, ascending, each as probable as the next.
pub fn normal_quantiles<const N: usize>() -> [f32; N] {
    let mut sorted = NORMAL.clone();
    sorted.sort_unstable_by(f32::total_cmp);
    let step = sorted.len() / N;
    std::array::from_fn(|i| (sorted[i * step + step / 2 - 1] + sorted[i * step + step / 2]) / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_piece_of_a_stream_is_that_piece_of_the_whole() {
        let stream = Stream::new(7, "weight");
        let mut whole = [0; 100];
        stream.bytes(0, &mut whole);
        let mut piece = [0; 20];
        stream.bytes(5, &mut piece);
        assert_eq!(piece, whole[40..60]);
        assert_ne!(
            Stream::new(8, "weight").word(0),
            Stream::new(7, "weight").word(0)
        );
        assert_ne!(
            Stream::new(7, "weigh").word(0),
            Stream::new(7, "weight").word(0)
        );
    }

    #[test]
    fn normal_values_have_the_moments_of_the_normal_distribution() {
        let values: Vec<f64> = Stream::new(1, "x")
            .normal(0)
            .take(100_000)
            .map(f64::from)
            .collect();
        let moment = |n| values.iter().map(|v| v.powi(n)).sum::<f64>() / values.len() as f64;
        assert!(moment(1).abs() < 0.02);
        assert!((moment(2) - 1.0).abs() < 0.02);
        assert!((moment(4) - 3.0).abs() < 0.15);
    }
}
