//! Few colours, told apart with any kind of colour vision.

pub const INK: &str = "#1b2430";
pub const MUTED: &str = "#5b6673";
pub const FAINT: &str = "#98a1ab";
pub const GRID: &str = "#e6e9ed";
pub const WARNING: &str = "#b45309";
pub const OUTLINE: &str = "#e8590c";

/// Source: Okabe and Ito, Color Universal Design, 2008; black left to text, yellow to nobody.
const SERIES: [&str; 7] = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a94a0",
];

pub fn series(index: usize) -> &'static str {
    SERIES[index % SERIES.len()]
}

/// What memory and time go to, with its colour in every chart: what belongs together has one hue, the
/// lighter the less of the work is the GPU's.
const COMPONENTS: [(&str, usize, f64); 20] = [
    ("expert slots", 0, 0.9),
    ("experts in VRAM", 0, 0.9),
    ("experts", 0, 0.55),
    ("experts in RAM", 0, 0.55),
    ("waiting for experts in RAM", 0, 0.55),
    ("experts from disk", 0, 0.3),
    ("promotions", 0, 0.3),
    ("dense weights", 1, 0.85),
    ("router", 1, 0.5),
    ("kv cache", 2, 0.85),
    ("delta-net state", 2, 0.55),
    ("conv state", 2, 0.3),
    ("other sequences", 2, 0.7),
    ("lm_head", 4, 0.9),
    ("embedding", 4, 0.5),
    ("CUDA context", 6, 0.85),
    ("workspace", 6, 0.5),
    ("kernel boundaries", 3, 0.85),
    ("handoffs", 3, 0.5),
    ("launches and handoffs", 3, 0.5),
];

/// The colour of a component of memory or time, whatever chart it is in; `index` tells apart those that
/// have no colour of their own.
pub fn component(name: &str, index: usize) -> String {
    let known = COMPONENTS
        .iter()
        .find(|(known, _, _)| known.eq_ignore_ascii_case(name));
    match known {
        Some(&(_, hue, strength)) => tint(SERIES[hue], strength),
        None => tint(
            SERIES[5 - index % 2 * 2],
            0.7 / (1.0 + (index / 2) as f64 / 4.0),
        ),
    }
}

/// Near white to deep blue, even steps of lightness; `t` from 0 to 1.
pub fn sequential(t: f64) -> String {
    const STOPS: [[f64; 3]; 5] = [
        [246.0, 248.0, 250.0],
        [198.0, 219.0, 239.0],
        [107.0, 174.0, 214.0],
        [33.0, 113.0, 181.0],
        [8.0, 38.0, 92.0],
    ];
    let position = t.clamp(0.0, 1.0) * (STOPS.len() - 1) as f64;
    let below = (position as usize).min(STOPS.len() - 2);
    let part = position - below as f64;
    let channel = |c: usize| {
        let value = STOPS[below][c] + (STOPS[below + 1][c] - STOPS[below][c]) * part;
        value.round() as u8
    };
    format!("#{:02x}{:02x}{:02x}", channel(0), channel(1), channel(2))
}

/// White or ink, whichever is read more easily on `background`.
pub fn text_on(background: &str) -> &'static str {
    let channel = |at: usize| u8::from_str_radix(&background[at..at + 2], 16).unwrap_or(0);
    let [r, g, b] = [1, 3, 5].map(|at| f64::from(channel(at)));
    let luma = 0.299 * r + 0.587 * g + 0.114 * b;
    if luma > 150.0 { INK } else { "#fff" }
}

/// A colour mixed with white, `strength` 1 for the colour itself.
pub fn tint(color: &str, strength: f64) -> String {
    let channel = |at: usize| {
        let value = u8::from_str_radix(&color[at..at + 2], 16).unwrap_or(0);
        (255.0 - (255.0 - f64::from(value)) * strength).round() as u8
    };
    format!("#{:02x}{:02x}{:02x}", channel(1), channel(3), channel(5))
}
