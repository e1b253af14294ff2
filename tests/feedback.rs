//! What the crate reads from the rate-limit headers of each provider, and how `FeedbackLayer` applies them to a
//! limiter.

use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use std::{
    convert::Infallible,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};
use tokio::time::{Instant, sleep};
use tower::{Layer, ServiceExt, service_fn};
use tower_outbound::{
    Cost, Limits, Rate, RateLimiter,
    provider::{FeedbackLayer, Provider, RateLimitInfo, Reset, Unit},
    rate::{Budget, PauseSource},
};

const MINUTE: u64 = 60;
const HOUR: u64 = 60 * MINUTE;
const DAY: u64 = 24 * HOUR;

fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
    let pair = |(name, value): &(&str, &str)| {
        (
            HeaderName::from_bytes(name.as_bytes()).unwrap(),
            HeaderValue::from_str(value).unwrap(),
        )
    };
    pairs.iter().map(pair).collect()
}

/// Returns the local time at which the headers are read in these tests: 21 October 2026, 07:28:00 GMT.
fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_792_567_680)
}

fn read(provider: Provider, pairs: &[(&str, &str)]) -> RateLimitInfo {
    provider.rate_limit_info(&headers(pairs), now())
}

/// One quota that the headers report: what is counted, the period in seconds, the limit, the remaining amount, and the
/// reset.
type Row = (Unit, Option<u64>, Option<u64>, Option<u64>, Option<Reset>);

fn windows(provider: Provider, pairs: &[(&str, &str)]) -> Vec<Row> {
    let windows = read(provider, pairs).windows;
    let seconds = |period: Duration| period.as_secs();
    windows
        .iter()
        .map(|window| {
            (
                window.unit,
                window.period.map(seconds),
                window.limit,
                window.remaining,
                window.reset,
            )
        })
        .collect()
}

fn full(millis: u64) -> Option<Reset> {
    Some(Reset::Full(Duration::from_millis(millis)))
}

fn more(seconds: u64) -> Option<Reset> {
    Some(Reset::More(Duration::from_secs(seconds)))
}

#[test]
fn openai_reports_requests_and_tokens_and_when_they_are_full() {
    let pairs = [
        ("x-ratelimit-limit-requests", "60"),
        ("x-ratelimit-limit-tokens", "150000"),
        ("x-ratelimit-remaining-requests", "59"),
        ("x-ratelimit-remaining-tokens", "149984"),
        ("x-ratelimit-reset-requests", "1s"),
        ("x-ratelimit-reset-tokens", "6m0s"),
    ];
    let expected = [
        (Unit::Requests, None, Some(60), Some(59), full(1_000)),
        (Unit::Tokens, Some(MINUTE), Some(150_000), Some(149_984), full(360_000)),
    ];
    assert_eq!(windows(Provider::OpenAi, &pairs), expected);

    let project = [
        ("x-ratelimit-limit-project-tokens", "1000000"),
        ("x-ratelimit-remaining-project-tokens", "990000"),
        ("x-ratelimit-reset-project-tokens", "250ms"),
    ];
    let expected = [(Unit::Tokens, Some(MINUTE), Some(1_000_000), Some(990_000), full(250))];
    assert_eq!(windows(Provider::OpenAi, &project), expected);

    let older = [
        ("x-ratelimit-limit-tokens_usage_based", "160000"),
        ("x-ratelimit-remaining-tokens_usage_based", "159976"),
        ("x-ratelimit-reset-tokens_usage_based", "9ms"),
    ];
    let expected = [(Unit::Tokens, Some(MINUTE), Some(160_000), Some(159_976), full(9))];
    assert_eq!(windows(Provider::OpenAi, &older), expected);

    assert_eq!(read(Provider::OpenAi, &[]), RateLimitInfo::default());
}

#[test]
fn openais_reset_is_the_time_until_the_whole_amount_is_available() {
    // These are the headers of a real response to an account with 5000 requests and 160000 tokens per minute. For both,
    // the missing amount divided by the time until the reset is the limit per minute.
    let info = read(
        Provider::OpenAi,
        &[
            ("x-ratelimit-limit-requests", "5000"),
            ("x-ratelimit-remaining-requests", "4999"),
            ("x-ratelimit-reset-requests", "12ms"),
            ("x-ratelimit-limit-tokens", "160000"),
            ("x-ratelimit-remaining-tokens", "159976"),
            ("x-ratelimit-reset-tokens", "9ms"),
        ],
    );
    for window in info.windows {
        let Some(Reset::Full(reset)) = window.reset else {
            panic!("{window:?}")
        };
        let (limit, missing) = (window.limit.unwrap(), window.limit.unwrap() - window.remaining.unwrap());
        assert_eq!((missing as f64 / reset.as_secs_f64() * 60.0).round(), limit as f64);
    }
}

