//! Parses the command line.

use crate::limits::PerMinute;
use anyhow::{Context, bail, ensure};
use clap::{Parser, ValueEnum};
use http::{HeaderMap, HeaderName, HeaderValue, Uri};
use std::{
    net::SocketAddr,
    num::{NonZeroU64, NonZeroUsize},
    path::{Path, PathBuf},
    time::Duration,
};
use tower_outbound::provider::{ParseProviderError, Provider};

/// Sends every request of a JSONL file to a metered API, within its limits, and writes a result line for each.
///
/// The file has one JSON object per line. The object is the body of a POST request, without its `custom_id`, which only
/// names the request in the results. A line may also have the form of batch files, `{"custom_id": …, "body": {…}}`:
/// then its `body` is sent.
///
/// Without --url the program starts a provider of its own on 127.0.0.1 and sends the requests there. This local
/// provider enforces the limits: it answers requests above them with 429.
#[derive(Parser)]
#[command(name = "bulk", after_help = AFTER_HELP)]
pub(crate) struct Args {
    /// The provider of the API. Decides how the key is sent, and how limits, errors and usage are read from responses:
    /// openai, azure-openai, anthropic, gemini, groq, mistral, cerebras, github or ietf (any API with the IETF's
    /// `RateLimit` headers)
    #[arg(long, value_name = "NAME", default_value_t = Provider::OpenAi, value_parser = parse_provider)]
    pub(crate) provider: Provider,

    /// The URL to POST the requests to [default: the local provider]
    #[arg(long, value_name = "URL")]
    url: Option<String>,

    /// The file of requests, one JSON object per line [default: bulk/data/requests.jsonl, with 500 requests]
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,

    /// The file for the results, one JSON object per line [default: results.jsonl]
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,

    /// Continue an earlier run: skip the requests that are COMPLETED in the output, and append the other results.
    /// Requests are recognized by a hash of their line, so lines may be added or moved between the runs; a changed line
    /// is sent again. The limits start with empty buckets, because the earlier run may have used them up
    #[arg(long)]
    pub(crate) resume: bool,

    /// Overwrite an existing output. (Results of the local provider in the default output are overwritten in any case)
    #[arg(long, conflicts_with = "resume")]
    pub(crate) force: bool,

    /// What to do with a line that is not a request: `skip` reports it and sends the others, `refuse` sends nothing
    #[arg(long, value_enum, value_name = "WHAT", default_value_t = OnMalformed::Skip)]
    pub(crate) on_malformed: OnMalformed,

    /// Limit of requests per minute, or `off`
    #[arg(long, value_name = "N", default_value = "1500", help_heading = "Limits")]
    pub(crate) rpm: PerMinute,

    /// Limit of tokens per minute, or `off`
    #[arg(long, value_name = "N", default_value = "240000", help_heading = "Limits")]
    pub(crate) tpm: PerMinute,

    /// Burst: requests that may be sent at once after a pause [default: one second's worth of --rpm, at least 1]
    #[arg(long, value_name = "N", help_heading = "Limits")]
    pub(crate) rpm_burst: Option<NonZeroU64>,

    /// Burst: tokens that may be charged at once after a pause; a request that needs more fails without being sent
    /// [default: one second's worth of --tpm, or the largest request of the input if that is more, but at most one
    /// minute's worth]
    #[arg(long, value_name = "N", help_heading = "Limits")]
    pub(crate) tpm_burst: Option<NonZeroU64>,

    /// Limit of requests in flight at once
    #[arg(long, value_name = "N", default_value = "32", help_heading = "Limits")]
    pub(crate) concurrency: NonZeroUsize,

    /// Limit of requests that wait in memory; the file is read further as they are sent
    #[arg(long, value_name = "N", default_value = "100", help_heading = "Limits")]
    pub(crate) queue: NonZeroUsize,

    /// The field of a line that holds its number of tokens, as a path with dots: `tokens`, `usage.total` [default:
    /// none, tokens are estimated as a quarter of the characters of the messages plus `max_tokens`]
    #[arg(long, value_name = "PATH", help_heading = "Limits")]
    pub(crate) tokens_field: Option<String>,

    /// Factor, from 0.01 to 100, by which token estimates are multiplied. When a response reports the tokens that were
    /// used, the difference is settled in any case. Without effect if --tokens-field is given
    #[arg(long, value_name = "FACTOR", default_value = "1", value_parser = factor, help_heading = "Limits")]
    pub(crate) estimate_times: f64,

    /// Keep the limits given here, even if the provider reports others or rejects requests within them. (Its remaining
    /// quota and its `retry-after` are obeyed in any case)
    #[arg(long, help_heading = "Limits")]
    pub(crate) keep_limits: bool,

