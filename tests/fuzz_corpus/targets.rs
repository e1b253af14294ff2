//! The fuzz targets of the library: a function for each parser of input from outside. Each function accepts any bytes,
//! and checks what must hold for every input.

#![allow(unreachable_pub)]

use crate::recorded;
use bytes::Bytes;
use futures_util::{FutureExt, stream};
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use std::{
    borrow::Cow,
    convert::Infallible,
    future::ready,
    time::{Duration, SystemTime},
};
use tower::{Layer, Service, retry::Policy, service_fn};
use tower_outbound::{
    ApiTokensUsed, Cost, Limits, NetworkRequestEvent, Rate, RateLimiter, RequestStatus,
    body::CheckLayer,
    error::{AcquireError, BadResponse},
    event::Value,
    executor::Config,
    provider::{CharacterEstimate, Provider, UsageLayer},
    rate::{Budget, Estimate, RequestCost},
    retry::RetryPolicy,
};

/// The secret that the targets add to inputs, to check that it is redacted. An input that contains the beginning of the
/// secret is skipped, because it might contain the secret itself, in a place that is not redacted.
const MARK: &str = "Zq9Xw7Kv";

fn text_of(data: &[u8]) -> Option<Cow<'_, str>> {
    let text = String::from_utf8_lossy(data);
    (!text.to_ascii_lowercase().contains("zq9")).then_some(text)
}

/// The input is the name of a request status.
pub fn status(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    match text.parse::<RequestStatus>() {
        Ok(status) => assert_eq!(status.as_str(), text),
        Err(error) => {
            assert!(RequestStatus::ALL.iter().all(|status| status.as_str() != text));
            assert!(error.to_string().len() < 1_000, "{error}");
        }
    }
    let json = serde_json::Value::String(text.clone().into_owned());
    let from_json = serde_json::from_value::<RequestStatus>(json).ok();
    assert_eq!(from_json, text.parse().ok());
}

/// The input is the name of a budget. The same rules hold whether it is parsed or read from JSON.
pub fn budget(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let is_valid = (1..=64).contains(&text.len())
        && text
            .bytes()
            .all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-' | b'.'));
    let parsed = text.parse::<Budget>();
    match &parsed {
        Ok(budget) => {
            assert_eq!((budget.name(), budget.to_string().as_str()), (&*text, &*text));
            assert!(is_valid, "{text:?}");
            let cost = Cost::none().with(*budget, u64::MAX);
            assert_eq!(cost.of(&*text), u64::MAX);
        }
        Err(error) => {
            // A process remembers at most 1,024 names.
            assert!(!is_valid || error.to_string().contains("1024"), "{text:?}: {error}");
            assert!(error.to_string().len() < 1_000, "{error}");
        }
    }
    let json = serde_json::Value::String(text.into_owned());
    assert_eq!(serde_json::from_value::<Budget>(json).ok(), parsed.ok());
}

/// The input is a part of the URL of a request. An event must never record the value of a secret parameter, or the user
/// info.
pub fn url(data: &[u8]) {
    let Some(text) = text_of(data) else { return };
    let text = text.trim_end_matches('\\');
    if let Some(clean) = recorded::url(text) {
        assert!(clean.len() <= 3 * text.len() + 32, "{text:?} became {clean:?}");
        // Redacting a URL a second time changes nothing.
        if let Some(again) = recorded::url(&clean) {
            assert_eq!(again, clean, "of {text:?}");
        }
    }
    let name = disguised("api_key", data);
    for (planted, is_secret) in [
        (format!("http://h/a?{text}&token={MARK}"), true),
        (format!("http://h/a?{text}token={MARK}"), true),
        (format!("http://h/a?{text}&{name}={MARK}{text}"), true),
        (format!("http://h/a?sig={MARK}{text}"), !text.contains('&')),
        (
            format!("http://h/a?a={text}{name}={MARK}"),
            text.ends_with([';', '&', ',', '?']),
        ),
        (format!("http://{text}:{MARK}@h/a"), !text.contains(['/', '?', '#'])),
        (
            format!("http://h/{text}/http://u:{MARK}@h/a"),
            !text.contains(['?', '#']),
        ),
    ] {
        if let Some(clean) = recorded::url(&planted).filter(|_| is_secret) {
            assert!(!clean.contains(MARK), "{planted:?} became {clean:?}");
        }
    }
    // A URL without secrets is recorded unchanged.
    let plain: String = text.chars().filter(char::is_ascii_lowercase).collect();
    let harmless = format!("http://h/{plain}?page={MARK}&x=1");
    assert_eq!(recorded::url(&harmless).as_deref(), Some(&*harmless));
}