#[test]
fn openai_reports_the_retry_delay_in_seconds_and_in_milliseconds() {
    let info = read(Provider::OpenAi, &[("retry-after", "20")]);
    assert_eq!(info.retry_after, Some(Duration::from_secs(20)));
    let both = [
        ("retry-after", "20"),
        ("retry-after-ms", "4321"),
        ("x-should-retry", "false"),
    ];
    let info = read(Provider::OpenAi, &both);
    assert_eq!(info.retry_after, Some(Duration::from_millis(4_321)));
    assert_eq!(info.should_retry, Some(false));
    assert_eq!(
        read(Provider::OpenAi, &[("x-should-retry", "true")]).should_retry,
        Some(true)
    );
    assert_eq!(
        read(Provider::OpenAi, &[("x-should-retry", "maybe")]).should_retry,
        None
    );
}

#[test]
fn azure_reports_resets_in_seconds_and_unknown_numbers_as_minus_one() {
    let pairs = [
        ("x-ratelimit-limit-requests", "10"),
        ("x-ratelimit-remaining-requests", "9"),
        ("x-ratelimit-reset-requests", "10"),
        ("x-ratelimit-limit-tokens", "1000"),
        ("x-ratelimit-remaining-tokens", "900"),
        ("x-ratelimit-reset-tokens", "300"),
        ("retry-after-ms", "2000"),
    ];
    let expected = [
        (Unit::Requests, None, Some(10), Some(9), full(10_000)),
        (Unit::Tokens, Some(MINUTE), Some(1_000), Some(900), full(300_000)),
    ];
    assert_eq!(windows(Provider::AzureOpenAi, &pairs), expected);
    assert_eq!(
        read(Provider::AzureOpenAi, &pairs).retry_after,
        Some(Duration::from_secs(2))
    );
    let unknown = [
        ("x-ratelimit-limit-tokens", "-1"),
        ("x-ratelimit-remaining-tokens", "-1"),
        ("x-ratelimit-reset-tokens", "0"),
    ];
    assert_eq!(windows(Provider::AzureOpenAi, &unknown), []);
}

#[test]
fn github_models_reports_the_period_too() {
    let pairs = [
        ("x-ratelimit-limit-requests", "150"),
        ("x-ratelimit-renewalperiod-requests", "60"),
        ("x-ratelimit-remaining-tokens", "7"),
        ("x-ratelimit-renewalperiod-tokens", "86400"),
    ];
    let expected = [
        (Unit::Requests, Some(MINUTE), Some(150), None, None),
        (Unit::Tokens, Some(DAY), None, Some(7), None),
    ];
    assert_eq!(windows(Provider::AzureOpenAi, &pairs), expected);
}

#[test]
fn anthropic_reports_resets_as_dates_by_its_own_clock() {
    let pairs = [
        ("date", "Wed, 25 Feb 2026 20:02:31 GMT"),
        ("anthropic-ratelimit-requests-limit", "50"),
        ("anthropic-ratelimit-requests-remaining", "49"),
        ("anthropic-ratelimit-requests-reset", "2026-02-25T20:02:32Z"),
        ("anthropic-ratelimit-input-tokens-limit", "30000"),
        ("anthropic-ratelimit-input-tokens-remaining", "28000"),
        ("anthropic-ratelimit-output-tokens-limit", "8000"),
        ("anthropic-ratelimit-output-tokens-remaining", "8000"),
        ("anthropic-ratelimit-tokens-limit", "38000"),
        ("anthropic-ratelimit-tokens-remaining", "36000"),
        // These headers report separate quotas (priority tier, fast mode, subscriptions), which the crate does not
        // read.
        ("anthropic-priority-input-tokens-limit", "1"),
        ("anthropic-ratelimit-priority-input-tokens-limit", "1"),
        ("anthropic-fast-input-tokens-remaining", "1"),
        ("anthropic-ratelimit-unified-reset", "1772049752"),
    ];
    let expected = [
        (Unit::Requests, Some(MINUTE), Some(50), Some(49), full(1_000)),
        (Unit::Tokens, Some(MINUTE), Some(38_000), Some(36_000), None),
        (Unit::InputTokens, Some(MINUTE), Some(30_000), Some(28_000), None),
        (Unit::OutputTokens, Some(MINUTE), Some(8_000), Some(8_000), None),
    ];
    assert_eq!(windows(Provider::Anthropic, &pairs), expected);
    assert_eq!(
        read(Provider::Anthropic, &[("retry-after", "31")]).retry_after,
        Some(Duration::from_secs(31))
    );
    // The date of the reset is before the local time, and the response has no `date` header. So the time until the
    // reset is zero.
    let past = [
        ("anthropic-ratelimit-requests-remaining", "49"),
        ("anthropic-ratelimit-requests-reset", "2026-02-25T20:02:32Z"),
    ];
    assert_eq!(windows(Provider::Anthropic, &past)[0].4, full(0));
}

