//! What the tokens of a step ask of one layer, sorted so that each expert is read once.

use std::ops::Range;

use super::{Asked, MAX_TOKENS};

/// 0, 1, .. for kernels that take all tokens there are.
pub const ALL_TOKENS: [u32; MAX_TOKENS] = {
    let mut all = [0; MAX_TOKENS];
    let mut i = 0;
    while i < MAX_TOKENS {
        all[i] = i as u32;
        i += 1;
    }
    all
};

/// An expert and the tokens that picked it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    pub expert: usize,
    /// First of its places among all picks
    first: usize,
    len: usize,
}

impl Group {
    /// Its picks, one for each of its tokens.
    pub fn places(&self) -> Range<usize> {
        self.first..self.first + self.len
    }

    /// 0, 1, .. for each of its tokens.
    pub fn numbers(&self) -> &'static [u32] {
        &ALL_TOKENS[..self.len]
    }
}

/// Picks by expert, and again by token. Memory is kept from layer to layer.
#[derive(Default)]
pub struct Picks {
    groups: Vec<Group>,
    /// Of each place, its token: ascending within a group
    tokens: Vec<u32>,
    /// Place and weight of each token's picks, token after token, in the order they were asked in
    by_token: Vec<(usize, f32)>,
    /// Where each token's end in `by_token`
    ends: Vec<usize>,
}

impl Picks {
    /// Experts in the order in which they are first asked for.
    pub fn sort<'a>(&mut self, asked: impl Iterator<Item = Asked<'a>> + Clone) {
        self.groups.clear();
        self.by_token.clear();
        self.ends.clear();
        for asked in asked.clone() {
            for (&id, &weight) in asked.ids.iter().zip(asked.weights) {
                let expert = id as usize;
                let known = self.groups.iter().position(|group| group.expert == expert);
                let group = known.unwrap_or_else(|| {
                    self.groups.push(Group {
                        expert,
                        first: 0,
                        len: 0,
                    });
                    self.groups.len() - 1
                });
                self.groups[group].len += 1;
                // The group for now.
                self.by_token.push((group, weight));
            }
            self.ends.push(self.by_token.len());
        }
        let mut first = 0;
        for group in &mut self.groups {
            group.first = first;
            first += std::mem::take(&mut group.len);
        }
        self.tokens.resize(first, 0);
        let mut start = 0;
        for (token, &end) in self.ends.iter().enumerate() {
            for (place, _) in &mut self.by_token[start..end] {
                let group = &mut self.groups[*place];
                *place = group.first + group.len;
                group.len += 1;
                self.tokens[*place] = token as u32;
            }
            start = end;
        }
    }

    pub fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// Picks of all tokens.
    pub fn count(&self) -> usize {
        self.tokens.len()
    }

    /// The tokens that picked an expert, ascending.
    pub fn tokens(&self, group: &Group) -> &[u32] {
        &self.tokens[group.places()]
    }

    /// Place and weight of a token's picks, in the order they were asked in.
    pub fn of_token(&self, token: usize) -> &[(usize, f32)] {
        let start = token.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.by_token[start..self.ends[token]]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expert_of_several_tokens_is_one_group_and_tokens_keep_their_order() {
        let asked = |ids, weights| Asked {
            ids,
            weights,
            x: &[],
        };
        let mut picks = Picks::default();
        for _ in 0..2 {
            let all = [
                asked(&[7, 2][..], &[0.5, 0.25][..]),
                asked(&[], &[]),
                asked(&[3, 7, 2], &[0.4, 0.3, 0.2]),
                asked(&[7], &[0.1]),
            ];
            picks.sort(all.into_iter());
            let groups = picks.groups();
            assert_eq!(
                groups.iter().map(|g| g.expert).collect::<Vec<_>>(),
                [7, 2, 3]
            );
            assert_eq!(picks.tokens(&groups[0]), [0, 2, 3]);
            assert_eq!(picks.tokens(&groups[1]), [0, 2]);
            assert_eq!(picks.tokens(&groups[2]), [2]);
            assert_eq!(groups[0].numbers(), [0, 1, 2]);
            assert_eq!(picks.count(), 6);
            assert_eq!(picks.of_token(0), [(0, 0.5), (3, 0.25)]);
            assert_eq!(picks.of_token(1), []);
            assert_eq!(picks.of_token(2), [(5, 0.4), (1, 0.3), (4, 0.2)]);
            assert_eq!(picks.of_token(3), [(2, 0.1)]);
        }
    }
}
