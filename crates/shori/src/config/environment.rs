//! Values of the environment in a configuration, and how errors tell where they stand without telling what they are.
//!
//! They may be secrets, so what an error says is of the text before they were filled in: no message of a parser that has
//! seen one goes out as it is.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use shori_core::{Error, ErrorKind, Result};

/// A configuration's text with the environment's values, and where they stand.
#[derive(Debug, Default)]
pub(super) struct Filled {
    pub text: String,
    values: Vec<Value>,
}

#[derive(Debug)]
struct Value {
    variable: String,
    at: Range<usize>,
}

/// What the `.env` file in a folder sets.
pub(super) fn read(directory: &Path) -> Result<BTreeMap<String, String>> {
    let file = directory.join(".env");
    if !file.exists() {
        return Ok(BTreeMap::new());
    }
    let fail = |cause: dotenvy::Error| {
        let object = format!("environment file {}", file.display());
        match cause {
            dotenvy::Error::LineParse(content, _) => {
                let object = match line_of(&file, &content) {
                    Some(line) => format!("{object} line {line}"),
                    None => object,
                };
                Error::new(ErrorKind::Usage, "read", object, "it is not of the form NAME=value")
                    .with_remedy("quote a value that has spaces or quotes, and close its quotes")
            }
            dotenvy::Error::Io(cause) => Error::new(ErrorKind::Usage, "read", object, cause),
            _ => Error::new(ErrorKind::Usage, "read", object, "it is not understood"),
        }
    };
    let pairs = dotenvy::from_path_iter(&file).map_err(fail)?;
    pairs.collect::<std::result::Result<_, _>>().map_err(fail)
}

/// What the `.env` file beside a configuration sets a variable to.
pub fn beside(file: &Path, variable: &str) -> Result<Option<String>> {
    let parent = file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Ok(read(parent)?.remove(variable))
}

/// Where in the file the content stands that the parser refuses; it tells no line.
fn line_of(file: &Path, content: &str) -> Option<usize> {
    let text = std::fs::read_to_string(file).ok()?;
    let first = content.trim().lines().next()?;
    text.lines().position(|line| line.trim() == first).map(|index| index + 1)
}

/// Replaces `${NAME}` and `${NAME:-default}` outside comments.
pub(super) fn fill(text: &str, file: &Path, environment: &BTreeMap<String, String>) -> Result<Filled> {
    let mut filled = Filled::default();
    for (number, line) in text.split_inclusive('\n').enumerate() {
        if line.trim_start().starts_with('#') {
            filled.text.push_str(line);
            continue;
        }
        let mut rest = line;
        while let Some(start) = rest.find("${") {
            filled.text.push_str(&rest[..start]);
            rest = &rest[start..];
            let Some(end) = rest.find('}') else { break };
            let (name, default) = match rest[2..end].split_once(":-") {
                Some((name, default)) => (name, Some(default)),
                None => (&rest[2..end], None),
            };
            match (std::env::var(name).ok().or_else(|| environment.get(name).cloned()), default) {
                (Some(value), _) => filled.push_value(name, &value),
                (None, Some(default)) => filled.text.push_str(default),
                (None, None) => {
                    let object = format!("configuration {} line {}", file.display(), number + 1);
                    let cause = format!("environment variable {name} is not set");
                    return Err(Error::new(ErrorKind::Usage, "read", object, cause)
                        .with_remedy(format!("set it, put it in .env, or write ${{{name}:-default}}")));
                }
            }
            rest = &rest[end + 1..];
        }
        filled.text.push_str(rest);
    }
    Ok(filled)
}

impl Filled {
    fn push_value(&mut self, variable: &str, value: &str) {
        let start = self.text.len();
        self.text.push_str(value);
        self.values.push(Value { variable: variable.into(), at: start..self.text.len() });
    }

    /// The line of the configuration's file in which a place of the text stands: values may have several lines.
    pub fn line_of(&self, place: usize) -> usize {
        let breaks = |range: Range<usize>| self.text[range].matches('\n').count();
        let of_values = self.values.iter().filter(|value| value.at.start < place);
        1 + breaks(0..place) - of_values.map(|value| breaks(value.at.start..value.at.end.min(place))).sum::<usize>()
    }

    /// What a parser says of `span`, or a part of it that holds no value.
    pub fn without_values(&self, message: &str, span: Option<&Range<usize>>) -> String {
        // The names of missing keys are known ones.
        if message.starts_with("missing field") {
            return message.to_string();
        }
        let (start, end) = span.map_or((0, self.text.len()), |span| (span.start, span.end));
        let start = self.text[..start].rfind('\n').map_or(0, |at| at + 1);
        let end = self.text[end..].find('\n').map_or(self.text.len(), |at| end + at);
        let near = |value: &&Value| value.at.start < end && start <= value.at.end;
        let told = |value: &&Value| message.contains(&self.text[value.at.clone()]);
        let mut variables: Vec<_> = self.values.iter().filter(near).collect();
        if variables.is_empty() {
            let long = |value: &&Value| value.at.len() > LETTERS_BY_CHANCE;
            variables = self.values.iter().filter(long).filter(told).collect();
        }
        if variables.is_empty() {
            return message.to_string();
        }
        let mut names: Vec<_> = variables.iter().map(|value| format!("${{{}}}", value.variable)).collect();
        names.dedup();
        // What was expected is the parser's own, whatever stands before.
        let expected = message.rsplit_once(", expected ").map(|(_, expected)| format!(", expected {expected}"));
        format!("it does not fit with the value of {}{}", names.join(" and "), expected.unwrap_or_default())
    }
}

/// Values up to this long occur in messages of their own accord, on lines where they do not stand.
const LETTERS_BY_CHANCE: usize = 3;