/// The names of response headers that are read for a provider's limits and delays.
const HEADERS: [&str; 24] = [
    "retry-after",
    "retry-after-ms",
    "x-should-retry",
    "date",
    "x-ratelimit-limit-requests",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-reset-requests",
    "x-ratelimit-limit-tokens",
    "x-ratelimit-remaining-tokens",
    "x-ratelimit-reset-tokens",
    "x-ratelimit-renewalperiod-tokens",
    "x-ratelimit-remaining-req-minute",
    "x-ratelimit-tokens-query-cost",
    "x-ratelimit-limit-requests-day",
    "anthropic-ratelimit-requests-limit",
    "anthropic-ratelimit-tokens-remaining",
    "anthropic-ratelimit-tokens-reset",
    "x-ratelimit-remaining",
    "x-ratelimit-reset",
    "ratelimit",
    "ratelimit-policy",
    "ratelimit-limit",
    "ratelimit-remaining",
    "ratelimit-reset",
];

/// The input is a list of response headers with a provider's limits, one per line. The first byte of a line selects the
/// name of the header.
pub fn feedback(data: &[u8]) {
    let mut headers = HeaderMap::new();
    for line in data.split(|byte| *byte == b'\n').take(32) {
        let Some((which, value)) = line.split_first() else {
            continue;
        };
        if let Ok(value) = HeaderValue::from_bytes(value) {
            headers.append(HEADERS[usize::from(*which) % HEADERS.len()], value);
        }
    }
    const YEAR: Duration = Duration::from_secs(366 * 24 * 60 * 60);
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_792_567_680);
    for provider in Provider::ALL {
        let feedback = provider.rate_limit_info(&headers, now);
        assert!(feedback.retry_after.is_none_or(|delay| delay <= YEAR), "{feedback:?}");
        assert!(feedback.windows.len() <= 16, "{feedback:?}");
        for window in &feedback.windows {
            assert!(window.limit.is_some() || window.remaining.is_some(), "{window:?}");
            assert_ne!(window.period, Some(Duration::ZERO));
        }
        assert_eq!(provider.rate_limit_info(&headers, now), feedback);
    }
}

/// The input is the body of a response, with a token usage or an error. The result must not depend on the size of the
/// frames in which the body arrives.
pub fn response_body(data: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let provider = Provider::ALL[data.len() % Provider::ALL.len()];
        let body = Bytes::copy_from_slice(data);
        let mut request = Request::new(body.clone());
        for kind in ["application/json", "text/event-stream"] {
            let mut seen = [1, 3, usize::MAX].map(|size| used(kind, &body, size).ok()).into_iter();
            let first = seen.next();
            assert!(seen.all(|used| Some(used) == first));
        }
        for status in [429, 503] {
            let mut policy = RetryPolicy::new().provider(provider);
            let mut result = Ok(Response::builder()
                .status(status)
                .body(body.clone())
                .expect("a response"));
            let _ = Policy::retry(&mut policy, &mut request, &mut result);
        }
        let cost = CharacterEstimate::new().cost(&request);
        assert_eq!(cost.requests, 1);
        for kind in [
            "application/json",
            "application/x-ndjson",
            "text/event-stream",
            "text/plain",
        ] {
            check(kind, &body);
        }
    });
}

/// Checks whether a response with this content type and body is an answer. What is an answer is passed on unchanged.
fn check(kind: &'static str, body: &Bytes) {
    let mut response = Some(
        Response::builder()
            .header("content-type", kind)
            .body(body.clone())
            .expect("a response"),
    );
    let client = service_fn(move |_: Request<Bytes>| {
        let response = response.take().expect("the client is called once");
        ready(Ok::<_, Infallible>(response))
    });
    let request = Request::post("/").body(Bytes::from_static(b"{}")).expect("a request");
    let checked = CheckLayer::new().layer(client).call(request).now_or_never();
    match checked.expect("nothing is waited for") {
        Ok(response) => assert_eq!(response.body(), body),
        Err(error) => {
            let error = error.downcast::<BadResponse>().expect("the client has no other error");
            assert_eq!(error.response().body(), body);
            assert!(error.to_string().len() < 5_000, "{error}");
        }
    }
}

/// Returns the number of used tokens that is read from a response with this content type and body, sent in frames of
/// `size` bytes.
fn used(kind: &'static str, body: &Bytes, size: usize) -> Result<Option<u64>, Infallible> {
    let pieces: Vec<_> = body
        .chunks(size)
        .map(|piece| Ok::<_, Infallible>(Frame::data(Bytes::copy_from_slice(piece))))
        .collect();
    let mut pieces = Some(StreamBody::new(stream::iter(pieces)));
    let client = service_fn(move |_: Request<()>| {
        let body = pieces.take().expect("the client is called once");
        ready(Ok::<_, Infallible>(
            Response::builder()
                .header("content-type", kind)
                .body(body)
                .expect("a response"),
        ))
    });
    let collected = async {
        let response = UsageLayer::new().layer(client).call(Request::new(())).await?;
        let used = response.extensions().get::<ApiTokensUsed>().cloned();
        response.into_body().collect().await?;
        Ok(used.and_then(|used| used.get()))
    };
    collected.now_or_never().expect("nothing is waited for")
}