#[test]
fn gemini_reports_nothing_in_headers() {
    assert_eq!(
        read(Provider::Gemini, &[("x-ratelimit-limit-tokens", "5")]),
        RateLimitInfo::default()
    );
}

#[test]
fn groq_counts_requests_per_day_and_writes_durations_with_fractions() {
    let pairs = [
        ("x-ratelimit-limit-requests", "14400"),
        ("x-ratelimit-remaining-requests", "14399"),
        ("x-ratelimit-reset-requests", "2m59.56s"),
        ("x-ratelimit-limit-tokens", "18000"),
        ("x-ratelimit-remaining-tokens", "17997"),
        ("x-ratelimit-reset-tokens", "7.66s"),
        ("retry-after", "2"),
    ];
    let expected = [
        (Unit::Requests, Some(DAY), Some(14_400), Some(14_399), full(179_560)),
        (Unit::Tokens, Some(MINUTE), Some(18_000), Some(17_997), full(7_660)),
    ];
    assert_eq!(windows(Provider::Groq, &pairs), expected);
    assert_eq!(read(Provider::Groq, &pairs).retry_after, Some(Duration::from_secs(2)));
}

#[test]
fn mistral_reports_no_reset_but_the_tokens_used() {
    let pairs = [
        ("x-ratelimit-limit-req-minute", "720"),
        ("x-ratelimit-remaining-req-minute", "717"),
        ("x-ratelimit-limit-tokens-minute", "5000000"),
        ("x-ratelimit-remaining-tokens-minute", "4999911"),
        ("x-ratelimit-tokens-query-cost", "52"),
    ];
    let expected = [
        (Unit::Requests, Some(MINUTE), Some(720), Some(717), None),
        (Unit::Tokens, Some(MINUTE), Some(5_000_000), Some(4_999_911), None),
    ];
    assert_eq!(windows(Provider::Mistral, &pairs), expected);
    assert_eq!(read(Provider::Mistral, &pairs).tokens_used, Some(52));
}

#[test]
fn cerebras_has_several_periods_at_once() {
    let pairs = [
        ("x-ratelimit-limit-requests-minute", "5"),
        ("x-ratelimit-limit-requests-hour", "150"),
        ("x-ratelimit-limit-requests-day", "2400"),
        ("x-ratelimit-remaining-tokens-day", "999"),
    ];
    let expected = [
        (Unit::Requests, Some(MINUTE), Some(5), None, None),
        (Unit::Requests, Some(HOUR), Some(150), None, None),
        (Unit::Requests, Some(DAY), Some(2_400), None, None),
        (Unit::Tokens, Some(DAY), None, Some(999), None),
    ];
    assert_eq!(windows(Provider::Cerebras, &pairs), expected);
}

#[test]
fn github_reports_the_reset_in_seconds_since_1970() {
    let reset = "1792567740";
    let pairs = [
        ("x-ratelimit-limit", "5000"),
        ("x-ratelimit-remaining", "0"),
        ("x-ratelimit-used", "5000"),
        ("x-ratelimit-reset", reset),
        ("x-ratelimit-resource", "core"),
    ];
    let expected = [(Unit::Requests, Some(HOUR), Some(5_000), Some(0), full(60_000))];
    assert_eq!(windows(Provider::GitHub, &pairs), expected);
}

