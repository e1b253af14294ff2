//! Tests of `CheckLayer`: which successful responses are answers, and what becomes of a call that has got none.

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::time::Instant;
use tower::{BoxError, Layer, Service, ServiceBuilder, ServiceExt, retry::RetryLayer, service_fn};
use tower_outbound::{
    Executor, RequestStatus,
    body::{CheckLayer, CollectLayer},
    error::{BadResponse, BadResponseReason as Reason},
    event::Http,
    provider::{Provider, UsageLayer},
    retry::RetryPolicy,
};

const JSON: &str = "application/json";
const EVENTS: &str = "text/event-stream; charset=utf-8";
const LINES: &str = "application/x-ndjson";

fn response(kind: &str, body: impl Into<Bytes>) -> Response<Bytes> {
    let mut response = Response::builder();
    if !kind.is_empty() {
        response = response.header("content-type", kind);
    }
    response.body(body.into()).unwrap()
}

fn prompt() -> Request<Bytes> {
    Request::post("http://localhost/v1/chat/completions")
        .body(Bytes::from_static(br#"{"messages":[]}"#))
        .unwrap()
}

async fn check(request: Request<Bytes>, response: Response<Bytes>) -> Result<Response<Bytes>, BadResponse> {
    let client = service_fn(move |_: Request<Bytes>| {
        let response = response.clone();
        async move { Ok::<_, Infallible>(response) }
    });
    let result = CheckLayer::new().layer(client).oneshot(request).await;
    result.map_err(|error| *error.downcast::<BadResponse>().unwrap())
}

/// Returns what is wrong with the response to a prompt, or `None` if it is an answer.
async fn defect(kind: &str, body: &str) -> Option<Reason> {
    let result = check(prompt(), response(kind, body.to_owned())).await;
    result.err().map(|error| error.reason())
}

#[tokio::test]
async fn an_error_document_is_not_an_answer() {
    for text in [
        r#"{"error":{"message":"Provider returned error","code":502}}"#,
        r#"{"error":{"message":"Rate limit exceeded","code":429},"user_id":"u"}"#,
        r#"  {"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}"#,
        r#"{"type":"error","message":"broken"}"#,
        r#"{"object":"error","message":"no","type":"BadRequestError","code":400}"#,
        r#"{"error":"channel_not_found","ok":false}"#,
        r#"{"error":true,"message":"no"}"#,
        r#"{"success":false,"error":"no","data":{"request":1}}"#,
        r#"{"timestamp":1,"status":500,"error":"Internal Server Error"}"#,
        r#"{"error":{"message":"no"},"choices":[]}"#,
        r#"{"error":{"message":"no"},"choices":null,"usage":{"total_tokens":3}}"#,
        r#"{"choices":[{"index":0,"error":{"code":502,"message":"gone"},"finish_reason":"error","message":{"content":"He"}}]}"#,
        r#"{"choices":[{"finish_reason":"error","message":{"content":"He"}}]}"#,
        r#"{"object":"response","status":"failed","error":{"code":"server_error","message":"x"},"output":[]}"#,
        r#"{"object":"response","status":"failed","output":[{"type":"message"}]}"#,
        r#"{"object":"response","status":"cancelled","error":null}"#,
        r#"{"errors":[{"message":"Cannot query field"}],"data":null}"#,
        r#"{"success":false,"errors":[{"code":1000,"message":"not allowed"}],"result":null}"#,
        r#"[{"candidates":[{}]},{"error":{"code":503,"status":"UNAVAILABLE"}}]"#,
    ] {
        assert_eq!(defect(JSON, text).await, Some(Reason::ReportedError), "{text}");
        // The content type does not matter.
        if text.starts_with('{') {
            assert_eq!(defect("text/plain", text).await, Some(Reason::ReportedError), "{text}");
        }
    }
}

#[tokio::test]
async fn a_document_with_an_answer_is_an_answer_whatever_else_it_holds() {
    for text in [
        r#"{"choices":[{"message":{"content":"error"},"finish_reason":"stop"}]}"#,
        r#"{"choices":[{"message":{"content":"x"},"finish_reason":"length"}],"error":null}"#,
        // A warning beside an answer, and one of two answers.
        r#"{"choices":[{"message":{"content":"x"},"finish_reason":"stop"}],"error":{"message":"deprecated"}}"#,
        r#"{"choices":[{"finish_reason":"error"},{"message":{"content":"x"},"finish_reason":"stop"}]}"#,
        r#"{"type":"message","content":[{"type":"text","text":"{\"error\":1}"}],"stop_reason":"max_tokens"}"#,
        r#"{"object":"response","status":"completed","error":null,"output":[{}]}"#,
        r#"{"object":"response","status":"incomplete","incomplete_details":{"reason":"max_output_tokens"},"output":[{}]}"#,
        r#"{"object":"response","status":"queued","error":null,"output":[]}"#,
        r#"{"candidates":[{"content":{"parts":[{"text":"x"}]}}]}"#,
        r#"{"promptFeedback":{"blockReason":"SAFETY"}}"#,
        r#"{"object":"list","data":[{"embedding":[0.1,1e999]}]}"#,
        r#"{"data":[1e999]}"#,
        r#"{"choices":[{"message":{"content":"\ud83d"},"finish_reason":"stop"}]}"#,
        r#"{"text":"\ud83d"}"#,
        r#"{"error":false,"value":1}"#,
        r#"{"error":"","value":1}"#,
        r#"{"error":{},"value":1}"#,
        r#"{"object":"fine_tuning.job","status":"running","error":{"code":null,"message":null,"param":null}}"#,
        r#"{"errors":[],"data":{"a":1}}"#,
        r#"{"errors":[{"message":"one field"}],"data":{"a":1}}"#,
        r#"{"valid":false,"errors":["no name"]}"#,
        // The state of another job, which is the answer to the question for it.
        r#"{"object":"batch","status":"failed","errors":{"data":[{"message":"x"}]}}"#,
        r#"{"a":{"error":{"message":"deeper"}}}"#,
        r#"[{"id":1,"error":{"message":"one of many"}},{"id":2}]"#,
        r#"[{"id":1},{"id":2,"error":{"message":"one of many"}}]"#,
        r#"{"n":123456789012345678901234567890}"#,
        "{}",
        "[]",
        "\u{feff}{}\n",
        "null",
        "3",
        r#""text""#,
    ] {
        assert_eq!(defect(JSON, text).await, None, "{text}");
    }
}

#[tokio::test]
async fn a_body_that_is_cut_empty_a_page_or_no_json_is_not_an_answer() {
    let page = "<!DOCTYPE html><html><body>502 Bad Gateway</body></html>";
    for (kind, text, reason) in [
        (
            JSON,
            r#"{"choices":[{"message":{"content":"He"#,
            Some(Reason::Truncated),
        ),
        (JSON, r#"{"choices":[{"message":"#, Some(Reason::Truncated)),
        ("application/problem+json", "[1,", Some(Reason::Truncated)),
        (JSON, "upstream connect error", Some(Reason::NotJson)),
        (JSON, r#"{"a":1}{"b":2}"#, Some(Reason::NotJson)),
        (JSON, r#"{"a":1} trailing"#, Some(Reason::NotJson)),
        (JSON, page, Some(Reason::Html)),
        ("text/html; charset=utf-8", page, Some(Reason::Html)),
        ("text/html", "<center>log in</center>", Some(Reason::Html)),
        ("text/plain", " <HTML></HTML>", Some(Reason::Html)),
        ("", page, Some(Reason::Html)),
        ("", "upstream connect error", Some(Reason::NotJson)),
        (JSON, "", Some(Reason::Empty)),
        (JSON, " \n\n ", Some(Reason::Empty)),
        ("", "", Some(Reason::Empty)),
        ("text/plain", "", Some(Reason::Empty)),
        (
            JSON,
            r#"{"choices":[],"usage":{"total_tokens":3}}"#,
            Some(Reason::Empty),
        ),
        (JSON, r#"{"choices":null}"#, Some(Reason::Empty)),
        ("audio/mpeg", "", Some(Reason::Empty)),
        // Answers that are not JSON.
        ("text/plain", "WEBVTT", None),
        ("text/plain", "{name} is a placeholder", None),
        ("audio/mpeg", "ID3", None),
        ("application/octet-stream", "<html>", None),
        ("application/octet-stream", "", Some(Reason::Empty)),
        ("", r#"{"a":1}"#, None),
    ] {
        assert_eq!(defect(kind, text).await, reason, "{kind}: {text}");
    }
    let latin = check(prompt(), response(JSON, &b"{\"a\":\"\xe4\"}"[..]))
        .await
        .unwrap_err();
    assert_eq!(latin.reason(), Reason::NotJson);
    let mut short = response("application/octet-stream", "1234");
    short.headers_mut().insert("content-length", 5.into());
    assert_eq!(check(prompt(), short).await.unwrap_err().reason(), Reason::Truncated);
}

#[tokio::test]
async fn what_was_not_asked_for_need_not_be_there() {
    let ask = |method: &str, accept: &str, body: &str| {
        let mut request = Request::builder().method(method).uri("http://localhost/a");
        if !accept.is_empty() {
            request = request.header("accept", accept);
        }
        request.body(Bytes::from(body.to_owned())).unwrap()
    };
    let empty = |status: u16| {
        let mut response = response("", "");
        *response.status_mut() = StatusCode::from_u16(status).unwrap();
        response
    };
    let page = || response("text/html", "<html></html>");
    for (request, response, reason) in [
        (ask("HEAD", JSON, ""), response(JSON, ""), None),
        (ask("POST", JSON, "{}"), empty(204), None),
        (ask("POST", "", "{}"), empty(202), None),
        (ask("PUT", "", "{}"), empty(200), None),
        (ask("DELETE", JSON, ""), empty(200), None),
        (ask("GET", "", ""), empty(200), None),
        (ask("POST", "", "a=b"), empty(200), None),
        (ask("GET", JSON, ""), empty(200), Some(Reason::Empty)),
        (ask("POST", "", "{}"), empty(200), Some(Reason::Empty)),
        (ask("POST", "*/*", "[1]"), empty(200), Some(Reason::Empty)),
        (ask("GET", "", ""), page(), None),
        (ask("GET", "text/html,*/*", ""), page(), None),
        (ask("POST", "", "a=b"), page(), None),
        (ask("GET", JSON, ""), page(), Some(Reason::Html)),
        (ask("POST", "audio/mpeg", "{}"), page(), Some(Reason::Html)),
        (ask("GET", "", ""), response(JSON, "<html>"), Some(Reason::Html)),
        // Only a request that accepts nothing but JSON makes a fault of a text.
        (
            ask("GET", JSON, ""),
            response("text/plain", "ok"),
            Some(Reason::NotJson),
        ),
        (
            ask("GET", "application/json, text/plain, */*", ""),
            response("text/plain", "ok"),
            None,
        ),
        (ask("POST", "", "{}"), response("text/plain", "ok"), None),
    ] {
        let shown = format!("{request:?} {response:?}");
        let checked = check(request, response).await.err().map(|error| error.reason());
        assert_eq!(checked, reason, "{shown}");
    }
    // A failure, and a body that the client has not decompressed, are passed on.
    let mut failure = response(JSON, "");
    *failure.status_mut() = StatusCode::BAD_GATEWAY;
    check(prompt(), failure).await.unwrap();
    let mut compressed = response(JSON, &b"\x1f\x8b"[..]);
    compressed
        .headers_mut()
        .insert("content-encoding", "gzip".parse().unwrap());
    check(prompt(), compressed).await.unwrap();
}

#[tokio::test]
async fn a_stream_is_an_answer_only_with_its_end_and_without_an_error() {
    let hello = "data: {\"choices\":[{\"delta\":{\"content\":\"he\"},\"finish_reason\":null}]}\n\n";
    let usage = "data: {\"choices\":[],\"usage\":{\"total_tokens\":12}}\n\n";
    let chunk =
        "data: {\"object\":\"chat.completion.chunk\",\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n";
    let cohere = "data: {\"type\":\"message-start\"}\n\ndata: {\"type\":\"content-delta\"}\n\n";
    let claude = "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"content\":[]}}\n\n";
    let created = "event: response.created\r\ndata: {\"type\":\"response.created\",\"response\":{\"object\":\"response\",\"error\":null}}\r\n\r\n";
    for (text, reason) in [
        (format!(": PROCESSING\n\n{hello}{usage}data: [DONE]\n\n"), None),
        (format!("{hello}{usage}data: [DONE]"), None),
        (
            format!("{hello}data: {{\"choices\":[{{\"delta\":{{}},\"finish_reason\":\"stop\"}}]}}\n\n"),
            None,
        ),
        // OpenAI itself sends `[DONE]`, and the usage before it.
        (format!("{chunk}data: [DONE]\n\n"), None),
        (chunk.to_owned(), Some(Reason::Truncated)),
        (format!("{chunk}data: [DO\n\n"), Some(Reason::Truncated)),
        (format!("{hello}data: [DO\n\ndata: [DONE]\n\n"), Some(Reason::NotJson)),
        (cohere.to_owned(), Some(Reason::Truncated)),
        (format!("{cohere}data: {{\"type\":\"message-end\"}}\n\n"), None),
        (format!("{hello}{usage}"), Some(Reason::Truncated)),
        (format!("{hello}data: {{\"choices\":[{{\"del"), Some(Reason::Truncated)),
        (
            format!("{hello}data: {{choices}}\n\ndata: [DONE]\n\n"),
            Some(Reason::NotJson),
        ),
        (
            format!("{hello}data: {{\"error\":{{\"code\":502}}}}\n\ndata: [DONE]\n\n"),
            Some(Reason::ReportedError),
        ),
        (
            format!(
                "{hello}data: {{\"error\":{{\"code\":502}},\"choices\":[{{\"finish_reason\":\"error\"}}]}}\n\ndata: [DONE]\n\n"
            ),
            Some(Reason::ReportedError),
        ),
        (
            format!("{hello}event: error\ndata: too slow\n\n"),
            Some(Reason::ReportedError),
        ),
        (
            format!("{hello}event: error\n\ndata: [DONE]\n\n"),
            Some(Reason::ReportedError),
        ),
        (
            format!("{hello}data: {{\"error\":{{\"code\":502}},\"choices\":[{{\"delta\":{{}}}}]}}\n\ndata: [DONE]\n\n"),
            Some(Reason::ReportedError),
        ),
        // A document in place of the stream.
        (r#"{"error":{"code":502}}"#.to_owned(), Some(Reason::ReportedError)),
        (r#"{"choices":[{"finish_reason":"stop"}]}"#.to_owned(), None),
        (
            format!("{claude}event: message_stop\ndata: {{\"type\":\"message_stop\"}}\n\n"),
            None,
        ),
        (
            format!("{claude}event: ping\ndata: {{\"type\":\"ping\"}}\n\n"),
            Some(Reason::Truncated),
        ),
        (
            format!(
                "{claude}event: error\ndata: {{\"type\":\"error\",\"error\":{{\"type\":\"overloaded_error\",\"message\":\"Overloaded\"}}}}\n\n"
            ),
            Some(Reason::ReportedError),
        ),
        (
            format!(
                "{created}data: {{\"type\":\"response.completed\",\"response\":{{\"object\":\"response\",\"status\":\"completed\"}}}}\n\n"
            ),
            None,
        ),
        (
            format!("{created}data: {{\"type\":\"response.incomplete\",\"response\":{{}}}}\n\n"),
            None,
        ),
        (created.to_owned(), Some(Reason::Truncated)),
        (
            format!(
                "{created}data: {{\"type\":\"response.failed\",\"response\":{{\"error\":{{\"code\":\"server_error\"}}}}}}\n\n"
            ),
            Some(Reason::ReportedError),
        ),
        (
            "data: {\"candidates\":[{\"content\":{}}]}\n\n".to_owned(),
            Some(Reason::Truncated),
        ),
        (
            "data: {\"candidates\":[{\"content\":{},\"finishReason\":\"STOP\"}]}\n\n".to_owned(),
            None,
        ),
        // The end of a stream in another format cannot be told.
        ("event: tick\ndata: {\"n\":1}\n\n".to_owned(), None),
        ("data: any text\n\n".to_owned(), None),
        (": nothing else\n\n".to_owned(), Some(Reason::Empty)),
        (String::new(), Some(Reason::Empty)),
    ] {
        assert_eq!(defect(EVENTS, &text).await, reason, "{text}");
        if text.starts_with("data:") {
            assert_eq!(defect(JSON, &text).await, reason, "a stream under another type: {text}");
        }
    }
    for (text, reason) in [
        ("{\"message\":{},\"done\":false}\n{\"done\":true}\n", None),
        (
            "{\"message\":{},\"done\":false}\n{\"done\":false}\n",
            Some(Reason::Truncated),
        ),
        (
            "{\"message\":{},\"done\":false}\n{\"error\":\"out of memory\"}\n",
            Some(Reason::ReportedError),
        ),
        ("{\"message\":{},\"done\":false}\n{\"do", Some(Reason::Truncated)),
        ("{\"id\":1}\n\n{\"id\":2}", None),
    ] {
        assert_eq!(defect(LINES, text).await, reason, "{text}");
        assert_eq!(defect(JSON, text).await, reason, "lines under another type: {text}");
    }
}

#[tokio::test]
async fn a_stream_of_several_choices_has_ended_when_each_of_them_has() {
    let begun =
        |index: u32| format!("data: {{\"choices\":[{{\"index\":{index},\"delta\":{{\"content\":\"he\"}}}}]}}\n\n");
    let ended = |index: u32| format!("data: {{\"choices\":[{{\"index\":{index},\"finish_reason\":\"stop\"}}]}}\n\n");
    let both = format!("{}{}", begun(0), begun(1));
    for (text, reason) in [
        (format!("{both}{}", ended(0)), Some(Reason::Truncated)),
        (format!("{both}{}", ended(1)), Some(Reason::Truncated)),
        (format!("{both}{}{}", ended(1), ended(0)), None),
        (format!("{both}{}data: [DONE]\n\n", ended(1)), None),
        // Azure sends the results of its filter after the end of the choice.
        (format!("{}{}{}", begun(0), ended(0), begun(0)), None),
    ] {
        assert_eq!(defect(EVENTS, &text).await, reason, "{text}");
    }
    let candidate = |index: u32, end: &str| format!("data: {{\"candidates\":[{{\"index\":{index}{end}}}]}}\n\n");
    let end = ",\"finishReason\":\"STOP\"";
    let cut = format!("{}{}", candidate(0, end), candidate(1, ""));
    assert_eq!(defect(EVENTS, &cut).await, Some(Reason::Truncated));
    let whole = format!("{cut}{}", candidate(1, end));
    assert_eq!(defect(EVENTS, &whole).await, None);
}

#[tokio::test]
async fn a_document_with_half_of_a_character_is_read_like_any_other() {
    // JavaScript cuts texts in the middle of such characters.
    let error = r#"{"error":{"type":"overloaded_error","message":"no room for \\ud83d and \ud83d"}}"#;
    let error = check(prompt(), response(JSON, error)).await.unwrap_err();
    assert_eq!(error.reported_status(), StatusCode::from_u16(529).ok());
    assert_eq!(
        defect(JSON, r#"{"choices":[],"id":"\ud83d"}"#).await,
        Some(Reason::Empty)
    );
    let end = "data: {\"choices\":[{\"delta\":{\"content\":\"\\ud83d\"},\"text\":\"\\ud83d\",\"finish_reason\":\"stop\"}]}\n\n";
    let begun = "data: {\"choices\":[{\"delta\":{}}]}\n\n";
    assert_eq!(defect(EVENTS, &format!("{begun}{end}")).await, None);
}

#[tokio::test]
async fn of_a_field_that_is_there_twice_the_last_one_counts() {
    let answer = r#"{"choices":null,"choices":[{"message":{}}]}"#;
    assert_eq!(defect(JSON, answer).await, None);
    let nothing = r#"{"choices":[{"message":{}}],"choices":null}"#;
    assert_eq!(defect(JSON, nothing).await, Some(Reason::Empty));
}

#[tokio::test]
async fn an_end_without_anything_before_it_is_not_an_answer() {
    for text in [
        "data: [DONE]\n\n",
        ": PROCESSING\n\ndata: [DONE]\n\n",
        "data: {\"choices\":[],\"usage\":{\"total_tokens\":3}}\n\ndata: [DONE]\n\n",
    ] {
        assert_eq!(defect(EVENTS, text).await, Some(Reason::Empty), "{text}");
    }
}

#[tokio::test]
async fn lines_that_are_no_json_are_not_an_answer() {
    for (text, reason) in [
        ("<html></html>", Some(Reason::Html)),
        ("upstream connect error", Some(Reason::NotJson)),
        ("{\"id\":1}\nupstream connect error\n", Some(Reason::NotJson)),
        ("[1,2]\n[3,", Some(Reason::Truncated)),
        ("[1,2]\n3\n\"a\"", None),
        ("{\"id\":1}\n[DONE]", None),
    ] {
        assert_eq!(defect(LINES, text).await, reason, "{text}");
    }
}

#[tokio::test]
async fn the_error_tells_what_the_body_reports_and_whether_it_may_pass() {
    for (text, status, code, is_transient) in [
        (r#"{"error":{"code":502}}"#, Some(502), None, true),
        (r#"{"error":{"code":"429"}}"#, Some(429), None, true),
        (
            r#"{"error":{"code":429,"status":"RESOURCE_EXHAUSTED"}}"#,
            Some(429),
            Some("RESOURCE_EXHAUSTED"),
            true,
        ),
        (
            r#"{"error":{"type":"overloaded_error"}}"#,
            Some(529),
            Some("overloaded_error"),
            true,
        ),
        (r#"{"error":{"type":"api_error"}}"#, Some(500), Some("api_error"), true),
        (
            r#"{"error":{"type":"rate_limit_error"}}"#,
            Some(429),
            Some("rate_limit_error"),
            true,
        ),
        (
            r#"{"error":{"code":"rate_limit_exceeded","type":"requests"}}"#,
            Some(429),
            Some("rate_limit_exceeded"),
            true,
        ),
        (r#"{"error":{"code":400,"type":"x"}}"#, Some(400), Some("x"), false),
        (
            r#"{"error":{"type":"BadRequestError"}}"#,
            Some(400),
            Some("BadRequestError"),
            false,
        ),
        (
            r#"{"error":{"type":"invalid_request_error","code":null}}"#,
            Some(400),
            Some("invalid_request_error"),
            false,
        ),
        (
            r#"{"error":{"type":"invalid_request_error","code":"model_not_found"}}"#,
            Some(404),
            Some("model_not_found"),
            false,
        ),
        (
            r#"{"error":{"code":"invalid_api_key"}}"#,
            Some(401),
            Some("invalid_api_key"),
            false,
        ),
        // Without credit, waiting is of no use, whatever the number.
        (
            r#"{"error":{"code":429,"type":"insufficient_quota"}}"#,
            Some(402),
            Some("insufficient_quota"),
            false,
        ),
        (
            r#"{"error":"ratelimited","ok":false}"#,
            Some(429),
            Some("ratelimited"),
            true,
        ),
        (r#"{"error":"Bad Request","code":400}"#, Some(400), None, false),
        (
            r#"{"error":{"code":401},"choices":[{"finish_reason":"error"}]}"#,
            Some(401),
            None,
            false,
        ),
        // Unknown errors, and sentences, by which nothing is decided.
        (r#"{"error":{"code":-32000}}"#, None, None, true),
        (r#"{"error":{"type":"mystery"}}"#, None, Some("mystery"), true),
        (r#"{"error":"invalid model"}"#, None, None, true),
    ] {
        let error = check(prompt(), response(JSON, text)).await.unwrap_err();
        let found = (
            error.reported_status().map(|status| status.as_u16()),
            error.code(),
            error.is_transient(),
        );
        assert_eq!(found, (status, code, is_transient), "{text}");
        assert_eq!(error.is_throttled(), matches!(status, Some(429 | 503 | 529)), "{text}");
        assert_eq!(error.response().body(), text);
    }
    let empty = check(prompt(), response(JSON, "")).await.unwrap_err();
    assert!(empty.is_transient() && !empty.is_throttled() && empty.message().is_none());
}

#[tokio::test]
async fn the_error_shows_no_secret_and_no_body() {
    let text = format!(
        r#"{{"error":{{"message":"see http://u:s3cr3t@h/?token=s3cr3t {}"}},"note":"s3cr3t"}}"#,
        "ä".repeat(500)
    );
    let mut bad = response(JSON, text);
    bad.headers_mut().insert("x-api-key", "s3cr3t".parse().unwrap());
    let error = check(prompt(), bad).await.unwrap_err();
    let shown = format!("{error} {error:?} {:?}", error.message());
    assert!(!shown.contains("s3cr3t"), "{shown}");
    assert_eq!(error.message().unwrap().chars().count(), 301);
    assert_eq!(error.into_response().headers()["x-api-key"], "s3cr3t");
    // A password is only recognized together with the `@` after it.
    let text = format!(
        r#"{{"error":{{"message":"{} http://u:s3cr3t{}@h/"}}}}"#,
        "語".repeat(195),
        "s3cr3t".repeat(90)
    );
    let error = check(prompt(), response(JSON, text)).await.unwrap_err();
    assert!(error.message().unwrap().ends_with("語 http://h/"), "{error}");
}

#[tokio::test]
async fn a_body_that_is_not_in_memory_is_not_checked() {
    let client = service_fn(async |_: Request<()>| Ok::<_, Infallible>(Response::new(())));
    let response = CheckLayer::new().layer(client).oneshot(Request::new(())).await;
    assert_eq!(response.unwrap().status(), StatusCode::OK);
}

#[tokio::test]
async fn a_streamed_answer_is_not_checked_when_its_body_has_ended() {
    use http_body_util::{BodyExt, Full};
    let client = service_fn(async |_: Request<Bytes>| {
        let body = Full::new(Bytes::from_static(b"data: {\"choices\":[{}]}\n\n"));
        let response = Response::builder().header("content-type", EVENTS).body(body);
        Ok::<_, Infallible>(response.unwrap())
    });
    let executor = Executor::builder()
        .layer(CheckLayer::new())
        .build_streaming(client)
        .unwrap();
    executor.start().unwrap();
    let call = executor.submit(prompt()).await.unwrap();
    let event = call.event().clone();
    let body = call.await.unwrap().into_body().collect().await.unwrap().to_bytes();
    assert!(body.starts_with(b"data:"));
    assert_eq!(event.finished().await.status, RequestStatus::Completed);
}

/// A client that gives each of `answers` to one attempt, and then an answer to all others. Counts the attempts.
fn client(
    answers: Vec<Response<Bytes>>,
) -> (
    impl Service<Request<Bytes>, Response = Response<Bytes>, Error = BoxError, Future: Send> + Clone + Send + 'static,
    Arc<AtomicUsize>,
) {
    let attempts = Arc::new(AtomicUsize::new(0));
    let counted = attempts.clone();
    let client = service_fn(move |_: Request<Bytes>| {
        let answer = answers.get(counted.fetch_add(1, Ordering::Relaxed)).cloned();
        async move { Ok::<_, BoxError>(answer.unwrap_or_else(|| response(JSON, r#"{"choices":[{}]}"#))) }
    });
    (CheckLayer::new().layer(client), attempts)
}

fn policy() -> RetryPolicy {
    RetryPolicy::new().backoff(Duration::ZERO, Duration::ZERO)
}

#[tokio::test(start_paused = true)]
async fn a_response_without_an_answer_is_retried_if_that_may_help() {
    let not_processed = policy().retry_only_idempotent();
    for (text, policy, attempts) in [
        (r#"{"error":{"code":502}}"#, policy(), 2),
        (r#"{"choi"#, policy(), 2),
        ("", policy(), 2),
        (r#"{"error":{"type":"overloaded_error"}}"#, policy(), 2),
        (r#"{"error":{"type":"invalid_request_error"}}"#, policy(), 1),
        (r#"{"error":{"code":429,"type":"insufficient_quota"}}"#, policy(), 1),
        // The provider has begun, or may have.
        (r#"{"error":{"code":502}}"#, not_processed.clone(), 1),
        (r#"{"choi"#, not_processed.clone(), 1),
        (r#"{"error":{"code":429}}"#, not_processed, 2),
    ] {
        let (client, made) = client(vec![response(JSON, text)]);
        let client = RetryLayer::new(policy).layer(client);
        let result = client.oneshot(prompt()).await;
        assert_eq!(made.load(Ordering::Relaxed), attempts, "{text}");
        assert_eq!(result.is_ok(), attempts == 2, "{text}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_retry_of_a_response_without_an_answer_waits_as_its_headers_or_its_body_ask() {
    let mut limited = response(JSON, r#"{"error":{"code":429}}"#);
    limited.headers_mut().insert("retry-after", 7.into());
    let gemini = r#"{"error":{"code":429,"status":"RESOURCE_EXHAUSTED","details":[{"@type":"type.googleapis.com/google.rpc.RetryInfo","retryDelay":"9s"}]}}"#;
    let (client, _) = client(vec![limited, response(JSON, gemini)]);
    let start = Instant::now();
    let client = RetryLayer::new(policy().provider(Provider::Gemini)).layer(client);
    client.oneshot(prompt()).await.unwrap();
    assert_eq!(start.elapsed(), Duration::from_secs(16));
}

#[tokio::test(start_paused = true)]
async fn the_event_of_a_response_without_an_answer_has_its_status_its_headers_and_the_reason() {
    let mut bad = response(JSON, r#"{"error":{"message":"no model","code":"model_not_found"}}"#);
    bad.headers_mut().insert("x-request-id", "r1".parse().unwrap());
    bad.headers_mut().insert("x-mine", "s3cr3t".parse().unwrap());
    let (client, _) = client(vec![response(JSON, ""), bad]);
    let executor = Executor::builder()
        .layer(RetryLayer::new(policy()))
        .describe(Http::default().redact("x-mine".parse().unwrap()))
        .build(client)
        .unwrap();
    executor.start().unwrap();
    let call = executor.submit(prompt()).await.unwrap();
    let event = call.event().clone();
    let error = call.await.unwrap_err();
    assert_eq!(error.find::<BadResponse>().unwrap().code(), Some("model_not_found"));
    let event = event.finished().await;
    assert_eq!(event.status, RequestStatus::Failed);
    assert_eq!(event.response_status_code, Some(200));
    assert_eq!(event.response_headers["x-request-id"], "r1");
    assert_eq!(event.response_headers["x-mine"], "[redacted]");
    assert_eq!(event.error_type.as_deref(), Some("BadResponse"));
    assert_eq!(
        event.error_message.as_deref(),
        Some(
            "the response is no success in spite of its status 200: its body reports an error 404: model_not_found: no model"
        )
    );
    let attempts: Vec<_> = event.attempts.iter().map(|attempt| attempt.status_code).collect();
    assert_eq!(attempts, [Some(200), Some(200)]);
    assert!(
        event.logs[0].message.contains("its body holds no answer; retrying"),
        "{:?}",
        event.logs
    );
}

#[cfg(feature = "reqwest")]
#[tokio::test]
async fn a_stack_around_a_real_client_retries_until_the_server_has_answered() {
    use axum::{Router, body::Body, routing::post};
    let requests = Arc::new(AtomicUsize::new(0));
    let counted = requests.clone();
    let stream = "data: {\"choices\":[{\"delta\":{\"content\":\"hi\"}}]}\n\n";
    let app = Router::new().route(
        "/v1/chat/completions",
        post(move || {
            let (kind, text) = match counted.fetch_add(1, Ordering::Relaxed) {
                0 => ("text/html", "<html>starting</html>".to_owned()),
                1 => (JSON, r#"{"error":{"message":"busy","code":503}}"#.to_owned()),
                2 => (EVENTS, stream.to_owned()),
                _ => (EVENTS, format!("{stream}data: [DONE]\n\n")),
            };
            async move {
                Response::builder()
                    .header("content-type", kind)
                    .body(Body::from(text))
                    .unwrap()
            }
        }),
    );
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/v1/chat/completions", listener.local_addr().unwrap());
    let server = tokio::spawn(async move { axum::serve(listener, app).await });
    let client = ServiceBuilder::new()
        .layer(RetryLayer::new(policy()))
        .layer(CheckLayer::new())
        .layer(CollectLayer::new(1 << 20))
        .layer(UsageLayer::new())
        .service(tower_outbound::client::Reqwest::new(
            reqwest::Client::builder().no_proxy().build().unwrap(),
        ));
    let request = Request::post(url).body(Bytes::from_static(b"{}")).unwrap();
    let response = client.oneshot(request).await.unwrap();
    assert_eq!(requests.load(Ordering::Relaxed), 4);
    assert!(response.body().ends_with(b"[DONE]\n\n"));
    server.abort();
}
