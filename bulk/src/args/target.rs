//! Where requests are sent: the URLs of the command line, and how the URL of a line is combined with them.

use anyhow::{Context, bail, ensure};
use base64::{Engine, prelude::BASE64_STANDARD};
use http::{HeaderMap, HeaderName, HeaderValue, Uri, header, uri::Scheme};

/// The URLs that requests are sent to, and the headers that are sent with each request.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    /// The URL of `--url`, or of the local provider: requests whose line names no URL are sent there.
    pub(crate) url: Option<Uri>,
    /// The URL of `--base-url`, to which relative URLs of lines are joined.
    pub(crate) base: Option<Uri>,
    /// The headers of the command line, and the key. Secret values are marked as sensitive.
    pub(crate) headers: HeaderMap,
    /// What is to be said about the key, such as the variable that it comes from.
    pub(crate) note: Option<String>,
    /// The environment variable that holds the key, if the key comes from one.
    pub(crate) key_variable: Option<String>,
    /// Whether lines may name any host.
    pub(super) any_host: bool,
    /// Whether requests are sent to the local provider.
    pub(super) is_local: bool,
}

/// The headers that a client sets itself, or that are about one connection: a request that sets them is not sent as it
/// says, or breaks the connection.
const REFUSED: [HeaderName; 9] = [
    header::CONNECTION,
    header::CONTENT_LENGTH,
    header::HOST,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    HeaderName::from_static("keep-alive"),
];

/// Checks that a header may be set by the user.
///
/// # Errors
///
/// Names the header if the client has to set it, or if it is about one connection.
pub(crate) fn check_header(name: &HeaderName) -> Result<(), String> {
    if REFUSED.contains(name) {
        Err(format!(
            "the header `{name}` cannot be set: the client sets it as needed"
        ))
    } else {
        Ok(())
    }
}

impl Target {
    pub(crate) const fn is_local(&self) -> bool {
        self.is_local
    }

    /// Returns this target with the URL of the local provider, once that is known.
    pub(crate) fn at_local(&self, url: Uri) -> Self {
        Self {
            url: Some(url),
            ..self.clone()
        }
    }

    /// Returns whether a header holds a key, in one of the names that providers use.
    pub(crate) fn has_key(&self) -> bool {
        ["authorization", "x-api-key", "api-key", "x-goog-api-key"]
            .iter()
            .any(|name| self.headers.contains_key(*name))
    }

    /// The host that requests are sent to, for messages.
    pub(crate) fn host(&self) -> &str {
        let url = self.url.as_ref().or(self.base.as_ref());
        url.and_then(Uri::host).unwrap_or("the server")
    }

    /// Returns whether every request is sent without TLS, so that no certificates are needed.
    pub(crate) fn is_plain_http(&self) -> bool {
        !self.any_host && self.origins().all(|url| url.scheme() == Some(&Scheme::HTTP))
    }

    /// The URL that a result is of if its line names none; `None` is the local provider.
    pub(crate) fn default_url(&self) -> Option<Uri> {
        self.url
            .clone()
            .or_else(|| self.base.clone())
            .filter(|_| !self.is_local)
    }

    /// Returns the URL to send a request to, for what [`resolve`](Self::resolve) has returned for its line.
    pub(crate) fn url_of(&self, resolved: Option<&Uri>) -> Uri {
        let own = self.url.as_ref();
        match resolved {
            // The local provider was not known when the line was read.
            Some(url) if url.host().is_none() => own.and_then(|own| with_path(own, "", url).ok()),
            Some(url) => Some(url.clone()),
            None => own.cloned(),
        }
        .unwrap_or_default()
    }

