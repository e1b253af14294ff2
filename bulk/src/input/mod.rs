//! The file of requests. It is read line by line, so its length is not limited by memory.
//!
//! | file | what it holds |
//! |---|---|
//! | `source.rs` | where the lines come from: files, pipes, compressed or not |
//! | `form.rs` | the forms of a file of requests, and how they are recognized |
//! | `fields.rs` | the fields of a JSON object as they are written |
//! | `line.rs` | one line, parsed into its request |
//! | `admission.rs` | how much of the input is in memory at once |

mod admission;
mod fields;
mod form;
mod line;
mod source;

pub(crate) use admission::{Admission, Admitted};
pub(crate) use fields::Fields;
pub(crate) use form::Form;
pub(crate) use line::{hash, without_secrets};

use crate::{
    args::{Args, Target},
    limits::{COST_FIELD, OwnBudgets},
};
use anyhow::{Context, bail, ensure};
use http::{HeaderMap, Method, Uri};
use hyper::body::Bytes;
use serde_json::value::RawValue;
use source::{Line, Lines};
use std::{
    collections::{HashSet, VecDeque},
    path::{Path, PathBuf},
    sync::Arc,
};
use tower_outbound::{Cost, provider::Provider};

/// The requests that are sent to the local provider if no input is given. They are in the program, because an installed
/// one has no files beside it.
const BUNDLED: &[u8] = include_bytes!("../../data/requests.jsonl");

/// The size of the beginning of the input that is looked at to tell what it is, in bytes.
const HEAD: usize = 64 << 10;

/// The number of ids that are remembered to find those that occur twice. Above it, ids are not compared.
const MAX_IDS: usize = 1_000_000;

/// The bytes that a request takes in memory beside what its line holds.
const OVERHEAD: u64 = 2_048;

/// The request in one line of the file.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) line: u64,
    /// The name that the line gives to the request, as it is written there.
    pub(crate) custom_id: Option<Box<RawValue>>,
    /// What the line holds for its user alone: it is not sent, and stands in the result.
    pub(crate) metadata: Option<Box<RawValue>>,
    /// A hash of the line, by which a later run recognizes the request.
    pub(crate) hash: u64,
    pub(crate) tokens: u64,
    /// What the request takes of the budgets with names of the user's own, and nothing of any other.
    pub(crate) own_cost: Cost,
    pub(crate) method: Method,
    /// The absolute URL that the request is sent to; `None` for that of the command line.
    pub(crate) url: Option<Uri>,
    /// The headers of the line, which are sent beside those of the command line.
    pub(crate) headers: HeaderMap,
    /// The bytes of the line that are sent.
    pub(crate) body: Bytes,
    /// The place of the request in memory, if there is a bound.
    pub(crate) admitted: Option<Admitted>,
}

/// A line of the input that is not a request, and what is wrong with it.
#[derive(Debug)]
pub(crate) struct Malformed {
    pub(crate) line: u64,
    pub(crate) custom_id: Option<Box<RawValue>>,
    pub(crate) reason: String,
    /// The place of its result in memory, if there is a bound.
    pub(crate) admitted: Option<Admitted>,
}

/// How the number of tokens of a request is determined.
#[derive(Clone, Debug)]
pub(crate) enum Tokens {
    /// The number of tokens is estimated, and the estimate is multiplied by this factor.
    Estimate(f64),
    /// The number of tokens is read from the field of the line at this JSON pointer.
    Field(String),
}

/// How the input is read.
#[derive(Clone)]
pub(crate) struct Options {
    /// `None` for the requests that come with the program.
    path: Option<PathBuf>,
    /// The form of all lines; `None` to recognize that of each line.
    form: Option<Form>,
    /// The longest line, in bytes.
    max_line: usize,
    tokens: Tokens,
    own_budgets: OwnBudgets,
    provider: Provider,
    target: Arc<Target>,
}

/// Reads the requests of the input. Empty lines are skipped.
pub(crate) struct Requests {
    lines: Lines,
    /// Lines that were read to recognize the form of the file.
    ahead: VecDeque<Line>,
    options: Options,
    form: Form,
    is_rewindable: bool,
    /// `None` if the ids have been compared before.
    ids: Option<Ids>,
}

