//! Removes secrets from URLs: user info, and the values of secret query parameters.

use super::{
    REDACTED,
    credentials::{Scheme, redact_fields},
    names::is_secret,
};
use http::Uri;
use std::{borrow::Cow, ops::Range};

/// Returns the URL without user info, and with the values of secret query parameters redacted.
pub(crate) fn uri(uri: &Uri) -> String {
    use std::fmt::Write;
    let mut url = String::with_capacity(64);
    if let Some(scheme) = uri.scheme_str() {
        let _ = write!(url, "{scheme}://");
    }
    if let Some(authority) = uri.authority() {
        let authority = authority.as_str();
        url.push_str(authority.rsplit_once('@').map_or(authority, |(_, host)| host));
    }
    url.push_str(&without_user_infos("", uri.path()));
    if let Some(query) = uri.query() {
        url.push('?');
        url.push_str(&redact_query(query));
    }
    url
}

/// Returns a word of a text without its secrets, if the word is a URL, a relative URL with a query, or form data
/// (`a=1&b=2`).
pub(super) fn redact_word(word: &str) -> Cow<'_, str> {
    let mut slashes = word.match_indices("//");
    let authority = slashes.find(|(at, _)| *at == 0 || word[..*at].ends_with(':'));
    let (start, rest) = authority.map_or(("", word), |(at, slashes)| word.split_at(at + slashes.len()));
    if start.contains('=') && holds_secret(start) {
        return Cow::Borrowed(REDACTED);
    }
    let (rest, fragment) = match rest.split_once('#') {
        Some((rest, fragment)) => (rest, Some(fragment)),
        None => (rest, None),
    };
    let (path, parameters) = match rest.split_once('?') {
        Some((path, parameters)) => (path, Some(parameters)),
        None if start.is_empty() && rest.contains('=') => ("", Some(rest)),
        None => (rest, None),
    };
    let is_form = start.is_empty() && !rest.contains('?');
    let mut clean = without_user_infos(start, path);
    if let Some(parameters) = parameters {
        clean.push_str(if is_form { "" } else { "?" });
        clean.push_str(&redact_query(parameters));
    }
    if let Some(fragment) = fragment {
        clean.push('#');
        clean.push_str(&redact_query(fragment));
    }
    if clean == word {
        Cow::Borrowed(word)
    } else {
        Cow::Owned(clean)
    }
}

fn redact_query(query: &str) -> Cow<'_, str> {
    let mut pairs: Vec<_> = query.split('&').map(Cow::Borrowed).collect();
    let mut is_clean = true;
    for pair in &mut pairs {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let clean = if holds_secret(name) {
            REDACTED.to_owned()
        } else if !value.is_empty() && (is_secret_parameter(name) || holds_secret(value)) {
            format!("{name}={REDACTED}")
        } else {
            continue;
        };
        *pair = Cow::Owned(clean);
        is_clean = false;
    }
    if is_clean {
        Cow::Borrowed(query)
    } else {
        Cow::Owned(pairs.join("&"))
    }
}

/// Whether a query parameter with the name `name` holds a credential: if [`is_secret`] is true for the name, or the
/// name is `key` or `code`, or the name is percent-encoded more than three times.
fn is_secret_parameter(name: &str) -> bool {
    let Some(name) = decoded(name) else { return true };
    is_secret(&name) || name.eq_ignore_ascii_case("key") || name.eq_ignore_ascii_case("code")
}

/// Whether the value of a parameter contains a secret: in a URL, a form, a header or JSON inside the value, which may
/// be percent-encoded up to three times. A value that is encoded more often counts as a secret.
///
/// If there is a secret, the caller redacts the whole value. Removing only the secrets from the value would need
/// recursion into the URLs inside it: a server can nest URLs in URLs without bound, and recursion would overflow the
/// stack. So the search does not recurse.
fn holds_secret(value: &str) -> bool {
    let Some(value) = decoded(value) else { return true };
    let ends_name = |letter: char| !letter.is_alphanumeric() && !"-_.[]".contains(letter);
    // The text before a `=` ends with the name of a parameter, so the value is split at each `=`, and the last part,
    // which no `=` follows, is left out.
    let mut before = value.split('=').rev().skip(1);
    let mut scheme = None;
    before.any(|text| text.rsplit(ends_name).next().is_some_and(is_secret_parameter))
        || user_infos(&value).next().is_some()
        || redact_fields(&value) != *value
        || value.split_whitespace().any(|word| {
            let follows = scheme.take().is_some_and(|scheme: Scheme| scheme.precedes(word));
            scheme = Scheme::of(word);
            follows
        })
}

/// Returns `start` and `path`, joined, without the user info of any URL in them. There may be several URLs: a path may
/// contain further URLs.
fn without_user_infos(start: &str, path: &str) -> String {
    let text = format!("{start}{path}");
    let mut clean = String::with_capacity(text.len());
    let mut done = 0;
    for user_info in user_infos(&text) {
        clean.push_str(&text[done..user_info.start]);
        done = user_info.end;
    }
    clean + &text[done..]
}

/// Returns where the user infos in a text are: after every `//` that begins an authority, the part up to the
/// authority's last `@`, which is included.
fn user_infos(text: &str) -> impl Iterator<Item = Range<usize>> {
    let mut done = 0;
    text.match_indices("//").filter_map(move |(at, _)| {
        // A `//` inside a path, as in `a//b`, begins no authority.
        if at < done || text[..at].ends_with(|letter: char| letter.is_alphanumeric() || letter == '/') {
            return None;
        }
        let start = after_slashes(text, at);
        let mut end = None;
        let mut from = start;
        // If no host follows the `@`, as in `//u:p@/v:q@h`, the user info goes on: the text after the next slashes is
        // read as a part of the authority.
        loop {
            let length = text[from..].find(['/', '?', '#']).unwrap_or(text.len() - from);
            let Some(sign) = text[from..from + length].rfind('@') else {
                break;
            };
            done = from + sign + 1;
            end = Some(done);
            if sign + 1 < length || !text[done..].starts_with('/') {
                break;
            }
            from = after_slashes(text, done);
        }
        end.map(|end| start..end)
    })
}

fn after_slashes(text: &str, at: usize) -> usize {
    text.len() - text[at..].trim_start_matches('/').len()
}

/// Returns the text percent-decoded, to be searched and not to be shown: both `api%5Fkey` and `api%255Fkey` become
/// `api_key`. Returns `None` if the text is encoded more than three times, which has no harmless use.
fn decoded(text: &str) -> Option<Cow<'_, str>> {
    let mut text = if text.contains('+') {
        Cow::Owned(text.replace('+', " "))
    } else {
        Cow::Borrowed(text)
    };
    for _ in 0..4 {
        match percent_decoded(&text) {
            Cow::Owned(next) if next != text => text = Cow::Owned(next),
            _ => return Some(text),
        }
    }
    None
}

fn percent_decoded(name: &str) -> Cow<'_, str> {
    if !name.contains('%') {
        return Cow::Borrowed(name);
    }
    let mut bytes = Vec::with_capacity(name.len());
    let mut rest = name.as_bytes();
    while let [first, tail @ ..] = rest {
        let digits = tail.get(..2).and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) if *first == b'%' => {
                bytes.push(byte);
                rest = &tail[2..];
            }
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    Cow::Owned(String::from_utf8_lossy(&bytes).into_owned())
}
