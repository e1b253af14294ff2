//! Tests of the kinds of tokens that a call has used: read, settled, recorded and estimated apart.

use bytes::Bytes;
use http::{Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody as Frames};
use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::time::{advance, sleep};
use tower::{BoxError, Layer, ServiceExt, service_fn};
use tower_outbound::{
    ApiTokensUsed, Call, Cost, Executor, Limits, Rate, RateLimiter, TokenUsage,
    body::CollectLayer,
    provider::{CharacterEstimate, QuantileEstimate, UsageLayer},
    rate::{ByUsage, RequestCost, UsedCost},
};
use tracing_subscriber::layer::SubscriberExt;

const JSON: &str = "application/json";
const EVENTS: &str = "text/event-stream";

type Pieces = Frames<futures_util::stream::Iter<std::vec::IntoIter<Result<Frame<Bytes>, Infallible>>>>;

/// A response whose body arrives in frames of 9 bytes.
fn response(kind: &'static str, text: &str) -> Response<Pieces> {
    let frame = |piece: &[u8]| Ok(Frame::data(Bytes::copy_from_slice(piece)));
    let pieces: Vec<_> = text.as_bytes().chunks(9).map(frame).collect();
    let body = Frames::new(futures_util::stream::iter(pieces));
    Response::builder().header("content-type", kind).body(body).unwrap()
}

async fn answered(
    layer: &UsageLayer,
    kind: &'static str,
    text: &str,
) -> Response<impl http_body::Body<Data = Bytes> + use<>> {
    let text = text.to_owned();
    let client = service_fn(move |_: Request<()>| {
        let response = response(kind, &text);
        async move { Ok::<_, Infallible>(response) }
    });
    layer.layer(client).oneshot(Request::new(())).await.unwrap()
}

/// Returns what is read from a body.
async fn usage(layer: &UsageLayer, kind: &'static str, text: &str) -> Option<TokenUsage> {
    let response = answered(layer, kind, text).await;
    let used = response.extensions().get::<ApiTokensUsed>().unwrap().clone();
    let _ = response.into_body().collect().await;
    used.usage()
}

/// Total, input, output, cached and reasoning.
type Numbers = [Option<u64>; 5];

fn numbers(usage: TokenUsage) -> Numbers {
    [
        usage.total,
        usage.input,
        usage.output,
        usage.cached_input,
        usage.reasoning,
    ]
}