/// Finds ids that occur more than once, by hashes of them.
#[derive(Default)]
struct Ids {
    seen: HashSet<u64>,
    repeated: u64,
    /// The first repeated id, and its line.
    example: Option<(String, u64)>,
}

// === impl Request ===

impl Request {
    /// The bytes that the request takes in memory, roughly.
    pub(crate) fn bytes(&self) -> u64 {
        let notes = [&self.custom_id, &self.metadata];
        let notes: usize = notes.into_iter().flatten().map(|note| note.get().len()).sum();
        (self.body.len() + notes) as u64 + OVERHEAD
    }

    #[cfg(test)]
    pub(crate) fn example(line: u64) -> Self {
        Self {
            line,
            custom_id: None,
            metadata: None,
            hash: line,
            tokens: 1,
            own_cost: Cost::none(),
            method: Method::POST,
            url: None,
            headers: HeaderMap::new(),
            body: "{}".into(),
            admitted: None,
        }
    }
}

// === impl Malformed ===

impl Malformed {
    /// The bytes that the result of the line takes in memory, roughly.
    pub(crate) fn bytes(&self) -> u64 {
        let custom_id = self.custom_id.as_ref().map_or(0, |id| id.get().len());
        (custom_id + self.reason.len()) as u64 + OVERHEAD
    }

    #[cfg(test)]
    pub(crate) fn example(line: u64) -> Self {
        Self {
            line,
            custom_id: None,
            reason: "it is none".into(),
            admitted: None,
        }
    }
}

// === impl Options ===

impl Options {
    /// Takes the options from the command line. `target` is where requests are sent to.
    pub(crate) fn new(args: &Args, target: impl Into<Arc<Target>>) -> Self {
        Self {
            path: args.files.given_input().map(Path::to_owned),
            form: args.files.form(),
            max_line: args.files.max_line(),
            tokens: Tokens::new(args.limits.tokens_field.as_deref(), args.limits.estimate_times),
            own_budgets: OwnBudgets::of(&args.limits),
            provider: args.send.provider(),
            target: target.into(),
        }
    }

    /// Returns the form of a line. The field `cost` tells nothing about it if it is one of this program's.
    fn form_of(&self, fields: &fields::Fields<'_>) -> Form {
        let own_field = if self.own_budgets.is_empty() { "" } else { COST_FIELD };
        self.form.unwrap_or_else(|| Form::of(fields, own_field))
    }
}

// === impl Requests ===

impl Requests {
    /// Opens the input and recognizes its form, for which it waits for the first line.
    ///
    /// # Errors
    ///
    /// An error if the input cannot be read, or is no file of requests.
    pub(crate) async fn open(options: &Options) -> anyhow::Result<Self> {
        let Some(path) = &options.path else {
            ensure!(
                options.target.is_local(),
                "no --input is given, and the requests that come with the program are for the local provider only"
            );
            let lines = Lines::from_memory(BUNDLED, options.max_line)?;
            return Self::recognize(lines, options, true).await;
        };
        let lines = Lines::open(path, options.max_line).with_context(|| format!("cannot open {}", path.display()))?;
        let is_rewindable = path != Path::new("-") && source::is_regular(path);
        let requests = Self::recognize(lines, options, is_rewindable).await;
        requests.with_context(|| format!("cannot use the input {}", path.display()))
    }

    /// Reads requests from memory.
    #[allow(dead_code, reason = "used by tests and by the fuzzer")]
    pub(crate) async fn from_memory(bytes: &[u8], options: &Options) -> anyhow::Result<Self> {
        let lines = Lines::from_memory(bytes, options.max_line)?;
        Self::recognize(lines, options, false).await
    }

