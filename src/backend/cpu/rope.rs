//! Rotary embedding of the leading dimensions of a head, first half with second half.

/// Rotation angles of one position: `[rotary_dim / 2]` cosines and sines.
#[derive(Clone, Debug, Default)]
pub struct Rotation {
    pub cos: Vec<f32>,
    pub sin: Vec<f32>,
}

impl Rotation {
    /// Angles in f32, as transformers has them: at position 100,000 an f64 angle would differ.
    pub fn set(&mut self, position: usize, inverse_frequencies: &[f32]) {
        let angles = inverse_frequencies.iter().map(|f| position as f32 * f);
        self.cos.clear();
        self.sin.clear();
        for angle in angles {
            let (sin, cos) = angle.sin_cos();
            self.cos.push(cos);
            self.sin.push(sin);
        }
    }

    /// Rotates the leading `2 * cos.len()` elements of a head.
    pub fn apply(&self, head: &mut [f32]) {
        let half = self.cos.len();
        let (a, b) = head[..2 * half].split_at_mut(half);
        for (((a, b), cos), sin) in a.iter_mut().zip(b).zip(&self.cos).zip(&self.sin) {
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Rope;

    #[test]
    fn position_zero_changes_nothing() {
        let mut rotation = Rotation::default();
        rotation.set(0, &Rope::plain(1e7).inverse_frequencies(8));
        let mut head = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0];
        rotation.apply(&mut head);
        assert_eq!(head, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]);
    }

    #[test]
    fn pairs_turn_by_position_times_frequency_and_the_rest_stays() {
        let mut rotation = Rotation::default();
        rotation.set(3, &Rope::plain(100.0).inverse_frequencies(4));
        let mut head = [1.0, 0.0, 0.0, 1.0, 7.0];
        rotation.apply(&mut head);
        // Frequencies are 1 and 1/10; the pairs are (0, 2) and (1, 3).
        let expected = [3f32.cos(), -0.3f32.sin(), 3f32.sin(), 0.3f32.cos(), 7.0];
        for (found, expected) in head.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-6);
        }
    }
}
