//! The font of the charts, in the binary: the same picture on a machine without fonts.

use std::sync::{Arc, LazyLock};

use resvg::usvg::fontdb;
use ttf_parser::Face;

/// Subsets of Inter under the SIL Open Font License; text and origin in `font/OFL.txt`.
pub const REGULAR: &[u8] = include_bytes!("font/Inter-Regular.otf");
pub const SEMI_BOLD: &[u8] = include_bytes!("font/Inter-SemiBold.otf");
/// Where the file is opened without the font, the closest that machines have.
pub const FAMILY: &str = "Inter, 'Helvetica Neue', Arial, sans-serif";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weight {
    Regular,
    SemiBold,
}

/// Width of one line of text in the units of `size`; kerning, a percent at most, is left out.
pub fn width(text: &str, size: f64, weight: Weight) -> f64 {
    let face = match weight {
        Weight::Regular => &FACES[0],
        Weight::SemiBold => &FACES[1],
    };
    let advance = |c| {
        let glyph = face.glyph_index(c).unwrap_or_default();
        f64::from(face.glyph_hor_advance(glyph).unwrap_or(0))
    };
    text.chars().map(advance).sum::<f64>() * size / f64::from(face.units_per_em())
}

/// `text`, with an ellipsis in its middle if it is wider than `room`: names differ at their ends.
pub fn fit(text: &str, size: f64, weight: Weight, room: f64) -> String {
    if width(text, size, weight) <= room {
        return text.to_string();
    }
    let characters: Vec<char> = text.chars().collect();
    for kept in (0..characters.len()).rev() {
        let (head, tail) = (kept.div_ceil(2), kept / 2);
        let head: String = characters[..head].iter().collect();
        let tail: String = characters[characters.len() - tail..].iter().collect();
        let shown = format!("{}…{}", head.trim_end(), tail.trim_start());
        if width(&shown, size, weight) <= room {
            return shown;
        }
    }
    String::new()
}

/// Only the bundled fonts, never the system's: PNGs do not depend on the machine.
pub fn database() -> Arc<fontdb::Database> {
    static DATABASE: LazyLock<Arc<fontdb::Database>> = LazyLock::new(|| {
        let mut database = fontdb::Database::new();
        database.load_font_data(REGULAR.to_vec());
        database.load_font_data(SEMI_BOLD.to_vec());
        database.set_sans_serif_family("Inter");
        Arc::new(database)
    });
    Arc::clone(&DATABASE)
}

static FACES: LazyLock<[Face; 2]> = LazyLock::new(|| {
    [REGULAR, SEMI_BOLD].map(|data| Face::parse(data, 0).expect("the bundled font is valid"))
});

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wider_text_is_wider_and_cut_text_fits() {
        let narrow = width("ill", 12.0, Weight::Regular);
        let wide = width("WWW", 12.0, Weight::Regular);
        assert!(0.0 < narrow && narrow < wide);
        let cut = fit("a rather long name of a model", 12.0, Weight::Regular, 80.0);
        assert!(
            cut.starts_with("a r") && cut.ends_with("el") && cut.contains('…'),
            "{cut}"
        );
        assert!(width(&cut, 12.0, Weight::Regular) <= 80.0);
        assert_eq!(fit("short", 12.0, Weight::Regular, 80.0), "short");
    }

    #[test]
    fn the_signs_the_charts_use_are_in_the_font() {
        for c in "×–…−≈≤≥·%±µ→".chars() {
            assert!(FACES.iter().all(|f| f.glyph_index(c).is_some()), "{c}");
        }
    }
}
