//! Expressions of Jinja2 written so that minijinja computes what Jinja2 would.
//!
//! The two agree on most of the language. Where they do not, an expression is written anew with a
//! filter of ours in the place of an operator: `a ~ b` joins what Python's `str` gives, `a % b` formats
//! a text, `a[1:]` of what has no slices is undefined, and precedence is Jinja2's, by parentheses.
//!
//! Source: jinja2 3.1.6, `parser.py`.

use super::lexer::{Token, tokens};
use super::methods::is_method;

/// Filters that stand for operators.
pub const REMAINDER: &str = "__remainder";
pub const POSITIVE: &str = "__positive";
pub const NEGATIVE: &str = "__negative";
pub const SLICE: &str = "__slice";
/// `a[b]`, unless `b` is a text written out
pub const ITEM: &str = "__item";
/// `a.b` where `b` is the name of a method that is not called
pub const ATTRIBUTE: &str = "__attribute";
/// `a ** b`
pub const POWER: &str = "__power";
/// What a loop goes through
pub const EACH: &str = "__each";

/// How deep parentheses may nest; beyond, minijinja has its own word on it.
const DEEPEST: usize = 100;

/// The expression of `{{ }}` or of a `set` block in the form that minijinja takes; `None` where the
/// source is better left as it is: minijinja will say what is wrong with it.
pub fn printed(source: &str) -> Option<String> {
    let mut parser = Parser::new(source)?;
    let found = parser.tuple(true)?;
    parser.end(found)
}

/// A condition, as of `if`.
pub fn condition(source: &str) -> Option<String> {
    let mut parser = Parser::new(source)?;
    let found = parser.tuple(false)?;
    parser.end(found)
}

/// `targets in values`, perhaps with `if condition` and `recursive`, as of `for`.
pub fn loop_header(source: &str) -> Option<String> {
    let mut parser = Parser::new(source)?;
    let start = parser.tokens.iter().position(|t| *t == Token::Name("in"))?;
    let targets = parser.targets(start)?;
    parser.at = start + 1;
    let values = parser.tuple(false)?;
    let mut found = format!("{targets} in {values}|{EACH}");
    if parser.eat_name("if") {
        found += &format!(" if {}", parser.conditional()?);
    }
    if parser.eat_name("recursive") {
        found += " recursive";
    }
    parser.end(found)
}

/// `targets = value`, as of `set`.
pub fn assignment(source: &str) -> Option<String> {
    let mut parser = Parser::new(source)?;
    let equals = Token::Operator("=");
    let start = parser.tokens.iter().position(|t| *t == equals)?;
    let targets = parser.targets(start)?;
    parser.at = start + 1;
    let value = parser.tuple(true)?;
    parser.end(format!("{targets} = {value}"))
}

struct Parser<'a> {
    tokens: Vec<Token<'a>>,
    at: usize,
    depth: usize,
}

impl<'a> Parser<'a> {
    fn new(source: &'a str) -> Option<Self> {
        Some(Parser {
            tokens: tokens(source)?,
            at: 0,
            depth: 0,
        })
    }

    fn end(&self, found: String) -> Option<String> {
        (self.at == self.tokens.len()).then_some(found)
    }

