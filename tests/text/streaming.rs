use std::sync::LazyLock;

use moectl::engine::stream::{StopStrings, TextStream};
use moectl::model::Tokenizer;
use proptest::prelude::*;

use crate::{golden_model, tokenizer};

/// Hardly any merges: most characters outside ASCII are several tokens.
static TINY_A: LazyLock<Tokenizer> = LazyLock::new(|| tokenizer(&golden_model("tiny-a")));

fn pieces(ids: &[u32], skip_special: bool, stop: &[&str]) -> Vec<String> {
    let stop: Vec<String> = stop.iter().map(|s| s.to_string()).collect();
    let mut stream = TextStream::new(&TINY_A, skip_special, &stop);
    let mut pieces: Vec<String> = ids.iter().map(|&id| stream.push(id)).collect();
    pieces.push(stream.finish());
    pieces
}

/// Text before the first stop string to be complete, found one character at a time.
fn cut(text: &str, stop: &[String]) -> String {
    for (at, c) in text.char_indices() {
        let so_far = &text[..at + c.len_utf8()];
        let longest = stop
            .iter()
            .filter(|s| !s.is_empty() && so_far.ends_with(s.as_str()))
            .map(String::len)
            .max();
        if let Some(len) = longest {
            return so_far[..so_far.len() - len].to_owned();
        }
    }
    text.to_owned()
}

fn split(text: &str, at: &[usize]) -> Vec<String> {
    let chars: Vec<char> = text.chars().collect();
    let mut at: Vec<usize> = at.iter().map(|i| i % (chars.len() + 1)).collect();
    at.extend([0, chars.len()]);
    at.sort_unstable();
    at.windows(2)
        .map(|w| chars[w[0]..w[1]].iter().collect())
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn pieces_of_any_text_join_to_the_decoded_text(
        text in "([a-z \n]|[é-ž]|[一-龥]|[ぁ-ん]|[🌀-🙏]|👩‍👩‍👧|🇩🇪|<think>|<\\|im_end\\|>){0,40}",
        skip_special: bool,
    ) {
        let ids = TINY_A.encode(&text).unwrap();
        let pieces = pieces(&ids, skip_special, &[]);
        prop_assert_eq!(pieces.concat(), TINY_A.decode(&ids, skip_special).unwrap());
        // Whole characters only, and none of them later than its last token.
        let half = pieces.iter().any(|piece| piece.contains(char::REPLACEMENT_CHARACTER));
        prop_assert!(!half, "half a character in {:?}", pieces);
        prop_assert_eq!(pieces.last().unwrap(), "");
    }

    #[test]
    fn pieces_of_any_ids_join_to_the_decoded_text(
        ids in prop::collection::vec(0u32..330, 0..60),
        skip_special: bool,
    ) {
        prop_assert_eq!(
            pieces(&ids, skip_special, &[]).concat(),
            TINY_A.decode(&ids, skip_special).unwrap()
        );
    }

    #[test]
    fn stop_strings_cut_the_same_however_the_text_is_split(
        text in "[abé]{0,30}",
        stop in prop::collection::vec("[abé]{0,5}", 0..4),
        at in prop::collection::vec(any::<usize>(), 0..8),
    ) {
        let mut stop_strings = StopStrings::new(&stop);
        let mut kept = String::new();
        for piece in split(&text, &at) {
            kept += &stop_strings.push(&piece);
        }
        let expected = cut(&text, &stop);
        prop_assert_eq!(stop_strings.found().is_some(), expected != text);
        kept += &stop_strings.finish();
        prop_assert_eq!(kept, expected);
    }
}

#[test]
fn a_character_appears_with_its_last_token() {
    let ids = TINY_A.encode("🙂").unwrap();
    assert_eq!(ids.len(), 4);
    assert_eq!(pieces(&ids, false, &[]), ["", "", "", "🙂", ""]);
}

#[test]
fn a_character_that_is_never_completed_is_shown_at_the_end() {
    let ids = &TINY_A.encode("🙂").unwrap()[..3];
    assert_eq!(pieces(ids, false, &[]), ["", "", "", "\u{fffd}"]);
}

#[test]
fn a_stop_string_across_tokens_is_not_shown() {
    let ids: Vec<u32> = "one END two"
        .chars()
        .flat_map(|c| TINY_A.encode(&c.to_string()).unwrap())
        .collect();
    let stop = ["END".to_owned()];
    let mut stream = TextStream::new(&TINY_A, true, &stop);
    let mut shown = Vec::new();
    for &id in &ids {
        shown.push(stream.push(id));
        if stream.stopped_by().is_some() {
            break;
        }
    }
    assert_eq!(shown, ["o", "n", "e", " ", "", "", ""]);
    assert_eq!(stream.stopped_by(), Some("END"));
    assert_eq!(stream.push(ids[0]), "");
    assert_eq!(stream.finish(), "");
}

#[test]
fn the_beginning_of_a_stop_string_is_shown_once_it_cannot_be_one() {
    let ids: Vec<u32> = "aENb EN"
        .chars()
        .flat_map(|c| TINY_A.encode(&c.to_string()).unwrap())
        .collect();
    assert_eq!(
        pieces(&ids, true, &["END"]),
        ["a", "", "", "ENb", " ", "", "", "EN"]
    );
}

#[test]
fn a_special_token_is_a_stop_string_only_where_it_is_text() {
    let ids = TINY_A.encode("a<|im_end|>b").unwrap();
    assert_eq!(pieces(&ids, false, &["<|im_end|>"]).concat(), "a");
    assert_eq!(pieces(&ids, true, &["<|im_end|>"]).concat(), "ab");
}
