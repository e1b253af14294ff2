//! What an earlier run wrote: which requests are done, and by whom they were answered.

use super::LOCAL;
use crate::input::{Request, hash};
use anyhow::{Context, bail};
use http::Uri;
use serde::Deserialize;
use std::{
    borrow::Cow,
    fs::File,
    io::{BufRead, BufReader, ErrorKind},
    path::Path,
    sync::Arc,
};
use tower_outbound::RequestStatus;

/// The longest result line of an earlier run, in bytes. A longer one is not a result.
const MAX_LINE: u64 = 1 << 30;

/// The number of APIs whose results are told apart. Results of further ones count as none.
const MAX_APIS: usize = 100;

/// The requests that an earlier run completed. Clones share what is read, and count for themselves what is taken.
#[derive(Clone, Default)]
pub(crate) struct Done {
    /// The keys of completed requests in ascending order: see [`key`].
    keys: Arc<[u64]>,
    /// For each key, how often it is not taken yet. The number can be above one, because a file may have the same line
    /// twice.
    left: Vec<u32>,
    /// The APIs that results came from, and the number of requests of the input that only they have completed.
    apis: Vec<(String, u64)>,
    taken: u64,
    completed: u64,
    /// The API of requests whose line names no URL, and the hash of their path: see [`path_hash`].
    default_api: String,
    default_path: u64,
    /// The number of bytes up to the end of the last complete line.
    pub(super) complete_bytes: u64,
    /// The length of the file when it was read, in bytes.
    pub(super) all_bytes: u64,
    pub(super) ends_with_newline: bool,
}

/// The fields of a result line that a later run reads, in either form of results.
#[derive(Deserialize)]
pub(super) struct EarlierResult<'a> {
    /// Missing in the result of a malformed line.
    #[serde(borrow, default)]
    hash: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    host: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    url: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    status: Option<Cow<'a, str>>,
    /// The same fields in the form of OpenAI's batches.
    #[serde(borrow, default)]
    bulk: Option<Box<Self>>,
    /// Whether the result has that form.
    #[serde(skip)]
    pub(super) is_batch: bool,
}

// === impl EarlierResult ===

impl<'a> EarlierResult<'a> {
    pub(super) fn parse(line: &'a [u8]) -> Option<Self> {
        let text = std::str::from_utf8(line).ok()?;
        let mut result: Self = serde_json::from_str(text).ok()?;
        if let Some(inner) = result.bulk.take() {
            result = *inner;
            result.is_batch = true;
        }
        result.status.is_some().then_some(result)
    }

    fn is_local(&self) -> bool {
        self.host.as_deref() == Some(LOCAL)
    }

    /// Returns whether an API was meant to answer the request. The result of a malformed line names no host.
    pub(super) fn is_of_api(&self) -> bool {
        self.host.is_some() && !self.is_local()
    }

    /// The hash of the request, if the result is that of a completed one.
    fn completed(&self) -> Option<u64> {
        let is_completed = self.status.as_deref() == Some(RequestStatus::Completed.as_str());
        let hash = self.hash.as_deref().filter(|_| is_completed)?;
        u64::from_str_radix(hash, 16).ok()
    }

    fn api(&self) -> String {
        if self.is_local() {
            return LOCAL.to_owned();
        }
        self.uri().map_or_else(
            || self.host.as_deref().unwrap_or_default().to_owned(),
            |url| api(Some(&url)),
        )
    }

    fn uri(&self) -> Option<Uri> {
        self.url.as_deref()?.parse().ok()
    }
}

// === impl Done ===

impl Done {
    /// Reads the results at `path`; there are none if the file does not exist. `default_url` is the URL of requests
    /// whose line names none; `None` is the local provider.
    pub(super) fn read(path: &Path, default_url: Option<&Uri>) -> anyhow::Result<Self> {
        let mut done = match File::open(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Self::default(),
            opened => {
                let file = opened.with_context(|| format!("cannot open {}", path.display()))?;
                Self::from_lines(BufReader::with_capacity(1 << 18, file))
                    .with_context(|| format!("cannot continue {}", path.display()))?
            }
        };
        done.set_default_url(default_url);
        Ok(done)
    }

    fn set_default_url(&mut self, url: Option<&Uri>) {
        self.default_api = api(url);
        self.default_path = path_hash(url);
    }

