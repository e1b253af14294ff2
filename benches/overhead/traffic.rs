//! The requests and responses of the calls that are measured: empty ones, and those of a chat API.

use bytes::Bytes;
use http::{
    HeaderName, HeaderValue, Request, Response, Uri,
    header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, USER_AGENT},
};
use http_body_util::{Empty, Full};
use std::{convert::Infallible, ops::Range};

/// What the calls send and receive.
pub(crate) trait Traffic: 'static {
    /// The body of the requests and of the responses.
    type Body: http_body::Body<Data = Bytes, Error = Infallible> + Clone + Send + 'static;

    fn request() -> Request<Self::Body>;

    fn response() -> Response<Self::Body>;
}

/// Requests and responses without headers and bodies: only the code of the layers is measured.
pub(crate) struct Nothing;

/// A request to a chat API and its response, as they really are: 4 headers and a prompt, 16 headers and an answer.
pub(crate) struct Chat;

pub(crate) const URL: &str = "https://api.openai.com/v1/chat/completions";

/// The body of a request: a prompt of 600 bytes.
pub(crate) const PROMPT: &str = r#"{"model":"gpt-4o-mini","messages":[{"role":"system","content":"You are a careful assistant. Answer in one short paragraph, and say so if you do not know."},{"role":"user","content":"A bucket holds 150,000 tokens and is refilled at 2,500 tokens a second. A client sends requests of 1,200 tokens each, as fast as it is allowed to. How many requests are admitted in the first ten seconds, how long does the next one wait after that, and what changes if the bucket holds only the tokens of one second? Show the steps, but keep each of them to one line."}],"max_tokens":400,"temperature":0.2}"#;

/// The body of a response: an answer with the number of tokens it has used.
pub(crate) const ANSWER: &str = r#"{"id":"chatcmpl-BqW3Xz9LkN2vT7uYd4Rf6Hs8","object":"chat.completion","created":1764280000,"model":"gpt-4o-mini-2024-07-18","choices":[{"index":0,"message":{"role":"assistant","content":"The bucket admits 125 requests at once (150,000 / 1,200), and the refill of 25,000 tokens in ten seconds admits another 20, so 145 in all. From then on a request waits for its own 1,200 tokens, which is 0.48 s. With a bucket of only one second (2,500 tokens) the burst is 2 requests, and 22 are admitted in the first ten seconds.","refusal":null,"annotations":[]},"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":148,"completion_tokens":103,"total_tokens":251,"prompt_tokens_details":{"cached_tokens":0,"audio_tokens":0},"completion_tokens_details":{"reasoning_tokens":0,"audio_tokens":0,"accepted_prediction_tokens":0,"rejected_prediction_tokens":0}},"service_tier":"default","system_fingerprint":"fp_62a23a81ef"}"#;

/// The headers of a response, in the form in which they arrive.
pub(crate) const ANSWER_HEADERS: [(&str, &str); 16] = [
    ("date", "Fri, 27 Nov 2026 20:00:00 GMT"),
    ("content-type", "application/json"),
    ("openai-organization", "org-3Jd8sKq1LmZ7"),
    ("openai-processing-ms", "812"),
    ("openai-version", "2020-10-01"),
    ("x-ratelimit-limit-requests", "10000"),
    ("x-ratelimit-limit-tokens", "200000"),
    ("x-ratelimit-remaining-requests", "9999"),
    ("x-ratelimit-remaining-tokens", "199852"),
    ("x-ratelimit-reset-requests", "6ms"),
    ("x-ratelimit-reset-tokens", "44ms"),
    ("x-request-id", "req_9f0c2b7d41e84a6b8d53c7e1a2f4b6d8"),
    (
        "set-cookie",
        "__cf_bm=q3Xv8.kT2mZ7-1764280000-1.0.1.1-pL9sR; path=/; HttpOnly; Secure; SameSite=None",
    ),
    (
        "strict-transport-security",
        "max-age=31536000; includeSubDomains; preload",
    ),
    ("cf-ray", "9a51f0c3be7d2c1a-FRA"),
    ("alt-svc", "h3=\":443\"; ma=86400"),
];

/// [`ANSWER_HEADERS`], each with where its value is in the bytes of the head of a response. The values of a received
/// response share the bytes of its head, as they do with hyper.
struct AnswerHead {
    bytes: Vec<u8>,
    values: Vec<(HeaderName, Range<usize>)>,
}

impl Traffic for Nothing {
    type Body = Empty<Bytes>;

    fn request() -> Request<Self::Body> {
        Request::new(Empty::new())
    }

    fn response() -> Response<Self::Body> {
        Response::new(Empty::new())
    }
}

impl Traffic for Chat {
    type Body = Full<Bytes>;

    fn request() -> Request<Self::Body> {
        chat_request(Uri::from_static(URL))
    }

    fn response() -> Response<Self::Body> {
        thread_local! {
            static HEAD: AnswerHead = AnswerHead::new();
        }
        let mut response = Response::new(Full::new(Bytes::from_static(ANSWER.as_bytes())));
        HEAD.with(|head| {
            let bytes = Bytes::copy_from_slice(&head.bytes);
            for (name, range) in &head.values {
                let value = HeaderValue::from_maybe_shared(bytes.slice(range.clone())).expect("the value is valid");
                response.headers_mut().append(name.clone(), value);
            }
        });
        response
    }
}

pub(crate) fn chat_request(url: Uri) -> Request<Full<Bytes>> {
    Request::post(url)
        .header(AUTHORIZATION, "Bearer sk-proj-4hT9wQ2zX8vB6nM1kL5jR7dF3gS0pA")
        .header(CONTENT_TYPE, "application/json")
        .header(ACCEPT, "application/json")
        .header(USER_AGENT, "tower-outbound-benches/0.0.0")
        .body(Full::new(Bytes::from_static(PROMPT.as_bytes())))
        .expect("the request is valid")
}

impl AnswerHead {
    fn new() -> Self {
        let mut bytes = Vec::new();
        let values = ANSWER_HEADERS
            .iter()
            .map(|(name, value)| {
                bytes.extend_from_slice(format!("{name}: {value}\r\n").as_bytes());
                let end = bytes.len() - 2;
                (HeaderName::from_static(name), end - value.len()..end)
            })
            .collect();
        Self { bytes, values }
    }
}
