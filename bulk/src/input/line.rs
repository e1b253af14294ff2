//! One line of the input, parsed into its request.

use super::{Malformed, Options, Request, Tokens, fields::Fields, form::Form};
use crate::limits::COST_FIELD;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri, header};
use hyper::body::Bytes;
use serde_json::{Value, value::RawValue};
use tower_outbound::{
    Cost,
    provider::{CharacterEstimate, Provider},
    rate::RequestCost,
};

/// The path that the lines of an Anthropic batch are for.
const ANTHROPIC_PATH: &str = "/v1/messages";

/// Headers that the client sets itself. A line that sets one of them would break the request.
const OWN_HEADERS: [HeaderName; 4] = [
    header::CONNECTION,
    header::CONTENT_LENGTH,
    header::HOST,
    header::TRANSFER_ENCODING,
];

/// Parses a line, whose text has no whitespace around it.
pub(super) fn parse(line: u64, text: &Bytes, options: &Options) -> Result<Request, Malformed> {
    let mut custom_id = None;
    parse_fields(line, text, options, &mut custom_id).map_err(|reason| Malformed {
        line,
        custom_id,
        reason,
        admitted: None,
    })
}

fn parse_fields(
    line: u64,
    bytes: &Bytes,
    options: &Options,
    custom_id: &mut Option<Box<RawValue>>,
) -> Result<Request, String> {
    let text =
        std::str::from_utf8(bytes).map_err(|error| format!("not UTF-8, at column {}", error.valid_up_to() + 1))?;
    let fields = Fields::parse(text)?;
    let form = options.form_of(&fields);
    let id = fields
        .get("custom_id")
        .or_else(|| fields.get("key").filter(|_| form == Form::GeminiBatch));
    // Tools that write tables as JSON write `null` for what a row does not have.
    *custom_id = id.filter(|id| id.get() != "null").map(RawValue::to_owned);
    let part = |name: &str| {
        let value = fields.get(name).filter(|value| value.get().starts_with('{'));
        let range = fields.range_of(value.ok_or_else(|| format!("no object `{name}`"))?);
        Ok::<_, String>(bytes.slice(range))
    };
    let mut headers = HeaderMap::new();
    let mut method = Method::POST;
    let body = match form {
        Form::Lines => {
            let keeps_metadata = keeps_metadata(&fields, options.provider);
            let is_own = |name: &str| name == COST_FIELD && !options.own_budgets.is_empty();
            let is_cut = |name: &str| name == "custom_id" || (name == "metadata" && !keeps_metadata) || is_own(name);
            fields.without(is_cut).map_or_else(|| bytes.clone(), Bytes::from)
        }
        Form::AnthropicBatch => part("params")?,
        Form::GeminiBatch => part("request")?,
        Form::OpenAiBatch => {
            method = method_of(&fields)?;
            part("body")?
        }
        Form::Rest => {
            method = method_of(&fields)?;
            headers = headers_of(&fields)?;
            body_of(&fields, bytes, &mut headers)?
        }
    };
    // A part of the line keeps the whole line in memory, of which only the part is counted.
    let body = if body.len() < bytes.len() / 2 {
        Bytes::copy_from_slice(&body)
    } else {
        body
    };
    let line_url = match form {
        Form::OpenAiBatch | Form::Rest => fields.get("url").map(|url| string(url, "url")).transpose()?,
        _ => None,
    };
    // A base URL alone does not say which of its paths the requests are for; the form does.
    let default_url = (form == Form::AnthropicBatch && options.target.url.is_none()).then_some(ANTHROPIC_PATH);
    let url = options.target.resolve(line_url.as_deref().or(default_url))?;

    let mut request = http::Request::new(body);
    *request.method_mut() = method;
    if let Some(url) = &url {
        *request.uri_mut() = url.clone();
    }
    let tokens = options.tokens.of(text, &request)?;
    let own_cost = if options.own_budgets.is_empty() {
        Cost::none()
    } else {
        options.own_budgets.cost(fields.get(COST_FIELD))?
    };
    let (parts, body) = request.into_parts();
    Ok(Request {
        line,
        custom_id: custom_id.clone(),
        metadata: fields.get("metadata").map(RawValue::to_owned),
        hash: hash(bytes),
        tokens,
        own_cost,
        method: parts.method,
        url,
        headers,
        body,
        admitted: None,
    })
}