/// Returns `name` with some letters in upper case and some percent-encoded, as the bytes of `data` choose.
fn disguised(name: &str, data: &[u8]) -> String {
    let mut disguised = String::new();
    for (index, letter) in name.chars().enumerate() {
        let byte = data.get(index).copied().unwrap_or_default();
        let letter = if byte & 1 == 0 {
            letter
        } else {
            letter.to_ascii_uppercase()
        };
        match byte >> 1 & 3 {
            0 | 1 => disguised.push(letter),
            2 => disguised.push_str(&format!("%{:02x}", u32::from(letter))),
            _ => disguised.push_str(&format!("%25{:02X}", u32::from(letter))),
        }
    }
    disguised
}

/// The input is any text, and also the value of a header.
pub fn text(data: &[u8]) {
    let Some(text) = text_of(data) else { return };
    let clean = recorded::text(&text);
    assert!(clean.len() <= 3 * text.len() + 32, "{text:?} became {clean:?}");
    assert_eq!(recorded::text(&clean), clean, "of {text:?}");
    for planted in [
        format!("{text} Bearer {MARK}"),
        format!("{text} http://h/?token={MARK}{text}"),
        format!("{text} http://u:{MARK}@h/{text}"),
        format!("{text} {{\"api_key\":\"{MARK}{text}"),
        format!("{text} {{\"api_key\":[\"{MARK}\"{text}"),
        format!("{text} {{\\\"api_key\\\":\\\"{MARK}\\\"{text}"),
        format!("{text} api_key='{MARK}' {text}"),
    ] {
        let clean = recorded::text(&planted);
        assert!(!clean.contains(MARK), "{planted:?} became {clean:?}");
    }
    if http::HeaderValue::from_bytes(data).is_ok() {
        let value = |name, value: &[u8]| recorded::headers(name, value)[name].as_bytes().to_vec();
        assert_eq!(value("x-api-key", data), b"[redacted]");
        let clean = value("x-plain", data);
        assert_eq!(value("x-plain", &clean), clean);
        let planted = [data, b" http://u:Zq9Xw7Kv@h/?token=Zq9Xw7Kv&", data].concat();
        let clean = value("location", &planted);
        assert!(
            !String::from_utf8_lossy(&clean).contains(MARK),
            "{text:?} became {clean:?}"
        );
    }
}

