//! A template's source as minijinja can take it: newlines as Jinja2 reads them, expressions as
//! [`expression`] writes them, and the `generation` block of transformers, which marks what the
//! assistant says and changes no text.
//!
//! In transformers the block is a call block: names that are set inside stay inside. So they do in
//! a `with` block, which takes its place.

use minijinja::{Error, ErrorKind};

use super::expression;

/// The source with every newline as `\n`, and `generation` blocks as `with` blocks.
///
/// The newline after `{% raw %}` is kept, as Jinja2 keeps it in spite of `trim_blocks`.
///
/// # Errors
/// If an expression has more operators than [`MOST_OPERATORS`].
pub fn prepare(source: &str) -> Result<String, Error> {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len());
    let mut rest = source.as_str();
    let mut raw = false;
    while let Some(start) = rest.find('{') {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        let length = match tag.as_bytes().get(1) {
            Some(b'#') if !raw => tag.find("#}").map(|end| end + 2),
            Some(b'{') if !raw => end_of_tag(tag, "}}"),
            Some(b'%') => end_of_tag(tag, "%}"),
            _ => Some(1),
        };
        // Without an end, it is the parser's to say so.
        let (tag, after) = tag.split_at(length.unwrap_or(tag.len()));
        let is_expression = tag.len() > 1 && !raw && !tag.starts_with("{#");
        if is_expression && operators(tag) > MOST_OPERATORS {
            let line = 1 + out.matches('\n').count();
            let detail = format!(
                "line {line}: an expression of more than {MOST_OPERATORS} operators is not supported"
            );
            return Err(Error::new(ErrorKind::SyntaxError, detail));
        }
        let replacement = match tag.as_bytes().get(1) {
            Some(b'%') => block_tag(tag, &mut raw),
            Some(b'{') if !raw => rewritten(tag, "{{", "}}", expression::printed),
            _ => None,
        };
        match replacement {
            Some(replacement) => out.push_str(&replacement),
            None if raw && tag.len() > 1 => {
                // Not the end of the raw block: its text may hold one further on.
                out.push('{');
                rest = &rest[start + 1..];
                continue;
            }
            None => out.push_str(tag),
        }
        rest = after;
    }
    Ok(out + rest)
}

/// The engine compiles an expression by recursion, as deep as it has operators in a row.
const MOST_OPERATORS: usize = 500;

/// How many operators a tag has, beside the texts in it.
fn operators(tag: &str) -> usize {
    let mut outside = String::new();
    let mut quote = None;
    let mut characters = tag.chars();
    while let Some(c) = characters.next() {
        match (quote, c) {
            (Some(_), '\\') => drop(characters.next()),
            (Some(open), c) if open == c => quote = None,
            (Some(_), _) => {}
            (None, '"' | '\'') => quote = Some(c),
            (None, c) => outside.push(c),
        }
    }
    let signs = outside.matches(['-', '+', '*', '/', '%', '~', '|', '<', '>', '=']);
    let words = outside.split(|c: char| !c.is_alphanumeric());
    let words = words.filter(|word| ["not", "and", "or", "in", "is", "if"].contains(word));
    signs.count() + words.count()
}

/// Bytes of `tag` up to the end of `close`, which may stand in strings.
fn end_of_tag(tag: &str, close: &str) -> Option<usize> {
    let bytes = tag.as_bytes();
    let mut at = 2;
    let mut quote = None;
    while at < bytes.len() {
        match (quote, bytes[at]) {
            (Some(_), b'\\') => at += 1,
            (Some(open), found) if open == found => quote = None,
            (None, found @ (b'"' | b'\'')) => quote = Some(found),
            (None, _) if tag.as_bytes()[at..].starts_with(close.as_bytes()) => {
                return Some(at + close.len());
            }
            _ => {}
        }
        at += 1;
    }
    None
}

/// What replaces a whole block tag, `{%` to `%}`; notes where raw text begins and ends.
fn block_tag(tag: &str, raw: &mut bool) -> Option<String> {
    let inner = tag.strip_prefix("{%")?.strip_suffix("%}")?;
    let name = inner.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
    let replacement = match (name, *raw) {
        ("raw", false) => {
            *raw = true;
            return Some(match inner.ends_with(['-', '+']) {
                true => tag.to_owned(),
                false => format!("{{%{inner}+%}}"),
            });
        }
        ("endraw", true) => {
            *raw = false;
            "endraw"
        }
        ("generation", false) => "with",
        ("endgeneration", false) => "endwith",
        (_, true) => return None,
        (statement, false) => {
            let keyword = statement.split(|c: char| !c.is_alphanumeric()).next()?;
            let write: fn(&str) -> Option<String> = match keyword {
                "if" | "elif" => expression::condition,
                "for" => expression::loop_header,
                "set" => expression::assignment,
                _ => return None,
            };
            let inside = |inside: &str| {
                let rest = inside.trim_start().strip_prefix(keyword)?;
                Some(format!("{keyword} {}", write(rest)?))
            };
            return rewritten(tag, "{%", "%}", inside);
        }
    };
    Some(tag.replacen(name, replacement, 1))
}

/// The tag with what is inside of it written anew; on as many lines, so that errors name the right one.
fn rewritten(
    tag: &str,
    open: &str,
    close: &str,
    write: impl Fn(&str) -> Option<String>,
) -> Option<String> {
    let inner = tag.strip_prefix(open)?.strip_suffix(close)?;
    let inside = inner.strip_prefix(['-', '+']).unwrap_or(inner);
    let before = &inner[..inner.len() - inside.len()];
    let content = inside.strip_suffix(['-', '+']).unwrap_or(inside);
    let after = &inside[content.len()..];
    let lines = "\n".repeat(inner.matches('\n').count());
    Some(format!(
        "{open}{before} {}{lines} {after}{close}",
        write(content)?
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_tags_are_replaced() {
        for (source, expected) in [
            (
                "{%- generation -%}a{% endgeneration %}",
                "{%- with -%}a{% endwith %}",
            ),
            (
                "{{ '{% generation %}' }}{# {% generation %} #}",
                "{{ \"{% generation %}\" }}{# {% generation %} #}",
            ),
            (
                "{% raw %}{% generation %}{{ '{% endraw %}{% generation %}",
                "{% raw +%}{% generation %}{{ '{% endraw %}{% with %}",
            ),
            (
                "{% if x\n== '%}' %}{%+generation%}",
                "{% if (x == \"%}\")\n %}{%+with%}",
            ),
            ("a\r\nb\rc\n{% generation", "a\nb\nc\n{% generation"),
        ] {
            assert_eq!(prepare(source).unwrap(), expected);
        }
    }

    /// The engine would overflow its stack.
    #[test]
    fn expressions_without_an_end_are_refused() {
        for operators in ["-", "not ", "1 ~ ", "1 + "] {
            let source = format!("a\n{{{{ {}1 }}}}", operators.repeat(20_000));
            let error = prepare(&source).unwrap_err();
            assert!(error.to_string().contains("line 2"), "{error}");
        }
        assert!(prepare(&format!("{{# {} #}}", "-".repeat(5000))).is_ok());
    }
}
