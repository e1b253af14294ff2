//! Finds secrets in a text by what comes before them: the secret name of a quoted field, or the word `Bearer` or
//! `Basic`.

use super::{REDACTED, names::is_secret};
use std::borrow::Cow;

/// The scheme of an `Authorization` header, which a credential may follow.
pub(super) enum Scheme {
    Bearer,
    Basic,
}

impl Scheme {
    /// Returns the scheme (`Bearer` or `Basic`) that `word` is or ends with, as `authorization:Bearer` ends with
    /// `Bearer`.
    pub(super) fn of(word: &str) -> Option<Self> {
        let word = word.rsplit(|letter: char| !letter.is_alphanumeric()).next()?;
        if word.eq_ignore_ascii_case("bearer") {
            Some(Self::Bearer)
        } else if word.eq_ignore_ascii_case("basic") {
            Some(Self::Basic)
        } else {
            None
        }
    }

    /// Whether `word`, which follows this scheme of an `Authorization` header, is a credential. After `Bearer`, any
    /// word is a credential. After `Basic`, the word has to look encoded: `dXNlcjpwYXNz` does, `question` does not.
    pub(super) fn precedes(&self, word: &str) -> bool {
        let is_encoded = |letter: char| letter.is_ascii_uppercase() || letter.is_ascii_digit() || letter == '=';
        match self {
            Self::Bearer => !word.is_empty(),
            Self::Basic => word.len() >= 4 && word.chars().any(is_encoded),
        }
    }
}

/// Returns the text with the quoted or bracketed value of every field with a secret name redacted.
///
/// Fields are recognized in JSON (`"api_key": "…"`) and in what Rust, Python or a log line write: `api_key: Some("…")`,
/// `'api_key': '…'`, `api_key="…"`. The quotes may be escaped, as in a JSON text inside a JSON text.
pub(super) fn redact_fields(text: &str) -> Cow<'_, str> {
    let mut clean = String::new();
    let mut done = 0;
    for (at, opening) in text.match_indices(['"', '\'', '[', '{']) {
        if at < done {
            continue;
        }
        // Only the name before a quote decides whether the quote opens a secret value. Pairing the quotes from the
        // start of the text would fail in a text with unbalanced quotes, where the quote that closes one value seems to
        // open another.
        let before = text[..at].trim_end_matches('\\');
        if !ends_with_secret_name(before) {
            continue;
        }
        let (start, end) = match opening {
            "[" | "{" => (at, end_of_brackets(text, at)),
            quote => (at + 1, end_of_quoted(text, at, quote).0),
        };
        if start < end {
            clean.push_str(&text[done..start]);
            clean.push_str(REDACTED);
            done = end;
        }
    }
    if done == 0 {
        return Cow::Borrowed(text);
    }
    clean.push_str(&text[done..]);
    Cow::Owned(clean)
}

/// Whether the text ends with a secret name and a `:` or `=`, so that the secret value follows the text.
fn ends_with_secret_name(text: &str) -> bool {
    // Between the `:` or `=` and the value's quote there may be `Some(`, or the `b` of a byte string.
    let text = text.trim_end_matches(|letter: char| letter.is_alphanumeric() || "_(".contains(letter));
    let Some(text) = text.trim_end().strip_suffix([':', '=']) else {
        return false;
    };
    let text = text.trim_end();
    let quoted = text.strip_suffix(['"', '\'']).map(|name| name.trim_end_matches('\\'));
    let also_in_name = if quoted.is_some() { "-_.[]% " } else { "-_." };
    let name = quoted
        .unwrap_or(text)
        .rsplit(|letter: char| !letter.is_alphanumeric() && !also_in_name.contains(letter))
        .next();
    name.is_some_and(is_secret)
}

/// Returns where the content of a quoted text ends, and where its closing quote ends. The opening quote is at `at`.
fn end_of_quoted(text: &str, at: usize, quote: &str) -> (usize, usize) {
    let escapes = |end: usize| end - text[..end].trim_end_matches('\\').len();
    let opening = escapes(at);
    let closing = text[at + 1..]
        .match_indices(quote)
        .map(|(end, _)| at + 1 + end)
        .find(|end| {
            let escapes = escapes(*end);
            escapes <= opening || (opening == 0 && escapes % 2 == 0)
        });
    match closing {
        Some(end) if opening > 0 => (end - escapes(end), end + 1),
        Some(end) => (end, end + 1),
        // There is no closing quote, because the text was truncated inside the quotes: the content goes on to the end.
        None => (text.len(), text.len()),
    }
}

/// Returns the position after the bracket that closes the bracket at `at`, or the end of the text if no bracket does.
fn end_of_brackets(text: &str, at: usize) -> usize {
    let (mut end, mut depth) = (at, 0);
    while let Some(next) = text[end..].find(['"', '[', ']', '{', '}']) {
        end += next;
        match text.as_bytes()[end] {
            b'"' => {
                end = end_of_quoted(text, end, "\"").1;
                continue;
            }
            b'[' | b'{' => depth += 1,
            _ => depth -= 1,
        }
        end += 1;
        if depth == 0 {
            return end;
        }
    }
    text.len()
}
