//! The report as Markdown that reads well unrendered.

use std::fmt::Write;

use super::content::{Block, Section, Table};
use super::{Chart, ReportInputs, content};

/// The whole report; pictures are linked as `<name>.png` beside it.
pub fn render(inputs: &ReportInputs, charts: &[Chart]) -> String {
    let mut out = format!("# {}\n", inputs.title);
    for verdict in &inputs.verdicts {
        let _ = write!(out, "\n**{}**\n", escape(&super::ci::headline(verdict)));
    }
    for label in content::labels(&inputs.runs) {
        let _ = write!(out, "\n- {}", escape(&label));
    }
    out.push('\n');
    for section in content::before_charts(inputs) {
        push_section(&mut out, &section);
    }
    for chart in charts {
        let _ = write!(out, "\n![{}]({}.png)\n", chart.title, chart.name);
    }
    for section in content::after_charts(inputs) {
        push_section(&mut out, &section);
    }
    out
}

fn push_section(out: &mut String, section: &Section) {
    let _ = write!(out, "\n## {}\n", section.heading);
    for block in &section.blocks {
        out.push('\n');
        match block {
            Block::Text(text) => out.push_str(&escape(text)),
            Block::List(items) => {
                let items: Vec<String> = items.iter().map(|i| format!("- {}", escape(i))).collect();
                out.push_str(&items.join("\n"));
            }
            Block::Code(code) => {
                let _ = write!(out, "```\n{code}\n```");
            }
            Block::Table(table) => out.push_str(&table_text(table)),
        }
        out.push('\n');
    }
}

/// Columns padded to one width, so that the source is a table too.
pub fn table_text(table: &Table) -> String {
    let rows: Vec<Vec<String>> = std::iter::once(&table.header)
        .chain(&table.rows)
        .map(|row| row.iter().map(|cell| escape(cell)).collect())
        .collect();
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells
            .map(|cell| cell.chars().count())
            .max()
            .unwrap_or(0)
            .max(3)
    };
    let widths: Vec<usize> = (0..table.header.len()).map(width).collect();
    let line = |row: &[String]| {
        let cells = row
            .iter()
            .zip(&widths)
            .enumerate()
            .map(|(i, (cell, width))| match i < table.left {
                true => format!(" {cell:<width$} "),
                false => format!(" {cell:>width$} "),
            });
        format!("|{}|", cells.collect::<Vec<_>>().join("|"))
    };
    let rule = widths
        .iter()
        .enumerate()
        .map(|(i, &width)| match i < table.left {
            true => format!(" {} ", "-".repeat(width)),
            false => format!(" {}: ", "-".repeat(width - 1)),
        });
    let mut lines = vec![
        line(&rows[0]),
        format!("|{}|", rule.collect::<Vec<_>>().join("|")),
    ];
    lines.extend(rows[1..].iter().map(|row| line(row)));
    lines.join("\n")
}

/// Characters that Markdown would take for its own, in names that come from elsewhere.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '|' | '*' | '<' | '`' => {
                out.push('\\');
                out.push(c);
            }
            '\n' | '\r' => out.push(' '),
            c => out.push(c),
        }
    }
    out
}