    /// Returns the URL for a request whose line names `line_url`: an absolute one, `None` for that of `--url`, or a path
    /// of the local provider.
    ///
    /// A relative URL is joined to `--base-url`, without doubling a path that both have, such as `/v1`. Without
    /// `--base-url` it is joined to the origin of `--url`, if `--url` has no path or only that of a version, and it may
    /// be the end of `--url` itself.
    ///
    /// # Errors
    ///
    /// The reason why the line is malformed: its URL is not valid, or is of another origin than those of the command
    /// line, to which their keys must not be sent; or it cannot be joined.
    pub(crate) fn resolve(&self, line_url: Option<&str>) -> Result<Option<Uri>, String> {
        let Some(text) = line_url else {
            if self.url.is_none() && !self.is_local {
                return Err("names no URL, and neither does --url".into());
            }
            return Ok(None);
        };
        // A scheme and an authority in the manner of a browser, `//host/path`, would look like a path.
        if text.starts_with("//") || text.contains('\\') {
            return Err("the URL must begin with https://, http:// or a single slash".into());
        }
        if text.contains("://") {
            return self.absolute(text).map(Some);
        }
        let path: Uri = format!("/{}", text.trim_start_matches('/'))
            .parse()
            .map_err(|error| format!("the URL is not valid: {error}"))?;
        if self.is_local {
            return Ok(Some(path));
        }
        if let Some(base) = &self.base {
            return with_path(base, base.path(), &path).map(Some);
        }
        let Some(url) = &self.url else {
            return Err(format!("the URL {} is relative: --base-url says to what", shown(&path)));
        };
        if url
            .path()
            .trim_end_matches('/')
            .ends_with(path.path().trim_end_matches('/'))
            && (path.query().is_none() || path.query() == url.query())
        {
            return Ok(None);
        }
        if is_version_only(url.path()) {
            return with_path(url, url.path(), &path).map(Some);
        }
        Err(format!(
            "the URL {} is relative, and --url names another path: give --base-url instead of --url",
            shown(&path)
        ))
    }

    fn absolute(&self, text: &str) -> Result<Uri, String> {
        let url: Uri = text.parse().map_err(|error| format!("the URL is not valid: {error}"))?;
        if !matches!(url.scheme_str(), Some("http" | "https")) {
            return Err("the URL must begin with http:// or https://".into());
        }
        if url
            .authority()
            .is_some_and(|authority| authority.as_str().contains('@'))
        {
            return Err("the URL holds a user or a password: send them as a header".into());
        }
        if self.is_local {
            // A demonstration sends nothing to a real host.
            let path = url.path_and_query().map_or("/", |path| path.as_str());
            return path.parse().map_err(|error| format!("the URL is not valid: {error}"));
        }
        if self.any_host || self.origins().any(|origin| is_same_origin(origin, &url)) {
            Ok(url)
        } else {
            let host = url.host().unwrap_or_default();
            Err(format!(
                "the URL is of another server ({host}) than the command line names: --any-host sends it there, with the \
                 headers and the key of the command line"
            ))
        }
    }

    fn origins(&self) -> impl Iterator<Item = &Uri> {
        self.url.iter().chain(&self.base)
    }
}

/// Parses an absolute URL, and takes a user and a password out of it. Returns the URL, and the header that holds the
/// user and the password.
pub(super) fn endpoint(option: &str, url: &str) -> anyhow::Result<(Uri, Option<HeaderValue>)> {
    let uri: Uri = url.parse().with_context(|| format!("{option} is not a valid URL"))?;
    ensure!(
        matches!(uri.scheme_str(), Some("http" | "https")),
        "{option} must begin with http:// or https://"
    );
    ensure!(
        uri.host().is_some_and(|host| !host.is_empty()),
        "{option} names no host"
    );
    let authority = uri.authority().context("the URL names no host")?.as_str();
    let Some((user, host)) = authority.rsplit_once('@') else {
        return Ok((uri, None));
    };
    let colon = if user.contains(':') { "" } else { ":" };
    let user = [decoded(user), colon.into()].concat();
    let mut basic = HeaderValue::try_from(format!("Basic {}", BASE64_STANDARD.encode(user)))?;
    basic.set_sensitive(true);
    let mut parts = uri.clone().into_parts();
    parts.authority = Some(host.parse().with_context(|| format!("{option} is not a valid URL"))?);
    Ok((Uri::from_parts(parts)?, Some(basic)))
}

