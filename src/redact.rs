//! What must not be seen: secrets in headers, URLs, texts and bodies.
//!
//! Redaction happens when something is recorded, so that no later reader, serializer or `Debug` can show what was never
//! kept. Names decide: a header or a query parameter whose name says that it is a credential loses its value.

use http::{HeaderMap, HeaderName, HeaderValue, Uri};
use std::{borrow::Cow, ops::Range};

/// Stands where a secret was.
pub(crate) const REDACTED: &str = "[redacted]";

/// Words that make a name a credential's wherever they stand in it: `x-auth-token`, `clientSecret`, `set-cookie`.
const SECRET_WORDS: [&str; 25] = [
    "auth",
    "authorization",
    "authentication",
    "bearer",
    "cookie",
    "credential",
    "credentials",
    "jwt",
    "hmac",
    "oauth",
    "otp",
    "pass",
    "passcode",
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

/// Keys that open nothing: `idempotency-key`, `sort_key`. Any other `…-key` is a credential: `api-key`,
/// `x-functions-key`.
const HARMLESS_KEYS: [&str; 13] = [
    "cache",
    "foreign",
    "idempotency",
    "index",
    "message",
    "object",
    "partition",
    "primary",
    "public",
    "routing",
    "sort",
    "surrogate",
    "websocket",
];

/// What a name ends with that is written without any border: `accesstoken`, `myapikey`, `PHPSESSID`.
const SECRET_ENDS: [&str; 13] = [
    "accesskey",
    "accesskeyid",
    "apikey",
    "authkey",
    "passphrase",
    "passwd",
    "password",
    "privatekey",
    "secret",
    "secretkey",
    "sessid",
    "sessionid",
    "token",
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
    // Capitals may stand anywhere, and so be no borders: `ToKeN`.
    are_secret(&words) || are_secret(&self::words(&name.to_lowercase()))
}

fn are_secret(words: &[String]) -> bool {
    let words = || {
        words
            .iter()
            .map(|word| word.trim_end_matches(|end: char| end.is_ascii_digit()))
    };
    let is_harmless = || words().any(|word| HARMLESS_KEYS.contains(&word));
    words().any(|word| {
        // Many of them are one, too; but `tokens` are the API's.
        let one = word.strip_suffix('s').filter(|_| word != "tokens").unwrap_or(word);
        SECRET_WORDS.contains(&word)
            || SECRET_WORDS.contains(&one)
            || SECRET_ENDS.iter().any(|end| word.ends_with(end))
            || (one == "key" && words().len() > 1 && !is_harmless())
    })
}

/// The same for query parameters, where a plain `key` or `code` is one, too.
fn is_secret_parameter(name: &str) -> bool {
    let Some(name) = decoded(name) else { return true };
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
                Err(_) => match self::text(&String::from_utf8_lossy(value.as_bytes())) {
                    Cow::Borrowed(_) => value.clone(),
                    Cow::Owned(_) => hidden(),
                },
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
    url.push_str(&without_user_infos("", uri.path()));
    if let Some(query) = uri.query() {
        url.push('?');
        url.push_str(&self::query(query));
    }
    url
}

/// A text in which every URL, every credential after `Bearer` or `Basic`, and every quoted field of secret name is
/// redacted.
pub(crate) fn text(text: &str) -> Cow<'_, str> {
    if !text.contains(|letter: char| letter.is_whitespace() || "/?=#\"':".contains(letter)) {
        return Cow::Borrowed(text);
    }
    let fields = fields(text);
    let mut clean = String::with_capacity(text.len());
    let mut after_scheme: Option<Scheme> = None;
    // These end a URL wherever they stand; other signs of punctuation can be part of one.
    let border = |letter: char| letter.is_whitespace() || "\"<>".contains(letter);
    for piece in fields.split_inclusive(border) {
        let word = piece.trim_end_matches(border);
        let (before, core, after) = trimmed(word);
        let scheme = Scheme::of(core);
        match after_scheme.take() {
            Some(waiting) if waiting.precedes(core) => {
                clean.extend([before, REDACTED, after]);
                // `Bearer Bearer …`, by mistake.
                after_scheme = scheme;
            }
            // Two borders one after the other.
            waiting if word.is_empty() => after_scheme = waiting,
            _ => {
                clean.push_str(before);
                clean.push_str(&url(core));
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

/// A word without the brackets and stops around it; but what was redacted before stays whole.
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

/// What the next word is, after `Bearer` or `Basic`: a credential, or just a word.
enum Scheme {
    Bearer,
    Basic,
}

impl Scheme {
    /// Also at the end of a word: `authorization:Bearer`.
    fn of(word: &str) -> Option<Self> {
        let word = word.rsplit(|letter: char| !letter.is_alphanumeric()).next()?;
        if word.eq_ignore_ascii_case("bearer") {
            Some(Self::Bearer)
        } else if word.eq_ignore_ascii_case("basic") {
            Some(Self::Basic)
        } else {
            None
        }
    }

    /// Whether this word is the credential. After `basic` it has to look like one: `dXNlcjpwYXNz`, not `question`.
    fn precedes(&self, word: &str) -> bool {
        let encoded = |letter: char| letter.is_ascii_uppercase() || letter.is_ascii_digit() || letter == '=';
        match self {
            Self::Bearer => !word.is_empty(),
            Self::Basic => word.len() >= 4 && word.chars().any(encoded),
        }
    }
}

/// What is quoted or in brackets after a secret name: `"api_key": "…"` in JSON, and as Rust, Python or a log line tell
/// it, `api_key: Some("…")`, `'api_key': '…'`, `api_key="…"`; also where the quotes are escaped, in a text in a text.
fn fields(text: &str) -> Cow<'_, str> {
    let mut clean = String::new();
    let mut done = 0;
    for (at, opening) in text.match_indices(['"', '\'', '[', '{']) {
        if at < done {
            continue;
        }
        // The quote that closed one value may open another, if the quotes are not in order.
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

/// Whether a value follows to which a secret name belongs.
fn ends_with_secret_name(text: &str) -> bool {
    // In front of a quote there may be `Some(`, or the `b` of bytes.
    let text = text.trim_end_matches(|letter: char| letter.is_alphanumeric() || "_(".contains(letter));
    let Some(text) = text.trim_end().strip_suffix([':', '=']) else {
        return false;
    };
    let text = text.trim_end();
    let quoted = text.strip_suffix(['"', '\'']).map(|name| name.trim_end_matches('\\'));
    let also = if quoted.is_some() { "-_.[]% " } else { "-_." };
    let name = quoted
        .unwrap_or(text)
        .rsplit(|letter: char| !letter.is_alphanumeric() && !also.contains(letter))
        .next();
    name.is_some_and(is_secret)
}

/// Where the text ends whose quote opens at `at`, and where its closing quote does.
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
        // It was cut off.
        None => (text.len(), text.len()),
    }
}

/// Behind the bracket that closes the one at `at`.
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

/// A word that may be a URL, a relative one with a query, or a form.
fn url(word: &str) -> Cow<'_, str> {
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
        clean.push_str(&query(parameters));
    }
    if let Some(fragment) = fragment {
        clean.push('#');
        clean.push_str(&query(fragment));
    }
    if clean == word {
        Cow::Borrowed(word)
    } else {
        Cow::Owned(clean)
    }
}

fn query(query: &str) -> Cow<'_, str> {
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

/// Whether there is a secret in what stands in a parameter: a URL, a form, a header or JSON, however often encoded.
///
/// It is looked for in one pass and not cleaned: what a server sends may be nested as deep as it likes.
fn holds_secret(value: &str) -> bool {
    let Some(value) = decoded(value) else { return true };
    let ends_name = |letter: char| !letter.is_alphanumeric() && !"-_.[]".contains(letter);
    // What is followed by a `=`.
    let mut before = value.split('=').rev().skip(1);
    let mut scheme = None;
    before.any(|text| text.rsplit(ends_name).next().is_some_and(is_secret_parameter))
        || user_infos(&value).next().is_some()
        || fields(&value) != *value
        || value.split_whitespace().any(|word| {
            let follows = scheme.take().is_some_and(|scheme: Scheme| scheme.precedes(word));
            scheme = Scheme::of(word);
            follows
        })
}

/// After every `//` that begins an authority, the part up to its last `@`.
fn user_infos(text: &str) -> impl Iterator<Item = Range<usize>> {
    let mut done = 0;
    text.match_indices("//").filter_map(move |(at, _)| {
        // In the middle of a path, as in `a//b`, it begins none.
        if at < done || text[..at].ends_with(|letter: char| letter.is_alphanumeric() || letter == '/') {
            return None;
        }
        let start = after_slashes(text, at);
        let mut end = None;
        let mut from = start;
        // Where no host follows, as in `//u:p@/v:q@h`, what is behind the slashes stands in its place.
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

/// A URL's path may have other URLs in it, and one word may hold several.
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

fn without_user_info(authority: &str) -> &str {
    authority.rsplit_once('@').map_or(authority, |(_, host)| host)
}

/// Only for looking: `api%5Fkey` is `api_key`, and so is `api%255Fkey`. `None` if it is encoded more often than anybody
/// does who has nothing to hide.
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
            "dd-application-key",
            "x-functions-key",
            "pass",
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
            "key",
            "sec-websocket-key",
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
    fn no_secret_hides_behind_punctuation_in_fragments_or_in_nested_urls() {
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
            uri(&"http://h/?next=https://u:s3@h/&a=1".parse().unwrap()),
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