impl Tokens {
    /// Returns the number of tokens of `request`, whose whole line is `line`.
    fn of(&self, line: &str, request: &http::Request<Bytes>) -> Result<u64, String> {
        match self {
            Self::Estimate(times) => Ok((CharacterEstimate::new().cost(request).tokens as f64 * times).ceil() as u64),
            Self::Field(pointer) => serde_json::from_str::<Value>(line)
                .ok()
                .and_then(|whole| whole.pointer(pointer)?.as_u64())
                .ok_or_else(|| {
                    let path = pointer[1..].replace('/', ".").replace("~1", "/").replace("~0", "~");
                    format!("no number of tokens at {path}")
                }),
        }
    }
}

/// Returns whether `metadata` in a line that is the body belongs to the API: OpenAI keeps it with a stored answer, and
/// Anthropic's has the single field `user_id`.
fn keeps_metadata(fields: &Fields<'_>, provider: Provider) -> bool {
    let is_stored = fields.get("store").is_some_and(|store| store.get() == "true");
    let is_user_id = || {
        let metadata = fields.get("metadata").and_then(|value| Fields::parse(value.get()).ok());
        metadata.is_some_and(|metadata| metadata.names().eq(["user_id"]))
    };
    is_stored || (provider == Provider::Anthropic && is_user_id())
}

fn method_of(fields: &Fields<'_>) -> Result<Method, String> {
    let Some(method) = fields.get("method") else {
        return Ok(Method::POST);
    };
    let method = string(method, "method")?.to_ascii_uppercase();
    match Method::from_bytes(method.as_bytes()) {
        Ok(Method::CONNECT) | Err(_) => Err("`method` is no method of a request".into()),
        Ok(method) => Ok(method),
    }
}

/// Reads the headers of a line. They may be keys, so they are marked as sensitive, and errors do not show values.
fn headers_of(fields: &Fields<'_>) -> Result<HeaderMap, String> {
    let mut headers = HeaderMap::new();
    let Some(object) = fields.get("headers") else {
        return Ok(headers);
    };
    let object = Fields::parse(object.get()).map_err(|_| "`headers` is not an object")?;
    for name in object.names() {
        let value = object.get(name).map_or("", RawValue::get);
        let value = match value.starts_with('"') {
            true => serde_json::from_str(value).map_err(|_| format!("the header {name:?} is not a string"))?,
            false if value.starts_with(['{', '[', 'n']) => return Err(format!("the header {name:?} is not a string")),
            false => value.to_owned(),
        };
        let header: HeaderName = name.parse().map_err(|_| format!("{name:?} is no name of a header"))?;
        if OWN_HEADERS.contains(&header) {
            return Err(format!("the header `{header}` is set by the client and not by a line"));
        }
        let mut value: HeaderValue = value
            .parse()
            .map_err(|_| format!("the header `{header}` has a value that cannot be sent"))?;
        value.set_sensitive(true);
        headers.insert(header, value);
    }
    Ok(headers)
}

/// Returns the body of a call: a string is sent as its text, `null` or nothing as no body, and other JSON as it is
/// written.
fn body_of(fields: &Fields<'_>, bytes: &Bytes, headers: &mut HeaderMap) -> Result<Bytes, String> {
    let Some(body) = fields.get("body").filter(|body| body.get() != "null") else {
        return Ok(Bytes::new());
    };
    if !body.get().starts_with('"') {
        return Ok(bytes.slice(fields.range_of(body)));
    }
    let text = string(body, "body")?;
    headers
        .entry(header::CONTENT_TYPE)
        .or_insert(HeaderValue::from_static("text/plain; charset=utf-8"));
    Ok(text.into())
}

fn string(value: &RawValue, name: &str) -> Result<String, String> {
    serde_json::from_str(value.get()).map_err(|_| format!("`{name}` is not a string"))
}

