//! The command line.

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

/// Sends every request of a JSONL file to a metered API, under its limits, and writes a result line for each.
///
/// The file has one JSON object per line. It is POSTed as it is, except for `custom_id`, which only names the request
/// in the results. A line may also be in the form of batch files, `{"custom_id": …, "body": {…}}`: then its `body` is
/// POSTed.
///
/// Without --url the requests go to a local provider, started for the purpose, which enforces the limits with 429s.
#[derive(Parser)]
#[command(name = "bulk", after_help = AFTER_HELP)]
pub(crate) struct Args {
    /// Whose API it is: how the key is sent, and how limits, retries and usage are told in responses
    #[arg(long, value_name = "NAME", default_value_t = Provider::OpenAi, value_parser = parse_provider)]
    pub(crate) provider: Provider,

    /// Where to POST the requests [default: a local provider that enforces the limits]
    #[arg(long, value_name = "URL")]
    url: Option<String>,

    /// The requests, a JSON object per line [default: the 500 of bulk/data/requests.jsonl]
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,

    /// Where the results go, a JSON object per line [default: results.jsonl]
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,

    /// Go on where an earlier run stopped: skip what the output has as COMPLETED, and append. A request is known by a
    /// hash of its line, so lines may be added or moved meanwhile; one that was changed is sent again. The limits start
    /// with empty buckets, as the earlier run may have used them up
    #[arg(long)]
    pub(crate) resume: bool,

    /// Overwrite the output if there is one. (The local demonstration overwrites its own results without being asked)
    #[arg(long, conflicts_with = "resume")]
    pub(crate) force: bool,

    /// What to do about a line that is no request: `skip` it, naming it, or `refuse` the file before anything is sent
    #[arg(long, value_enum, value_name = "WHAT", default_value_t = OnMalformed::Skip)]
    pub(crate) on_malformed: OnMalformed,

    /// Requests per minute, or `off`
    #[arg(long, value_name = "N", default_value = "1500", help_heading = "Limits")]
    pub(crate) rpm: PerMinute,

    /// Tokens per minute, or `off`
    #[arg(long, value_name = "N", default_value = "240000", help_heading = "Limits")]
    pub(crate) tpm: PerMinute,

    /// Requests that may go at one instant [default: one second's worth]
    #[arg(long, value_name = "N", help_heading = "Limits")]
    pub(crate) rpm_burst: Option<NonZeroU64>,

    /// Tokens that may go at one instant; a request with more fails unsent [default: one second's worth, or the largest
    /// request of the input if that is more, up to one minute's worth]
    #[arg(long, value_name = "N", help_heading = "Limits")]
    pub(crate) tpm_burst: Option<NonZeroU64>,

    /// Requests in flight at once
    #[arg(long, value_name = "N", default_value = "32", help_heading = "Limits")]
    pub(crate) concurrency: NonZeroUsize,

    /// Requests that wait in memory; the rest of the file is read when there is room
    #[arg(long, value_name = "N", default_value = "100", help_heading = "Limits")]
    pub(crate) queue: NonZeroUsize,

    /// Where a line says how many tokens it needs, with dots: `tokens`, `usage.total` [default: a quarter of the
    /// characters of its messages, and `max_tokens`]
    #[arg(long, value_name = "PATH", help_heading = "Limits")]
    pub(crate) tokens_field: Option<String>,

    /// Multiply what requests are estimated to need by this; what they turn out to need is settled in any case
    #[arg(long, value_name = "FACTOR", default_value = "1", value_parser = factor, help_heading = "Limits")]
    pub(crate) estimate_times: f64,

    /// Keep to the limits given here, whatever the provider says of its own. (What it has left, and when to come back, is
    /// always listened to)
    #[arg(long, help_heading = "Limits")]
    pub(crate) keep_limits: bool,

    /// How often a request is made again that failed for a while: no connection, 408, 409, 429, 5xx
    #[arg(long, value_name = "N", default_value = "8", help_heading = "Requests")]
    pub(crate) retries: u32,

    /// A header to send with each request, e.g. "x-team: search". Repeatable. For keys see --api-key-env
    #[arg(long = "header", value_name = "NAME: VALUE", help_heading = "Requests")]
    headers: Vec<String>,

    /// The environment variable that holds the API key. It is sent as the provider wants it, and never shown
    #[arg(long, value_name = "VAR", help_heading = "Requests")]
    api_key_env: Option<String>,

