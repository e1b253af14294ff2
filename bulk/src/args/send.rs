//! The options of requests: where they are sent, with which headers, and how failures are met.

use super::{
    key::{self, Key},
    target::{Target, add_basic, check_header, endpoint},
};
use anyhow::{Context, bail};
use http::{HeaderMap, HeaderName, HeaderValue, Uri};
use std::{path::PathBuf, time::Duration};
use tower_outbound::provider::{ParseProviderError, Provider};

#[derive(clap::Args)]
#[command(next_help_heading = "Requests")]
pub(crate) struct SendArgs {
    /// The provider of the API [default: the one whose host the URL names, else openai]
    ///
    /// It decides how the key is sent, and how limits, errors and usage are read from responses: openai, azure-openai,
    /// anthropic, gemini, groq, mistral, cerebras, github or ietf (any API with the IETF's `RateLimit` headers).
    #[arg(long, value_name = "NAME", value_parser = parse_provider)]
    provider: Option<Provider>,

    /// The URL to send requests to [default: the local provider]
    ///
    /// A line that names a path, such as /v1/embeddings, is sent to that path of the same server.
    #[arg(long, value_name = "URL")]
    pub(super) url: Option<String>,

    /// The URL to which relative URLs of lines are joined, e.g. https://api.openai.com/v1
    ///
    /// A path that both have, such as `/v1`, is not doubled.
    #[arg(long, value_name = "URL")]
    pub(super) base_url: Option<String>,

    /// Let lines name URLs of any server
    ///
    /// The headers and the key of the command line are sent to each of them.
    #[arg(long)]
    pub(super) any_host: bool,

    /// A header to send with each request, e.g. "x-team: search"
    ///
    /// May be repeated. A header of a line wins over it. For API keys use --api-key-env.
    #[arg(long = "header", value_name = "NAME: VALUE")]
    pub(super) headers: Vec<String>,

    /// Environment variable that holds the API key [default: the provider's own, e.g. OPENAI_API_KEY]
    ///
    /// The key is sent in the header that the provider expects, and never shown. The provider's own variable is used for
    /// https URLs of the provider's host, and of other hosts if --provider is given.
    #[arg(long, value_name = "VAR")]
    pub(super) api_key_env: Option<String>,

    /// Retries per request, at most, after a temporary failure
    ///
    /// Temporary are: no connection, the status 408, 409, 429 or 5xx, and an answer that is none, such as HTML or a
    /// broken stream.
    #[arg(long, value_name = "N", default_value = "8", help_heading = "Failures")]
    pub(crate) retries: u32,

    /// The longest wait that a provider may ask for, in seconds
    ///
    /// A request that would have to wait longer fails, and the run stops: see --keep-going.
    #[arg(long, value_name = "SECONDS", default_value = "3600", value_parser = seconds, help_heading = "Failures")]
    pub(crate) max_wait: Duration,

    /// Send all requests, even if every one fails
    ///
    /// Without it the run stops early if the key, the quota, the host, its certificate, the model or the path is wrong
    /// for each of the first 5 attempts, or later for 20 in a row. The rest is left for --resume.
    #[arg(long, help_heading = "Failures")]
    pub(crate) keep_going: bool,

    /// Seconds that requests on the wire get to finish after Ctrl-C, SIGTERM or SIGHUP
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = any_seconds, help_heading = "Failures")]
    pub(crate) drain: Duration,

    /// Seconds until an attempt fails, from its start to the last byte of the response
    #[arg(long, value_name = "SECONDS", default_value = "600", value_parser = seconds, help_heading = "Connection")]
    pub(crate) timeout: Duration,

    /// Seconds until an attempt to connect fails
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds, help_heading = "Connection")]
    pub(crate) connect_timeout: Duration,

    /// The longest response body that is accepted, in bytes
    #[arg(long, value_name = "BYTES", default_value = "67108864", help_heading = "Connection")]
    pub(crate) max_response: usize,

    /// File of certificates (PEM) to trust beside those of the system
    ///
    /// They are those of authorities, or that of the server itself.
    #[arg(long, value_name = "FILE", help_heading = "Connection")]
    pub(crate) ca: Option<PathBuf>,

    /// Accept any certificate: any server that answers gets the key
    #[arg(long, help_heading = "Connection")]
    pub(crate) insecure: bool,

    /// Speak HTTP/2 from the first byte, also without TLS
    ///
    /// With TLS, HTTP/2 is used in any case if the server offers it.
    #[arg(long, help_heading = "Connection")]
    pub(crate) http2: bool,

    /// The proxy to send through: http, https, socks5 or socks5h [default: that of the environment]
    ///
    /// The environment names one in HTTP_PROXY, HTTPS_PROXY or ALL_PROXY, and hosts without one in NO_PROXY.
    #[arg(long, value_name = "URL", help_heading = "Connection")]
    pub(crate) proxy: Option<String>,

    /// Connect to this Unix socket instead of the host of the URL
    #[cfg(unix)]
    #[arg(long, value_name = "PATH", conflicts_with = "proxy", help_heading = "Connection")]
    pub(crate) unix_socket: Option<PathBuf>,
}

impl SendArgs {
    /// Returns whether the run sends to the local provider.
    pub(crate) const fn is_local(&self) -> bool {
        self.url.is_none() && self.base_url.is_none() && !self.any_host
    }