    async fn recognize(lines: Lines, options: &Options, is_rewindable: bool) -> anyhow::Result<Self> {
        let mut requests = Self {
            lines,
            ahead: VecDeque::new(),
            form: options.form.unwrap_or(Form::Lines),
            options: options.clone(),
            is_rewindable,
            ids: Some(Ids::default()),
        };
        let mut head = Vec::new();
        // In an array or an object over several lines, a line may happen to be an object, too.
        let mut spans_lines = None;
        let is_whole = loop {
            let Some(line) = requests.lines.next().await? else {
                break true;
            };
            let text = line.text.clone().unwrap_or_default();
            requests.ahead.push_back(line);
            let text = trim(&text);
            head.extend_from_slice(&text[..text.len().min(HEAD)]);
            head.push(b'\n');
            if text.is_empty() {
                continue;
            }
            let spans_lines = *spans_lines.get_or_insert_with(|| form::is_opened(text));
            let text = std::str::from_utf8(text).unwrap_or_default();
            if !spans_lines && let Ok(fields) = fields::Fields::parse(text) {
                requests.form = options.form_of(&fields);
                return Ok(requests);
            }
            if head.len() >= HEAD {
                break false;
            }
        };
        let is_blank = |line: &Line| matches!(&line.text, Ok(text) if trim(text).is_empty());
        let is_empty = is_whole && requests.ahead.iter().all(is_blank);
        // A form that is forced is believed, as long as there is something to read.
        // Of lines above `--max-line` nothing is kept that could be judged: each of them is malformed.
        let has_text = !head.trim_ascii().is_empty();
        let is_judged = is_empty || (options.form.is_none() && has_text);
        if let Some(what) = form::what_it_is(&head, is_whole).filter(|_| is_judged) {
            bail!("it is no file of requests: it looks like {what}");
        }
        Ok(requests)
    }

    /// Returns whether the input can be opened again. A pipe or standard input can be read once only.
    pub(crate) const fn is_rewindable(&self) -> bool {
        self.is_rewindable
    }

    /// The form of the first request. Other lines may have other forms.
    pub(crate) const fn form(&self) -> Form {
        self.form
    }

    /// Reads the same input from its start. Its ids, which take memory for each line, are not compared again.
    pub(crate) async fn again(self, options: &Options) -> anyhow::Result<Self> {
        drop(self);
        let mut again = Self::open(options).await?;
        again.ids = None;
        Ok(again)
    }

    /// Returns a note about ids that occur more than once in what has been read.
    pub(crate) fn repeated_ids(&self) -> Option<String> {
        let ids = self.ids.as_ref()?;
        let (id, line) = ids.example.as_ref()?;
        let count = ids.repeated;
        Some(format!(
            "{count} lines repeat a custom_id of an earlier line; the first is line {line} with {id}"
        ))
    }

    /// Returns the next request, or what is wrong with the next line; `None` at the end. Cancel safe.
    ///
    /// # Errors
    ///
    /// An error if the input cannot be read further.
    pub(crate) async fn next(&mut self) -> anyhow::Result<Option<Result<Request, Malformed>>> {
        loop {
            let line = match self.ahead.pop_front() {
                Some(line) => line,
                None => match self.lines.next().await.context("cannot read the input")? {
                    Some(line) => line,
                    None => return Ok(None),
                },
            };
            if let Some(request) = self.parse(line) {
                return Ok(Some(request));
            }
        }
    }

    fn parse(&mut self, line: Line) -> Option<Result<Request, Malformed>> {
        let number = line.number;
        let bytes = match line.text {
            Ok(bytes) => bytes,
            Err(length) => {
                let limit = self.options.max_line;
                return Some(Err(Malformed {
                    line: number,
                    custom_id: None,
                    reason: format!("{length} bytes long, above --max-line of {limit} bytes"),
                    admitted: None,
                }));
            }
        };
        let text = trim(&bytes);
        if text.is_empty() {
            return None;
        }
        let request = line::parse(number, &bytes.slice_ref(text), &self.options);
        if let (
            Some(ids),
            Ok(Request {
                custom_id: Some(id), ..
            }),
        ) = (&mut self.ids, &request)
        {
            ids.add(id.get(), number);
        }
        Some(request)
    }
}

/// Cuts off whitespace, and the byte order mark that some programs write at the beginning of a file.
fn trim(text: &[u8]) -> &[u8] {
    text.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(text).trim_ascii()
}

// === impl Ids ===

impl Ids {
    fn add(&mut self, id: &str, line: u64) {
        if self.seen.len() >= MAX_IDS || self.seen.insert(line::hash(id.as_bytes())) {
            return;
        }
        self.repeated += 1;
        if self.example.is_none() {
            self.example = Some((id.chars().take(100).collect(), line));
        }
    }
}