    /// Retries per request, at most, after a temporary failure: no connection, 408, 409, 429, 5xx
    #[arg(long, value_name = "N", default_value = "8", help_heading = "Requests")]
    pub(crate) retries: u32,

    /// A header to send with each request, e.g. "x-team: search". May be repeated. For API keys use --api-key-env
    #[arg(long = "header", value_name = "NAME: VALUE", help_heading = "Requests")]
    headers: Vec<String>,

    /// Environment variable that holds the API key. The key is sent in the header that the provider expects, and never
    /// shown
    #[arg(long, value_name = "VAR", help_heading = "Requests")]
    api_key_env: Option<String>,

    /// Seconds until an attempt fails, from its start to the last byte of the response
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = seconds, help_heading = "Requests")]
    pub(crate) timeout: Duration,

    #[command(flatten)]
    pub(crate) local: Local,

    /// Show problems and the summary only, no progress
    #[arg(long)]
    pub(crate) quiet: bool,

    /// Send nothing: run only the local provider, at this address (127.0.0.1:8080, for example), until Ctrl-C. Another
    /// `bulk --url` can send to it
    #[arg(long, value_name = "ADDRESS", conflicts_with_all = ["url", "resume"])]
    pub(crate) serve: Option<SocketAddr>,
}

/// The behaviour of the local provider.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Local {
    /// Requests per minute that the local provider allows, or `off` [default: the value of --rpm]
    #[arg(long, value_name = "N", help_heading = "Local provider")]
    pub(crate) local_rpm: Option<PerMinute>,

    /// Tokens per minute that the local provider allows, or `off` [default: the value of --tpm]
    #[arg(long, value_name = "N", help_heading = "Local provider")]
    pub(crate) local_tpm: Option<PerMinute>,

    /// Percentage of `max_tokens` that each response uses, from 1 to 100
    #[arg(long, value_name = "PERCENT", default_value = "100", help_heading = "Local provider",
          value_parser = clap::value_parser!(u8).range(1..=100))]
    pub(crate) local_usage: u8,

    /// Percentage of requests that are answered with 503, from 0 to 100
    #[arg(long, value_name = "PERCENT", default_value = "2", help_heading = "Local provider",
          value_parser = clap::value_parser!(u8).range(0..=100))]
    pub(crate) local_faults: u8,

    /// Percentage of responses whose body pauses for 400 ms in the middle, from 0 to 100
    #[arg(long, value_name = "PERCENT", default_value = "5", help_heading = "Local provider",
          value_parser = clap::value_parser!(u8).range(0..=100))]
    pub(crate) local_slow: u8,

    /// Seed that selects the requests with a 503 or a slow response; the same seed selects the same ones
    #[arg(long, value_name = "N", default_value = "1", help_heading = "Local provider")]
    pub(crate) local_seed: u64,
}

const AFTER_HELP: &str = "\
Results: one line per request, written when the request ends. COMPLETED: a response with a 2xx status. FAILED: a
response with any other status (429, for example), or no response, after the last retry. CANCELLED: ended by Ctrl-C.
With --resume only COMPLETED requests are skipped. If a request has several lines, the last one is its result.

Ctrl-C, once: no more requests are read, and those already read are finished; --resume sends the rest. Twice: those
already read are cancelled.

Exit codes:
  0    every request has a COMPLETED line (skipped malformed lines do not count)
  1    the run could not start, or was broken off, because of the input, the output or the settings
  2    the command line is wrong
  3    some requests FAILED
  4    some requests have no result line
  130  interrupted by Ctrl-C";

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OnMalformed {
    Skip,
    Refuse,
}

/// The URL that requests are sent to, and the headers that are sent with each request.
pub(crate) struct Target {
    /// The URL that requests are sent to; `None` for the local provider.
    pub(crate) url: Option<Uri>,
    pub(crate) headers: HeaderMap,
}

impl Args {
    pub(crate) fn input(&self) -> &Path {
        let bundled = concat!(env!("CARGO_MANIFEST_DIR"), "/data/requests.jsonl");
        self.input.as_deref().unwrap_or_else(|| Path::new(bundled))
    }

    pub(crate) fn output(&self) -> &Path {
        self.output.as_deref().unwrap_or_else(|| Path::new("results.jsonl"))
    }

    /// Returns whether the run sends to the local provider and writes its results to the default output.
    pub(crate) const fn is_demonstration(&self) -> bool {
        self.url.is_none() && self.output.is_none()
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

fn factor(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(factor) if (0.01..=100.0).contains(&factor) => Ok(factor),
        _ => Err("must be a number from 0.01 to 100".into()),
    }
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
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn the_help_names_every_provider() {
        let help = Args::command().render_long_help().to_string();
        for provider in Provider::ALL {
            assert!(help.contains(&provider.to_string()), "{provider}");
        }
    }

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