    fn from_lines(mut lines: impl BufRead) -> anyhow::Result<Self> {
        let mut done = Self {
            ends_with_newline: true,
            ..Self::default()
        };
        let mut keys = Vec::new();
        let mut bytes = Vec::new();
        for number in 1_u64.. {
            bytes.clear();
            let length = std::io::Read::take(&mut lines, MAX_LINE).read_until(b'\n', &mut bytes)?;
            let has_newline = bytes.ends_with(b"\n");
            done.all_bytes += length as u64;
            match EarlierResult::parse(&bytes) {
                _ if length == 0 => break,
                Some(earlier) => {
                    if let Some(hash) = earlier.completed() {
                        let path = path_hash(earlier.uri().as_ref());
                        keys.extend(done.api_number(earlier.api()).map(|api| key(hash, api, path)));
                        done.completed += 1;
                    }
                }
                // The earlier run was killed while it wrote this line, so the request of the line is sent again.
                None if !has_newline => break,
                // The file holds something other than results, which must not be overwritten.
                None => bail!("its line {number} is not a result"),
            }
            done.complete_bytes += length as u64;
            done.ends_with_newline = has_newline;
        }
        keys.sort_unstable();
        for group in keys.chunk_by(|one, other| one == other) {
            done.left.push(u32::try_from(group.len()).unwrap_or(u32::MAX));
        }
        keys.dedup();
        done.keys = keys.into();
        Ok(done)
    }

    /// The position of the API in the list, to which it is added if there is room.
    fn api_number(&mut self, api: String) -> Option<usize> {
        let found = self.apis.iter().position(|(known, _)| *known == api);
        if found.is_none() && self.apis.len() < MAX_APIS {
            self.apis.push((api, 0));
            return Some(self.apis.len() - 1);
        }
        found
    }

    /// Returns whether an earlier run completed this request at the API that it would be sent to. Each completed line
    /// counts for one request only.
    pub(crate) fn take(&mut self, request: &Request) -> bool {
        let of_line;
        let (wanted, path) = match &request.url {
            Some(url) => {
                of_line = api(Some(url));
                (&of_line, path_hash(Some(url)))
            }
            None => (&self.default_api, self.default_path),
        };
        let position = self.apis.iter().position(|(known, _)| known == wanted);
        if position.is_some_and(|position| take(&self.keys, &mut self.left, key(request.hash, position, path))) {
            self.taken += 1;
            return true;
        }
        let other = self.apis.iter().enumerate().position(|(number, (api, _))| {
            let path = if api == LOCAL { 0 } else { path };
            take(&self.keys, &mut self.left, key(request.hash, number, path))
        });
        if let Some(other) = other {
            self.apis[other].1 += 1;
        }
        false
    }

    /// Returns what to say, once the whole input is read, about results that were not taken for done.
    pub(crate) fn notes(&self) -> Vec<String> {
        let mut notes: Vec<_> = self
            .apis
            .iter()
            .filter(|(_, others)| *others > 0)
            .map(|(api, others)| {
                let api = if api.is_empty() {
                    "an API that they do not name"
                } else {
                    api
                };
                format!("{others} results are of {api}: those requests are sent again")
            })
            .collect();
        let of_others: u64 = self.apis.iter().map(|(_, others)| others).sum();
        let unknown = self.completed - self.taken - of_others;
        if unknown > 0 {
            notes.push(format!(
                "{unknown} results belong to no line of the input: a line that has changed, or goes to another path, is sent \
                 again"
            ));
        }
        notes
    }
}

/// Takes one of the requests with this key.
fn take(keys: &[u64], left: &mut [u32], key: u64) -> bool {
    let Ok(position) = keys.binary_search(&key) else {
        return false;
    };
    let is_left = left[position] > 0;
    left[position] = left[position].saturating_sub(1);
    is_left
}

