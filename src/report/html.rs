//! The report as one HTML file that needs nothing else: styles, font and drawings inside.

use std::fmt::Write;

use super::content::{Block, Section, Table};
use super::svg::escape;
use super::{Chart, ReportInputs, content, font};

const STYLE: &str = "
:root { color: #1b2430; background: #fff; font: 15px/1.55 Inter, 'Helvetica Neue', Arial, sans-serif; }
body { max-width: 1180px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 27px; font-weight: 600; margin: 0 0 8px; }
h2 { font-size: 19px; font-weight: 600; margin: 48px 0 8px; }
ul { padding-left: 20px; color: #5b6673; }
p { color: #5b6673; margin: 12px 0 8px; }
figure { margin: 28px 0; border: 1px solid #e6e9ed; border-radius: 6px; overflow: hidden; }
figure svg { display: block; width: 100%; height: auto; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-feature-settings: 'tnum'; }
th { font-weight: 600; text-align: left; vertical-align: bottom; }
th, td { padding: 5px 14px 5px 0; border-bottom: 1px solid #e6e9ed; }
td { vertical-align: top; }
.number { text-align: right; }
pre { background: #f6f8fa; padding: 12px 14px; border-radius: 6px; overflow-x: auto; font-size: 13px; }
.warning { color: #b45309; font-weight: 600; }
.verdict { font-weight: 600; padding: 10px 14px; border-radius: 6px; color: #1b2430; }
.pass { background: #e3f4ec; }
.undecided { background: #fdf0d9; }
.fail { background: #fbe3dc; }
";

pub fn render(inputs: &ReportInputs, charts: &[Chart]) -> String {
    let title = escape(&inputs.title);
    let (regular, bold) = (base64(font::REGULAR), base64(font::SEMI_BOLD));
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width\">\n<title>{title}</title>\n<style>\n\
         @font-face {{ font-family: Inter; font-weight: 400; src: url(data:font/otf;base64,{regular}); }}\n\
         @font-face {{ font-family: Inter; font-weight: 600; src: url(data:font/otf;base64,{bold}); }}\
         {STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
    );
    if inputs.is_synthetic() {
        out.push_str("<p class=\"warning\">Measured on synthetic weights.</p>\n");
    }
    for verdict in &inputs.verdicts {
        let class = verdict.outcome.name();
        let line = escape(&super::ci::headline(verdict));
        let _ = writeln!(out, "<p class=\"verdict {class}\">{line}</p>");
    }
    push_list(&mut out, &content::labels(&inputs.runs));
    for section in content::before_charts(inputs) {
        push_section(&mut out, &section);
    }
    for chart in charts {
        let _ = writeln!(out, "<figure>\n{}</figure>", chart.svg);
    }
    for section in content::after_charts(inputs) {
        push_section(&mut out, &section);
    }
    out.push_str("</body>\n</html>\n");
    out
}

fn push_section(out: &mut String, section: &Section) {
    let _ = writeln!(out, "<h2>{}</h2>", escape(&section.heading));
    for block in &section.blocks {
        match block {
            Block::Text(text) => {
                let _ = writeln!(out, "<p>{}</p>", escape(text));
            }
            Block::List(items) => push_list(out, items),
            Block::Code(code) => {
                let _ = writeln!(out, "<pre>{}</pre>", escape(code));
            }
            Block::Table(table) => push_table(out, table),
        }
    }
}

fn push_list(out: &mut String, items: &[String]) {
    out.push_str("<ul>\n");
    for item in items {
        let _ = writeln!(out, "<li>{}</li>", escape(item));
    }
    out.push_str("</ul>\n");
}

fn push_table(out: &mut String, table: &Table) {
    let row = |tag: &str, cells: &[String]| {
        let cells = cells.iter().enumerate().map(|(i, cell)| {
            let class = if i < table.left {
                ""
            } else {
                " class=\"number\""
            };
            // Names of metrics may wrap, so that no table is wider than the page.
            let cell = escape(cell).replace('_', "_<wbr>");
            format!("<{tag}{class}>{cell}</{tag}>")
        });
        format!("<tr>{}</tr>\n", cells.collect::<String>())
    };
    out.push_str("<div class=\"table\"><table>\n");
    out.push_str(&row("th", &table.header));
    out.extend(table.rows.iter().map(|cells| row("td", cells)));
    out.push_str("</table></div>\n");
}

/// Source: RFC 4648, section 4.
fn base64(data: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(data.len().div_ceil(3) * 4);
    for chunk in data.chunks(3) {
        let byte = |i: usize| u32::from(chunk.get(i).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for i in 0..4 {
            let sextet = bits >> (18 - 6 * i) & 63;
            out.push(match i <= chunk.len() {
                true => char::from(ALPHABET[sextet as usize]),
                false => '=',
            });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::base64;

    #[test]
    fn base64_meets_the_vectors_of_rfc_4648() {
        let cases = [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ];
        for (plain, encoded) in cases {
            assert_eq!(base64(plain.as_bytes()), encoded);
        }
    }
}
