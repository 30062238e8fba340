//! The terms and the filter of an index, out of its `create index` statement.
//!
//! SQLite tells the columns of an index, but the text of an expression or of a partial index's `where` only in the
//! statement. It is cut at the top level, knowing quotes, comments and parentheses, and nothing else.

/// What `create [unique] index … on t (term, …) [where filter]` says.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct IndexText {
    /// Each without `asc` or `desc`.
    pub terms: Vec<String>,
    pub filter: Option<String>,
}

/// `None` when the text is no such statement.
pub(crate) fn parse(sql: &str) -> Option<IndexText> {
    let tokens = tokens(sql)?;
    let open = tokens.iter().position(|token| token.text(sql) == "(")?;
    let (mut depth, mut terms, mut from) = (1, Vec::new(), open + 1);
    let mut close = None;
    for (at, token) in tokens.iter().enumerate().skip(open + 1) {
        match token.text(sql) {
            "(" => depth += 1,
            ")" => {
                depth -= 1;
                if depth == 0 {
                    terms.push(term(sql, tokens.get(from..at)?)?);
                    close = Some(at);
                    break;
                }
            }
            "," if depth == 1 => {
                terms.push(term(sql, tokens.get(from..at)?)?);
                from = at + 1;
            }
            _ => {}
        }
    }
    let rest: Vec<&Token> = tokens.iter().skip(close? + 1).filter(|token| token.text(sql) != ";").collect();
    let filter = match rest.as_slice() {
        [] => None,
        [word, first, ..] if word.text(sql).eq_ignore_ascii_case("where") => {
            Some(spaced(sql, rest.get(1..)?)).filter(|_| !first.text(sql).is_empty())
        }
        _ => return None,
    };
    Some(IndexText { terms, filter })
}

fn term(sql: &str, tokens: &[Token]) -> Option<String> {
    let ends_with_order = |token: &Token| {
        let text = token.text(sql);
        text.eq_ignore_ascii_case("asc") || text.eq_ignore_ascii_case("desc")
    };
    let tokens = match tokens {
        [kept @ .., last] if !kept.is_empty() && ends_with_order(last) => kept,
        all => all,
    };
    let all: Vec<&Token> = tokens.iter().collect();
    (!all.is_empty()).then(|| spaced(sql, &all))
}

/// The tokens again, without comments. Operators of two characters stay together where they stood together.
fn spaced(sql: &str, tokens: &[&Token]) -> String {
    let mut text = String::new();
    let mut end = None;
    for token in tokens {
        if end.is_some_and(|end| end != token.start) {
            text.push(' ');
        }
        text.push_str(token.text(sql));
        end = Some(token.end);
    }
    text
}

struct Token {
    start: usize,
    end: usize,
}

impl Token {
    fn text<'a>(&self, sql: &'a str) -> &'a str {
        &sql[self.start..self.end]
    }
}

/// Words, quoted text, and single characters; spaces and comments left out.
fn tokens(sql: &str) -> Option<Vec<Token>> {
    let bytes = sql.as_bytes();
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'$' || byte >= 0x80;
    let (mut tokens, mut at) = (Vec::new(), 0);
    while at < bytes.len() {
        let start = at;
        match bytes[at] {
            byte if byte.is_ascii_whitespace() => {
                at += 1;
                continue;
            }
            b'-' if bytes.get(at + 1) == Some(&b'-') => {
                at = sql[at..].find('\n').map_or(bytes.len(), |length| at + length + 1);
                continue;
            }
            b'/' if bytes.get(at + 1) == Some(&b'*') => {
                at = sql[at + 2..].find("*/").map_or(bytes.len(), |length| at + 2 + length + 2);
                continue;
            }
            quote @ (b'\'' | b'"' | b'`') => at = end_of_quote(bytes, at, quote)?,
            b'[' => at += sql[at..].find(']')? + 1,
            byte if is_word(byte) => {
                while at < bytes.len() && is_word(bytes[at]) {
                    at += 1;
                }
            }
            _ => at += 1,
        }
        tokens.push(Token { start, end: at });
    }
    Some(tokens)
}

/// Just after the closing quote; a doubled quote stands for itself.
fn end_of_quote(bytes: &[u8], start: usize, quote: u8) -> Option<usize> {
    let mut at = start + 1;
    loop {
        if *bytes.get(at)? == quote {
            if bytes.get(at + 1) != Some(&quote) {
                return Some(at + 1);
            }
            at += 1;
        }
        at += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(sql: &str) -> (Vec<String>, Option<String>) {
        let text = parse(sql).unwrap();
        (text.terms, text.filter)
    }

    #[test]
    fn terms_and_filter_are_cut_at_the_top_level() {
        assert_eq!(parsed("CREATE UNIQUE INDEX i ON t(a)"), (vec!["a".into()], None));
        let (terms, filter) = parsed(
            "create unique index \"i(1\" on [t,(] (lower(a, 'x,)''') desc, -- one, two\n \"b\"\"(\" collate nocase ASC,\n\
             (a||b) /* ) */) where a is not null and b <> ')' ;",
        );
        assert_eq!(terms, ["lower(a, 'x,)''')", "\"b\"\"(\" collate nocase", "(a||b)"]);
        assert_eq!(filter.as_deref(), Some("a is not null and b <> ')'"));
    }

    #[test]
    fn text_that_is_no_index_is_refused() {
        for sql in ["", "create index i on t", "create index i on t(a", "create index i on t('a)", "x (a) nonsense"] {
            assert_eq!(parse(sql), None, "{sql}");
        }
    }
}
