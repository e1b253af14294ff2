//! Decides which names of headers, query parameters and fields mean a credential.

/// Words that mean a credential. A name that contains one of these words is secret: `x-auth-token`, `clientSecret`,
/// `set-cookie`.
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

/// Words that make a name with the word `key` harmless: `idempotency-key`, `sort_key`. Without such a word, a name of
/// several words with `key` among them is secret: `api-key`, `x-functions-key`.
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

/// Endings that make a name secret. They are for names whose words are written together: `accesstoken`, `myapikey`,
/// `PHPSESSID`.
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

/// Words that make a name harmless if they are its last word: such a name describes tokens and does not hold one, as in
/// `token_count`, `token_type`, `x-token-limit`.
const HARMLESS_ENDS: [&str; 4] = ["count", "limit", "type", "usage"];

/// Whether a header, a query parameter or a JSON field with the name `name` holds a credential.
pub(crate) fn is_secret(name: &str) -> bool {
    let words = words(name);
    if words.last().is_some_and(|last| HARMLESS_ENDS.contains(&last.as_str())) {
        return false;
    }
    // The name is also checked in lower case, because its capitals may not be the beginnings of words: `ToKeN` would
    // otherwise be read as `to`, `ke`, `n`.
    has_secret_word(&words) || has_secret_word(&self::words(&name.to_lowercase()))
}

fn has_secret_word(words: &[String]) -> bool {
    let words = || {
        words
            .iter()
            .map(|word| word.trim_end_matches(|end: char| end.is_ascii_digit()))
    };
    let is_harmless_key = || words().any(|word| HARMLESS_KEYS.contains(&word));
    words().any(|word| {
        // The plural of a secret word is secret as well, except for `tokens`: these are what an API counts, as in
        // `max_tokens`.
        let singular = word.strip_suffix('s').filter(|_| word != "tokens").unwrap_or(word);
        SECRET_WORDS.contains(&word)
            || SECRET_WORDS.contains(&singular)
            || SECRET_ENDS.iter().any(|end| word.ends_with(end))
            || (singular == "key" && words().len() > 1 && !is_harmless_key())
    })
}

/// Splits a name into its words, in lower case. A word ends at a character that is neither letter nor digit, and before
/// a capital that follows a lower-case letter or a digit, as in `camelCase`.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_secret_if_one_of_its_words_means_a_credential() {
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
}