/// Adds the user and the password of a URL to the headers.
pub(super) fn add_basic(headers: &mut HeaderMap, basic: Option<HeaderValue>) -> anyhow::Result<()> {
    let Some(basic) = basic else { return Ok(()) };
    match headers.get(header::AUTHORIZATION) {
        Some(other) if *other != basic => {
            bail!(
                "the URL holds a user and a password, and a header or a key is another `authorization`: give one of them"
            )
        }
        _ => headers.insert(header::AUTHORIZATION, basic),
    };
    Ok(())
}

/// Decodes `%40` and the like. A percent sign without two digits stays as it is.
fn decoded(text: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let hex = tail.get(..2).and_then(|hex| std::str::from_utf8(hex).ok());
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
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
    bytes
}

/// Returns the URL with the origin of `base`, whose path is `base_path` followed by that of `path`. Segments with which
/// the one ends and the other begins are not doubled. The queries of both are kept.
fn with_path(base: &Uri, base_path: &str, path: &Uri) -> Result<Uri, String> {
    let before: Vec<_> = base_path.split('/').filter(|segment| !segment.is_empty()).collect();
    let after: Vec<_> = path.path().trim_start_matches('/').split('/').collect();
    let common = (1..=before.len().min(after.len()))
        .rev()
        .find(|&count| before[before.len() - count..] == after[..count])
        .unwrap_or(0);
    let mut joined = String::new();
    for segment in before.iter().chain(&after[common..]) {
        joined.push('/');
        joined.push_str(segment);
    }
    let base_query = if base_path.is_empty() { None } else { base.query() };
    let query: Vec<_> = base_query.into_iter().chain(path.query()).collect();
    if !query.is_empty() {
        joined.push('?');
        joined.push_str(&query.join("&"));
    }
    let mut parts = base.clone().into_parts();
    parts.path_and_query = Some(
        joined
            .parse()
            .map_err(|error| format!("the URL is not valid: {error}"))?,
    );
    Uri::from_parts(parts).map_err(|error| format!("the URL is not valid: {error}"))
}

/// Returns whether a path is empty or that of a version alone: `/v1`, `/v1beta/`.
fn is_version_only(path: &str) -> bool {
    let segment = path.trim_matches('/');
    segment.is_empty()
        || (!segment.contains('/')
            && segment.starts_with('v')
            && segment[1..].starts_with(|c: char| c.is_ascii_digit()))
}

fn is_same_origin(one: &Uri, other: &Uri) -> bool {
    let host = |url: &Uri| url.host().map(str::to_ascii_lowercase);
    one.scheme() == other.scheme() && host(one) == host(other) && port(one) == port(other)
}

fn port(url: &Uri) -> u16 {
    let default = if url.scheme() == Some(&Scheme::HTTPS) { 443 } else { 80 };
    url.port_u16().unwrap_or(default)
}

