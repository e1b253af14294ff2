//! What must not be seen: secrets in headers, URLs, texts and bodies.
//!
//! Redaction happens when something is recorded, so that no later reader, serializer or `Debug` can show what was never
//! kept. Names decide: a header or a query parameter whose name says that it is a credential loses its value.

use http::{HeaderMap, HeaderName, HeaderValue, Uri};
use std::borrow::Cow;

/// Stands where a secret was.
pub(crate) const REDACTED: &str = "[redacted]";

/// Words that make a name a credential's wherever they stand in it: `x-auth-token`, `clientSecret`, `set-cookie`.
const SECRET_WORDS: [&str; 21] = [
    "auth",
    "authorization",
    "authentication",
    "bearer",
    "cookie",
    "credential",
    "credentials",
    "jwt",
    "otp",
    "passwd",
    "password",
    "passphrase",
    "pwd",
    "sas",
    "secret",
    "session",
    "sessionid",
    "sig",
    "signature",
    "token",
    "apikey",
];

/// Words that make `key` a credential's: `api-key`, `x-goog-api-key`, `subscription_key`.
const KEY_WORDS: [&str; 8] = [
    "access",
    "account",
    "api",
    "auth",
    "private",
    "secret",
    "shared",
    "subscription",
];

/// Whether a header, query parameter or JSON field of this name holds a credential.
pub(crate) fn is_secret(name: &str) -> bool {
    let words = words(name);
    // About tokens, and none: `token_count`, `token_type`, `x-token-limit`.
    if words
        .last()
        .is_some_and(|last| ["count", "limit", "type", "usage"].contains(&last.as_str()))
    {
        return false;
    }
    words.iter().any(|word| SECRET_WORDS.contains(&word.as_str()))
        || (words.iter().any(|word| word == "key") && words.iter().any(|word| KEY_WORDS.iter().any(|end| word.ends_with(end))))
        // Written without any border: `accesstoken`, `myapikey`, `awsaccesskeyid`.
        || words.iter().any(|word| {
            ["token", "secret", "password", "apikey", "accesskey", "accesskeyid"].iter().any(|end| word.ends_with(end))
        })
}

/// The same for query parameters, where a plain `key` or `code` is one, too.
fn is_secret_parameter(name: &str) -> bool {
    let name = percent_decoded(name);
    is_secret(&name) || name.eq_ignore_ascii_case("key") || name.eq_ignore_ascii_case("code")
}

/// Lower-case words: borders are anything that is no letter or digit, and `camelCase`.
fn words(name: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut after_lower = false;
    for letter in name.chars() {
        if !letter.is_alphanumeric() || (letter.is_uppercase() && after_lower) {
            words.push(String::new());
        }
        after_lower = letter.is_lowercase() || letter.is_numeric();
        if letter.is_alphanumeric() {
            words.last_mut().expect("never empty").extend(letter.to_lowercase());
        }
    }
    words
}

/// A copy without secrets: those of secret name, those marked as sensitive, and those in `also`.
pub(crate) fn headers(headers: &HeaderMap, also: &[HeaderName]) -> HeaderMap {
    if headers.is_empty() {
        return HeaderMap::new();
    }
    let hidden = || {
        let mut value = HeaderValue::from_static(REDACTED);
        value.set_sensitive(true);
        value
    };
    headers
        .iter()
        .map(|(name, value)| {
            let secret = value.is_sensitive() || also.contains(name) || is_secret(name.as_str());
            // A `Location` or `Referer` is a URL, with all that can be in one.
            let value = match value.to_str() {
                _ if secret => hidden(),
                Ok(text) => match self::text(text) {
                    Cow::Borrowed(_) => value.clone(),
                    Cow::Owned(clean) => HeaderValue::from_str(&clean).unwrap_or_else(|_| hidden()),
                },
                Err(_) => value.clone(),
            };
            (name.clone(), value)
        })
        .collect()
}

/// The URL without user info and without the values of secret query parameters.
pub(crate) fn uri(uri: &Uri) -> String {
    use std::fmt::Write;
    let mut url = String::with_capacity(64);
    if let Some(scheme) = uri.scheme_str() {
        let _ = write!(url, "{scheme}://");
    }
    if let Some(authority) = uri.authority() {
        url.push_str(without_user_info(authority.as_str()));
    }
    url.push_str(uri.path());
    if let Some(query) = uri.query() {
        url.push('?');
        url.push_str(&self::query(query));
    }
    url
}

/// A text in which every URL, and every bearer credential, is redacted.
pub(crate) fn text(text: &str) -> Cow<'_, str> {
    if !text.contains("://") && !text.contains('?') && !has_scheme_word(text) {
        return Cow::Borrowed(text);
    }
    let mut clean = String::with_capacity(text.len());
    let mut after_scheme_word = false;
    for piece in text.split_inclusive(|letter: char| letter.is_whitespace() || "\"'<>`()[]{},".contains(letter)) {
        let word = piece.trim_end_matches(|letter: char| letter.is_whitespace() || "\"'<>`()[]{},".contains(letter));
        let border = &piece[word.len()..];
        if after_scheme_word && !word.is_empty() {
            clean.push_str(REDACTED);
            after_scheme_word = false;
        } else {
            after_scheme_word |= is_scheme_word(word);
            clean.push_str(&url(word));
        }
        clean.push_str(border);
    }
    if clean == text {
        Cow::Borrowed(text)
    } else {
        Cow::Owned(clean)
    }
}

