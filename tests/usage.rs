//! Tests of the token usage that responses report, of its settlement, and of token estimates.

use bytes::Bytes;
use http::{Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody as Frames};
use std::{convert::Infallible, io, time::Duration};
use tokio::time::sleep;
use tower::{BoxError, Layer, ServiceExt, service_fn};
use tower_outbound::{
    Call, Cost, Executor, Limits, Rate, RateLimitLayer, RateLimiter, RequestStatus,
    body::CollectLayer,
    provider::{AverageEstimate, CharacterEstimate, UsageLayer},
    rate::{ByUsage, RequestCost, UsedCost},
};

const JSON: &str = "application/json";
const EVENTS: &str = "text/event-stream; charset=utf-8";

type Pieces = Frames<futures_util::stream::Iter<std::vec::IntoIter<Result<Frame<Bytes>, Infallible>>>>;

/// A response whose body arrives in frames of `size` bytes.
fn response(kind: &'static str, text: &str, size: usize) -> Response<Pieces> {
    let pieces: Vec<_> = text
        .as_bytes()
        .chunks(size)
        .map(|piece| Ok(Frame::data(Bytes::copy_from_slice(piece))))
        .collect();
    let body = Frames::new(futures_util::stream::iter(pieces));
    Response::builder().header("content-type", kind).body(body).unwrap()
}

/// Returns the number of used tokens in the `ApiTokensUsed` extension after the body was read. Checks that the number
/// does not depend on the size of the frames.
async fn used(layer: UsageLayer, kind: &'static str, text: &str) -> Option<u64> {
    let mut seen = Vec::new();
    for size in [1, 2, 7, 1_000_000] {
        let text = text.to_owned();
        let client = service_fn(move |_: Request<()>| {
            let response = response(kind, &text, size);
            async move { Ok::<_, Infallible>(response) }
        });
        let response = layer.layer(client).oneshot(Request::new(())).await.unwrap();
        let used = response
            .extensions()
            .get::<tower_outbound::ApiTokensUsed>()
            .unwrap()
            .clone();
        assert_eq!(used.get(), None);
        response.into_body().collect().await.unwrap();
        seen.push(used.get());
    }
    assert!(seen.windows(2).all(|pair| pair[0] == pair[1]), "{seen:?} of {text}");
    seen[0]
}