#[test]
fn retry_after_is_seconds_or_a_date_compared_with_the_date_of_the_response() {
    let at = |pairs: &[(&str, &str)]| read(Provider::Ietf, pairs).retry_after;
    let seconds = |seconds| Some(Duration::from_secs(seconds));
    assert_eq!(at(&[("retry-after", "120")]), seconds(120));
    assert_eq!(at(&[("retry-after", " 1.5 ")]), Some(Duration::from_millis(1_500)));
    assert_eq!(at(&[("retry-after", "Wed, 21 Oct 2026 07:28:30 GMT")]), seconds(30));
    // The server's clock is an hour slow. Its `retry-after` date is compared with the `date` header of the same
    // response, not with the local clock.
    let date = ("date", "Wed, 21 Oct 2026 06:28:00 GMT");
    assert_eq!(
        at(&[date, ("retry-after", "Wed, 21 Oct 2026 06:28:45 GMT")]),
        seconds(45)
    );
    // The two obsolete date formats that RFC 9110 describes are also read.
    assert_eq!(at(&[("retry-after", "Wednesday, 21-Oct-26 07:28:10 GMT")]), seconds(10));
    assert_eq!(at(&[("retry-after", "Wed Oct 21 07:28:09 2026")]), seconds(9));
    // The date in `retry-after` is before the local time, and the response has no `date` header. So the delay is zero.
    assert_eq!(at(&[("retry-after", "Wed, 21 Oct 2026 07:00:00 GMT")]), seconds(0));
    assert_eq!(at(&[("retry-after", "99999999999999999999999")]), seconds(366 * DAY));
    for odd in [
        "", "-1", "-5", "1e9", "NaN", "inf", "soon", "1,5", "+3", "0x10", ".5", "1.2.3",
    ] {
        assert_eq!(at(&[("retry-after", odd)]), None, "{odd}");
    }
}