/// The path of a URL of a line, for messages: its query may hold a key.
fn shown(url: &Uri) -> &str {
    url.path()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(url: Option<&str>, base: Option<&str>) -> Target {
        let parse = |text: Option<&str>| text.map(|text| text.parse().unwrap());
        Target {
            url: parse(url),
            base: parse(base),
            headers: HeaderMap::new(),
            note: None,
            key_variable: None,
            any_host: false,
            is_local: false,
        }
    }

    fn resolved(target: &Target, line: &str) -> Result<String, String> {
        Ok(target
            .resolve(Some(line))?
            .map_or("--url".into(), |url| url.to_string()))
    }

    #[test]
    fn a_relative_url_is_joined_to_the_base_without_doubling_the_version() {
        for (base, line, joined) in [
            ("https://api.x.com", "/v1/chat", "https://api.x.com/v1/chat"),
            ("https://api.x.com/", "/v1/chat", "https://api.x.com/v1/chat"),
            ("https://api.x.com/v1", "/v1/chat", "https://api.x.com/v1/chat"),
            ("https://api.x.com/v1/", "chat", "https://api.x.com/v1/chat"),
            (
                "https://x.com/openai/v1",
                "/v1/embeddings",
                "https://x.com/openai/v1/embeddings",
            ),
            ("https://x.com/openai/v1", "/openai/v1/a", "https://x.com/openai/v1/a"),
            (
                "https://x.com/o?api-version=2",
                "/chat?page=2",
                "https://x.com/o/chat?api-version=2&page=2",
            ),
            ("http://127.0.0.1:81", "/ok?page=2", "http://127.0.0.1:81/ok?page=2"),
        ] {
            assert_eq!(
                resolved(&target(None, Some(base)), line),
                Ok(joined.into()),
                "{base} {line}"
            );
        }
    }

    #[test]
    fn a_relative_url_fits_to_a_url_that_ends_with_it_or_has_no_path_of_its_own() {
        let chat = target(Some("https://x.com/v1/chat/completions"), None);
        assert_eq!(resolved(&chat, "/v1/chat/completions"), Ok("--url".into()));
        assert!(resolved(&chat, "/v1/embeddings").unwrap_err().contains("--base-url"));
        for url in ["https://x.com", "https://x.com/", "https://x.com/v1"] {
            let embeddings = Ok("https://x.com/v1/embeddings".into());
            assert_eq!(
                resolved(&target(Some(url), None), "/v1/embeddings"),
                embeddings,
                "{url}"
            );
        }
        assert_eq!(target(Some("https://x.com/v1"), None).resolve(None), Ok(None));
        assert!(target(None, Some("https://x.com/v1")).resolve(None).is_err());
    }

    #[test]
    fn a_line_cannot_send_the_key_to_another_server() {
        let mut target = target(Some("https://api.x.com/v1/chat"), None);
        for other in [
            "https://evil.com/v1",
            "http://api.x.com/v1",
            "https://api.x.com:8443/v1",
            "https://api.x.com@evil.com/v1",
            "https://api.x.com.evil.com/v1",
            "//evil.com/v1",
            "\\\\evil.com/v1",
            "ftp://api.x.com/",
        ] {
            assert!(resolved(&target, other).is_err(), "{other}");
        }
        let same = "https://API.x.com:443/v1/files";
        assert_eq!(
            resolved(&target, same).unwrap().to_ascii_lowercase(),
            same.to_ascii_lowercase()
        );
        target.any_host = true;
        assert!(resolved(&target, "https://other.com/v1").is_ok());
    }

    #[test]
    fn a_demonstration_sends_nothing_to_a_real_host() {
        let mut target = target(None, None);
        target.is_local = true;
        let target = target.at_local("http://127.0.0.1:81/v1/chat/completions".parse().unwrap());
        for line in ["https://api.x.com/v1/embeddings", "/v1/embeddings"] {
            let path = target.resolve(Some(line)).unwrap();
            assert_eq!(path.as_ref().and_then(Uri::host), None);
            assert_eq!(target.url_of(path.as_ref()), "http://127.0.0.1:81/v1/embeddings");
        }
    }

    #[test]
    fn a_user_in_a_url_becomes_a_sensitive_header() {
        let (url, basic) = endpoint("--url", "https://us%40er:p:w@x.com:81/v1").unwrap();
        assert_eq!(url, "https://x.com:81/v1");
        let basic = basic.unwrap();
        assert!(basic.is_sensitive());
        assert_eq!(basic, format!("Basic {}", BASE64_STANDARD.encode("us@er:p:w")));
        let (_, user_alone) = endpoint("--url", "https://user@x.com").unwrap();
        assert_eq!(
            user_alone.unwrap(),
            format!("Basic {}", BASE64_STANDARD.encode("user:"))
        );
    }

    #[test]
    fn a_url_has_a_scheme_and_a_host() {
        assert!(endpoint("--url", "https://api.example.com/v1/chat/completions").is_ok());
        for bad in [
            "api.example.com/v1",
            "ftp://api.example.com",
            "/v1/chat",
            "http://",
            "http://a b/",
        ] {
            assert!(endpoint("--url", bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn headers_of_the_connection_are_refused_by_name() {
        assert!(check_header(&HeaderName::from_static("x-team")).is_ok());
        for name in [
            "host",
            "content-length",
            "transfer-encoding",
            "connection",
            "keep-alive",
        ] {
            assert!(check_header(&HeaderName::from_static(name)).unwrap_err().contains(name));
        }
    }
}