/// The key of a request that was answered by an API: the hash of its line, mixed with the number of the API and the hash
/// of the path.
const fn key(hash: u64, api: usize, path: u64) -> u64 {
    hash ^ (api as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ path.wrapping_mul(0xff51_afd7_ed55_8ccd)
}

/// The hash of the path of a URL: the same body means another request at another path, such as `/v1/embeddings` and
/// `/v1/moderations`. A slash at the end does not matter. Zero for the local provider, which has no paths in results.
fn path_hash(url: Option<&Uri>) -> u64 {
    let url = url.filter(|url| url.host().is_some());
    url.map_or(0, |url| hash(url.path().trim_end_matches('/').as_bytes()))
}

/// Names the API behind a URL: its scheme, host and port, and the model, if the path holds it. `None`, or a path
/// without a host, is the local provider.
fn api(url: Option<&Uri>) -> String {
    let Some((url, host)) = url.and_then(|url| Some((url, url.host()?.to_ascii_lowercase()))) else {
        return LOCAL.to_owned();
    };
    let scheme = url.scheme_str().unwrap_or_default();
    let default_port = if scheme == "https" { 443 } else { 80 };
    let port = url.port_u16().unwrap_or(default_port);
    let mut segments = url.path().split('/');
    // As Gemini's `models/NAME:generateContent` and Azure's `deployments/NAME/chat/completions`.
    let is_before_model = |segment: &str| segment == "models" || segment == "deployments";
    let model = segments
        .find(|segment| is_before_model(segment))
        .and_then(|_| segments.next());
    let model = model
        .and_then(|model| model.split(':').next())
        .filter(|model| !model.is_empty());
    let model = model.map_or(String::new(), |model| format!(" ({model})"));
    format!("{scheme}://{host}:{port}{model}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::result::hex;

    const URL: &str = "http://h/v1/chat";

    fn line(hash: u64, status: &str) -> String {
        line_of(hash, status, URL)
    }

    fn line_of(hash: u64, status: &str, url: &str) -> String {
        let host = if url.is_empty() { LOCAL } else { "h" };
        let hash = hex(hash);
        format!("{{\"line\":1,\"hash\":\"{hash}\",\"host\":\"{host}\",\"url\":\"{url}\",\"status\":\"{status}\"}}\n")
    }

    fn done(text: &str, url: &'static str) -> Done {
        let mut done = Done::from_lines(text.as_bytes()).unwrap();
        done.set_default_url(Some(&Uri::from_static(url)));
        done
    }

    fn taken(done: &mut Done, hashes: &[u64]) -> Vec<bool> {
        hashes.iter().map(|hash| done.take(&Request::example(*hash))).collect()
    }

    #[test]
    fn only_completed_lines_count_and_each_counts_once() {
        let text = [
            line(1, "COMPLETED"),
            line(2, "FAILED"),
            line(1, "COMPLETED"),
            line(3, "CANCELLED"),
        ]
        .concat();
        let mut done = done(&text, URL);
        let clone = done.clone();
        assert_eq!(
            taken(&mut done, &[1, 1, 1, 2, 3, 4]),
            [true, true, false, false, false, false]
        );
        assert_eq!(taken(&mut clone.clone(), &[1]), [true]);
    }

    #[test]
    fn results_of_another_api_do_not_count_and_are_said() {
        let text = [
            line_of(1, "COMPLETED", ""),
            line_of(2, "COMPLETED", "http://h:80/v1/chat/?x"),
            line_of(3, "COMPLETED", "https://h/v1/chat"),
            line_of(4, "COMPLETED", "http://h:8080/v1/chat"),
        ]
        .concat();
        let mut done = done(&text, URL);
        assert_eq!(taken(&mut done, &[1, 2, 3, 5]), [false, true, false, false]);
        assert_eq!(
            done.notes(),
            [
                "1 results are of (local provider): those requests are sent again",
                "1 results are of https://h:443: those requests are sent again",
                "1 results belong to no line of the input: a line that has changed, or goes to another path, is sent again",
            ]
        );
    }

    #[test]
    fn results_of_another_path_do_not_count() {
        let mut done = done(
            &line_of(1, "COMPLETED", "http://h/v1/embeddings"),
            "http://h/v1/moderations",
        );
        assert_eq!(taken(&mut done, &[1]), [false]);
        let mut request = Request::example(1);
        request.url = Some(Uri::from_static("http://h/v1/embeddings"));
        assert!(done.take(&request));
    }

    #[test]
    fn a_path_without_a_host_is_the_local_provider() {
        let mut done = done(&line_of(1, "COMPLETED", ""), URL);
        let mut request = Request::example(1);
        request.url = Some(Uri::from_static("/v1/embeddings"));
        assert!(done.take(&request));
    }

    #[test]
    fn a_model_in_the_path_tells_apis_apart() {
        let one = "https://h/v1beta/models/small:generateContent";
        let text = line_of(1, "COMPLETED", one);
        assert_eq!(taken(&mut done(&text, one), &[1]), [true]);
        assert_eq!(
            taken(&mut done(&text, "https://h/v1beta/models/large:generateContent"), &[1]),
            [false]
        );
    }

    #[test]
    fn results_in_the_form_of_batches_count() {
        let inner = line(7, "COMPLETED");
        let text = format!("{{\"id\":\"x\",\"custom_id\":\"a\",\"bulk\":{}}}\n", inner.trim());
        assert_eq!(taken(&mut done(&text, URL), &[7]), [true]);
    }

    #[test]
    fn a_line_that_was_cut_off_does_not_count() {
        let (first, second) = (line(1, "COMPLETED"), line(2, "COMPLETED"));
        let text = format!("{first}{}", &second[..20]);
        let mut done = done(&text, URL);
        assert_eq!(
            (done.complete_bytes, done.ends_with_newline),
            (first.len() as u64, true)
        );
        assert_eq!(done.all_bytes, text.len() as u64);
        assert_eq!(taken(&mut done, &[2]), [false]);
    }

    #[test]
    fn a_complete_result_without_a_newline_counts() {
        let text = line(1, "COMPLETED");
        let text = text.trim_end();
        let mut done = done(text, URL);
        assert_eq!(
            (done.complete_bytes, done.ends_with_newline),
            (text.len() as u64, false)
        );
        assert_eq!(taken(&mut done, &[1]), [true]);
    }

    #[test]
    fn a_file_with_other_lines_is_refused() {
        let text = format!("{}notes\n{}", line(1, "COMPLETED"), line(2, "COMPLETED"));
        assert_eq!(
            Done::from_lines(text.as_bytes()).err().unwrap().to_string(),
            "its line 2 is not a result"
        );
    }
}