/// The FNV-1a hash. It does not depend on the version of a library, so hashes in the results of earlier runs stay
/// valid.
pub(crate) fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// Returns the URL without user information and query, which may hold keys.
pub(crate) fn without_secrets(url: &Uri) -> String {
    let host = url.host().unwrap_or_default();
    let port = url.port().map_or(String::new(), |port| format!(":{port}"));
    format!("{}://{host}{port}{}", url.scheme_str().unwrap_or_default(), url.path())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Args;
    use clap::Parser;

    fn options(args: &[&str]) -> Options {
        let args = Args::parse_from([&["bulk"], args].concat());
        let target = args.send.target().unwrap();
        Options::new(&args, target)
    }

    fn with(text: &str, args: &[&str]) -> Result<Request, String> {
        let text = Bytes::copy_from_slice(text.as_bytes());
        parse(7, &text, &options(args)).map_err(|malformed| malformed.reason)
    }

    fn request(text: &str) -> Request {
        with(text, &[]).unwrap()
    }

    #[test]
    fn the_line_without_its_custom_id_and_metadata_is_the_body() {
        let text = r#"{"custom_id":"a","z":1.0,"metadata":{"row":1}, "a":{"big":123456789012345678901234567890,"big":"\u0041"}}"#;
        let request = request(text);
        assert_eq!(request.custom_id.unwrap().get(), r#""a""#);
        assert_eq!(request.metadata.unwrap().get(), r#"{"row":1}"#);
        assert_eq!(
            request.body,
            r#"{"z":1.0, "a":{"big":123456789012345678901234567890,"big":"\u0041"}}"#
        );
        assert_eq!((request.line, request.method), (7, Method::POST));
    }

    #[test]
    fn what_a_line_takes_of_budgets_of_ones_own_is_cut_out_of_a_body_and_read_in_every_form() {
        let own = ["--budget", "images=10/min"];
        for (text, body, images) in [
            (r#"{"cost":{"images":3},"input":"x"}"#, r#"{"input":"x"}"#, 3),
            (
                r#"{"custom_id":"c","params":{"a":1},"cost":{"images":0}}"#,
                r#"{"a":1}"#,
                0,
            ),
            (
                r#"{"custom_id":"c","url":"/x","body":{"a":1},"cost":{"images":2}}"#,
                r#"{"a":1}"#,
                2,
            ),
            (r#"{"key":"c","request":{"a":1}}"#, r#"{"a":1}"#, 1),
        ] {
            let request = with(text, &own).unwrap();
            assert_eq!(
                (&*request.body, request.own_cost.of("images")),
                (body.as_bytes(), images)
            );
        }
        assert_eq!(
            with(r#"{"cost":{"images":"3"},"input":"x"}"#, &own).unwrap_err(),
            "`cost.images` is not a whole number"
        );
        // Without such a budget it is a field like any other.
        let body = r#"{"cost":"low","input":"x"}"#;
        assert_eq!(request(body).body, body);
    }

    #[test]
    fn metadata_that_the_api_keeps_is_sent_and_stands_in_the_result() {
        let stored = r#"{"store":true,"metadata":{"row":"1"},"messages":[]}"#;
        assert_eq!(request(stored).body, stored);
        assert_eq!(request(stored).metadata.unwrap().get(), r#"{"row":"1"}"#);
        let user = r#"{"metadata":{"user_id":"u"},"messages":[]}"#;
        assert_eq!(with(user, &["--provider", "anthropic"]).unwrap().body, user);
        assert_eq!(request(user).body, r#"{"messages":[]}"#);
    }

    #[test]
    fn the_body_of_a_batch_line_is_sent_as_it_is_written() {
        for text in [
            r#"{"custom_id":"c","method":"POST","url":"/v1/x","body":{"b": 1, "a":2}}"#,
            r#"{"custom_id":"c","params":{"b": 1, "a":2}}"#,
            r#"{"key":"c","request":{"b": 1, "a":2}}"#,
        ] {
            let request = request(text);
            assert_eq!(request.body, r#"{"b": 1, "a":2}"#);
            assert_eq!(request.custom_id.unwrap().get(), r#""c""#);
        }
    }

    #[test]
    fn a_request_does_not_keep_what_else_is_in_its_line() {
        let text = Bytes::from(format!(
            r#"{{"custom_id":"c","body":{{"a":1}},"metadata":"{}"}}"#,
            "x".repeat(1_000)
        ));
        let request = parse(7, &text, &options(&[])).unwrap();
        assert_eq!(request.body, r#"{"a":1}"#);
        assert!(text.is_unique());
    }

    #[test]
    fn a_call_has_its_method_headers_and_body() {
        let call = request(r#"{"method":"patch","url":"/x","headers":{"x-team":"a","x-n":7},"body":[1, 2]}"#);
        assert_eq!((call.method.as_str(), &*call.body), ("PATCH", &b"[1, 2]"[..]));
        assert_eq!(
            (call.headers["x-team"].as_bytes(), call.headers["x-n"].as_bytes()),
            (&b"a"[..], &b"7"[..])
        );
        assert!(call.headers["x-team"].is_sensitive());
        let get = request(r#"{"method":"GET","url":"/x?page=2"}"#);
        assert_eq!((get.method, &*get.body, get.tokens), (Method::GET, &b""[..], 0));
        let text = request(r#"{"method":"PUT","url":"/x","body":"a\nb"}"#);
        assert_eq!(
            (&*text.body, text.headers["content-type"].as_bytes()),
            (&b"a\nb"[..], &b"text/plain; charset=utf-8"[..])
        );
    }

    #[test]
    fn what_cannot_be_sent_is_malformed_and_no_value_of_a_header_is_shown() {
        for (text, expected) in [
            (
                r#"{"method":"GET","url":"/x","headers":{"a":"sec\nret"}}"#,
                "the header `a` has a value that cannot be sent",
            ),
            (
                r#"{"method":"GET","url":"/x","headers":{"a b":"secret"}}"#,
                "\"a b\" is no name of a header",
            ),
            (
                r#"{"method":"GET","url":"/x","headers":{"Host":"secret"}}"#,
                "the header `host` is set by the client and not by a line",
            ),
            (
                r#"{"method":"GET","url":"/x","headers":[]}"#,
                "`headers` is not an object",
            ),
            (
                r#"{"method":"GET","url":"/x","headers":{"a":"\ud800"}}"#,
                "the header \"a\" is not a string",
            ),
            (r#"{"method":"A B","url":"/x"}"#, "`method` is no method of a request"),
            ("[]", "not a JSON object"),
            (r#"{"a":}"#, "expected value, at column 6"),
        ] {
            assert_eq!(with(text, &[]).unwrap_err(), expected);
        }
        let broken = Bytes::from_static(b"{\"a\":\"\xff\"}");
        assert_eq!(
            parse(1, &broken, &options(&[])).unwrap_err().reason,
            "not UTF-8, at column 7"
        );
    }

    #[test]
    fn a_malformed_line_keeps_its_custom_id() {
        let text = Bytes::from_static(br#"{"custom_id":"a","method":"A B","url":"/x"}"#);
        let malformed = parse(1, &text, &options(&[])).unwrap_err();
        assert_eq!(malformed.custom_id.unwrap().get(), r#""a""#);
    }

    #[test]
    fn null_is_no_custom_id() {
        let request = request(r#"{"custom_id":null,"a":1}"#);
        assert_eq!(
            (request.custom_id.is_none(), &*request.body),
            (true, &br#"{"a":1}"#[..])
        );
    }

    #[test]
    fn the_form_can_be_forced() {
        let text = r#"{"custom_id":1,"body":{"a":1}}"#;
        assert_eq!(
            with(text, &["--input-format", "lines"]).unwrap().body,
            r#"{"body":{"a":1}}"#
        );
        assert_eq!(
            with(text, &["--input-format", "anthropic-batch"]).unwrap_err(),
            "no object `params`"
        );
    }

    #[test]
    fn a_field_of_tokens_is_found_by_its_path() {
        let tokens = |text| with(text, &["--tokens-field", "a.b/c.1"]).map(|request| request.tokens);
        assert_eq!(tokens(r#"{"a":{"b/c":[4,5]}}"#), Ok(5));
        for text in [r#"{"a":{}}"#, r#"{"a":{"b/c":[4,"5"]}}"#, r#"{"a":{"b/c":[4,-5]}}"#] {
            assert_eq!(tokens(text).unwrap_err(), "no number of tokens at a.b/c.1");
        }
    }

    #[test]
    fn the_hash_is_fnv_1a() {
        assert_eq!(hash(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(hash(b"foobar"), 0x8594_4171_f739_67e8);
    }

    #[test]
    fn a_url_is_shown_without_what_may_be_a_key() {
        let url = Uri::from_static("https://user:secret@h.example:8443/v1/x?key=secret");
        assert_eq!(without_secrets(&url), "https://h.example:8443/v1/x");
    }
}