/// `Bearer` and `Basic`: the credential is the next word.
fn is_scheme_word(word: &str) -> bool {
    let word = word.trim_end_matches(':');
    word.eq_ignore_ascii_case("bearer") || word.eq_ignore_ascii_case("basic")
}

fn has_scheme_word(text: &str) -> bool {
    text.split(|letter: char| !letter.is_ascii_alphanumeric())
        .any(is_scheme_word)
}

/// A word that may be a URL, or a relative one with a query.
fn url(word: &str) -> Cow<'_, str> {
    let (start, rest) = match word.find("://") {
        Some(at) => word.split_at(at + 3),
        None => ("", word),
    };
    let (before_query, after) = match rest.find('?') {
        Some(at) => (&rest[..at], Some(&rest[at + 1..])),
        None => (rest, None),
    };
    let before_query = if start.is_empty() {
        before_query
    } else {
        // User info ends at the last `@` before the path.
        let path = before_query.find('/').unwrap_or(before_query.len());
        match before_query[..path].rfind('@') {
            Some(at) => &before_query[at + 1..],
            None => before_query,
        }
    };
    match after {
        Some(after) => {
            let (parameters, fragment) = after
                .split_once('#')
                .map_or((after, None), |(query, rest)| (query, Some(rest)));
            let fragment = fragment
                .map(|fragment| format!("#{}", query(fragment)))
                .unwrap_or_default();
            Cow::Owned(format!("{start}{before_query}?{}{fragment}", query(parameters)))
        }
        None if start.len() + before_query.len() < word.len() => Cow::Owned(format!("{start}{before_query}")),
        None => Cow::Borrowed(word),
    }
}

fn query(query: &str) -> Cow<'_, str> {
    let is_hidden = |pair: &str| pair.split_once('=').is_some_and(|(name, _)| is_secret_parameter(name));
    if !query.split(['&', ';']).any(is_hidden) {
        return Cow::Borrowed(query);
    }
    let mut clean = String::with_capacity(query.len());
    for piece in query.split_inclusive(['&', ';']) {
        let pair = piece.trim_end_matches(['&', ';']);
        match pair.split_once('=') {
            Some((name, _)) if is_hidden(pair) => {
                clean.push_str(name);
                clean.push('=');
                clean.push_str(REDACTED);
            }
            _ => clean.push_str(pair),
        }
        clean.push_str(&piece[pair.len()..]);
    }
    Cow::Owned(clean)
}

fn without_user_info(authority: &str) -> &str {
    authority.rsplit_once('@').map_or(authority, |(_, host)| host)
}

/// Only for names: `api%5Fkey` is `api_key`.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_tells_a_credential() {
        for name in [
            "authorization",
            "Proxy-Authorization",
            "x-api-key",
            "api-key",
            "apikey",
            "apiKey",
            "x-goog-api-key",
            "ocp-apim-subscription-key",
            "cookie",
            "set-cookie",
            "access_token",
            "accessToken",
            "X-Amz-Signature",
            "X-Amz-Credential",
            "x-amz-security-token",
            "AWSAccessKeyId",
            "client_secret",
            "sig",
            "password",
            "x-auth",
            "mytoken",
        ] {
            assert!(is_secret(name), "{name}");
        }
        for name in [
            "content-type",
            "x-ratelimit-remaining-tokens",
            "anthropic-ratelimit-tokens-limit",
            "x-ratelimit-tokens-query-cost",
            "max_tokens",
            "idempotency-key",
            "cache-key",
            "author",
            "x-request-id",
            "monkey",
            "token_count",
            "promptTokenCount",
            "token_type",
        ] {
            assert!(!is_secret(name), "{name}");
        }
    }

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
            assert_eq!(uri(&url.parse().unwrap()), clean);
            assert_eq!(text(url), clean);
        }
    }

    #[test]
    fn a_text_loses_the_secrets_of_its_urls_and_its_bearers() {
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
    fn a_header_loses_its_value_by_name_by_mark_and_on_request() {
        let mut map = HeaderMap::new();
        map.insert("authorization", HeaderValue::from_static("Bearer s3"));
        map.insert("x-mine", HeaderValue::from_static("s3"));
        map.insert("location", HeaderValue::from_static("https://u:p@h/?sig=s3"));
        map.insert("accept", HeaderValue::from_static("*/*"));
        map.append("x-odd", HeaderValue::from_bytes(b"\xff").unwrap());
        let mut marked = HeaderValue::from_static("s3");
        marked.set_sensitive(true);
        map.insert("x-marked", marked);
        let clean = headers(&map, &[HeaderName::from_static("x-mine")]);
        for name in ["authorization", "x-mine", "x-marked"] {
            assert_eq!(clean[name], REDACTED, "{name}");
        }
        assert_eq!(clean["location"], "https://h/?sig=[redacted]");
        assert_eq!(clean["accept"], "*/*");
        assert_eq!(clean["x-odd"].as_bytes(), b"\xff");
        assert!(!format!("{clean:?}").contains("s3"));
    }
}
