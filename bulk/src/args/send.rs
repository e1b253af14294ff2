//! The options of requests: where they are sent, with which headers, and how failures are met.

use anyhow::{Context, bail, ensure};
use http::{HeaderMap, HeaderName, HeaderValue, Uri};
use std::time::Duration;
use tower_outbound::provider::{ParseProviderError, Provider};

#[derive(clap::Args)]
#[command(next_help_heading = "Requests")]
pub(crate) struct SendArgs {
    /// The provider of the API. Decides how the key is sent, and how limits, errors and usage are read from responses:
    /// openai, azure-openai, anthropic, gemini, groq, mistral, cerebras, github or ietf (any API with the IETF's
    /// `RateLimit` headers)
    #[arg(long, value_name = "NAME", default_value_t = Provider::OpenAi, value_parser = parse_provider)]
    pub(crate) provider: Provider,

    /// The URL to POST the requests to [default: the local provider]
    #[arg(long, value_name = "URL")]
    pub(super) url: Option<String>,

    /// Retries per request, at most, after a temporary failure: no connection, 408, 409, 429, 5xx
    #[arg(long, value_name = "N", default_value = "8")]
    pub(crate) retries: u32,

    /// A header to send with each request, e.g. "x-team: search". May be repeated. For API keys use --api-key-env
    #[arg(long = "header", value_name = "NAME: VALUE")]
    pub(super) headers: Vec<String>,

    /// Environment variable that holds the API key. The key is sent in the header that the provider expects, and never
    /// shown
    #[arg(long, value_name = "VAR")]
    pub(super) api_key_env: Option<String>,

    /// Seconds until an attempt fails, from its start to the last byte of the response
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = seconds)]
    pub(crate) timeout: Duration,
}

/// The URL that requests are sent to, and the headers that are sent with each request.
pub(crate) struct Target {
    /// The URL that requests are sent to; `None` for the local provider.
    pub(crate) url: Option<Uri>,
    pub(crate) headers: HeaderMap,
}

impl SendArgs {
    /// Returns whether the run sends to the local provider.
    pub(crate) const fn is_local(&self) -> bool {
        self.url.is_none()
    }

    /// Parses the URL and the headers.
    ///
    /// This is done after the argument parser has run, because the parser's errors repeat the argument, and a header or
    /// a URL may hold a key.
    pub(crate) fn target(&self) -> anyhow::Result<Target> {
        Ok(Target {
            url: self.url.as_deref().map(endpoint).transpose()?,
            headers: self.headers()?,
        })
    }

    fn headers(&self) -> anyhow::Result<HeaderMap> {
        let mut headers = HeaderMap::new();
        for (index, text) in self.headers.iter().enumerate() {
            let (name, value) =
                header(text).with_context(|| format!("--header number {} of the command line", index + 1))?;
            headers.append(name, value);
        }
        if let Some(variable) = &self.api_key_env {
            let key = std::env::var(variable).ok().filter(|key| !key.trim().is_empty());
            let key = key.with_context(|| format!("--api-key-env: the variable {variable} is not set, or empty"))?;
            let (name, value) = match self.provider {
                Provider::Anthropic => ("x-api-key", sensitive(key.trim())),
                Provider::AzureOpenAi => ("api-key", sensitive(key.trim())),
                Provider::Gemini => ("x-goog-api-key", sensitive(key.trim())),
                _ => ("authorization", sensitive(&format!("Bearer {}", key.trim()))),
            };
            let value = value.with_context(|| format!("--api-key-env: the variable {variable}"))?;
            headers.insert(HeaderName::from_static(name), value);
        }
        if self.provider == Provider::Anthropic {
            // Anthropic rejects every request without this header.
            let version = HeaderValue::from_static("2023-06-01");
            headers.entry("anthropic-version").or_insert(version);
        }
        Ok(headers)
    }
}

impl Target {
    /// Resolves the URL of a line. `None` is the URL of the command line, or the local provider.
    ///
    /// # Errors
    ///
    /// Why the URL cannot be used.
    pub(crate) fn resolve(&self, line_url: Option<&str>) -> Result<Option<Uri>, String> {
        let (Some(url), Some(line_url)) = (&self.url, line_url) else {
            return Ok(None);
        };
        let line_url: Uri = line_url.parse().map_err(|_| "`url` is not a valid URL")?;
        let Some(path) = line_url.path_and_query().cloned() else {
            return Err("`url` has no path".into());
        };
        if line_url.host().is_some_and(|host| Some(host) != url.host()) {
            return Err("`url` has another host than --url".into());
        }
        let mut parts = url.clone().into_parts();
        parts.path_and_query = Some(path);
        Uri::from_parts(parts).map(Some).map_err(|error| error.to_string())
    }
}

fn endpoint(url: &str) -> anyhow::Result<Uri> {
    let uri: Uri = url.parse().context("--url is not a valid URL")?;
    ensure!(
        matches!(uri.scheme_str(), Some("http" | "https")),
        "--url must begin with http:// or https://"
    );
    ensure!(uri.host().is_some_and(|host| !host.is_empty()), "--url names no host");
    Ok(uri)
}

fn header(text: &str) -> anyhow::Result<(HeaderName, HeaderValue)> {
    let Some((name, value)) = text.split_once(':') else {
        bail!("must have the form \"Name: value\", but has no colon")
    };
    let name = HeaderName::from_bytes(name.trim().as_bytes()).context("must have the form \"Name: value\"")?;
    let value = sensitive(value.trim()).with_context(|| format!("{name} has a value that cannot be sent"))?;
    Ok((name, value))
}

/// Makes a header value that is marked as sensitive, so that its `Debug` output and logs do not show it.
fn sensitive(value: &str) -> anyhow::Result<HeaderValue> {
    let mut value = HeaderValue::from_str(value)?;
    value.set_sensitive(true);
    Ok(value)
}

fn parse_provider(name: &str) -> Result<Provider, String> {
    name.parse().map_err(|error: ParseProviderError| error.to_string())
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "must be a number of seconds")?;
    let timeout = Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())?;
    if timeout.is_zero() {
        Err("must be above zero".into())
    } else {
        Ok(timeout)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_a_name_and_a_value() {
        let (name, value) = header("X-Team:  search: fast ").unwrap();
        assert_eq!((name.as_str(), value.to_str().unwrap()), ("x-team", "search: fast"));
        assert!(value.is_sensitive());
    }

    #[test]
    fn the_error_for_a_bad_header_does_not_show_its_value() {
        for bad in [
            "x-api-key secret",
            "x api key: secret",
            "x-api-key: sec\nret",
            ": secret",
        ] {
            let error = format!("{:#}", header(bad).unwrap_err());
            assert!(!error.contains("sec"), "{error}");
        }
    }

    #[test]
    fn a_url_has_a_scheme_and_a_host() {
        assert!(endpoint("https://api.example.com/v1/chat/completions").is_ok());
        for bad in [
            "api.example.com/v1",
            "ftp://api.example.com",
            "/v1/chat",
            "http://",
            "http://a b/",
        ] {
            assert!(endpoint(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_timeout_is_above_zero() {
        assert_eq!(seconds("2.5"), Ok(Duration::from_millis(2_500)));
        for bad in ["0", "-1", "NaN", "soon", "1e30"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }
}