    /// Seconds until a request fails, from its first byte out to its last byte in
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = seconds, help_heading = "Requests")]
    pub(crate) timeout: Duration,

    #[command(flatten)]
    pub(crate) local: Local,

    /// Show no progress, only problems and the summary
    #[arg(long)]
    pub(crate) quiet: bool,

    /// Send nothing: run the local provider at this address, to try the rest against, until Ctrl-C
    #[arg(long, value_name = "ADDRESS", conflicts_with_all = ["url", "resume"])]
    pub(crate) serve: Option<SocketAddr>,
}

/// What the local provider does.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Local {
    /// Requests per minute that it really allows [default: as told by --rpm]
    #[arg(long, value_name = "N", help_heading = "Local provider")]
    pub(crate) local_rpm: Option<PerMinute>,

    /// Tokens per minute that it really allows [default: as told by --tpm]
    #[arg(long, value_name = "N", help_heading = "Local provider")]
    pub(crate) local_tpm: Option<PerMinute>,

    /// How much of the tokens that were asked for it uses, in percent
    #[arg(long, value_name = "PERCENT", default_value = "100", help_heading = "Local provider",
          value_parser = clap::value_parser!(u8).range(1..=100))]
    pub(crate) local_usage: u8,

    /// How many requests it answers with 503, in percent
    #[arg(long, value_name = "PERCENT", default_value = "2", help_heading = "Local provider",
          value_parser = clap::value_parser!(u8).range(0..=100))]
    pub(crate) local_faults: u8,

    /// How many answers it sends slowly, in percent
    #[arg(long, value_name = "PERCENT", default_value = "5", help_heading = "Local provider",
          value_parser = clap::value_parser!(u8).range(0..=100))]
    pub(crate) local_slow: u8,

    /// Which requests those are
    #[arg(long, value_name = "N", default_value = "1", help_heading = "Local provider")]
    pub(crate) local_seed: u64,
}

const AFTER_HELP: &str = "\
Results: one line per request, written when it is over. COMPLETED has an answer with a 2xx code; FAILED has any other
answer (429, say) or none; CANCELLED was cut off. On --resume only COMPLETED counts as done; the last line of a request is
the one that holds.

Ctrl-C: once, and no more requests are taken from the file, while those taken are finished; --resume does the rest. Twice,
and they are cancelled.

Exit codes:
  0    every request has a COMPLETED line (malformed lines that were skipped do not count)
  1    the run did not begin, or broke off: input, output or settings
  2    the command line is wrong
  3    some requests FAILED
  4    some requests were lost: they have no result line
  130  interrupted by Ctrl-C";

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OnMalformed {
    Skip,
    Refuse,
}

/// Where requests go, and what is sent with each of them.
pub(crate) struct Target {
    /// `None`: to the local provider.
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

    /// Whether results of the local provider go to a file that nobody named.
    pub(crate) const fn is_demonstration(&self) -> bool {
        self.url.is_none() && self.output.is_none()
    }

    /// Not left to the parser: its errors repeat what was typed, and there may be a key in a header or a URL.
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
            // Without it nothing is answered.
            let version = HeaderValue::from_static("2023-06-01");
            headers.entry("anthropic-version").or_insert(version);
        }
        Ok(headers)
    }
}

fn endpoint(url: &str) -> anyhow::Result<Uri> {
    let uri: Uri = url.parse().context("--url is no URL")?;
    ensure!(
        matches!(uri.scheme_str(), Some("http" | "https")),
        "--url has to begin with http:// or https://"
    );
    ensure!(uri.host().is_some_and(|host| !host.is_empty()), "--url names no host");
    Ok(uri)
}

fn header(text: &str) -> anyhow::Result<(HeaderName, HeaderValue)> {
    let Some((name, value)) = text.split_once(':') else {
        bail!("must look like \"Name: value\", and has no colon")
    };
    let name = HeaderName::from_bytes(name.trim().as_bytes()).context("must look like \"Name: value\"")?;
    let value = sensitive(value.trim()).with_context(|| format!("{name} has a value that cannot be sent"))?;
    Ok((name, value))
}

/// Marked, so that nothing that logs headers shows it.
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
    fn a_header_is_a_name_and_a_value() {
        let (name, value) = header("X-Team:  search: fast ").unwrap();
        assert_eq!((name.as_str(), value.to_str().unwrap()), ("x-team", "search: fast"));
        assert!(value.is_sensitive());
    }

    #[test]
    fn a_bad_header_is_refused_without_its_value() {
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