#[tokio::test]
async fn each_kind_of_token_is_read_from_a_document_and_a_stream_of_each_provider() {
    let cases: [(&str, &str, &str, Numbers); 17] = [
        (
            "OpenAI chat",
            JSON,
            r#"{"id":"chatcmpl-1","object":"chat.completion","model":"gpt-4o","choices":[],"usage":{"prompt_tokens":2006,"completion_tokens":300,"total_tokens":2306,"prompt_tokens_details":{"cached_tokens":1920,"audio_tokens":0},"completion_tokens_details":{"reasoning_tokens":256,"audio_tokens":0,"accepted_prediction_tokens":0,"rejected_prediction_tokens":0}}}"#,
            [Some(2_306), Some(2_006), Some(300), Some(1_920), Some(256)],
        ),
        (
            "OpenAI chat",
            EVENTS,
            "data: {\"choices\":[{\"delta\":{\"content\":\"Hi\"}}],\"usage\":null}\n\ndata: {\"choices\":[],\"usage\":{\"prompt_tokens\":19,\"completion_tokens\":10,\"total_tokens\":29,\"prompt_tokens_details\":{\"cached_tokens\":4},\"completion_tokens_details\":{\"reasoning_tokens\":3}}}\n\ndata: [DONE]\n\n",
            [Some(29), Some(19), Some(10), Some(4), Some(3)],
        ),
        (
            "OpenAI responses",
            JSON,
            r#"{"object":"response","usage":{"input_tokens":36,"input_tokens_details":{"cached_tokens":12},"output_tokens":87,"output_tokens_details":{"reasoning_tokens":64},"total_tokens":123}}"#,
            [Some(123), Some(36), Some(87), Some(12), Some(64)],
        ),
        (
            "OpenAI responses",
            EVENTS,
            "event: response.created\ndata: {\"type\":\"response.created\",\"response\":{\"usage\":null}}\n\nevent: response.completed\ndata: {\"type\":\"response.completed\",\"response\":{\"usage\":{\"input_tokens\":37,\"input_tokens_details\":{\"cached_tokens\":0},\"output_tokens\":11,\"output_tokens_details\":{\"reasoning_tokens\":2},\"total_tokens\":48}}}\n\n",
            [Some(48), Some(37), Some(11), Some(0), Some(2)],
        ),
        (
            "Anthropic",
            JSON,
            r#"{"type":"message","usage":{"input_tokens":50,"cache_creation_input_tokens":248,"cache_read_input_tokens":100000,"cache_creation":{"ephemeral_5m_input_tokens":248,"ephemeral_1h_input_tokens":0},"output_tokens":503,"service_tier":"standard"}}"#,
            [Some(801), Some(298), Some(503), Some(100_000), None],
        ),
        (
            "Anthropic",
            EVENTS,
            "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"usage\":{\"input_tokens\":25,\"cache_creation_input_tokens\":0,\"cache_read_input_tokens\":70,\"output_tokens\":1}}}\n\nevent: message_delta\ndata: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"end_turn\"},\"usage\":{\"output_tokens\":15}}\n\n",
            [Some(40), Some(25), Some(15), Some(70), None],
        ),
        (
            "Gemini",
            JSON,
            r#"{"candidates":[],"usageMetadata":{"promptTokenCount":400,"cachedContentTokenCount":300,"candidatesTokenCount":60,"toolUsePromptTokenCount":10,"thoughtsTokenCount":20,"totalTokenCount":490,"promptTokensDetails":[{"modality":"TEXT","tokenCount":400}]}}"#,
            [Some(490), Some(410), Some(80), Some(300), Some(20)],
        ),
        (
            "Gemini",
            EVENTS,
            "data: {\"usageMetadata\":{\"promptTokenCount\":4,\"totalTokenCount\":4}}\n\ndata: {\"usageMetadata\":{\"promptTokenCount\":4,\"candidatesTokenCount\":6,\"thoughtsTokenCount\":20,\"totalTokenCount\":30}}\n\n",
            [Some(30), Some(4), Some(26), None, Some(20)],
        ),
        (
            "Mistral",
            JSON,
            r#"{"object":"chat.completion","usage":{"prompt_tokens":16,"completion_tokens":34,"total_tokens":50}}"#,
            [Some(50), Some(16), Some(34), None, None],
        ),
        (
            "Mistral",
            EVENTS,
            "data: {\"choices\":[{\"delta\":{\"content\":\"\"},\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":16,\"completion_tokens\":34,\"total_tokens\":50}}\n\ndata: [DONE]\n\n",
            [Some(50), Some(16), Some(34), None, None],
        ),
        (
            "Groq",
            JSON,
            r#"{"usage":{"queue_time":0.04,"prompt_tokens":18,"prompt_time":0.001,"completion_tokens":556,"completion_time":0.46,"total_tokens":574,"total_time":0.46},"x_groq":{"id":"req_1"}}"#,
            [Some(574), Some(18), Some(556), None, None],
        ),
        (
            "Groq",
            EVENTS,
            "data: {\"choices\":[{\"delta\":{}}],\"x_groq\":{\"id\":\"req_1\",\"usage\":{\"prompt_tokens\":18,\"completion_tokens\":5,\"total_tokens\":23}}}\n\ndata: [DONE]\n\n",
            [Some(23), Some(18), Some(5), None, None],
        ),
        (
            "Bedrock Converse, whose total includes what is read from the cache",
            JSON,
            r#"{"stopReason":"end_turn","usage":{"inputTokens":30,"outputTokens":628,"totalTokens":1758,"cacheReadInputTokens":1000,"cacheWriteInputTokens":100}}"#,
            [Some(758), Some(130), Some(628), Some(1_000), None],
        ),
        (
            "OpenAI embeddings",
            JSON,
            r#"{"object":"list","data":[],"model":"text-embedding-3-small","usage":{"prompt_tokens":8,"total_tokens":8}}"#,
            [Some(8), Some(8), None, None, None],
        ),
        (
            "xAI, whose reasoning is in the total only",
            JSON,
            r#"{"usage":{"prompt_tokens":32,"completion_tokens":9,"total_tokens":135,"completion_tokens_details":{"reasoning_tokens":94}}}"#,
            [Some(135), Some(32), Some(103), None, Some(94)],
        ),
        (
            "a relay that fills the names of another API with zeros",
            JSON,
            r#"{"usage":{"prompt_tokens":9,"completion_tokens":12,"total_tokens":21,"input_tokens":0,"output_tokens":0,"input_tokens_details":null}}"#,
            [Some(21), Some(9), Some(12), None, None],
        ),
        (
            "values of unexpected types",
            JSON,
            r#"{"usage":{"prompt_tokens":9,"prompt_tokens_details":[1],"completion_tokens_details":{"reasoning_tokens":"3","cached_tokens":null},"output_tokens_details":7,"completion_tokens":{"a":1}}}"#,
            [Some(9), Some(9), None, None, None],
        ),
    ];
    for (name, kind, text, expected) in cases {
        let read = usage(&UsageLayer::new(), kind, text).await.map(numbers);
        assert_eq!(read, Some(expected), "{name}: {text}");
    }
}