// === impl Tokens ===

impl Tokens {
    pub(crate) fn new(path: Option<&str>, times: f64) -> Self {
        path.map_or(Self::Estimate(times), |path| {
            let pointer = path.replace('~', "~0").replace('/', "~1").replace('.', "/");
            Self::Field(format!("/{pointer}"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    async fn read(text: impl Into<Vec<u8>>, args: &[&str]) -> anyhow::Result<(Requests, Vec<Result<u64, u64>>)> {
        let args = Args::parse_from([&["bulk"], args].concat());
        let options = Options::new(&args, args.send.target()?);
        let mut requests = Requests::from_memory(&text.into(), &options).await?;
        let mut lines = Vec::new();
        while let Some(line) = requests.next().await? {
            lines.push(line.map(|request| request.line).map_err(|malformed| malformed.line));
        }
        Ok((requests, lines))
    }

    #[tokio::test]
    async fn a_mark_at_the_start_carriage_returns_and_blank_lines_do_not_matter() {
        let text = "\u{feff}{\"a\":1}\r\n\r\n  \n{\"a\":2}\r\n{\"a\":3}";
        let (requests, lines) = read(text, &[]).await.unwrap();
        assert_eq!(lines, [Ok(1), Ok(4), Ok(5)]);
        assert_eq!(requests.form(), Form::Lines);
        assert!(!requests.is_rewindable());
        let (_, lines) = read("\n".repeat(HEAD + 1) + "{\"a\":1}", &[]).await.unwrap();
        assert_eq!(lines, [Ok(HEAD as u64 + 2)]);
    }

    #[tokio::test]
    async fn a_malformed_line_does_not_end_the_file() {
        let (_, lines) = read("{\"a\":\n{\"a\":2}\n[]\n{\"a\":3}", &[]).await.unwrap();
        assert_eq!(lines, [Err(1), Ok(2), Err(3), Ok(4)]);
        for first in ["notes", "[]"] {
            let (_, lines) = read(format!("{first}\n{{\"a\":2}}"), &[]).await.unwrap();
            assert_eq!(lines, [Err(1), Ok(2)]);
        }
    }

    #[tokio::test]
    async fn a_file_of_something_else_is_an_error_that_says_what_it_looks_like() {
        for (text, what) in [
            ("[\n{\"a\":1},\n{\"a\":2}\n]", "a JSON array"),
            ("[\n  {\n    \"a\": {}\n  },\n  {}\n]", "a JSON array"),
            ("{\n  \"a\": [\n    {}\n  ]\n}", "JSON with line breaks"),
            ("id,prompt\n1,a", "a table (CSV)"),
            ("\n\n", "an empty file"),
        ] {
            let error = read(text, &[]).await.err().unwrap().to_string();
            assert!(error.contains(what), "{error}");
        }
    }

    #[tokio::test]
    async fn a_line_above_the_limit_is_malformed_and_the_others_are_read() {
        let text = format!("{{\"a\":1}}\n{{\"a\":\"{}\"}}\n{{\"a\":3}}\n", "x".repeat(2 << 20));
        let (_, lines) = read(text, &["--max-line", "1M"]).await.unwrap();
        assert_eq!(lines, [Ok(1), Err(2), Ok(3)]);
        // Such a line alone is not an empty file.
        let (_, lines) = read(format!("[{}]", " ".repeat(2 << 20)), &["--max-line", "1M"])
            .await
            .unwrap();
        assert_eq!(lines, [Err(1)]);
    }

    #[tokio::test]
    async fn ids_that_occur_twice_are_counted_and_the_first_is_named() {
        let text = "{\"custom_id\":\"a\"}\n{\"custom_id\":\"b\"}\n{\"custom_id\":\"a\"}\n{\"custom_id\":\"b\"}\n";
        let (requests, _) = read(text, &[]).await.unwrap();
        let expected = "2 lines repeat a custom_id of an earlier line; the first is line 3 with \"a\"";
        assert_eq!(requests.repeated_ids().as_deref(), Some(expected));
    }
}