    /// The provider that is named, or whose host the URL names; OpenAI, whose headers many copy, for any other host.
    pub(crate) fn provider(&self) -> Provider {
        let url = self.url.as_deref().or(self.base_url.as_deref());
        let of_host = || key::provider_of(url?.parse::<Uri>().ok()?.host()?);
        self.provider.or_else(of_host).unwrap_or(Provider::OpenAi)
    }

    /// Parses the URLs and the headers.
    ///
    /// This is done after the argument parser has run, because the parser's errors repeat the argument, and a header or
    /// a URL may hold a key.
    pub(crate) fn target(&self) -> anyhow::Result<Target> {
        let parsed = |option, url: &Option<String>| url.as_deref().map(|url| endpoint(option, url)).transpose();
        let (url, user) = parsed("--url", &self.url)?.unzip();
        let (base, base_user) = parsed("--base-url", &self.base_url)?.unzip();
        let mut target = Target {
            url,
            base,
            headers: self.headers()?,
            note: None,
            key_variable: self.api_key_env.clone(),
            any_host: self.any_host,
            is_local: self.is_local(),
        };
        add_basic(&mut target.headers, user.flatten())?;
        add_basic(&mut target.headers, base_user.flatten())?;
        if let Some(Key { variable, header }) = self.default_key(&target)? {
            target.note = Some(format!("key from {variable}"));
            target.key_variable = Some(variable.to_owned());
            target.headers.insert(header.0, header.1);
        }
        if self.provider() == Provider::Anthropic {
            // Anthropic rejects every request without this header.
            let version = HeaderValue::from_static("2023-06-01");
            target.headers.entry("anthropic-version").or_insert(version);
        }
        Ok(target)
    }

    fn headers(&self) -> anyhow::Result<HeaderMap> {
        let mut headers = HeaderMap::new();
        for (index, text) in self.headers.iter().enumerate() {
            let (name, value) =
                header(text).with_context(|| format!("--header number {} of the command line", index + 1))?;
            headers.append(name, value);
        }
        if let Some(variable) = &self.api_key_env {
            // A key that was given in place of the name of its variable must not be shown.
            let is_name = |letter: char| letter.is_ascii_uppercase() || letter.is_ascii_digit() || letter == '_';
            let shown = if variable.chars().all(is_name) {
                variable
            } else {
                "given"
            };
            let key = key::from_environment(variable)
                .with_context(|| format!("--api-key-env: the variable {shown} is not set, or empty"))?;
            let (name, value) = self
                .provider()
                .key_header(&key)
                .with_context(|| format!("--api-key-env: the variable {shown} has a value that cannot be sent"))?;
            headers.insert(name, value);
        }
        Ok(headers)
    }

    /// Returns the key in the provider's own variable of the environment, if no other key is given and the URL may get
    /// it: an https URL of the provider itself, or of any host if the provider is named on the command line. A key of
    /// one provider must not reach another, nor be sent where it can be read on the way.
    fn default_key(&self, target: &Target) -> anyhow::Result<Option<Key>> {
        let provider = self.provider();
        let Some(variable) = provider.key_variable() else {
            return Ok(None);
        };
        let is_named = self.provider.is_some();
        let may_get_it = |url: &Uri| key::may_reach(url, provider, is_named);
        let urls = [&target.url, &target.base];
        if target.has_key() || target.is_local() || self.any_host || !urls.into_iter().flatten().all(may_get_it) {
            return Ok(None);
        }
        let Some(key) = key::from_environment(variable) else {
            return Ok(None);
        };
        let header = provider
            .key_header(&key)
            .with_context(|| format!("the variable {variable} has a value that cannot be sent"))?;
        Ok(Some(Key { variable, header }))
    }
}

fn header(text: &str) -> anyhow::Result<(HeaderName, HeaderValue)> {
    let Some((name, value)) = text.split_once(':') else {
        bail!("must have the form \"Name: value\", but has no colon")
    };
    let name = HeaderName::from_bytes(name.trim().as_bytes()).context("must have the form \"Name: value\"")?;
    check_header(&name).map_err(anyhow::Error::msg)?;
    let mut value =
        HeaderValue::from_str(value.trim()).with_context(|| format!("{name} has a value that cannot be sent"))?;
    value.set_sensitive(true);
    Ok((name, value))
}

fn parse_provider(name: &str) -> Result<Provider, String> {
    name.parse().map_err(|error: ParseProviderError| error.to_string())
}

fn seconds(text: &str) -> Result<Duration, String> {
    let time = any_seconds(text)?;
    if time.is_zero() {
        Err("must be above zero".into())
    } else {
        Ok(time)
    }
}

fn any_seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "must be a number of seconds")?;
    let time = Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())?;
    // A longer time cannot be added to the clock of every system.
    if time > Duration::from_secs(10 * 366 * 24 * 60 * 60) {
        return Err("must not be above ten years".into());
    }
    Ok(time)
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
            "host: secret",
        ] {
            let error = format!("{:#}", header(bad).unwrap_err());
            assert!(!error.contains("sec"), "{error}");
        }
    }

    #[test]
    fn a_timeout_is_above_zero() {
        assert_eq!(seconds("2.5"), Ok(Duration::from_millis(2_500)));
        for bad in ["0", "-1", "NaN", "soon", "1e30", "1e10"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }
}
