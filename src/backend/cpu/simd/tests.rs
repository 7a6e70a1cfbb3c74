//! Every instruction set against plain Rust, operation by operation.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::backend::cpu::isa::{Isa, Scalar, dispatch};

/// Results of all operations on the same inputs, as bits.
#[derive(Debug, Default, PartialEq)]
struct Bits(Vec<u32>);

impl Bits {
    #[inline(always)]
    fn f<S: Simd>(&mut self, s: S, v: S::F32) {
        let mut out = [0.0; LANES];
        s.store(v, &mut out);
        self.0.extend(out.map(f32::to_bits));
    }
    #[inline(always)]
    fn i<S: Simd>(&mut self, s: S, v: S::I32) {
        let mut out = [0; LANES];
        s.store_i32(v, &mut out);
        self.0.extend(out.map(|v| v as u32));
    }
    #[inline(always)]
    fn products<S: Simd, const N: usize, const H: usize>(&mut self, sums: [[S::I32; N]; H], s: S) {
        for v in sums.into_iter().flatten() {
            self.i(s, v);
        }
    }
}

struct Input {
    a: [f32; LANES],
    b: [f32; LANES],
    codes: [u32; LANES],
    pairs: [i32; LANES],
    quad: [i8; 4],
}

#[inline(always)]
fn all_operations<S: Simd>(s: S, input: &Input) -> Bits {
    let mut out = Bits::default();
    let (a, b) = (s.load(&input.a), s.load(&input.b));
    out.f(s, s.splat(1.5));
    out.f(s, s.add(a, b));
    out.f(s, s.sub(a, b));
    out.f(s, s.mul(a, b));
    out.f(s, s.div(a, b));
    out.f(s, s.max(a, b));
    out.f(s, s.min(a, b));
    out.f(s, s.abs(a));
    out.f(s, s.load_u16(&input.codes.map(|c| c as u16)));
    out.f(s, s.load_bf16(&input.a.map(bf16::from_f32)));
    out.f(s, s.load_f16(&input.a.map(f16::from_f32)));
    out.f(s, s.load_i8(&input.codes.map(|c| c as i8)));
    out.0.push(s.reduce_add(a).to_bits());
    out.0.push(s.reduce_max(a).to_bits());

    let codes = s.load_u32(&input.codes);
    let pairs = s.load_i32(&input.pairs);
    out.i(s, s.add_i32(codes, pairs));
    out.i(s, s.add_i32(codes, s.splat_i32(7)));
    out.i(s, s.shr::<12>(codes));
    out.f(s, s.to_f32(pairs));
    out.i(s, s.round(a));
    out.f(
        s,
        s.pow2(s.round(s.min(s.max(a, s.splat(-126.0)), s.splat(127.0)))),
    );
    out.i(s, s.dot_pairs(pairs, codes, pairs));
    for book in [&CODE_BOOK_INT16, &CODE_BOOK_WIDE] {
        // In the order of the codes, whichever become a pair.
        let mut words = [[0; LANES]; 8];
        let looked_up = s.nf4_words(s.word_table(book), codes);
        for (vector, [first, second]) in looked_up.into_iter().zip(S::PAIRS) {
            let mut both = [0; LANES];
            s.store_i32(vector, &mut both);
            words[first] = both.map(|pair| pair as i16 as u32);
            words[second] = both.map(|pair| (pair >> 16) as u32);
        }
        out.0.extend(words.as_flattened());
    }
    for bytes in s.nf4_bytes(s.byte_table(), codes) {
        let quad = input.quad;
        let sum: i32 = quad.iter().map(|&q| i32::from(q)).sum();
        let start = s.byte_start(-BYTE_OFFSET * sum);
        let quad = i32::from_le_bytes(quad.map(i8::cast_unsigned));
        out.i(s, s.dot_bytes(start, bytes, s.splat_i32(quad)));
    }
    let table = s.word_table(&CODE_BOOK_INT16);
    let tile: [[u32; 2 * LANES]; 8] = std::array::from_fn(|group| {
        std::array::from_fn(|row| input.codes[row % LANES].rotate_left((row + 4 * group) as u32))
    });
    // Activations of the codes of all groups, a different set for each token.
    let x: [[i32; 32]; 7] = std::array::from_fn(|token| {
        let of = |group: usize, code: usize| {
            let pair = input.pairs[(8 * group + code + token) % LANES].rotate_left(group as u32);
            // Thirteen bits, so that no sum overflows.
            pair as i16 >> 3
        };
        std::array::from_fn(|p| {
            let [low, high] = S::PAIRS[p % 4].map(|code| of(p / 4, code));
            i32::from(high) << 16 | i32::from(low as u16)
        })
    });
    out.products(s.dot_words::<1, 2>(table, &tile, 0, [&x[0]]), s);
    out.products(s.dot_words::<1, 1>(table, &tile, 1, [&x[0]]), s);
    out.products(s.dot_words::<2, 1>(table, &tile, 1, [&x[1], &x[2]]), s);
    out.products(
        s.dot_words::<3, 2>(table, &tile, 0, [&x[0], &x[3], &x[4]]),
        s,
    );
    out.products(s.dot_words::<7, 2>(table, &tile, 0, x.each_ref()), s);
    let table = s.f32_table();
    out.f(s, s.nf4_f32(table, codes));
    out.f(s, s.nf4_f32(table, s.shr::<28>(codes)));
    out
}

dispatch! {
    fn all_operations_on(input: &Input) -> Bits = all_operations
}

#[test]
fn every_instruction_set_computes_what_plain_rust_does() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for round in 0..200 {
        let range = if round % 4 == 0 { 1e6 } else { 4.0 };
        let input = Input {
            a: std::array::from_fn(|_| rng.random_range(-range..range)),
            b: std::array::from_fn(|_| rng.random_range(-range..range)),
            codes: rng.random(),
            pairs: std::array::from_fn(|_| {
                let v: [i16; 2] = std::array::from_fn(|_| rng.random_range(-8191..=8191));
                i32::from(v[1]) << 16 | i32::from(v[0] as u16)
            }),
            quad: std::array::from_fn(|_| rng.random_range(-127..=127)),
        };
        let expected = all_operations(Scalar, &input);
        for isa in Isa::available() {
            assert_eq!(all_operations_on(isa, &input), expected, "{}", isa.name());
        }
    }
}

#[test]
fn a_block_of_the_largest_products_fits_in_32_bits() {
    for (one, book) in [(WEIGHT_ONE, CODE_BOOK_INT16), (WIDE_ONE, CODE_BOOK_WIDE)] {
        let largest = i64::from(activation_sum(one) + 32) * i64::from(one);
        assert!(largest <= i64::from(i32::MAX));
        assert_eq!(i32::from(book[0]), -one);
        assert_eq!(i32::from(book[15]), one);
    }
    assert_eq!((CODE_BOOK_INT8[0], CODE_BOOK_INT8[15]), (-124, 124));
}