#[tokio::test]
async fn a_reader_may_return_the_kinds_and_use_what_its_caller_owns() {
    let documents = Arc::new(AtomicU64::new(0));
    let seen = documents.clone();
    let layer = UsageLayer::with(move |text| {
        seen.fetch_add(1, Ordering::Relaxed);
        text.starts_with(b"mine").then(|| TokenUsage::input_output(3, 4))
    });
    let read = usage(&layer.clone(), JSON, "mine").await.unwrap();
    assert_eq!(numbers(read), [Some(7), Some(3), Some(4), None, None]);
    let known = usage(&layer, JSON, r#"{"usage":{"total_tokens":5}}"#).await.unwrap();
    assert_eq!(known, TokenUsage::total(5));
    assert_eq!(documents.load(Ordering::Relaxed), 2);
}

#[tokio::test]
async fn a_reader_of_one_response_keeps_its_state_from_event_to_event_and_from_no_other_response() {
    let layer = UsageLayer::with_each(|| {
        let mut sum = 0;
        move |event: &[u8]| {
            sum += std::str::from_utf8(event).ok()?.trim().parse::<u64>().ok()?;
            Some(sum)
        }
    });
    for _ in 0..2 {
        let read = usage(&layer, EVENTS, "data: 3\n\ndata: 4\n\ndata: end\n\n").await;
        assert_eq!(read, Some(TokenUsage::total(7)));
    }
}

fn limiter() -> RateLimiter {
    let day = Rate::per_day(10_000);
    let limits = Limits::new().requests(Rate::per_day(100)).tokens(day);
    let limits = limits.input_tokens(day).output_tokens(day).budget("cents", day);
    RateLimiter::new(limits).unwrap()
}

#[tokio::test(start_paused = true)]
async fn each_budget_is_settled_by_its_kind_and_a_named_one_by_its_price() {
    let limiter = limiter();
    let left = |budget: &'static str| limiter.available().of(budget);
    let text = r#"{"usage":{"prompt_tokens":120,"completion_tokens":30,"total_tokens":150,"prompt_tokens_details":{"cached_tokens":100},"completion_tokens_details":{"reasoning_tokens":20}}}"#;
    let client = service_fn(move |_: Request<Bytes>| async move {
        sleep(Duration::from_secs(1)).await;
        Ok::<_, Infallible>(response(JSON, text))
    });
    let reserve = |_: &Request<Bytes>| Cost::input_output_tokens(200, 1_000).with("cents", 500);
    for (settlement, cents) in [
        (ByUsage::default(), 500),
        (
            ByUsage::default().price(|used, cost| {
                assert_eq!(cost.tokens, 150);
                cost.with("cents", 2 * used.input.unwrap() + 5 * used.output.unwrap())
            }),
            390,
        ),
    ] {
        let before = ["requests", "tokens", "input_tokens", "output_tokens", "cents"].map(left);
        let executor = Executor::builder()
            .limiter(limiter.clone())
            .cost(reserve)
            .settle(settlement)
            .build(CollectLayer::new(1_000).layer(UsageLayer::new().layer(client)))
            .unwrap();
        executor.start().unwrap();
        let call = executor.submit(Call::from(Request::new(Bytes::new()))).await.unwrap();
        let event = call.event().finished().await;
        let after = ["requests", "tokens", "input_tokens", "output_tokens", "cents"].map(left);
        let charged: Vec<_> = before
            .iter()
            .zip(after)
            .map(|(before, after)| before.unwrap() - after.unwrap())
            .collect();
        assert_eq!(charged, [1, 150, 120, 30, cents]);
        assert_eq!(
            (event.api_tokens_used, event.input_tokens_used, event.output_tokens_used),
            (Some(150), Some(120), Some(30))
        );
        assert_eq!((event.cached_tokens, event.reasoning_tokens), (Some(100), Some(20)));
    }
}

#[test]
fn a_total_without_kinds_leaves_the_other_budgets_as_charged() {
    let charged = Cost::input_output_tokens(10, 90).with("images", 2);
    let response = Response::builder().extension(ApiTokensUsed::new(40)).body(()).unwrap();
    let used = ByUsage::default().used(charged, Ok(&response)).unwrap();
    let mut expected = charged;
    expected.tokens = 40;
    assert_eq!(used, expected);
    let unknown = Response::builder()
        .extension(ApiTokensUsed::unknown())
        .body(())
        .unwrap();
    assert_eq!(
        ByUsage::default()
            .price(|_, _| Cost::none())
            .used(charged, Ok(&unknown)),
        None
    );
}

#[test]
fn the_numbers_of_a_call_are_shared_by_clones() {
    let used = ApiTokensUsed::unknown();
    assert_eq!((used.get(), used.usage()), (None, None));
    used.clone().set_usage(TokenUsage::input_output(u64::MAX, 4));
    assert_eq!(used.get(), Some(u64::MAX - 1));
    used.set(9);
    assert_eq!(
        used.usage().map(numbers),
        Some([Some(9), Some(u64::MAX - 1), Some(4), None, None])
    );
    used.set_usage(TokenUsage::default());
    assert_eq!(used.usage(), None);
}

#[test]
fn an_estimate_tells_input_and_output_apart() {
    let request = Request::new(r#"{"messages":[{"content":"12345678"}],"max_tokens":64}"#);
    assert_eq!(
        CharacterEstimate::new().cost(&request),
        Cost::input_output_tokens(2, 64)
    );
}

#[test]
fn a_quantile_of_the_answers_is_charged_once_enough_were_seen() {
    let estimate = QuantileEstimate::new(0.95).unwrap().default_answer(700);
    let unbounded = Request::new(r#"{"messages":[{"content":"12345678"}]}"#);
    let bounded = Request::new(r#"{"messages":[{"content":"12345678"}],"max_tokens":4000}"#);
    let short = Request::new(r#"{"messages":[{"content":"12345678"}],"max_tokens":5}"#);
    let end = |output| {
        let used = ApiTokensUsed::unknown();
        used.set_usage(TokenUsage::input_output(3, output));
        let response = Response::builder().extension(used).body(()).unwrap();
        let charged = estimate.cost(&bounded);
        assert_eq!(
            estimate.used(charged, Ok(&response)),
            Some(Cost::input_output_tokens(3, output))
        );
    };
    for answer in 1..=19 {
        end(answer);
        assert_eq!(estimate.cost(&unbounded), Cost::input_output_tokens(2, 700));
        assert_eq!(estimate.cost(&bounded), Cost::input_output_tokens(2, 4_000));
    }
    end(20);
    // 19 of the 20 answers have at most 19 tokens.
    assert_eq!(estimate.answer(), Some(19));
    assert_eq!(estimate.cost(&unbounded), Cost::input_output_tokens(2, 19));
    assert_eq!(estimate.clone().cost(&bounded), Cost::input_output_tokens(2, 19));
    assert_eq!(estimate.cost(&short), Cost::input_output_tokens(2, 5));
    // Failed calls teach nothing.
    UsedCost::<Response<()>>::used(&estimate, Cost::tokens(9), Err(&BoxError::from("no")));
    assert_eq!(estimate.answer(), Some(19));
    // Only the last 128 answers count.
    for _ in 0..128 {
        end(1_000);
    }
    assert_eq!(estimate.answer(), Some(1_000));
    for invalid in [0.0, -1.0, 1.1, f64::NAN, f64::INFINITY] {
        assert!(QuantileEstimate::new(invalid).is_err(), "{invalid}");
    }
}

/// Counts the warnings, and adds up the number in their field `count`.
#[derive(Clone, Default)]
struct Warnings(Arc<[AtomicU64; 2]>);

impl<S: tracing::Subscriber> tracing_subscriber::Layer<S> for Warnings {
    fn on_event(&self, event: &tracing::Event<'_>, _: tracing_subscriber::layer::Context<'_, S>) {
        if *event.metadata().level() == tracing::Level::WARN {
            self.0[0].fetch_add(1, Ordering::Relaxed);
            event.record(&mut Count(&self.0[1]));
        }
    }
}

struct Count<'a>(&'a AtomicU64);

impl tracing::field::Visit for Count<'_> {
    fn record_u64(&mut self, field: &tracing::field::Field, value: u64) {
        if field.name() == "count" {
            self.0.fetch_add(value, Ordering::Relaxed);
        }
    }

    fn record_debug(&mut self, _: &tracing::field::Field, _: &dyn std::fmt::Debug) {}
}

impl Warnings {
    fn seen(&self) -> [u64; 2] {
        [0, 1].map(|index| self.0[index].load(Ordering::Relaxed))
    }
}

#[tokio::test(start_paused = true)]
async fn bodies_that_are_not_read_to_their_end_are_warned_of_once_a_minute_with_their_number() {
    let warnings = Warnings::default();
    let _guard = tracing::subscriber::set_default(tracing_subscriber::registry().with(warnings.clone()));
    let layer = UsageLayer::new();
    let text = r#"{"usage":{"total_tokens":5}}"#;
    // A body that is read is none of them.
    usage(&layer, JSON, text).await;
    assert_eq!(warnings.seen(), [0, 0]);
    // Never read: the first is warned of at once, and the others with the next one after a minute.
    for _ in 0..5 {
        drop(answered(&layer, JSON, text).await);
    }
    assert_eq!(warnings.seen(), [1, 1]);
    advance(Duration::from_secs(60)).await;
    // Left while more could be read.
    let mut body = Box::pin(answered(&layer.clone(), EVENTS, "data: {}\n\n").await.into_body());
    let _ = body.frame().await;
    drop(body);
    assert_eq!(warnings.seen(), [2, 6]);
}

#[tokio::test(start_paused = true)]
async fn a_body_that_is_dropped_while_its_reader_waits_is_not_warned_of() {
    let warnings = Warnings::default();
    let _guard = tracing::subscriber::set_default(tracing_subscriber::registry().with(warnings.clone()));
    let client = service_fn(async |_: Request<()>| {
        let body = Frames::new(futures_util::stream::pending::<Result<Frame<Bytes>, Infallible>>());
        Ok::<_, Infallible>(Response::new(body))
    });
    let service = CollectLayer::new(1_000).layer(UsageLayer::new().layer(client));
    let call = service.oneshot(Request::new(()));
    tokio::time::timeout(Duration::from_secs(1), call).await.unwrap_err();
    // A response without a body has no usage either.
    let client = service_fn(async |_: Request<()>| {
        let response = Response::builder()
            .status(204)
            .body(http_body_util::Empty::<Bytes>::new());
        Ok::<_, Infallible>(response.unwrap())
    });
    drop(UsageLayer::new().layer(client).oneshot(Request::new(())).await.unwrap());
    assert_eq!(warnings.seen(), [0, 0]);
}
