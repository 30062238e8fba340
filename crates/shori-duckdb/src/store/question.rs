//! What a question says: whether it is one statement that reads.
//!
//! DuckDB tells, which alone knows its language. The kind of a prepared statement is not to be had, and who prepares several
//! statements runs all but the last; but a function shows the tree of a text that holds selects, and refuses any other,
//! without running anything. To it, `values`, `table`, `describe` and `show` are selects, too.

use shori_core::{Error, ErrorKind, Result};

use crate::database::quote_text;

/// Begin a statement that reads, where DuckDB shows no tree: one that pivots makes types of its own, and is several to it.
const READING_WORDS: [&str; 10] =
    ["select", "with", "from", "values", "table", "describe", "show", "summarize", "pivot", "explain"];

/// One statement that reads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Question<'a> {
    /// `explain`, and what belongs to it; empty where the rows themselves are asked for.
    pub explain: &'a str,
    /// Without the semicolon that ends it, so that it may stand within another statement.
    pub select: &'a str,
}

/// What DuckDB says of a text.
enum Told {
    Selects(usize),
    NoSelect,
    /// It cannot be parsed.
    Wrong(String),
}

impl<'a> Question<'a> {
    /// Refuses what is not one statement that reads. `ask` gives the text that is DuckDB's answer to a query.
    pub fn read(sql: &'a str, ask: &mut dyn FnMut(&str) -> Result<String>) -> Result<Self> {
        let refuse = |cause: &str| Err(Error::new(ErrorKind::Usage, "answer", "the question", cause));
        let (explain, text) = explained(after_comments(sql));
        if let Some(select) = before_end(text)
            && matches!(told(select, ask)?, Told::Selects(1))
        {
            return Ok(Self { explain, select });
        }
        match told(text, ask)? {
            Told::Selects(1) => return Ok(Self { explain, select: text }),
            Told::Selects(0) => return refuse("it holds no statement"),
            Told::Selects(_) => return refuse("only one statement is taken"),
            Told::Wrong(cause) => return refuse(&cause),
            Told::NoSelect => {}
        }
        let select = before_end(text).unwrap_or(text);
        if !READING_WORDS.contains(&first_word(select).to_lowercase().as_str()) || is_word(select, "explain") {
            return refuse(&format!("only reading statements are taken: {}", READING_WORDS.join(", ")));
        }
        if select.contains(';') {
            return refuse("only one statement is taken, and no semicolon within a pivot (chr(59) makes one)");
        }
        Ok(Self { explain, select })
    }

    /// The statement as DuckDB takes it.
    pub fn sql(&self) -> String {
        format!("{} {}", self.explain, self.select)
    }
}

fn told(text: &str, ask: &mut dyn FnMut(&str) -> Result<String>) -> Result<Told> {
    const NO_SELECT: &str = "not implemented: ";
    let sql = format!(
        "select if((tree->>'$.error')::boolean, concat(tree->>'$.error_type', ': ', tree->>'$.error_message'), \
         json_array_length(tree, '$.statements')::varchar) as told \
         from (select json_serialize_sql({}) as tree)",
        quote_text(text)
    );
    let told = ask(&sql)?;
    Ok(match told.parse() {
        Ok(selects) => Told::Selects(selects),
        Err(_) if told.starts_with(NO_SELECT) => Told::NoSelect,
        Err(_) => Told::Wrong(told),
    })
}

/// `explain` with its options, and what it explains.
fn explained(text: &str) -> (&str, &str) {
    if !is_word(text, "explain") {
        return ("", text);
    }
    let mut rest = after_comments(&text["explain".len()..]);
    if is_word(rest, "analyze") {
        rest = after_comments(&rest["analyze".len()..]);
    } else if let Some((options, after)) = rest.strip_prefix('(').and_then(|rest| rest.split_once(')'))
        && ["analyze", "format"].into_iter().any(|option| is_word(after_comments(options), option))
    {
        rest = after_comments(after);
    }
    text.split_at(text.len() - rest.len())
}

/// What stands before a semicolon that nothing follows, if there is one; it may stand in a text or a comment.
fn before_end(text: &str) -> Option<&str> {
    let ends = text.match_indices(';').find(|(at, _)| after_comments(&text[at + 1..]).is_empty());
    ends.map(|(at, _)| &text[..at])
}

fn first_word(text: &str) -> &str {
    let end = text.find(|letter: char| !(letter.is_alphanumeric() || letter == '_'));
    &text[..end.unwrap_or(text.len())]
}

fn is_word(text: &str, word: &str) -> bool {
    first_word(text).eq_ignore_ascii_case(word)
}

/// An SQL text from where anything stands in it but comments and semicolons. One that does not end is for DuckDB to tell.
pub fn after_comments(text: &str) -> &str {
    let mut rest = text;
    loop {
        rest = rest.trim_start_matches(|letter: char| letter.is_whitespace() || letter == ';' || letter == '\u{feff}');
        if let Some(comment) = rest.strip_prefix("--") {
            rest = comment.split_once('\n').map_or("", |(_, after)| after);
        } else if let Some(after) = rest.strip_prefix("/*").and_then(after_comment) {
            rest = after;
        } else {
            return rest;
        }
    }
}

/// What follows a comment that has been opened; comments nest.
fn after_comment(text: &str) -> Option<&str> {
    let (mut depth, mut rest) = (1, text);
    while depth > 0 {
        let next = rest.find("*/")?;
        match rest.find("/*").filter(|open| *open < next) {
            Some(open) => (depth, rest) = (depth + 1, &rest[open + 2..]),
            None => (depth, rest) = (depth - 1, &rest[next + 2..]),
        }
    }
    Some(rest)
}