/// The input is JSON: the payload of a call, or a recorded event.
pub fn value(data: &[u8]) {
    if let Ok(value) = serde_json::from_slice::<Value>(data) {
        let clean = recorded::payload(value.clone());
        assert_eq!(
            recorded::payload(clean.clone()).to_string(),
            clean.to_string(),
            "of {value}"
        );
        let is_text = matches!(value, Value::String(_) | Value::Array(_) | Value::Object(_));
        let inside = recorded::payload(Value::from([("client_secret", value)]));
        if is_text {
            assert_eq!(inside.to_string(), r#"{"client_secret":"[redacted]"}"#);
        }
        serde_json::from_str::<Value>(&clean.to_string()).expect("a value is written as JSON");
    }
    if let Ok(event) = serde_json::from_slice::<NetworkRequestEvent>(data) {
        let json = serde_json::to_string(&event).expect("an event is JSON");
        let again: NetworkRequestEvent = serde_json::from_str(&json).expect("what was written is read");
        assert_eq!(again.to_owned().logs, event.logs);
        let _ = (
            event.time_total(),
            event.time_calling(),
            event.time_in_queue(),
            event.time_waiting(),
        );
        let _ = format!("{event:?}");
    }
}

/// The input is the settings of an executor as JSON.
pub fn config(data: &[u8]) {
    let Ok(config) = serde_json::from_slice::<Config>(data) else {
        return;
    };
    let json = serde_json::to_string(&config).expect("a config is JSON");
    serde_json::from_str::<Config>(&json).expect("what was written is read");
    let builder = match config.into_builder() {
        Ok(builder) => builder,
        Err(error) => {
            let fields = serde_json::to_value(Config::default()).expect("a config is JSON");
            let setting = error.field().split('.').next().unwrap_or_default();
            assert!(fields.get(setting).is_some(), "{error}");
            return;
        }
    };
    let executor = builder.build_for_closures::<()>().expect("the numbers were checked");
    let monitor = executor.monitor();
    let limiter = monitor.limiter();
    let _ = format!("{executor:?} {limiter:?}");
    let budgets: Vec<_> = limiter.limits().rates().map(|(budget, _)| budget).collect();
    let extreme = budgets.iter().map(|budget| Cost::none().with(*budget, u64::MAX));
    for cost in extreme.chain([Cost::request(), Cost::tokens(u64::MAX), Cost::none()]) {
        // `try_acquire` admits a cost only if `check` accepts it, that is, only if no bucket is too small for it.
        assert!(limiter.try_acquire(cost).is_err() || limiter.check(cost).is_ok());
    }
    let available = limiter.available();
    assert!(budgets.iter().all(|budget| available.of(*budget).is_some()));
}

/// The budgets of the target `limiter`, and the capacities of their buckets. The last one refuses calls.
const BUDGETS: [(&str, u64); 5] = [
    ("requests", 10),
    ("input_tokens", 200),
    ("output_tokens", 100),
    ("images", 20),
    ("cents", 12),
];

/// The input is a program of two bytes a step, which acquires, settles, advances the clock, pauses and replaces the
/// limits of a limiter with five budgets. What the buckets hold must be what was charged of each, to the unit: while the
/// program runs, they do not refill.
pub fn limiter(data: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime");
    let _entered = runtime.enter();
    let limits = |order: usize| {
        let budgets = BUDGETS.iter().cycle().skip(order % BUDGETS.len()).take(BUDGETS.len());
        budgets.fold(Limits::new(), |limits, (budget, burst)| {
            let rate = if *budget == "cents" {
                Rate::utc_day(*burst).refuse()
            } else {
                Rate::new(1, Duration::from_secs(100 * 366 * 24 * 60 * 60)).burst(*burst)
            };
            // Half is there at first, so that a refund always fits.
            limits.budget(*budget, rate.initial(*burst / 2))
        })
    };
    let limiter = RateLimiter::at(limits(0), SystemTime::UNIX_EPOCH).expect("the limits make sense");
    let mut held = BUDGETS.map(|(_, burst)| i128::from(burst / 2));
    let mut estimates: Vec<(Estimate, [u64; 5])> = Vec::new();
    for step in data.chunks_exact(2).take(256) {
        let [what, amount] = [step[0], step[1]];
        // Each budget gets another amount, from the bits of one byte.
        let amounts: [u64; 5] = std::array::from_fn(|index| u64::from(amount >> index & 7));
        let cost = BUDGETS.iter().zip(amounts);
        let cost = cost.fold(Cost::none(), |cost, ((budget, _), amount)| cost.with(*budget, amount));
        match what % 6 {
            0 | 1 => {
                // A budget that is in debt does not keep a call that costs nothing of it.
                let is_held = |(held, amount): (&i128, u64)| amount == 0 || *held >= i128::from(amount);
                let is_held = held.iter().zip(amounts).all(is_held);
                let charged = if what % 6 == 0 {
                    limiter.try_acquire(cost).map(|()| None)
                } else {
                    limiter.try_acquire_estimate(cost).map(Some)
                };
                assert_eq!(charged.is_ok(), is_held, "{cost:?} of {held:?}");
                // What the cap does not hold is refused; what only the others do not hold would be waited for.
                let is_refused = amounts[4] > 0 && held[4] < i128::from(amounts[4]);
                let is_exhausted = matches!(charged, Err(AcquireError::Exhausted(cap)) if cap.budget() == "cents");
                assert_eq!(is_exhausted, is_refused, "{amounts:?} of {held:?}");
                if let Ok(estimate) = charged {
                    held.iter_mut()
                        .zip(amounts)
                        .for_each(|(held, amount)| *held -= i128::from(amount));
                    estimates.extend(estimate.map(|estimate| (estimate, amounts)));
                }
            }
            2 => {
                if let Some((estimate, charged)) = estimates.pop() {
                    estimate.settle(cost);
                    for ((held, charged), used) in held.iter_mut().zip(charged).zip(amounts) {
                        *held += i128::from(charged) - i128::from(used);
                    }
                }
            }
            3 => limiter
                .set_limits(limits(amount.into()))
                .expect("the limits make sense"),
            4 => drop(estimates.pop()),
            _ => {
                limiter.pause_for(Duration::from_secs(1));
                assert!(limiter.try_acquire(Cost::none()).is_err());
                limiter.resume();
            }
        }
        let available = limiter.available();
        for ((budget, _), held) in BUDGETS.iter().zip(held) {
            let held = u64::try_from(held).unwrap_or(0);
            assert_eq!(available.of(*budget), Some(held), "{budget} after {step:?}");
        }
    }
}
