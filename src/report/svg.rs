//! A small writer of SVG, and its rasteriser: one drawing for the page and the picture.

use std::fmt::Write;

use resvg::{tiny_skia, usvg};

use super::font::{self, Weight};

pub use super::font::Weight::{Regular, SemiBold};

/// A drawing in progress. Units are CSS pixels, y grows downwards.
pub struct Svg {
    width: f64,
    height: f64,
    body: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Anchor {
    Start,
    Middle,
    End,
}

#[derive(Clone, Copy, Debug)]
pub struct Text<'a> {
    pub size: f64,
    pub weight: Weight,
    pub color: &'a str,
    pub anchor: Anchor,
}

#[derive(Clone, Copy, Debug)]
pub struct Stroke<'a> {
    pub color: &'a str,
    pub width: f64,
    /// Lengths of dash and gap, empty for a solid line.
    pub dash: &'a str,
}

impl<'a> Text<'a> {
    pub fn new(size: f64, weight: Weight, color: &'a str) -> Self {
        Self {
            size,
            weight,
            color,
            anchor: Anchor::Start,
        }
    }

    pub fn anchored(self, anchor: Anchor) -> Self {
        Self { anchor, ..self }
    }

    pub fn width(&self, text: &str) -> f64 {
        font::width(text, self.size, self.weight)
    }

    pub fn fit(&self, text: &str, room: f64) -> String {
        font::fit(text, self.size, self.weight, room)
    }
}

impl<'a> Stroke<'a> {
    pub fn solid(color: &'a str, width: f64) -> Self {
        Self {
            color,
            width,
            dash: "",
        }
    }

    pub fn dashed(color: &'a str, width: f64) -> Self {
        Self {
            color,
            width,
            dash: "4 3",
        }
    }
}

impl Svg {
    pub fn new(width: f64, height: f64) -> Self {
        Self {
            width,
            height,
            body: String::new(),
        }
    }

    pub fn rect(&mut self, (x, y): (f64, f64), (width, height): (f64, f64), fill: &str) {
        self.push(format_args!(
            r#"<rect x="{x:.2}" y="{y:.2}" width="{width:.2}" height="{height:.2}" fill="{fill}"/>"#
        ));
    }

    pub fn line(&mut self, (x1, y1): (f64, f64), (x2, y2): (f64, f64), stroke: Stroke) {
        let stroke = stroke_attributes(stroke);
        self.push(format_args!(
            r#"<line x1="{x1:.2}" y1="{y1:.2}" x2="{x2:.2}" y2="{y2:.2}" {stroke}/>"#
        ));
    }

    pub fn polyline(&mut self, points: &[(f64, f64)], stroke: Stroke) {
        let stroke = stroke_attributes(stroke);
        let points = points.iter().fold(String::new(), |mut all, (x, y)| {
            let _ = write!(all, "{x:.2},{y:.2} ");
            all
        });
        let points = points.trim_end();
        self.push(format_args!(
            r#"<polyline points="{points}" fill="none" stroke-linejoin="round" {stroke}/>"#
        ));
    }

    /// A dot with a thin white edge, so that dots on a line or on each other stay apart.
    pub fn dot(&mut self, (x, y): (f64, f64), radius: f64, fill: &str) {
        self.push(format_args!(
            r##"<circle cx="{x:.2}" cy="{y:.2}" r="{radius}" fill="{fill}" stroke="#fff" stroke-width="1"/>"##
        ));
    }

    /// A path in SVG's own notation, filled, without antialiased seams between neighbours.
    pub fn cells(&mut self, path: &str, fill: &str) {
        self.push(format_args!(
            r#"<path d="{path}" fill="{fill}" shape-rendering="crispEdges"/>"#
        ));
    }

    pub fn outline(&mut self, path: &str, stroke: Stroke) {
        let stroke = stroke_attributes(stroke);
        self.push(format_args!(
            r#"<path d="{path}" fill="none" stroke-linecap="square" {stroke}/>"#
        ));
    }

    /// One line of text; `y` is its baseline.
    pub fn text(&mut self, (x, y): (f64, f64), text: &str, style: Text) {
        let weight = match style.weight {
            Weight::Regular => 400,
            Weight::SemiBold => 600,
        };
        let anchor = match style.anchor {
            Anchor::Start => "",
            Anchor::Middle => r#" text-anchor="middle""#,
            Anchor::End => r#" text-anchor="end""#,
        };
        let (size, color, text) = (style.size, style.color, escape(text));
        self.push(format_args!(
            r#"<text x="{x:.2}" y="{y:.2}" font-size="{size}" font-weight="{weight}" fill="{color}"{anchor}>{text}</text>"#
        ));
    }

    pub fn finish(self) -> String {
        let (width, height, body) = (self.width, self.height, self.body);
        let family = font::FAMILY;
        format!(
            r##"<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" font-family="{family}">
<rect width="{width}" height="{height}" fill="#fff"/>
{body}</svg>
"##
        )
    }

    fn push(&mut self, element: std::fmt::Arguments) {
        let _ = writeln!(self.body, "{element}");
    }
}

/// Text for a place between tags or in an attribute, of SVG and HTML alike.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

/// The PNG of a drawing of [`Svg::finish`], `scale` pixels per unit.
///
/// # Errors
/// Only if the drawing is too large to hold in memory.
pub fn rasterise(svg: &str, scale: f32) -> Result<Vec<u8>, String> {
    let options = usvg::Options {
        fontdb: font::database(),
        ..usvg::Options::default()
    };
    let tree = usvg::Tree::from_str(svg, &options).map_err(|e| e.to_string())?;
    let size = tree.size().to_int_size();
    let pixels = |n: u32| (n as f32 * scale).round() as u32;
    let (width, height) = (pixels(size.width()), pixels(size.height()));
    let mut image = tiny_skia::Pixmap::new(width, height)
        .ok_or_else(|| format!("a picture of {width} x {height} pixels cannot be made"))?;
    let transform = tiny_skia::Transform::from_scale(scale, scale);
    resvg::render(&tree, transform, &mut image.as_mut());
    image.encode_png().map_err(|e| e.to_string())
}

fn stroke_attributes(stroke: Stroke) -> String {
    let dash = match stroke.dash {
        "" => String::new(),
        dash => format!(r#" stroke-dasharray="{dash}""#),
    };
    format!(
        r#"stroke="{}" stroke-width="{}"{dash}"#,
        stroke.color, stroke.width
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_escaped_and_drawn() {
        let mut svg = Svg::new(100.0, 20.0);
        svg.text(
            (2.0, 15.0),
            "a < b & \"c\"",
            Text::new(12.0, SemiBold, "#000"),
        );
        let svg = svg.finish();
        assert!(svg.contains("a &lt; b &amp; &quot;c&quot;"));
        let blank = rasterise(&Svg::new(100.0, 20.0).finish(), 2.0).unwrap();
        let drawn = rasterise(&svg, 2.0).unwrap();
        assert!(drawn.starts_with(b"\x89PNG"));
        assert!(drawn.len() > blank.len());
    }
}
