//! Tokens of a Jinja2 expression, with the text of Python's string literals.
//!
//! Source: jinja2 3.1.6, `lexer.py`.

/// One token.
#[derive(Clone, Debug, PartialEq)]
pub enum Token<'a> {
    Name(&'a str),
    Integer(&'a str),
    Float(&'a str),
    /// What the literal stands for
    Text(String),
    Operator(&'a str),
}

/// Operators, longer ones first.
const OPERATORS: [&str; 26] = [
    "//", "**", "==", "!=", ">=", "<=", "+", "-", "*", "/", "%", "~", "<", ">", "(", ")", "[", "]",
    "{", "}", "|", ",", ".", ":", "=", ";",
];

/// The tokens of an expression; `None` where it has something that Jinja2 does not know, or a literal
/// that stands for no text.
pub fn tokens(source: &str) -> Option<Vec<Token<'_>>> {
    let mut found = Vec::new();
    let mut rest = source.trim_start();
    while let Some(first) = rest.chars().next() {
        let length = match first {
            '\'' | '"' => {
                let length = literal_length(rest)?;
                found.push(Token::Text(unescape(&rest[1..length - 1])?));
                length
            }
            c if c.is_ascii_digit() => {
                let after_dot = matches!(found.last(), Some(Token::Operator(".")));
                let (length, is_float) = number_length(rest, after_dot);
                found.push(match is_float {
                    true => Token::Float(&rest[..length]),
                    false => Token::Integer(&rest[..length]),
                });
                length
            }
            c if c.is_alphabetic() || c == '_' => {
                let end = rest.find(|c: char| !(c.is_alphanumeric() || c == '_'));
                let length = end.unwrap_or(rest.len());
                found.push(Token::Name(&rest[..length]));
                length
            }
            _ => {
                let operator = OPERATORS.into_iter().find(|o| rest.starts_with(o))?;
                found.push(Token::Operator(operator));
                operator.len()
            }
        };
        rest = rest[length..].trim_start();
    }
    Some(found)
}

/// Bytes of the string literal that `text` begins with, quotes included.
fn literal_length(text: &str) -> Option<usize> {
    let quote = text.as_bytes()[0];
    let mut bytes = text.bytes().enumerate().skip(1);
    while let Some((at, byte)) = bytes.next() {
        match byte {
            b'\\' => drop(bytes.next()),
            byte if byte == quote => return Some(at + 1),
            _ => {}
        }
    }
    None
}

/// Bytes of the number that `text` begins with, and whether it is a float. After a dot it is the index
/// of an item.
fn number_length(text: &str, after_dot: bool) -> (usize, bool) {
    let digits = |text: &str| {
        let end = text.find(|c: char| !(c.is_ascii_digit() || c == '_'));
        let run = &text[..end.unwrap_or(text.len())];
        run.trim_end_matches('_').len()
    };
    if let Some(radix) = text.as_bytes().get(1)
        && text.starts_with('0')
        && b"bBoOxX".contains(radix)
    {
        let end = text[2..].find(|c: char| !(c.is_ascii_hexdigit() || c == '_'));
        return (end.map_or(text.len(), |end| end + 2), false);
    }
    let mut length = digits(text);
    if after_dot {
        return (length, false);
    }
    let mut is_float = false;
    if let Some(fraction) = text[length..].strip_prefix('.')
        && digits(fraction) > 0
    {
        length += 1 + digits(fraction);
        is_float = true;
    }
    if let Some(exponent) = text[length..].strip_prefix(['e', 'E']) {
        let sign = usize::from(exponent.starts_with(['+', '-']));
        let exponent = digits(&exponent[sign..]);
        if exponent > 0 {
            length += 1 + sign + exponent;
            is_float = true;
        }
    }
    (length, is_float)
}

/// The text that the inside of a Python string literal stands for; `None` for half a surrogate pair and
/// for a character by its name.
fn unescape(inside: &str) -> Option<String> {
    let mut out = String::new();
    let mut rest = inside;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let escaped = rest[at + 1..].chars().next()?;
        rest = &rest[at + 1 + escaped.len_utf8()..];
        let plain = match escaped {
            '\n' => continue,
            '\\' | '\'' | '"' => escaped,
            'a' => '\x07',
            'b' => '\x08',
            'f' => '\x0c',
            'n' => '\n',
            'r' => '\r',
            't' => '\t',
            'v' => '\x0b',
            'x' | 'u' | 'U' => {
                let length = match escaped {
                    'x' => 2,
                    'u' => 4,
                    _ => 8,
                };
                let digits = rest.get(..length)?;
                if !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
                    return None;
                }
                rest = &rest[length..];
                char::from_u32(u32::from_str_radix(digits, 16).ok()?)?
            }
            '0'..='7' => {
                let more = rest
                    .bytes()
                    .take(2)
                    .take_while(|b| (b'0'..=b'7').contains(b));
                let more = more.count();
                let digits = format!("{escaped}{}", &rest[..more]);
                rest = &rest[more..];
                char::from_u32(u32::from_str_radix(&digits, 8).ok()?)?
            }
            'N' => return None,
            other => {
                out.push('\\');
                other
            }
        };
        out.push(plain);
    }
    Some(out + rest)
}