    fn peek(&self) -> Option<&Token<'a>> {
        self.tokens.get(self.at)
    }

    fn is(&self, operator: &str) -> bool {
        matches!(self.peek(), Some(Token::Operator(found)) if *found == operator)
    }

    fn is_name(&self, name: &str) -> bool {
        matches!(self.peek(), Some(Token::Name(found)) if *found == name)
    }

    /// Whether the token after the next one is that operator.
    fn is_after(&self, operator: &str) -> bool {
        matches!(self.tokens.get(self.at + 1), Some(Token::Operator(found)) if *found == operator)
    }

    fn eat(&mut self, operator: &str) -> bool {
        let found = self.is(operator);
        self.at += usize::from(found);
        found
    }

    fn eat_name(&mut self, name: &str) -> bool {
        let found = self.is_name(name);
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, operator: &str) -> Option<()> {
        self.eat(operator).then_some(())
    }

    fn name(&mut self) -> Option<&'a str> {
        match self.peek()? {
            Token::Name(name) => {
                let name = *name;
                self.at += 1;
                Some(name)
            }
            _ => None,
        }
    }

    /// What is assigned to: names, their attributes, perhaps in parentheses.
    fn targets(&self, end: usize) -> Option<String> {
        let mut found = String::new();
        for token in &self.tokens[..end] {
            match token {
                Token::Name(name) => found += name,
                Token::Operator(operator @ ("," | "." | "(" | ")")) => found += operator,
                _ => return None,
            }
        }
        Some(found)
    }

    /// Expressions with commas between them, which are a tuple even without parentheses.
    fn tuple(&mut self, conditional: bool) -> Option<String> {
        let mut items = Vec::new();
        let mut is_tuple = false;
        while items.is_empty() || is_tuple {
            let ends = self.peek().is_none()
                || self.is(")")
                || (is_tuple && (self.is_name("if") || self.is_name("recursive")));
            if ends {
                break;
            }
            items.push(match conditional {
                true => self.conditional()?,
                false => self.or()?,
            });
            if !self.eat(",") {
                break;
            }
            is_tuple = true;
        }
        match (&items[..], is_tuple) {
            ([], _) => None,
            ([one], false) => Some(one.clone()),
            ([one], true) => Some(format!("({one},)")),
            (items, _) => Some(format!("({})", items.join(", "))),
        }
    }

    fn conditional(&mut self) -> Option<String> {
        self.depth += 1;
        if self.depth > DEEPEST {
            return None;
        }
        let mut found = self.or()?;
        while self.eat_name("if") {
            let test = self.or()?;
            found = match self.eat_name("else") {
                true => format!("({found} if {test} else {})", self.conditional()?),
                false => format!("({found} if {test})"),
            };
        }
        self.depth -= 1;
        Some(found)
    }

    fn or(&mut self) -> Option<String> {
        let mut parts = vec![self.and()?];
        while self.eat_name("or") {
            parts.push(self.and()?);
        }
        Some(chain(parts, " or "))
    }

    fn and(&mut self) -> Option<String> {
        let mut parts = vec![self.not()?];
        while self.eat_name("and") {
            parts.push(self.not()?);
        }
        Some(chain(parts, " and "))
    }

    fn not(&mut self) -> Option<String> {
        let mut count = 0;
        while self.eat_name("not") {
            count += 1;
            if count > DEEPEST {
                return None;
            }
        }
        let found = self.compare()?;
        Some((0..count).fold(found, |found, _| format!("(not {found})")))
    }

    fn compare(&mut self) -> Option<String> {
        let mut found = self.sum()?;
        let mut is_comparison = false;
        loop {
            let operator = match self.peek() {
                Some(Token::Operator(o @ ("==" | "!=" | "<" | "<=" | ">" | ">="))) => *o,
                Some(Token::Name("in")) => "in",
                Some(Token::Name("not"))
                    if self.tokens.get(self.at + 1) == Some(&Token::Name("in")) =>
                {
                    self.at += 1;
                    "not in"
                }
                _ => break,
            };
            self.at += 1;
            found = format!("{found} {operator} {}", self.sum()?);
            is_comparison = true;
        }
        Some(match is_comparison {
            true => format!("({found})"),
            false => found,
        })
    }

    fn sum(&mut self) -> Option<String> {
        let mut parts = vec![self.joined()?];
        while let Some(Token::Operator(operator @ ("+" | "-"))) = self.peek() {
            let operator = *operator;
            self.at += 1;
            parts.push(format!("{operator} {}", self.joined()?));
        }
        Some(chain(parts, " "))
    }

    fn joined(&mut self) -> Option<String> {
        let mut parts = vec![self.product()?];
        while self.eat("~") {
            parts.push(self.product()?);
        }
        if parts.len() > 1 {
            parts.iter_mut().for_each(|part| part.push_str("|string"));
        }
        Some(chain(parts, " ~ "))
    }

    fn product(&mut self) -> Option<String> {
        let mut found = self.power()?;
        while let Some(Token::Operator(operator @ ("*" | "/" | "//" | "%"))) = self.peek() {
            let operator = *operator;
            self.at += 1;
            let right = self.power()?;
            found = match operator {
                "%" => format!("({found}|{REMAINDER}({right}))"),
                _ => format!("({found} {operator} {right})"),
            };
        }
        Some(found)
    }

    /// Powers from left to right, other than in Python.
    fn power(&mut self) -> Option<String> {
        let mut found = self.unary(true)?;
        while self.eat("**") {
            found = format!("({found}|{POWER}({}))", self.unary(true)?);
        }
        Some(found)
    }

    fn unary(&mut self, filters: bool) -> Option<String> {
        self.depth += 1;
        if self.depth > DEEPEST {
            return None;
        }
        let found = if self.eat("-") {
            match self.unary(false)? {
                number if number.starts_with(|c: char| c.is_ascii_digit()) => {
                    format!("(-{number})")
                }
                other => format!("({other}|{NEGATIVE})"),
            }
        } else if self.eat("+") {
            format!("({}|{POSITIVE})", self.unary(false)?)
        } else {
            self.primary()?
        };
        let found = self.postfix(found)?;
        let found = match filters {
            true => self.filters(found),
            false => Some(found),
        };
        self.depth -= 1;
        found
    }

    fn primary(&mut self) -> Option<String> {
        let token = self.peek()?.clone();
        self.at += 1;
        match token {
            Token::Name(name) => {
                const RESERVED: [&str; 7] = ["if", "else", "or", "and", "not", "in", "is"];
                (!RESERVED.contains(&name)).then(|| name.to_owned())
            }
            Token::Integer(digits) | Token::Float(digits) => Some(digits.replace('_', "")),
            Token::Text(mut text) => {
                // Literals side by side are one.
                while let Some(Token::Text(more)) = self.peek() {
                    text += more;
                    self.at += 1;
                }
                Some(quoted(&text))
            }
            Token::Operator("(") => {
                if self.eat(")") {
                    return Some("()".into());
                }
                let inside = self.tuple(true)?;
                self.expect(")")?;
                Some(format!("({inside})"))
            }
            Token::Operator("[") => Some(format!("[{}]", self.list("]")?)),
            Token::Operator("{") => self.dict(),
            Token::Operator(_) => None,
        }
    }

    /// Expressions up to `close`, which is taken, too.
    fn list(&mut self, close: &str) -> Option<String> {
        let mut items = Vec::new();
        while !self.eat(close) {
            if !items.is_empty() {
                self.expect(",")?;
                if self.eat(close) {
                    break;
                }
            }
            items.push(self.conditional()?);
        }
        Some(items.join(", "))
    }

    fn dict(&mut self) -> Option<String> {
        let mut items = Vec::new();
        while !self.eat("}") {
            if !items.is_empty() {
                self.expect(",")?;
                if self.eat("}") {
                    break;
                }
            }
            let key = self.conditional()?;
            self.expect(":")?;
            items.push(format!("{key}: {}", self.conditional()?));
        }
        // Not to be taken for the end of a tag.
        Some(format!("{{{} }}", items.join(", ")))
    }

    fn postfix(&mut self, mut found: String) -> Option<String> {
        loop {
            if self.eat(".") {
                found = match self.peek()?.clone() {
                    Token::Name(name) if is_method(name) && !self.is_after("(") => {
                        format!("({found}|{ATTRIBUTE}(\"{name}\"))")
                    }
                    Token::Name(name) => format!("{found}.{name}"),
                    Token::Integer(index) => format!("({found}|{ITEM}({index}))"),
                    _ => return None,
                };
                self.at += 1;
            } else if self.eat("[") {
                found = self.subscript(found)?;
            } else if self.eat("(") {
                found = format!("{found}({})", self.arguments()?);
            } else {
                return Some(found);
            }
        }
    }

    fn subscript(&mut self, of: String) -> Option<String> {
        let mut parts = [None, None, None];
        let mut colons = 0;
        while !self.eat("]") {
            if self.eat(":") {
                colons += 1;
                if colons > 2 {
                    return None;
                }
            } else if parts[colons].is_none() {
                parts[colons] = Some(self.conditional()?);
            } else {
                return None;
            }
        }
        match (colons, parts) {
            // What is called is found by the engine itself.
            (0, [Some(key), ..]) if key.starts_with('"') || self.is("(") => {
                Some(format!("{of}[{key}]"))
            }
            (0, [Some(key), ..]) => Some(format!("({of}|{ITEM}({key}))")),
            (0, _) => None,
            (_, parts) => {
                let parts = parts.map(|part| part.unwrap_or("none".into()));
                Some(format!("({of}|{SLICE}({}))", parts.join(", ")))
            }
        }
    }

    fn arguments(&mut self) -> Option<String> {
        let mut items = Vec::new();
        while !self.eat(")") {
            if !items.is_empty() {
                self.expect(",")?;
                if self.eat(")") {
                    break;
                }
            }
            let is_named = self.tokens.get(self.at + 1) == Some(&Token::Operator("="));
            let star = ["**", "*"].into_iter().find(|star| self.is(star));
            items.push(match (self.peek()?.clone(), star) {
                (_, Some(star)) => {
                    self.at += 1;
                    format!("{star}{}", self.conditional()?)
                }
                (Token::Name(name), None) if is_named => {
                    self.at += 2;
                    format!("{name}={}", self.conditional()?)
                }
                _ => self.conditional()?,
            });
        }
        Some(items.join(", "))
    }

    fn filters(&mut self, mut found: String) -> Option<String> {
        loop {
            if self.eat("|") {
                found = format!("{found}|{}", self.dotted()?);
                if self.eat("(") {
                    found = format!("{found}({})", self.arguments()?);
                }
            } else if self.eat_name("is") {
                found = self.test(found)?;
            } else if self.eat("(") {
                found = format!("({found})({})", self.arguments()?);
            } else {
                return Some(found);
            }
        }
    }

    fn dotted(&mut self) -> Option<String> {
        let mut name = self.name()?.to_owned();
        while self.eat(".") {
            name += ".";
            name += self.name()?;
        }
        Some(name)
    }

    fn test(&mut self, of: String) -> Option<String> {
        let not = if self.eat_name("not") { "not " } else { "" };
        let name = self.dotted()?;
        let arguments = if self.eat("(") {
            format!("({})", self.arguments()?)
        } else {
            match self.peek() {
                Some(Token::Name("else" | "or" | "and" | "is" | "if" | "in" | "not")) => {
                    String::new()
                }
                Some(Token::Name("recursive")) => String::new(),
                Some(Token::Operator("(" | "[" | "{"))
                | Some(Token::Name(_) | Token::Text(_) | Token::Integer(_) | Token::Float(_)) => {
                    let argument = self.primary()?;
                    format!("({})", self.postfix(argument)?)
                }
                _ => String::new(),
            }
        };
        Some(format!("({of} is {not}{name}{arguments})"))
    }
}

/// Operands of one precedence, from left to right: in one pair of parentheses, since the engine limits how
/// deep they may nest.
fn chain(parts: Vec<String>, operator: &str) -> String {
    match &parts[..] {
        [one] => one.clone(),
        parts => format!("({})", parts.join(operator)),
    }
}

/// A string literal for `text`, without anything that ends a tag or that minijinja reads in another
/// way.
fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c.is_control() => out.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}