#[tokio::test]
async fn the_tokens_used_are_read_from_a_document_of_each_provider() {
    for (text, tokens) in [
        // OpenAI chat completions, with and without the total.
        (
            r#"{"id":"a","choices":[],"usage":{"prompt_tokens":9,"completion_tokens":12,"total_tokens":21}}"#,
            Some(21),
        ),
        (r#"{"usage":{"prompt_tokens":9,"completion_tokens":12}}"#, Some(21)),
        // A response of OpenAI's Responses API.
        (
            r#"{"object":"response","usage":{"input_tokens":36,"output_tokens":87,"total_tokens":123}}"#,
            Some(123),
        ),
        // Anthropic: tokens that are read from the cache are not counted.
        (
            r#"{"type":"message","usage":{"input_tokens":10,"cache_creation_input_tokens":5,"cache_read_input_tokens":2000,"output_tokens":7}}"#,
            Some(22),
        ),
        // Gemini, with and without the total.
        (
            r#"{"usageMetadata":{"promptTokenCount":4,"candidatesTokenCount":6,"thoughtsTokenCount":20,"totalTokenCount":30}}"#,
            Some(30),
        ),
        (
            r#"{"usageMetadata":{"promptTokenCount":4,"candidatesTokenCount":6}}"#,
            Some(10),
        ),
        // Embeddings: the usage has no output tokens.
        (r#"{"data":[],"usage":{"prompt_tokens":8,"total_tokens":8}}"#, Some(8)),
        // A value of an unexpected type, or a name that is there twice, does not hide the numbers beside it.
        (
            r#"{"message":"done","response":[{"usage":3}],"usage":{"total_tokens":"9","input_tokens":[2],"prompt_tokens":4,"output_tokens":{"a":1},"completion_tokens":5}}"#,
            Some(9),
        ),
        (
            r#"{"usage":null,"usageMetadata":true,"message":{"usage":{"input_tokens":6}}}"#,
            Some(6),
        ),
        (r#"{"usage":{"total_tokens":3,"total_tokens":8}}"#, Some(8)),
        // Texts that report no valid usage.
        ("{}", None),
        ("", None),
        ("usage: 3", None),
        (r#"{"usage":null}"#, None),
        (r#"{"usage":"3"}"#, None),
        (r#"{"usage":{"total_tokens":-1}}"#, None),
        (r#"{"usage":{"total_tokens":1.5}}"#, None),
        (r#"{"usage":{"total_tokens":99999999999999999999}}"#, None),
        (r#"{"usage":{"total_tokens":3}"#, None),
    ] {
        assert_eq!(used(UsageLayer::new(), JSON, text).await, tokens, "{text}");
    }
}

#[tokio::test]
async fn the_tokens_used_are_read_from_a_stream_of_events_of_each_provider() {
    for (text, tokens) in [
        // OpenAI chat with `include_usage`: the usage is in an event near the end.
        (
            "data: {\"choices\":[{\"delta\":{\"content\":\"Hi\"}}],\"usage\":null}\n\ndata: {\"choices\":[],\"usage\":{\"prompt_tokens\":5,\"completion_tokens\":2,\"total_tokens\":7}}\n\ndata: [DONE]\n\n",
            Some(7),
        ),
        // A stream of OpenAI's Responses API.
        (
            "event: response.created\r\ndata: {\"type\":\"response.created\",\"response\":{\"usage\":null}}\r\n\r\nevent: response.completed\r\ndata: {\"response\":{\"usage\":{\"input_tokens\":1,\"output_tokens\":2,\"total_tokens\":3}}}\r\n\r\n",
            Some(3),
        ),
        // Anthropic: the first event has the input tokens, and later events have the growing number of output tokens.
        (
            "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"usage\":{\"input_tokens\":25,\"output_tokens\":1}}}\n\nevent: ping\ndata: {}\n\nevent: message_delta\ndata: {\"type\":\"message_delta\",\"usage\":{\"output_tokens\":15}}\n\n",
            Some(40),
        ),
        // Gemini: each event has all numbers up to then.
        (
            "data: {\"usageMetadata\":{\"promptTokenCount\":4,\"totalTokenCount\":5}}\n\ndata: {\"usageMetadata\":{\"promptTokenCount\":4,\"totalTokenCount\":9}}\n\n",
            Some(9),
        ),
        // The data of one event is split over several lines. The last event counts even if the body ends without the
        // empty line, or without the end of the last line.
        ("data: {\"usage\":\ndata: {\"total_tokens\":\ndata: 11}}", Some(11)),
        ("data: {\"usage\":\ndata: {\"total_tokens\":\ndata: 11}}\n", Some(11)),
        ("data: {\"usage\":\ndata: {\"total_tokens\":\ndata: 11}}\r", Some(11)),
        ("data: {\"usage\":\ndata: {\"total_tokens\":", None),
        ("data: {\"usage\":\ndata: {\"total_tokens\":\ndata: 11}}\n\n", Some(11)),
        (": a comment\n\ndata: usage\n\nid: 1\n\n", None),
    ] {
        assert_eq!(used(UsageLayer::new(), EVENTS, text).await, tokens, "{text}");
    }
}

#[tokio::test]
async fn a_custom_reader_takes_precedence() {
    let layer = UsageLayer::with(|body| body.starts_with(b"mine").then_some(5_u64));
    assert_eq!(used(layer.clone(), JSON, "mine").await, Some(5));
    assert_eq!(used(layer, JSON, r#"{"usage":{"total_tokens":7}}"#).await, Some(7));
}

#[tokio::test]
async fn mistrals_header_is_read_with_the_head() {
    let client = service_fn(async |_: Request<()>| {
        let mut response = response(JSON, "{}", 10);
        response
            .headers_mut()
            .insert("x-ratelimit-tokens-query-cost", 52.into());
        Ok::<_, Infallible>(response)
    });
    let response = UsageLayer::new().layer(client).oneshot(Request::new(())).await.unwrap();
    let used = response.extensions().get::<tower_outbound::ApiTokensUsed>().unwrap();
    assert_eq!(used.get(), Some(52));
}

#[tokio::test]
async fn a_body_that_is_too_large_to_be_searched_is_passed_on() {
    let long = format!(r#"{{"pad":"{}","usage":{{"total_tokens":3}}}}"#, "x".repeat(9 << 20));
    let client = service_fn(move |_: Request<()>| {
        let response = response(JSON, &long, 1 << 16);
        async move { Ok::<_, Infallible>(response) }
    });
    let response = UsageLayer::new().layer(client).oneshot(Request::new(())).await.unwrap();
    let used = response
        .extensions()
        .get::<tower_outbound::ApiTokensUsed>()
        .unwrap()
        .clone();
    assert!(response.into_body().collect().await.unwrap().to_bytes().len() > 9 << 20);
    assert_eq!(used.get(), None);
}

fn limiter() -> RateLimiter {
    RateLimiter::new(Limits::new().requests(Rate::per_day(100)).tokens(Rate::per_day(10_000))).unwrap()
}

fn left(limiter: &RateLimiter) -> (u64, u64) {
    let left = limiter.available();
    (left.requests.unwrap(), left.tokens.unwrap())
}

#[tokio::test(start_paused = true)]
async fn a_call_is_charged_its_estimate_and_settled_at_its_end() {
    let limiter = limiter();
    let client = service_fn(async |_: Request<()>| {
        sleep(Duration::from_secs(2)).await;
        Ok::<_, Infallible>(response(JSON, r#"{"usage":{"total_tokens":300}}"#, 5))
    });
    let executor = Executor::builder()
        .limiter(limiter.clone())
        .settle(ByUsage::default())
        .build(CollectLayer::new(1_000).layer(UsageLayer::new().layer(client)))
        .unwrap();
    executor.start().unwrap();
    let call = executor
        .submit(Call::from(Request::new(())).tokens(4_000))
        .await
        .unwrap();
    let event = call.event().clone();
    sleep(Duration::from_secs(1)).await;
    assert_eq!(left(&limiter), (99, 6_000));
    call.await.unwrap();
    assert_eq!(left(&limiter), (99, 9_700));
    let event = event.finished().await;
    assert_eq!((event.api_tokens, event.api_tokens_used), (4_000, Some(300)));
}

#[tokio::test(start_paused = true)]
async fn a_streamed_call_is_settled_when_its_body_ends_and_stays_charged_when_the_body_is_dropped() {
    let limiter = limiter();
    let client = service_fn(async |_: Request<()>| {
        let text = "data: {\"usage\":{\"total_tokens\":250}}\n\n";
        Ok::<_, Infallible>(response(EVENTS, text, 10))
    });
    let executor = Executor::builder()
        .limiter(limiter.clone())
        .settle(ByUsage::default())
        .build_streaming(UsageLayer::new().layer(client))
        .unwrap();
    executor.start().unwrap();
    let call = executor
        .submit(Call::from(Request::new(())).tokens(1_000))
        .await
        .unwrap();
    let event = call.event().clone();
    let body = call.await.unwrap().into_body();
    assert_eq!(left(&limiter), (99, 9_000));
    body.collect().await.unwrap();
    let event = event.finished().await;
    assert_eq!(
        (event.status, event.api_tokens_used),
        (RequestStatus::Completed, Some(250))
    );
    assert_eq!(left(&limiter), (99, 9_750));

    let call = executor
        .submit(Call::from(Request::new(())).tokens(1_000))
        .await
        .unwrap();
    let event = call.event().clone();
    drop(call.await.unwrap());
    event.finished().await;
    assert_eq!(left(&limiter), (98, 8_750));
}

#[tokio::test(start_paused = true)]
async fn a_failed_call_stays_charged_and_one_that_was_never_sent_costs_nothing() {
    let limiter = limiter();
    let never_sent = |error: &BoxError| {
        error
            .downcast_ref::<io::Error>()
            .is_some_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
    };
    let client = service_fn(async |kind: Request<io::ErrorKind>| Err::<Response<()>, _>(io::Error::from(*kind.body())));
    let service = RateLimitLayer::with_cost(limiter.clone(), |_: &Request<io::ErrorKind>| Cost::tokens(500))
        .settle(ByUsage::default().unless_sent(never_sent))
        .layer(client);
    service
        .clone()
        .oneshot(Request::new(io::ErrorKind::ConnectionRefused))
        .await
        .unwrap_err();
    assert_eq!(left(&limiter), (100, 10_000));
    service
        .oneshot(Request::new(io::ErrorKind::ConnectionReset))
        .await
        .unwrap_err();
    assert_eq!(left(&limiter), (99, 9_500));
}

#[tokio::test(start_paused = true)]
async fn the_event_records_the_estimate() {
    let client = service_fn(async |_: Request<&'static str>| Ok::<_, Infallible>(Response::new(())));
    let executor = Executor::builder()
        .cost(CharacterEstimate::new())
        .build(client)
        .unwrap();
    executor.start().unwrap();
    let call = executor.submit(Request::new(r#"{"input":"12345678"}"#)).await.unwrap();
    assert_eq!(call.event().finished().await.api_tokens, 2);
}

#[test]
fn an_estimate_is_a_quarter_of_the_characters_and_the_longest_answer_allowed() {
    for (body, tokens) in [
        (
            r#"{"model":"m","messages":[{"role":"user","content":"12345"}],"max_tokens":64}"#,
            66,
        ),
        (
            r#"{"messages":[{"content":[{"type":"text","text":"äöüß"},{"type":"image_url","image_url":{"url":"1234"}}]}],"max_completion_tokens":1}"#,
            767,
        ),
        (r#"{"input":"12345678","max_output_tokens":10}"#, 12),
        (r#"{"input":"12345678"}"#, 502),
        (r#"{"input":["1234","5678"]}"#, 2),
        (r#"{"system":"1234","messages":[],"max_tokens":0}"#, 1),
        (
            r#"{"contents":[{"parts":[{"text":"12345678"}]}],"generationConfig":{"maxOutputTokens":7}}"#,
            9,
        ),
        ("no JSON", 502),
        ("", 500),
        ("{}", 500),
    ] {
        let estimate = CharacterEstimate::new().default_answer(500);
        assert_eq!(estimate.cost(&Request::new(body)).tokens, tokens, "{body}");
    }
    let mut request = Request::new("1234");
    request.extensions_mut().insert(tower_outbound::ApiTokens(9));
    assert_eq!(
        CharacterEstimate::new().cost(&request),
        Cost::from(tower_outbound::ApiTokens(9))
    );
    assert_eq!(
        AverageEstimate::new(5).cost(&request),
        Cost::from(tower_outbound::ApiTokens(9))
    );
}

/// Returns the estimate for a body, with 500 tokens for an answer without a bound.
fn estimated(body: &str) -> u64 {
    let estimate = CharacterEstimate::new().default_answer(500);
    estimate.cost(&Request::new(body)).tokens
}

#[test]
fn an_estimate_counts_each_answer_that_is_asked_for() {
    for (body, tokens) in [
        (r#"{"messages":[{"content":"1234"}],"max_tokens":10,"n":3}"#, 31),
        (r#"{"messages":[{"content":"1234"}],"n":3}"#, 1_501),
        (r#"{"prompt":"1234","max_tokens":10,"n":2,"best_of":5}"#, 51),
        (r#"{"prompt":["1234","5678"],"max_tokens":10,"n":2}"#, 42),
        (r#"{"prompt":[[1,2,3],[4,5]],"max_tokens":10}"#, 25),
        (r#"{"prompt":[1,2,3],"max_tokens":10}"#, 13),
        (
            r#"{"contents":[{"parts":[{"text":"1234"}]}],"generationConfig":{"maxOutputTokens":7,"candidateCount":4}}"#,
            29,
        ),
        // Of two bounds, the larger counts.
        (r#"{"prompt":"1234","max_tokens":10,"max_completion_tokens":20}"#, 21),
        (r#"{"prompt":"1234","max_tokens":18446744073709551615,"n":9}"#, u64::MAX),
        (r#"{"prompt":"1234","max_tokens":"10","n":null}"#, 501),
    ] {
        assert_eq!(estimated(body), tokens, "{body}");
    }
}

#[test]
fn an_estimate_of_embeddings_has_no_answer() {
    for (body, tokens) in [
        (r#"{"model":"text-embedding-3-small","input":"12345678"}"#, 2),
        (r#"{"model":"m","input":["12345678","1234"]}"#, 3),
        (r#"{"model":"m","input":[101,102,103]}"#, 3),
        (r#"{"model":"m","input":[[101,102,103],[104]]}"#, 4),
        (r#"{"model":"m","input":"12345678","encoding_format":"base64"}"#, 2),
        (r#"{"model":"embed-v4","texts":["12345678"],"input_type":"x"}"#, 2),
        // The items of a conversation.
        (r#"{"model":"m","input":[{"role":"user","content":"12345678"}]}"#, 502),
    ] {
        assert_eq!(estimated(body), tokens, "{body}");
    }
    let request = Request::post("https://h/v1/embeddings")
        .body(r#"{"input":"12345678"}"#)
        .unwrap();
    let estimate = CharacterEstimate::new().default_answer(500);
    assert_eq!(estimate.cost(&request), Cost::input_output_tokens(2, 0));
}

#[test]
fn an_estimate_counts_schemas_by_their_length() {
    let tools = r#"[{"type":"function","function":{"name":"weather","parameters":{"type":"object"}}}]"#;
    let body = format!(r#"{{"messages":[],"max_tokens":0,"tools":{tools}}}"#);
    assert_eq!(estimated(&body), (tools.len() as u64).div_ceil(4));
    let schema = r#"{"properties":{"city":{"type":"string"}}}"#;
    for body in [
        format!(r#"{{"messages":[],"max_tokens":0,"response_format":{schema}}}"#),
        format!(r#"{{"input":"","max_output_tokens":0,"text":{schema}}}"#),
        format!(r#"{{"contents":[],"generationConfig":{{"maxOutputTokens":0,"responseSchema":{schema}}}}}"#),
    ] {
        assert_eq!(estimated(&body), (schema.len() as u64).div_ceil(4), "{body}");
    }
}

#[test]
fn an_estimate_counts_a_medium_as_a_typical_one_and_never_its_base64() {
    let base64 = "aGVsbG8gd29ybGQ5".repeat(100_000);
    let openai = |part: &str| format!(r#"{{"messages":[{{"content":[{part}]}}],"max_tokens":0}}"#);
    let gemini =
        |part: &str| format!(r#"{{"contents":[{{"parts":[{part}]}}],"generationConfig":{{"maxOutputTokens":0}}}}"#);
    for (body, tokens) in [
        (
            openai(r#"{"type":"image_url","image_url":{"url":"data:image/png;base64,B64"}}"#),
            765,
        ),
        (
            openai(r#"{"type":"image_url","image_url":{"url":"https://h/a.png","detail":"low"}}"#),
            85,
        ),
        (
            openai(r#"{"type":"input_image","image_url":"data:image/png;base64,B64"}"#),
            765,
        ),
        (openai(r#"{"file_id":"file-1","type":"input_image"}"#), 765),
        (
            openai(r#"{"type":"input_audio","input_audio":{"data":"B64","format":"wav"}}"#),
            600,
        ),
        (
            openai(r#"{"type":"file","file":{"file_data":"data:application/pdf;base64,B64"}}"#),
            1_500,
        ),
        (
            openai(r#"{"type":"input_file","filename":"a.pdf","file_data":"B64"}"#),
            1_500,
        ),
        (
            openai(r#"{"source":{"type":"base64","media_type":"image/png","data":"B64"},"type":"image"}"#),
            1_600,
        ),
        (
            openai(r#"{"source":{"type":"url","url":"https://h/a"},"type":"image"}"#),
            1_600,
        ),
        (
            openai(r#"{"type":"document","source":{"type":"base64","media_type":"application/pdf","data":"B64"}}"#),
            1_500,
        ),
        // Anthropic's documents may be texts.
        (
            openai(r#"{"type":"document","source":{"data":"12345678","type":"text","media_type":"text/plain"}}"#),
            2,
        ),
        (
            openai(r#"{"type":"document","source":{"type":"content","content":[{"type":"text","text":"1234"}]}}"#),
            1,
        ),
        (gemini(r#"{"inlineData":{"mimeType":"image/png","data":"B64"}}"#), 1_032),
        (
            gemini(r#"{"inline_data":{"data":"B64","mime_type":"audio/mp3"}}"#),
            1_920,
        ),
        (
            gemini(r#"{"fileData":{"mimeType":"application/pdf","fileUri":"https://h/a"}}"#),
            1_500,
        ),
        // Images in a list, and data in a field that no API has.
        (openai(r#"{"images":["B64","B64"],"content":"1234"}"#), 2 * 765 + 1),
        (openai(r#"{"images":"B64","content":"1234"}"#), 765 + 1),
        (openai(r#"{"images":null,"content":"1234"}"#), 1),
        (openai(r#"{"images":{"url":"B64"},"content":"1234"}"#), 765 + 1),
        (openai(r#"{"type":"tool_result","content":"B64"}"#), 1_500),
        (openai(r#"{"type":"thinking","thinking":"1234","signature":"B64"}"#), 1),
        (openai(r#"{"type":"image"}"#), 0),
    ] {
        let body = body.replace("B64", &base64);
        assert_eq!(estimated(&body), tokens, "{body:.200}");
    }
    // Long texts that only resemble base64.
    for text in [
        "ACGT".repeat(1_000),
        "word and 2 Words ".repeat(500),
        "語".repeat(4_000),
    ] {
        let body = openai(&format!(r#"{{"type":"text","text":"{text}"}}"#));
        assert_eq!(estimated(&body), text.chars().count() as u64 / 4, "{text:.20}");
    }
}

#[test]
fn an_average_follows_the_answers_of_earlier_calls() {
    let estimate = AverageEstimate::new(1_000);
    let mut charged = Vec::new();
    for _ in 0..200 {
        let cost = estimate.cost(&Request::new(r#"{"input":"12345678"}"#));
        charged.push(cost.tokens);
        let response = Response::builder()
            .extension(tower_outbound::ApiTokensUsed::new(102))
            .body(())
            .unwrap();
        let mut settled = cost;
        settled.tokens = 102;
        assert_eq!(estimate.used(cost, Ok(&response)), Some(settled));
    }
    assert_eq!(charged[0], 1_002);
    assert!((100..=104).contains(&charged[199]), "{charged:?}");
    // The length of an answer is never estimated above the `max_tokens` of the request.
    assert_eq!(estimate.cost(&Request::new(r#"{"max_tokens":5}"#)).tokens, 5);
    // A failed call does not change the average.
    let before = estimate.answer();
    UsedCost::<Response<()>>::used(&estimate, Cost::tokens(9), Err(&BoxError::from("no")));
    assert_eq!(estimate.answer(), before);
}
