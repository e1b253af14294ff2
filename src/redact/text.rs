//! Removes secrets from free text: error messages, notes, texts of payloads.

use super::{
    REDACTED,
    credentials::{Scheme, redact_fields},
    url,
};
use std::borrow::Cow;

/// Returns the text with every secret that can be recognized replaced by [`REDACTED`]: user info and secret parameters
/// of URLs, credentials after `Bearer` or `Basic`, and quoted values of fields with a secret name.
pub(crate) fn text(text: &str) -> Cow<'_, str> {
    if !text.contains(|letter: char| letter.is_whitespace() || "/?=#\"':".contains(letter)) {
        return Cow::Borrowed(text);
    }
    let fields = redact_fields(text);
    let mut clean = String::with_capacity(text.len());
    let mut after_scheme: Option<Scheme> = None;
    // Whitespace, `"`, `<` and `>` always end a URL; other punctuation can be part of a URL.
    let border = |letter: char| letter.is_whitespace() || "\"<>".contains(letter);
    for piece in fields.split_inclusive(border) {
        let word = piece.trim_end_matches(border);
        let (before, core, after) = trimmed(word);
        let scheme = Scheme::of(core);
        match after_scheme.take() {
            Some(previous_scheme) if previous_scheme.precedes(core) => {
                clean.extend([before, REDACTED, after]);
                // The redacted word may itself be a scheme (`Bearer` or `Basic`) that was repeated by mistake, as in
                // `Bearer Bearer …`: then the next word may be the credential.
                after_scheme = scheme;
            }
            // Between two adjacent separators, such as two spaces, there is no word: a scheme (`Bearer` or `Basic`)
            // before them applies to the next word.
            previous_scheme if word.is_empty() => after_scheme = previous_scheme,
            _ => {
                clean.push_str(before);
                clean.push_str(&url::redact_word(core));
                clean.push_str(after);
                after_scheme = scheme;
            }
        }
        clean.push_str(&piece[word.len()..]);
    }
    if clean == text {
        Cow::Borrowed(text)
    } else {
        Cow::Owned(clean)
    }
}

/// Splits a word into the brackets and punctuation before it, the rest, and the brackets and punctuation after it. A
/// [`REDACTED`] at the start or end of the rest keeps its brackets, so that redacting a text twice gives the same text.
fn trimmed(word: &str) -> (&str, &str, &str) {
    let mut start = word.len() - word.trim_start_matches(|letter| "([{'`".contains(letter)).len();
    if start > 0 && word[start - 1..].starts_with(REDACTED) {
        start -= 1;
    }
    let core = &word[start..];
    let mut end = core.trim_end_matches(|letter| ")]}'`.,:;".contains(letter)).len();
    if core.get(..=end).is_some_and(|core| core.ends_with(REDACTED)) {
        end += 1;
    }
    (&word[..start], &core[..end], &core[end..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_loses_its_secrets_and_nothing_else() {
        for (url, clean) in [
            (
                "https://u:p@h.example:8443/a?b=1&api_key=s3&c=2",
                "https://h.example:8443/a?b=1&api_key=[redacted]&c=2",
            ),
            ("http://h/a?key=s3", "http://h/a?key=[redacted]"),
            ("http://h/a?api%5Fkey=s3", "http://h/a?api%5Fkey=[redacted]"),
            ("http://h/?max_tokens=3&sig=s3", "http://h/?max_tokens=3&sig=[redacted]"),
            ("/relative?token=s3", "/relative?token=[redacted]"),
            ("http://h/plain?x=1", "http://h/plain?x=1"),
        ] {
            assert_eq!(url::uri(&url.parse().unwrap()), clean);
            assert_eq!(text(url), clean);
        }
    }

    #[test]
    fn a_text_loses_the_secrets_of_its_urls_and_its_bearer_tokens() {
        for (text, clean) in [
            (
                "error sending request for url (http://u:p@h/?token=s3): refused",
                "error sending request for url (http://h/?token=[redacted]): refused",
            ),
            (
                "sent Authorization: Bearer s3cret, got 401",
                "sent Authorization: Bearer [redacted], got 401",
            ),
            ("https://u:p%40s@h", "https://h"),
            (
                "#frag http://h/?a=1#access_token=s3",
                "#frag http://h/?a=1#access_token=[redacted]",
            ),
            ("is this a question?", "is this a question?"),
            ("nothing to see", "nothing to see"),
        ] {
            assert_eq!(super::text(text), clean);
        }
    }

    #[test]
    fn punctuation_fragments_and_nested_urls_hide_no_secret() {
        for text in [
            "https://app/cb#access_token=s3",
            "https://h/?token=ab,s3",
            "https://u:a,s3@h/",
            "https://h/?token[]=s3",
            "http://h/?token=abc;s3",
            "http://h/?next=https://u:s3@h/",
            "http://h/?next=https%3A%2F%2Fh%2F%3Ftoken%3Ds3",
            "//u:s3@h/path",
            "//u:s3@/v:s3@h/path",
            "?pass=s3",
            "grant_type=password&client_secret=s3",
            r#"{"api_key":"s3"}"#,
            r#"{"a": [{"access_token" : "x\"s3", "b": 1}]}"#,
            "Authorization: Basic dXM6czM=s3",
        ] {
            let clean = super::text(text);
            assert!(
                !clean.contains("s3") && clean.contains(REDACTED) || clean == "//h/path" || clean == "https://h/",
                "{clean}"
            );
        }
        assert_eq!(
            url::uri(&"http://h/?next=https://u:s3@h/&a=1".parse().unwrap()),
            "http://h/?next=[redacted]&a=1"
        );
        for text in [
            "a basic question",
            r#"{"tokens": 3, "token_count": "4"}"#,
            "a = b, c == d",
            "x=1&y=2",
            "mail me@h.example",
        ] {
            assert_eq!(super::text(text), text);
        }
    }
}
