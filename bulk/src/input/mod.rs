//! The file of requests. It is read line by line, so its length is not limited by memory.

use anyhow::Context;
use http::{HeaderMap, Method, Uri};
use hyper::body::Bytes;
use serde_json::{Value, value::RawValue};
use std::path::Path;
use tokio::{
    fs::File,
    io::{AsyncBufReadExt, AsyncRead, BufReader},
};
use tower_outbound::{provider::CharacterEstimate, rate::RequestCost};

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
    pub(crate) method: Method,
    /// The absolute URL that the request is sent to; `None` for that of the command line.
    pub(crate) url: Option<Uri>,
    /// The headers of the line, which are sent beside those of the command line.
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

/// A line of the input that is not a request, and what is wrong with it.
#[derive(Debug)]
pub(crate) struct Malformed {
    pub(crate) line: u64,
    pub(crate) reason: String,
}

/// How the number of tokens of a request is determined.
#[derive(Clone, Debug)]
pub(crate) enum Tokens {
    /// The number of tokens is estimated, and the estimate is multiplied by this factor.
    Estimate(f64),
    /// The number of tokens is read from the field of the line at this JSON pointer.
    Field(String),
}

/// Reads the requests of a file. Empty lines are skipped.
pub(crate) struct Requests<R = File> {
    file: BufReader<R>,
    line: u64,
    tokens: Tokens,
}

impl Requests {
    pub(crate) async fn open(path: &Path, tokens: Tokens) -> anyhow::Result<Self> {
        let file = File::open(path)
            .await
            .with_context(|| format!("cannot open {}", path.display()))?;
        Ok(Self::new(file, tokens))
    }
}

impl<R: AsyncRead + Unpin> Requests<R> {
    pub(crate) fn new(file: R, tokens: Tokens) -> Self {
        Self {
            file: BufReader::new(file),
            line: 0,
            tokens,
        }
    }

    pub(crate) async fn next(&mut self) -> anyhow::Result<Option<Result<Request, Malformed>>> {
        let mut bytes = Vec::new();
        loop {
            bytes.clear();
            if self
                .file
                .read_until(b'\n', &mut bytes)
                .await
                .context("cannot read the input")?
                == 0
            {
                return Ok(None);
            }
            self.line += 1;
            let text = bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(&bytes).trim_ascii();
            if !text.is_empty() {
                let line = self.line;
                return Ok(Some(
                    parse(line, text, &self.tokens).map_err(|reason| Malformed { line, reason }),
                ));
            }
        }
    }
}

impl Tokens {
    pub(crate) fn new(path: Option<&str>, times: f64) -> Self {
        path.map_or(Self::Estimate(times), |path| {
            let pointer = path.replace('~', "~0").replace('/', "~1").replace('.', "/");
            Self::Field(format!("/{pointer}"))
        })
    }

    /// Returns the number of tokens of `request`, whose whole line is `whole`.
    fn of(&self, whole: &Value, request: &http::Request<Bytes>) -> Result<u64, String> {
        match self {
            Self::Estimate(times) => Ok((CharacterEstimate::new().cost(request).tokens as f64 * times).ceil() as u64),
            Self::Field(pointer) => whole
                .pointer(pointer)
                .and_then(Value::as_u64)
                .ok_or_else(|| format!("no number of tokens at {}", pointer[1..].replace('/', "."))),
        }
    }
}

fn parse(line: u64, text: &[u8], tokens: &Tokens) -> Result<Request, String> {
    let mut whole: Value = serde_json::from_slice(text).map_err(|error| {
        let reason = error.to_string();
        // The parser sees a single line, so the line number in its error is always 1 and is cut off.
        let reason = reason.split(" at line ").next().unwrap_or_default();
        format!("{reason}, at column {}", error.column())
    })?;
    whole.as_object().ok_or("not a JSON object")?;
    let custom_id = whole.as_object_mut().and_then(|fields| fields.remove("custom_id"));
    let custom_id = custom_id.and_then(|id| RawValue::from_string(id.to_string()).ok());
    // The body is the field `body` if that is an object, as in batch files, and the whole line otherwise.
    let body = whole
        .get("body")
        .filter(|body| body.is_object())
        .unwrap_or(&whole)
        .to_string();
    let request = http::Request::new(Bytes::from(body));
    Ok(Request {
        line,
        custom_id,
        metadata: None,
        hash: hash(text),
        tokens: tokens.of(&whole, &request)?,
        method: Method::POST,
        url: None,
        headers: HeaderMap::new(),
        body: request.into_body(),
    })
}

/// The FNV-1a hash. It does not depend on the version of a library, so hashes in the results of earlier runs stay
/// valid.
fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(text: &str, tokens: Option<&str>) -> Result<Request, String> {
        parse(7, text.as_bytes(), &Tokens::new(tokens, 1.0))
    }

    #[test]
    fn the_line_without_its_custom_id_is_the_body() {
        let request = request(
            r#"{"custom_id":"a","max_tokens":64,"messages":[{"content":"12345"}]}"#,
            None,
        )
        .unwrap();
        assert_eq!(request.custom_id.unwrap().get(), r#""a""#);
        assert_eq!(request.body, r#"{"max_tokens":64,"messages":[{"content":"12345"}]}"#);
        assert_eq!((request.line, request.tokens), (7, 66));
    }

    #[test]
    fn the_field_body_is_the_body_if_it_is_an_object() {
        let text = r#"{"custom_id":1,"url":"/v1","tokens":9,"body":{"max_tokens":5}}"#;
        assert_eq!(request(text, None).unwrap().body, r#"{"max_tokens":5}"#);
        assert_eq!(request(text, None).unwrap().tokens, 5);
        assert_eq!(request(text, Some("tokens")).unwrap().tokens, 9);
        // A field `body` that is not an object is a field like any other.
        assert_eq!(
            request(r#"{"body":"hello"}"#, None).unwrap().body,
            r#"{"body":"hello"}"#
        );
    }

    #[test]
    fn the_estimate_counts_characters_of_all_messages() {
        let text = r#"{"messages":[{"role":"system","content":"äöüß"},{"content":[{"type":"text","text":"1234"},{"type":"image"}]}]}"#;
        assert_eq!(request(text, None).unwrap().tokens, 2);
        assert_eq!(request(r#"{"max_completion_tokens":10}"#, None).unwrap().tokens, 10);
        assert_eq!(request("{}", None).unwrap().tokens, 0);
    }

    #[test]
    fn a_field_is_found_by_its_path() {
        assert_eq!(request(r#"{"a":{"b/c":[4,5]}}"#, Some("a.b/c.1")).unwrap().tokens, 5);
        for text in [r#"{"a":{}}"#, r#"{"a":{"b":"5"}}"#, r#"{"a":{"b":-5}}"#] {
            assert_eq!(request(text, Some("a.b")).unwrap_err(), "no number of tokens at a.b");
        }
    }

    #[test]
    fn a_line_that_is_not_an_object_is_malformed() {
        assert_eq!(request("[]", None).unwrap_err(), "not a JSON object");
        assert_eq!(request(r#"{"a":}"#, None).unwrap_err(), "expected value, at column 6");
        assert!(parse(1, b"{\"a\":\"\xff\"}", &Tokens::Estimate(1.0)).is_err());
    }

    #[test]
    fn the_hash_is_fnv_1a() {
        assert_eq!(hash(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(hash(b"foobar"), 0x8594_4171_f739_67e8);
    }
}