#[test]
fn the_ietfs_fields_of_draft_10_are_matched_by_name() {
    let pairs = [
        ("ratelimit-policy", r#""burst";q=100;w=60,"daily";q=1000;w=86400"#),
        ("ratelimit", r#""burst";r=50;t=30"#),
    ];
    let expected = [
        (Unit::Requests, Some(MINUTE), Some(100), Some(50), more(30)),
        (Unit::Requests, Some(DAY), Some(1_000), None, None),
    ];
    assert_eq!(windows(Provider::Ietf, &pairs), expected);
    let without_policy = [("ratelimit", r#""default";r=50;t=30"#)];
    assert_eq!(
        windows(Provider::Ietf, &without_policy),
        [(Unit::Requests, None, None, Some(50), more(30))]
    );
    let other = [(
        "ratelimit-policy",
        r#""a";q=5;qu="content-bytes";w=1, "b";q=7;qu="tokens";w=60;pk=:c2VjcmV0:, "c";q=3;qu="concurrent-requests""#,
    )];
    assert_eq!(
        windows(Provider::Ietf, &other),
        [(Unit::Tokens, Some(MINUTE), Some(7), None, None)]
    );
    // In this example of the draft, the name of the limit is a token instead of a string, and the remaining amount `r`
    // is missing. So nothing is reported.
    assert_eq!(windows(Provider::Ietf, &[("ratelimit", "quota;t=1")]), []);
    let token = [("ratelimit-policy", "quota;q=9;w=1"), ("ratelimit", r#""quota";r=1"#)];
    assert_eq!(
        windows(Provider::Ietf, &token),
        [(Unit::Requests, Some(1), Some(9), Some(1), None)]
    );
}

#[test]
fn the_ietfs_older_drafts_are_read() {
    let seventh = [
        ("ratelimit", "limit=10, remaining=9, reset=1"),
        ("ratelimit-policy", "10;w=1"),
    ];
    assert_eq!(
        windows(Provider::Ietf, &seventh),
        [(Unit::Requests, Some(1), Some(10), Some(9), more(1))]
    );
    let third = [
        ("ratelimit-limit", "100, 100;w=60, 1000;w=3600"),
        ("ratelimit-remaining", "50"),
        ("ratelimit-reset", "30"),
    ];
    let expected = [(Unit::Requests, Some(MINUTE), Some(100), Some(50), more(30))];
    assert_eq!(windows(Provider::Ietf, &third), expected);
    let fourth = [
        ("ratelimit-limit", "100"),
        ("ratelimit-remaining", "50"),
        ("ratelimit-reset", "30"),
        ("ratelimit-policy", "100;w=60"),
    ];
    assert_eq!(windows(Provider::Ietf, &fourth), expected);
}

#[test]
fn a_malformed_header_counts_as_not_sent() {
    for odd in [
        "",
        "-1",
        "-2",
        "1e3",
        "five",
        "0x10",
        "99999999999999999999999",
        "1.5",
        "1 2",
        "\u{e9}",
    ] {
        for (provider, name) in [
            (Provider::OpenAi, "x-ratelimit-remaining-tokens"),
            (Provider::Anthropic, "anthropic-ratelimit-tokens-remaining"),
            (Provider::Mistral, "x-ratelimit-remaining-req-minute"),
            (Provider::GitHub, "x-ratelimit-remaining"),
            (Provider::Ietf, "ratelimit-remaining"),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(name, HeaderValue::from_bytes(odd.as_bytes()).unwrap());
            assert_eq!(
                provider.rate_limit_info(&headers, now()),
                RateLimitInfo::default(),
                "{name}: {odd}"
            );
        }
    }
    for odd in [
        r#""a";r=-1"#,
        r#""a";r=1.5"#,
        r#""a";r="1""#,
        r#""a""#,
        "(\"a\" \"b\");r=1",
        ",,,",
        "\"",
        "limit=x",
    ] {
        assert_eq!(windows(Provider::Ietf, &[("ratelimit", odd)]), [], "{odd}");
    }
    // If a header is sent twice, its first value counts.
    let twice = [
        ("x-ratelimit-remaining-tokens", "7"),
        ("x-ratelimit-remaining-tokens", "9"),
    ];
    assert_eq!(windows(Provider::OpenAi, &twice)[0].3, Some(7));
}

#[test]
fn a_provider_is_parsed_from_its_name() {
    for provider in Provider::ALL {
        assert_eq!(provider.to_string().parse(), Ok(provider));
    }
    assert_eq!(
        "OpenAI".parse::<Provider>().unwrap_err().to_string(),
        "unknown provider name: expected one of openai, azure-openai, anthropic, gemini, groq, mistral, cerebras, \
         github, ietf"
    );
}

// === The layer ===

fn limiter() -> RateLimiter {
    let limits = Limits::new()
        .requests(Rate::per_minute(600).burst(10))
        .tokens(Rate::per_minute(6_000));
    RateLimiter::new(limits).unwrap()
}

/// Makes a call through `layer` to a client whose response has this status and these headers.
async fn respond(layer: &FeedbackLayer, status: u16, pairs: &'static [(&'static str, &'static str)]) {
    let client = service_fn(move |_: Request<()>| async move {
        let mut response = Response::builder().status(status);
        *response.headers_mut().unwrap() = headers(pairs);
        Ok::<_, Infallible>(response.body(()).unwrap())
    });
    layer.layer(client).oneshot(Request::new(())).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_429_with_a_retry_delay_pauses_all_users_and_pauses_are_only_extended() {
    let limiter = limiter();
    let layer = FeedbackLayer::new(limiter.clone(), Provider::OpenAi).max_pause(Duration::from_secs(100));
    let begun = Instant::now();
    // This waiter joins the limiter's queue before the 429, during a pause of 1 s. The 429 extends that pause to 7 s.
    let waiting = tokio::spawn({
        let limiter = limiter.clone();
        async move {
            limiter.pause_for(Duration::from_secs(1));
            limiter.acquire(Cost::request()).await.unwrap();
            begun.elapsed()
        }
    });
    tokio::task::yield_now().await;
    respond(&layer, 429, &[("retry-after", "7")]).await;
    respond(&layer, 503, &[("retry-after", "2")]).await;
    respond(&layer, 200, &[("retry-after", "50")]).await;
    respond(&layer, 429, &[]).await;
    assert_eq!(waiting.await.unwrap(), Duration::from_secs(7));
    limiter.acquire(Cost::request()).await.unwrap();
    assert_eq!(begun.elapsed(), Duration::from_secs(7));
    respond(&layer, 529, &[("retry-after", "1000")]).await;
    limiter.acquire(Cost::request()).await.unwrap();
    assert_eq!(begun.elapsed(), Duration::from_secs(107));
}

#[tokio::test(start_paused = true)]
async fn the_remaining_amount_lowers_the_bucket_and_never_raises_it() {
    let limiter = limiter();
    let layer = FeedbackLayer::new(limiter.clone(), Provider::OpenAi);
    let remaining = || {
        (
            limiter.available().requests.unwrap(),
            limiter.available().tokens.unwrap(),
        )
    };
    respond(
        &layer,
        200,
        &[
            ("x-ratelimit-remaining-tokens", "2500"),
            ("x-ratelimit-remaining-requests", "4"),
        ],
    )
    .await;
    assert_eq!(remaining(), (4, 2_500));
    respond(
        &layer,
        200,
        &[
            ("x-ratelimit-remaining-tokens", "5000"),
            ("x-ratelimit-remaining-requests", "9"),
        ],
    )
    .await;
    respond(
        &layer,
        200,
        &[
            ("x-ratelimit-remaining-tokens", "-1"),
            ("x-ratelimit-limit-tokens", "1"),
        ],
    )
    .await;
    assert_eq!(remaining(), (4, 2_500));
    // Groq's header reports a quota of requests per day, so it does not lower the bucket of a rate per minute.
    let layer = FeedbackLayer::new(limiter.clone(), Provider::Groq);
    respond(&layer, 200, &[("x-ratelimit-remaining-requests", "1")]).await;
    assert_eq!(remaining(), (4, 2_500));
}

#[tokio::test(start_paused = true)]
async fn a_providers_limits_are_adopted_if_configured() {
    let limiter = limiter();
    let layer = FeedbackLayer::new(limiter.clone(), Provider::OpenAi).adopt_limits();
    respond(
        &layer,
        200,
        &[
            ("x-ratelimit-limit-tokens", "3000"),
            ("x-ratelimit-limit-requests", "60"),
        ],
    )
    .await;
    let expected = Limits::new()
        .requests(Rate::per_minute(60_u64).burst(10))
        .tokens(Rate::per_minute(3_000_u64));
    assert_eq!(limiter.limits(), expected);
    respond(
        &layer,
        200,
        &[("x-ratelimit-limit-requests", "6"), ("x-ratelimit-limit-tokens", "0")],
    )
    .await;
    let expected = Limits::new()
        .requests(Rate::per_minute(6_u64).burst(6_u64))
        .tokens(Rate::per_minute(3_000_u64));
    assert_eq!(limiter.limits(), expected);
    assert_eq!(limiter.adopt(Budget::Tokens, None, 3_000), Ok(false));
    assert_eq!(
        limiter.adopt(Budget::Tokens, None, 0).unwrap_err().field(),
        "tokens.amount"
    );
}

fn amounts(limiter: &RateLimiter) -> Vec<f64> {
    limiter.limits().rates().map(|(_, rate)| rate.amount()).collect()
}

#[tokio::test(start_paused = true)]
async fn a_rejection_leaves_the_caps_of_the_user_as_they_are() {
    let cap = Rate::per_second(40).refuse();
    let limits = Limits::new().requests(Rate::per_minute(600)).budget("images", cap);
    let limiter = RateLimiter::new(limits).unwrap();
    let layer = FeedbackLayer::new(limiter.clone(), Provider::Gemini).adapt();
    respond(&layer, 429, &[]).await;
    assert_eq!(amounts(&limiter), [540.0, 40.0]);
    let available = limiter.available();
    assert_eq!((available.requests, available.of("images")), (Some(0), Some(40)));
}

#[tokio::test(start_paused = true)]
async fn unreported_limits_are_found_by_their_429s() {
    let limiter = limiter();
    let layer = FeedbackLayer::new(limiter.clone(), Provider::Gemini).adapt();
    respond(&layer, 200, &[]).await;
    assert_eq!(amounts(&limiter), [600.0, 6_000.0]);
    respond(&layer, 429, &[]).await;
    assert_eq!(amounts(&limiter), [540.0, 5_400.0]);
    // The provider's bucket is empty, and so is the limiter's.
    assert_eq!(
        (limiter.available().requests, limiter.available().tokens),
        (Some(0), Some(0))
    );
    // In the first second after that, rejections change nothing.
    for _ in 0..5 {
        respond(&layer, 200, &[]).await;
        respond(&layer, 503, &[]).await;
    }
    assert_eq!(amounts(&limiter), [540.0, 5_400.0]);
    // Then the rates are set to 97 % of the share that was accepted: 6 of 11 calls.
    tokio::time::advance(Duration::from_secs(1)).await;
    respond(&layer, 200, &[]).await;
    assert_eq!(amounts(&limiter), [285.0, 2_857.0]);
    // A second without a rejection ends the episode, and the rates rise towards what was accepted (294), and beyond.
    for _ in 0..10 {
        respond(&layer, 200, &[]).await;
    }
    let mut rates = Vec::new();
    for _ in 0..6 {
        tokio::time::advance(Duration::from_secs(1)).await;
        respond(&layer, 200, &[]).await;
        rates.push(amounts(&limiter)[0]);
    }
    // Beyond it, the curve begins with the first answer that finds it there.
    assert_eq!(rates, [285.0, 292.0, 292.0, 292.0, 292.0, 299.0]);
    tokio::time::advance(Duration::from_secs(1_000)).await;
    respond(&layer, 200, &[]).await;
    assert_eq!(amounts(&limiter), [600.0, 6_000.0]);
    // Limits that user code sets meanwhile become the configured ones: the first 429 adopts them, and only the second
    // one lowers them.
    limiter
        .set_limits(Limits::new().requests(Rate::per_minute(100)))
        .unwrap();
    respond(&layer, 429, &[]).await;
    respond(&layer, 429, &[]).await;
    assert_eq!(amounts(&limiter), [90.0]);
    for _ in 0..200 {
        respond(&layer, 429, &[]).await;
    }
    assert_eq!(amounts(&limiter), [90.0]);
    for _ in 0..30 {
        tokio::time::advance(Duration::from_secs(5)).await;
        respond(&layer, 429, &[]).await;
    }
    assert_eq!(amounts(&limiter), [1.0]);
    // Rates below one per second are adapted as well. The first 429 leaves the new limits exactly as they were set and
    // does not round them up; the second one lowers them.
    let limits = Limits::new().requests(Rate::per_second(1.0 / 3.0));
    limiter.set_limits(limits.clone()).unwrap();
    respond(&layer, 429, &[]).await;
    assert_eq!(limiter.limits(), limits);
    respond(&layer, 429, &[]).await;
    assert_eq!(amounts(&limiter), [0.3]);
}

#[tokio::test(start_paused = true)]
async fn calls_in_flight_when_the_limits_were_lowered_do_not_lower_them_again() {
    let limiter = limiter();
    let layer = FeedbackLayer::new(limiter.clone(), Provider::Gemini).adapt();
    let client = service_fn(async |after: Request<u64>| {
        tokio::time::sleep(Duration::from_millis(*after.body())).await;
        Ok::<_, Infallible>(Response::builder().status(429).body(()).unwrap())
    });
    let service = layer.layer(client);
    let calls = (1..=20).map(|after| tokio::spawn(service.clone().oneshot(Request::new(after))));
    for call in calls.collect::<Vec<_>>() {
        call.await.unwrap().unwrap();
    }
    assert_eq!(amounts(&limiter), [540.0, 5_400.0]);
}

#[tokio::test(start_paused = true)]
async fn a_rejection_lowers_no_quota_of_a_day_unless_there_is_nothing_else() {
    let day = Rate::per_day(10_000);
    for (limits, lowered) in [
        (
            Limits::new().requests(Rate::per_second(100)).requests(day),
            vec![90.0, 10_000.0],
        ),
        (Limits::new().requests(day), vec![9_000.0]),
    ] {
        let limiter = RateLimiter::new(limits).unwrap();
        let layer = FeedbackLayer::new(limiter.clone(), Provider::Ietf).adapt();
        respond(&layer, 429, &[]).await;
        assert_eq!(amounts(&limiter), lowered);
    }
}

// === Reports of slow responses ===

/// A provider that holds 60 and gains one each second. It reports what is left when a request arrives, `delay` after it
/// was sent, and responds `takes` after that.
#[derive(Clone)]
struct SlowProvider {
    /// What is left, and when that was computed.
    left: Arc<Mutex<(f64, Instant)>>,
    takes: Duration,
}

impl SlowProvider {
    fn new(takes: Duration) -> Self {
        let left = Arc::new(Mutex::new((60.0, Instant::now())));
        Self { left, takes }
    }

    /// Takes `amount`, and returns what is left.
    fn take(&self, amount: f64) -> f64 {
        let mut left = self.left.lock().unwrap();
        let gained = left.1.elapsed().as_secs_f64();
        *left = ((left.0 + gained).min(60.0) - amount, Instant::now());
        left.0
    }

    /// Acquires from `limiter`, and makes a call that arrives after `delay`.
    async fn call(self, limiter: RateLimiter, layer: FeedbackLayer, delay: Duration) {
        limiter.acquire(Cost::request()).await.unwrap();
        let client = service_fn(move |_: Request<()>| {
            let provider = self.clone();
            async move {
                sleep(delay).await;
                let left = provider.take(1.0);
                assert!(left > -1.5, "the provider would have responded 429");
                sleep(provider.takes).await;
                let response = Response::builder().header("x-ratelimit-remaining-requests", format!("{left:.0}"));
                Ok::<_, Infallible>(response.body(()).unwrap())
            }
        });
        layer.layer(client).oneshot(Request::new(())).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_slow_response_reports_is_not_lost_a_second_time() {
    // The calls of a burst arrive in the order in which they were sent, in the reverse order, and in a random one.
    let mut rng = fastrand::Rng::with_seed(4);
    let random = (0..60).map(|_| rng.u64(0..100)).collect();
    for delays in [vec![0; 60], (0..60).rev().collect(), random] {
        for seconds in [0, 1, 20, 60, 120] {
            let limiter = RateLimiter::new(Limits::new().requests(Rate::per_minute(60))).unwrap();
            let layer = FeedbackLayer::new(limiter.clone(), Provider::OpenAi);
            let provider = SlowProvider::new(Duration::from_secs(seconds));
            let calls = delays.iter().map(|delay| {
                let delay = Duration::from_millis(*delay);
                tokio::spawn(provider.clone().call(limiter.clone(), layer.clone(), delay))
            });
            for call in calls.collect::<Vec<_>>() {
                call.await.unwrap();
            }
            let left = limiter.available().requests.unwrap();
            assert!(left + 1 >= seconds.min(60), "{left} left after {seconds} s");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_others_have_used_is_found_out_from_slow_responses_and_charged_once() {
    let limiter = RateLimiter::new(Limits::new().requests(Rate::per_minute(60))).unwrap();
    let layer = FeedbackLayer::new(limiter.clone(), Provider::OpenAi);
    let provider = SlowProvider::new(Duration::from_secs(10));
    // Another program uses 30, and then 10 calls are sent, one each second.
    provider.take(30.0);
    let mut calls = Vec::new();
    for _ in 0..10 {
        calls.push(tokio::spawn(provider.clone().call(
            limiter.clone(),
            layer.clone(),
            Duration::ZERO,
        )));
        sleep(Duration::from_secs(1)).await;
    }
    for call in calls {
        call.await.unwrap();
        let (left, expected) = (limiter.available().requests.unwrap() as f64, provider.take(0.0));
        assert!((left - expected).abs() < 2.0, "{left} instead of {expected}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_report_from_before_a_change_of_the_limits_is_carried_forward_by_time() {
    let limiter = RateLimiter::new(Limits::new().requests(Rate::per_minute(60))).unwrap();
    let layer = FeedbackLayer::new(limiter.clone(), Provider::OpenAi);
    let provider = SlowProvider::new(Duration::from_secs(20));
    provider.take(50.0);
    let call = tokio::spawn(provider.call(limiter.clone(), layer, Duration::ZERO));
    sleep(Duration::from_secs(10)).await;
    limiter
        .set_limits(Limits::new().requests(Rate::per_minute(59)))
        .unwrap();
    call.await.unwrap();
    // 9 were left, and about 20 came since then.
    assert_eq!(limiter.available().requests, Some(28));
}

// === Pauses of the provider ===

#[tokio::test(start_paused = true)]
async fn the_user_and_the_provider_each_have_a_pause_of_their_own_and_resume_ends_both() {
    let limiter = limiter();
    let layer = FeedbackLayer::new(limiter.clone(), Provider::OpenAi);
    let start = Instant::now();
    let paused = || {
        limiter
            .paused()
            .map(|pause| (pause.source(), (pause.until() - start).as_secs()))
    };
    respond(&layer, 429, &[("retry-after", "50")]).await;
    assert_eq!(paused(), Some((PauseSource::Provider, 50)));
    limiter.pause_for(Duration::from_secs(70));
    assert_eq!(paused(), Some((PauseSource::User, 70)));
    limiter.pause_for(Duration::ZERO);
    assert_eq!(paused(), Some((PauseSource::Provider, 50)));
    // Responses arrive in any order: an earlier end of the provider's does not count.
    respond(&layer, 429, &[("retry-after", "10")]).await;
    respond(&layer, 429, &[("retry-after", "0")]).await;
    assert_eq!(paused(), Some((PauseSource::Provider, 50)));
    limiter.pause_for(Duration::from_secs(70));
    limiter.resume();
    assert_eq!(paused(), None);
    limiter.acquire(Cost::request()).await.unwrap();
    assert_eq!(start.elapsed(), Duration::ZERO);
    // After that, the provider can pause the limiter again.
    respond(&layer, 429, &[("retry-after", "3")]).await;
    limiter.acquire(Cost::request()).await.unwrap();
    assert_eq!(start.elapsed(), Duration::from_secs(3));
}

#[tokio::test(start_paused = true)]
async fn a_provider_pauses_for_an_hour_at_most_unless_configured() {
    let limiter = limiter();
    let start = Instant::now();
    let layer = FeedbackLayer::new(limiter.clone(), Provider::OpenAi);
    for delay in ["86400", "99999999999999999999", "Sun, 06 Nov 2094 08:49:37 GMT"] {
        respond(&layer, 429, Box::leak(Box::new([("retry-after", delay)]))).await;
        assert_eq!(limiter.paused().unwrap().until(), start + Duration::from_secs(3_600));
    }
}
