//! Tests of retries: which calls are retried, when, and how often.

use bytes::Bytes;
use http::{Request, Response};
use std::{
    io,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::time::{Instant, sleep};
use tower::{BoxError, Layer, Service, ServiceExt, retry::RetryLayer, retry::budget::TpsBudget, service_fn};
use tower_outbound::{
    Call, Cost, Deadline, DeadlineLayer, Executor, Limits, Rate, RateLimiter, RequestStatus,
    error::{Cancelled, CostExceedsBurst, DeadlineExceeded, RetryAfterTooLong},
    provider::Provider,
    retry::{RetryPolicy, never_sent},
};

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// How the test server treats one attempt.
#[derive(Clone, Debug)]
enum Answer {
    /// The server responds with a status, headers and a body.
    Status(u16, &'static [(&'static str, &'static str)], &'static str),
    Error(io::ErrorKind),
    /// The server never responds.
    Hangs,
}

const fn code(code: u16) -> Answer {
    Answer::Status(code, &[], "")
}

const fn with(code: u16, headers: &'static [(&'static str, &'static str)]) -> Answer {
    Answer::Status(code, headers, "")
}

/// A test server that treats the first attempts as the list `answers` prescribes, one entry for each, and responds with
/// 200 to all further ones. Keeps the times of all attempts.
#[derive(Clone)]
struct Server {
    answers: Arc<Mutex<Vec<Answer>>>,
    times: Arc<Mutex<Vec<Duration>>>,
    started: Instant,
}

impl Server {
    fn new(answers: &[Answer]) -> Self {
        let mut answers = answers.to_vec();
        answers.reverse();
        Self {
            answers: Arc::new(Mutex::new(answers)),
            times: Arc::default(),
            started: Instant::now(),
        }
    }

    fn client(
        &self,
    ) -> impl Service<Request<String>, Response = Response<Bytes>, Error = BoxError, Future: Send> + Clone + Send + 'static
    {
        let server = self.clone();
        service_fn(move |_: Request<String>| {
            let server = server.clone();
            async move {
                server.times.lock().unwrap().push(server.started.elapsed());
                let answer = server.answers.lock().unwrap().pop().unwrap_or(code(200));
                match answer {
                    Answer::Status(status, headers, body) => {
                        let mut response = Response::builder().status(status);
                        for (name, value) in headers {
                            response = response.header(*name, *value);
                        }
                        Ok(response.body(Bytes::from_static(body.as_bytes()))?)
                    }
                    Answer::Error(kind) => Err(io::Error::from(kind).into()),
                    Answer::Hangs => std::future::pending().await,
                }
            }
        })
    }

    /// Returns the time of each attempt, counted from the start of the test server.
    fn times(&self) -> Vec<Duration> {
        self.times.lock().unwrap().clone()
    }
}

/// A policy without backoff, so that a call waits only for the delays that the server requests.
fn policy() -> RetryPolicy {
    RetryPolicy::new()
        .backoff(Duration::ZERO, Duration::ZERO)
        .max_retries(3)
}

/// Sends one call through `policy` to a server that treats its attempts as `answers` prescribes. Returns the server and
/// the result of the call.
async fn send(policy: RetryPolicy, answers: &[Answer]) -> (Server, Result<Response<Bytes>, BoxError>) {
    let server = Server::new(answers);
    let service = RetryLayer::new(policy).layer(server.client());
    let result = service.oneshot(Request::new("hello".into())).await;
    (server, result)
}

/// Returns how many attempts a call takes if the server treats the first one as `answer` prescribes, and responds to
/// the second with 200.
async fn attempts(policy: RetryPolicy, answer: Answer) -> usize {
    let (server, _) = send(policy, &[answer]).await;
    server.times().len()
}

#[tokio::test(start_paused = true)]
async fn only_failures_that_may_pass_are_retried() {
    for (answer, times) in [
        (code(200), 1),
        (code(301), 1),
        (code(400), 1),
        (code(401), 1),
        (code(403), 1),
        (code(404), 1),
        (code(408), 2),
        (code(409), 2),
        (code(422), 1),
        (code(429), 2),
        (code(500), 2),
        (code(502), 2),
        (code(503), 2),
        (code(529), 2),
        (with(400, &[("x-should-retry", "true")]), 2),
        // Only a failure can be retried, whatever the header says.
        (with(200, &[("x-should-retry", "true")]), 1),
        (with(301, &[("x-should-retry", "true")]), 1),
        (with(503, &[("x-should-retry", "false")]), 1),
        (with(429, &[("x-should-retry", "false"), ("retry-after", "1")]), 1),
        (Answer::Error(io::ErrorKind::ConnectionRefused), 2),
        (Answer::Error(io::ErrorKind::ConnectionReset), 2),
        (Answer::Error(io::ErrorKind::UnexpectedEof), 2),
        (Answer::Error(io::ErrorKind::TimedOut), 2),
        (Answer::Error(io::ErrorKind::PermissionDenied), 1),
    ] {
        assert_eq!(attempts(policy(), answer.clone()).await, times, "{answer:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn custom_errors_can_be_retried_too() {
    let denied = |error: &BoxError| {
        let error = error.downcast_ref::<io::Error>();
        error.is_some_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
    };
    let answer = Answer::Error(io::ErrorKind::PermissionDenied);
    assert_eq!(attempts(policy().retry_errors(denied), answer).await, 2);
}

#[tokio::test(start_paused = true)]
async fn failures_that_do_not_pass_by_waiting_are_recognized_for_each_provider() {
    let of = |provider| policy().provider(provider);
    let quota = Answer::Status(
        429,
        &[],
        r#"{"error":{"message":"You exceeded your current quota","type":"insufficient_quota","code":"insufficient_quota"}}"#,
    );
    let rate = Answer::Status(
        429,
        &[],
        r#"{"error":{"type":"requests","code":"rate_limit_exceeded"}}"#,
    );
    let json = cfg!(feature = "json");
    assert_eq!(attempts(of(Provider::OpenAi), quota).await, if json { 1 } else { 2 });
    assert_eq!(attempts(of(Provider::OpenAi), rate).await, 2);
    // Anthropic's 429 for a reached spend limit has no `retry-after`, and waiting does not help, so it is not retried.
    assert_eq!(attempts(of(Provider::Anthropic), code(429)).await, 1);
    assert_eq!(
        attempts(of(Provider::Anthropic), with(429, &[("retry-after", "1")])).await,
        2
    );
    assert_eq!(attempts(of(Provider::Anthropic), code(529)).await, 2);
    // GitHub sends a 403 both for a reached limit and for a missing permission. Only a response for a reached limit has
    // headers that show it, and only that one is retried.
    assert_eq!(attempts(of(Provider::GitHub), code(403)).await, 1);
    assert_eq!(
        attempts(of(Provider::GitHub), with(403, &[("x-ratelimit-remaining", "0")])).await,
        2
    );
    assert_eq!(
        attempts(of(Provider::GitHub), with(403, &[("retry-after", "1")])).await,
        2
    );
}

#[cfg(feature = "json")]
#[tokio::test(start_paused = true)]
async fn gemini_reports_the_retry_delay_and_permanent_limits_in_the_body() {
    const MINUTE: &str = r#"{"error":{"code":429,"message":"Please retry in 46s.","status":"RESOURCE_EXHAUSTED","details":[
        {"@type":"type.googleapis.com/google.rpc.QuotaFailure","violations":[{"quotaId":"GenerateRequestsPerMinutePerProjectPerModel"}]},
        {"@type":"type.googleapis.com/google.rpc.RetryInfo","retryDelay":"46s"}]}}"#;
    const DAY: &str = r#"{"error":{"code":429,"details":[{"violations":[{"quotaId":"GenerateRequestsPerDayPerProjectPerModel"}]},{"retryDelay":"5s"}]}}"#;
    const NONE: &str = r#"{"error":{"code":429,"message":"Quota exceeded, limit: 0, model: x"}}"#;
    const TEN: &str = r#"{"error":{"code":429,"message":"Quota exceeded, limit: 0.5, limit: 05, limit: 10"}}"#;
    const LONG: &str = r#"[{"error":{"details":[{"retryDelay":"10h17m5.723541104s"}]}}]"#;
    let of = || policy().provider(Provider::Gemini);
    let (server, result) = send(of(), &[Answer::Status(429, &[], MINUTE)]).await;
    assert_eq!(
        (server.times(), result.unwrap().status().as_u16()),
        (vec![ms(0), ms(46_000)], 200)
    );
    assert_eq!(attempts(of(), Answer::Status(429, &[], DAY)).await, 1);
    assert_eq!(attempts(of(), Answer::Status(429, &[], NONE)).await, 1);
    assert_eq!(attempts(of(), Answer::Status(429, &[], TEN)).await, 2);
    let (_, result) = send(of(), &[Answer::Status(429, &[], LONG)]).await;
    let error = result.unwrap_err().downcast::<RetryAfterTooLong>().unwrap();
    assert_eq!(error.delay(), Duration::new(10 * 3_600 + 17 * 60 + 5, 723_541_104));
}

#[tokio::test(start_paused = true)]
async fn a_servers_delay_is_waited_in_full_and_no_longer() {
    let answers = [
        with(429, &[("retry-after", "7")]),
        with(503, &[("retry-after-ms", "1500"), ("retry-after", "9")]),
    ];
    let (server, result) = send(RetryPolicy::new().provider(Provider::OpenAi), &answers).await;
    assert_eq!(result.unwrap().status(), 200);
    assert_eq!(server.times(), [ms(0), ms(7_000), ms(8_500)]);
}

#[tokio::test(start_paused = true)]
async fn a_call_backs_off_however_short_the_delay_is_that_the_server_requests() {
    for (value, shortest) in [("0", 0), ("0.001", 1), ("0.05", 50)] {
        let answer = Answer::Status(429, Vec::leak(vec![("retry-after", value)]), "");
        let mut last = Vec::new();
        for seed in 0..100 {
            let policy = RetryPolicy::new().backoff(ms(100), ms(400)).max_retries(3).seed(seed);
            let (server, result) = send(policy, &vec![answer.clone(); 4]).await;
            assert_eq!(result.unwrap().status(), 429);
            let times = server.times();
            let waits: Vec<_> = times.windows(2).map(|pair| (pair[1] - pair[0]).as_millis()).collect();
            for (wait, most) in waits.iter().zip([100, 200, 400]) {
                assert!((shortest..=most + 1).contains(wait), "{value}: {waits:?}");
            }
            last.push(waits[2]);
        }
        last.sort_unstable();
        // The last waits are spread evenly over the backoff of 400 ms.
        assert!((120..280).contains(&last[50]) && last[90] > 300, "{value}: {last:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn calls_that_are_told_the_same_delay_together_do_not_come_back_in_the_same_instant() {
    let server = Server::new(&vec![with(429, &[("retry-after", "1")]); 1_000]);
    let service = RetryLayer::new(RetryPolicy::new().budget(None).seed(1)).layer(server.client());
    let calls: Vec<_> = (0..1_000)
        .map(|_| tokio::spawn(service.clone().oneshot(Request::new(String::new()))))
        .collect();
    for call in calls {
        assert_eq!(call.await.unwrap().unwrap().status(), 200);
    }
    let second = server.times().split_off(1_000);
    // One comes back after exactly the delay, the others in the 500 ms after it: about ten in any 5 ms.
    assert_eq!((second.len(), second[0]), (1_000, ms(1_000)));
    assert!(second[999] <= ms(1_501) && second[999] > ms(1_480), "{:?}", second[999]);
    let most_at_once = second.iter().map(|at| {
        let together = second.iter().filter(|other| *other >= at && **other < *at + ms(5));
        together.count()
    });
    assert!(most_at_once.max().unwrap() < 30);
    // When none waits any more, a call is alone again.
    *server.answers.lock().unwrap() = vec![with(429, &[("retry-after", "1")])];
    let begun = Instant::now();
    service.oneshot(Request::new(String::new())).await.unwrap();
    assert_eq!(begun.elapsed(), ms(1_000));
}

fn with_deadline(left: Duration) -> Request<String> {
    Request::builder()
        .extension(Deadline::after(left))
        .body(String::new())
        .unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_requested_delay_beyond_the_deadline_fails_at_once_with_the_response() {
    const HEADERS: &[(&str, &str)] = &[("retry-after", "30"), ("x-request-id", "req_1")];
    let server = Server::new(&[Answer::Status(429, HEADERS, "slow down")]);
    let executor = Executor::builder()
        .limits(Limits::new())
        .layer(RetryLayer::new(RetryPolicy::new()))
        .timeout(ms(10_000))
        .build(server.client())
        .unwrap();
    executor.start().unwrap();
    let call = executor.submit(Request::new(String::new())).await.unwrap();
    let event = call.event().clone();
    let error = call.await.unwrap_err();
    assert_eq!((server.started.elapsed(), server.times().len()), (ms(0), 1));
    assert_eq!(
        error.to_string(),
        "429 Too Many Requests: the server asks to retry after 30s, and the call has only 10s until its deadline: \
         set a later deadline to wait for it"
    );
    let too_long = error.find::<RetryAfterTooLong>().unwrap();
    assert_eq!((too_long.delay(), too_long.max_delay()), (ms(30_000), ms(10_000)));
    assert!(too_long.is_deadline());
    let response = too_long.clone().into_response();
    assert_eq!(
        (response.status().as_u16(), &**response.body()),
        (429, &b"slow down"[..])
    );
    assert_eq!(response.headers()["x-request-id"], "req_1");
    let debug = format!("{too_long:?}");
    assert!(!debug.contains("req_1") && !debug.contains("slow down"), "{debug}");
    let event = event.finished().await;
    assert_eq!(
        event.logs[0].message,
        "Attempt 1: 429 Too Many Requests; not retried: the server requests a delay of 30s, and the call has only 10s \
         until its deadline"
    );
    assert_eq!(event.attempts[0].status_code, Some(429));
    assert_eq!(event.error_type.as_deref(), Some("RetryAfterTooLong"));
}

#[tokio::test(start_paused = true)]
async fn a_requested_delay_is_compared_with_the_time_left_and_with_the_maximum() {
    for (left, max_delay, expected) in [
        // Waits, since a call that is retried before its deadline may end in time.
        (10_001, 10_000, None),
        (10_000, 60_000, Some((10_000, true))),
        (5_000, 6_000, Some((5_000, true))),
        // Raising the other bound alone would not help.
        (6_000, 5_000, Some((5_000, false))),
        (60_000, 9_999, Some((9_999, false))),
    ] {
        let server = Server::new(&[with(503, &[("retry-after", "10")])]);
        let service = RetryLayer::new(policy().max_delay(ms(max_delay))).layer(server.client());
        let result = service.oneshot(with_deadline(ms(left))).await;
        let bound = result.err().map(|error| {
            let error = error.downcast::<RetryAfterTooLong>().unwrap();
            (error.max_delay(), error.is_deadline())
        });
        assert_eq!(bound, expected.map(|(bound, is_deadline)| (ms(bound), is_deadline)));
        assert_eq!(
            server.started.elapsed(),
            ms(if expected.is_none() { 10_000 } else { 0 })
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_backoff_beyond_the_deadline_is_not_waited_for() {
    for answer in [code(503), with(429, &[("retry-after", "0")])] {
        for seed in 0..50 {
            let server = Server::new(&vec![answer.clone(); 9]);
            let policy = RetryPolicy::new().backoff(ms(1_000), ms(1_000)).budget(None).seed(seed);
            let service = RetryLayer::new(policy).layer(server.client());
            let response = service.oneshot(with_deadline(ms(700))).await.unwrap();
            assert!(response.status().is_client_error() || response.status().is_server_error());
            // The call ends with its last attempt, and is not ended by the deadline.
            assert_eq!(server.started.elapsed(), *server.times().last().unwrap());
            assert!(server.started.elapsed() <= ms(700));
        }
    }
    let server = Server::new(&[Answer::Error(io::ErrorKind::ConnectionReset)]);
    let policy = RetryPolicy::new().backoff(ms(1_000_000), ms(1_000_000)).seed(1);
    let service = DeadlineLayer::new()
        .timeout(ms(100))
        .layer(RetryLayer::new(policy).layer(server.client()));
    let error = service.oneshot(Request::new(String::new())).await.unwrap_err();
    // The deadline of a layer further out counts, too.
    assert_eq!((server.started.elapsed(), error.is::<io::Error>()), (ms(0), true));

    // It does not replace the timeout of a layer below, which applies to each attempt.
    let server = Server::new(&[Answer::Hangs, code(200)]);
    let attempt = DeadlineLayer::new().timeout(ms(100)).layer(server.client());
    let policy = crate::policy().retry_errors(|error| error.is::<DeadlineExceeded>());
    let service = DeadlineLayer::new()
        .timeout(ms(1_000))
        .layer(RetryLayer::new(policy).layer(attempt));
    service.oneshot(Request::new(String::new())).await.unwrap();
    assert_eq!(server.times(), [ms(0), ms(100)]);
}

#[tokio::test(start_paused = true)]
async fn calls_that_are_told_the_same_delay_come_back_before_their_deadline() {
    let server = Server::new(&vec![with(429, &[("retry-after", "1")]); 200]);
    let policy = RetryPolicy::new().backoff(ms(60_000), ms(60_000)).budget(None).seed(1);
    let service = RetryLayer::new(policy).layer(server.client());
    let calls: Vec<_> = (0..200)
        .map(|_| tokio::spawn(service.clone().oneshot(with_deadline(ms(1_100)))))
        .collect();
    for call in calls {
        assert_eq!(call.await.unwrap().unwrap().status(), 200);
    }
    let times = server.times().split_off(200);
    assert!(times.iter().all(|at| (ms(1_000)..=ms(1_100)).contains(at)), "{times:?}");
    assert!(times[100] < times[199]);
}

#[tokio::test(start_paused = true)]
async fn a_limit_of_github_is_waited_for_until_its_reset_or_for_a_minute() {
    const DATE: (&str, &str) = ("date", "Tue, 03 Mar 2026 10:00:00 GMT");
    // 40 s after the date.
    const RESET: (&str, &str) = ("x-ratelimit-reset", "1772532040");
    const USED_UP: (&str, &str) = ("x-ratelimit-remaining", "0");
    let of = || policy().provider(Provider::GitHub);
    for status in [403, 429] {
        let (server, result) = send(of(), &[with(status, &[DATE, RESET, USED_UP])]).await;
        assert_eq!(
            (result.unwrap().status().as_u16(), server.times()),
            (200, vec![ms(0), ms(40_000)])
        );

        // A `retry-after`, which GitHub sends for its secondary limits, takes precedence.
        let (server, _) = send(of(), &[with(status, &[DATE, RESET, USED_UP, ("retry-after", "50")])]).await;
        assert_eq!(server.times(), [ms(0), ms(50_000)]);

        let (server, result) = send(of().max_delay(ms(39_000)), &[with(status, &[DATE, RESET, USED_UP])]).await;
        let error = result.unwrap_err().downcast::<RetryAfterTooLong>().unwrap();
        assert_eq!(
            (error.delay(), error.status().as_u16(), server.times().len()),
            (ms(40_000), status, 1)
        );
    }
    // Without a reset, and for secondary limits, GitHub's documentation asks for a minute.
    let (server, _) = send(of(), &[with(403, &[USED_UP]), code(429)]).await;
    assert_eq!(server.times(), [ms(0), ms(60_000), ms(120_000)]);
    let secondary = r#"{"message":"You have exceeded a secondary rate limit. Please wait a few minutes."}"#;
    let (server, _) = send(of(), &[Answer::Status(403, &[], secondary)]).await;
    let json = cfg!(feature = "json");
    assert_eq!(server.times(), if json { vec![ms(0), ms(60_000)] } else { vec![ms(0)] });
    // A missing permission is not a limit, and the reset of a limit that is not used up is not a delay.
    const REMAINING: (&str, &str) = ("x-ratelimit-remaining", "17");
    let (server, _) = send(of(), &[with(403, &[DATE, RESET, REMAINING])]).await;
    assert_eq!(server.times(), [ms(0)]);
    let (server, _) = send(of(), &[with(500, &[DATE, RESET, REMAINING])]).await;
    assert_eq!(server.times(), [ms(0), ms(0)]);
}

#[tokio::test(start_paused = true)]
async fn a_request_whose_body_cannot_be_cloned_is_made_once() {
    /// A body that can be sent once, unless it is shared.
    #[derive(Debug)]
    struct Stream(Option<Arc<str>>);

    let server = Server::new(&[const { code(503) }; 4]);
    let inner = server.client();
    let client = service_fn(move |request: Request<Stream>| inner.clone().oneshot(request.map(|_| String::new())));
    let policy = policy().clone_body_with(|body: &Stream| Some(Stream(Some(body.0.clone()?))));
    let service = RetryLayer::new(policy).layer(client);
    let response = service.clone().oneshot(Request::new(Stream(None))).await.unwrap();
    assert_eq!((response.status().as_u16(), server.times().len()), (503, 1));
    let response = service
        .oneshot(Request::new(Stream(Some("shared".into()))))
        .await
        .unwrap();
    assert_eq!((response.status().as_u16(), server.times().len()), (200, 5));
}

#[tokio::test(start_paused = true)]
async fn responses_of_any_body_type_are_retried_by_their_head_and_by_the_bytes_that_the_user_gives_access_to() {
    const QUOTA: &str = r#"{"error":{"code":"insufficient_quota"}}"#;
    struct Opaque(Bytes);

    type Inspect = fn(&Opaque) -> Option<&[u8]>;
    let looks_into: Inspect = |body| Some(&body.0);
    let sees_none: Inspect = |_| None;
    for (inspect, attempts) in [(sees_none, 2), (looks_into, if cfg!(feature = "json") { 1 } else { 2 })] {
        let server = Server::new(&[Answer::Status(429, &[], QUOTA)]);
        let client = server.client().map_response(|response| response.map(Opaque));
        let policy = policy().provider(Provider::OpenAi).whole_body_with(inspect);
        let service = RetryLayer::new(policy).layer(client);
        service.oneshot(Request::new(String::new())).await.unwrap();
        assert_eq!(server.times().len(), attempts);
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_is_sent_again_with_its_head_and_its_extensions() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let client = {
        let seen = seen.clone();
        service_fn(move |request: Request<String>| {
            seen.lock().unwrap().push(format!("{request:?}"));
            let mut response = Response::new(Bytes::new());
            *response.status_mut() = http::StatusCode::BAD_GATEWAY;
            std::future::ready(Ok::<_, BoxError>(response))
        })
    };
    let request = Request::put("http://localhost/a?b=c")
        .version(http::Version::HTTP_2)
        .header("x-one", "1")
        .header("x-one", "2")
        .extension(Deadline::after(ms(1_000)))
        .body(String::from("body"))
        .unwrap();
    let sent = format!("{request:?}");
    RetryLayer::new(policy()).layer(client).oneshot(request).await.unwrap();
    assert_eq!(*seen.lock().unwrap(), vec![sent; 4]);
}

#[tokio::test(start_paused = true)]
async fn without_retries_the_policy_returns_every_response_as_it_is() {
    let (server, result) = send(policy().max_retries(0), &[with(429, &[("retry-after", "1000")])]).await;
    assert_eq!((result.unwrap().status().as_u16(), server.times().len()), (429, 1));
}

#[tokio::test(start_paused = true)]
async fn a_delay_above_the_maximum_fails_at_once_with_an_error_that_has_both() {
    let (server, result) = send(policy().max_delay(ms(20_000)), &[with(429, &[("retry-after", "21")])]).await;
    let error = result.unwrap_err();
    let too_long = error.downcast_ref::<RetryAfterTooLong>().unwrap();
    assert_eq!((too_long.delay(), too_long.max_delay()), (ms(21_000), ms(20_000)));
    assert_eq!(too_long.status(), 429);
    assert_eq!(
        error.to_string(),
        "429 Too Many Requests: the server asks to retry after 21s, and the longest delay allowed is 20s: \
         raise `max_delay` to wait for it"
    );
    assert_eq!((server.times(), server.started.elapsed()), (vec![ms(0)], ms(0)));
    let (server, _) = send(policy().max_delay(ms(20_000)), &[with(429, &[("retry-after", "20")])]).await;
    assert_eq!(server.times(), [ms(0), ms(20_000)]);
}

#[tokio::test(start_paused = true)]
async fn without_a_requested_delay_the_wait_is_a_random_part_of_a_time_that_doubles() {
    let mut first = Vec::new();
    for seed in 0..200 {
        let policy = RetryPolicy::new().backoff(ms(100), ms(300)).max_retries(4).seed(seed);
        let (server, result) = send(policy.clone(), &[const { code(500) }; 9]).await;
        assert_eq!(result.unwrap().status(), 500);
        let times = server.times();
        assert_eq!(times.len(), 5);
        for (at, max) in [100, 200, 300, 300].into_iter().enumerate() {
            // The bound is a millisecond longer than the wait, because Tokio's timers are rounded up to the next
            // millisecond.
            assert!(times[at + 1] - times[at] <= ms(max + 1), "{times:?}");
        }
        first.push((times[1] - times[0]).as_millis());
        let (again, _) = send(policy.seed(seed), &[const { code(500) }; 9]).await;
        assert_eq!(again.times(), times);
    }
    first.sort_unstable();
    // The first waits of the 200 calls are spread evenly over the backoff of 100 ms: their 10th percentile is below 20
    // ms, the 50th is near 50 ms, and the 90th is above 80 ms.
    assert!(
        first[20] < 20 && (40..60).contains(&first[100]) && first[180] > 80,
        "{first:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn concurrent_calls_do_not_wait_the_same_time() {
    let server = Server::new(&[const { code(503) }; 50]);
    let service = RetryLayer::new(RetryPolicy::new().seed(1)).layer(server.client());
    let calls: Vec<_> = (0..50)
        .map(|_| tokio::spawn(service.clone().oneshot(Request::new(String::new()))))
        .collect();
    for call in calls {
        call.await.unwrap().unwrap();
    }
    let mut second = server.times().split_off(50);
    second.dedup();
    assert!(second.len() > 40, "{second:?}");
}

#[tokio::test(start_paused = true)]
async fn a_call_is_retried_up_to_max_retries_and_as_the_budget_allows() {
    let (server, result) = send(policy(), &[const { code(503) }; 9]).await;
    assert_eq!((server.times().len(), result.unwrap().status().as_u16()), (4, 503));

    // With a budget of ten retries in ten seconds, to which successes add nothing, the call fails after eleven
    // attempts.
    let budget = Arc::new(TpsBudget::new(Duration::from_secs(10), 1, 0.0));
    let policy = policy().max_retries(100).budget(Some(budget));
    let (server, result) = send(policy.clone(), &[const { code(503) }; 90]).await;
    assert_eq!((server.times().len(), result.unwrap().status().as_u16()), (11, 503));
    let (server, _) = send(policy.clone().budget(None), &[const { code(503) }; 90]).await;
    assert_eq!(server.times().len(), 91);
}

#[tokio::test(start_paused = true)]
async fn the_event_of_a_call_has_every_attempt_and_the_reason_for_each_retry() {
    let answers = [
        Answer::Error(io::ErrorKind::ConnectionReset),
        with(429, &[("retry-after", "2")]),
        with(503, &[("retry-after", "100")]),
    ];
    let server = Server::new(&answers);
    let executor = Executor::builder()
        .layer(RetryLayer::new(policy()))
        .build(server.client())
        .unwrap();
    executor.start().unwrap();
    let call = executor.submit(Call::from(Request::new(String::new()))).await.unwrap();
    let event = call.event().clone();
    assert_eq!(
        call.await.unwrap_err().find::<RetryAfterTooLong>().unwrap().delay(),
        ms(100_000)
    );
    let event = event.finished().await;
    let codes: Vec<_> = event.attempts.iter().map(|attempt| attempt.status_code).collect();
    assert_eq!(codes, [None, Some(429), Some(503)]);
    let logs: Vec<_> = event.logs.iter().map(|log| &*log.message).collect();
    assert_eq!(
        logs,
        [
            "Attempt 1: connection reset; retrying in 0ns (backoff)",
            "Attempt 2: 429 Too Many Requests; retrying in 2s (requested by the server)",
            "Attempt 3: 503 Service Unavailable; not retried: the server requests a delay of 100s, and max_delay is 60s",
        ]
    );
    assert_eq!(
        (event.status, event.error_type.as_deref()),
        (RequestStatus::Failed, Some("RetryAfterTooLong"))
    );
    assert_eq!(event.time_calling(), Some(ms(2_000)));
}

#[tokio::test(start_paused = true)]
async fn with_a_provider_that_fails_at_random_every_attempt_is_recorded_and_charged() {
    const CALLS: usize = 500;
    let mut rng = fastrand::Rng::with_seed(7);
    let answers: Vec<_> = (0..4 * CALLS)
        .map(|_| match rng.u32(..10) {
            0 => code(500),
            1 => with(429, &[("retry-after", "1")]),
            2 => Answer::Error(io::ErrorKind::ConnectionReset),
            _ => code(200),
        })
        .collect();
    let server = Server::new(&answers);
    let executor = Executor::builder()
        .limits(
            Limits::new()
                .requests(Rate::per_day(10_000))
                .tokens(Rate::per_day(1_000_000)),
        )
        .concurrency_limit(20)
        .layer(RetryLayer::new(RetryPolicy::new().budget(None).max_retries(4).seed(3)))
        .build(server.client())
        .unwrap();
    executor.start().unwrap();
    let limiter = executor.monitor().limiter().clone();
    let mut calls = Vec::new();
    for _ in 0..CALLS {
        calls.push(
            executor
                .submit(Call::from(Request::new(String::new())).tokens(7))
                .await
                .unwrap(),
        );
    }
    let (mut attempts, mut succeeded) = (0, 0);
    for call in calls {
        let event = call.event().clone();
        let result = call.await;
        let event = event.finished().await;
        attempts += event.attempts.len();
        assert_eq!(
            event.logs.len(),
            event.attempts.len() - usize::from(result.as_ref().is_ok_and(|response| response.status() == 200))
        );
        let last = event.attempts.last().unwrap();
        match &result {
            Ok(response) => {
                succeeded += usize::from(response.status() == 200);
                assert_eq!(last.status_code, Some(response.status().as_u16()));
                assert!(response.status() == 200 || event.attempts.len() == 5);
            }
            Err(_) => assert_eq!((last.status_code, event.attempts.len()), (None, 5)),
        }
        for attempt in &event.attempts[..event.attempts.len() - 1] {
            assert_ne!(attempt.status_code, Some(200));
        }
    }
    let seen = server.times().len();
    assert_eq!(seen, attempts);
    assert!(seen > 650 && succeeded > 490, "{seen} {succeeded}");
    // The buckets were refilled a little during the test, so the charged amounts are checked with an allowance.
    let elapsed = server.started.elapsed().as_secs_f64();
    let available = limiter.available();
    let refilled = |per_day: f64| (per_day * elapsed / 86_400.0).ceil() as u64;
    let charged = (
        10_000 - available.requests.unwrap(),
        1_000_000 - available.tokens.unwrap(),
    );
    let seen = seen as u64;
    assert!(
        (seen - refilled(10_000.0)..=seen).contains(&charged.0),
        "{charged:?} {seen}"
    );
    assert!(
        (7 * seen - refilled(1_000_000.0)..=7 * seen).contains(&charged.1),
        "{charged:?} {seen}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_timeout_of_a_single_attempt_is_retried() {
    let server = Server::new(&[Answer::Hangs, code(200)]);
    let attempt = tower::timeout::TimeoutLayer::new(ms(100)).layer(server.client());
    let service = RetryLayer::new(policy()).layer(attempt);
    service.oneshot(Request::new(String::new())).await.unwrap();
    assert_eq!(server.times(), [ms(0), ms(100)]);
}

#[tokio::test(start_paused = true)]
async fn a_call_whose_caller_has_the_response_is_not_retried() {
    use http_body_util::BodyExt;
    let calls = Arc::new(Mutex::new(0));
    let client = {
        let calls = calls.clone();
        service_fn(move |_: Request<String>| {
            *calls.lock().unwrap() += 1;
            async move {
                sleep(ms(10)).await;
                let frames = futures_util::stream::iter([Err::<http_body::Frame<Bytes>, _>(io::Error::from(
                    io::ErrorKind::ConnectionReset,
                ))]);
                Ok::<_, BoxError>(Response::new(http_body_util::StreamBody::new(frames)))
            }
        })
    };
    let executor = Executor::builder()
        .layer(RetryLayer::new(policy()))
        .build_streaming(client)
        .unwrap();
    executor.start().unwrap();
    let call = executor.submit(Call::from(Request::new(String::new()))).await.unwrap();
    let event = call.event().clone();
    let error = call.await.unwrap().into_body().collect().await.unwrap_err();
    assert!(error.is::<io::Error>() && !error.is::<Cancelled>());
    let event = event.finished().await;
    assert_eq!(
        (event.attempts.len(), event.error_type.as_deref()),
        (1, Some("BodyFailed"))
    );
    assert_eq!(*calls.lock().unwrap(), 1);
}

/// Returns how often a service is called that always fails with the error that `fail` makes, by a policy that retries
/// once.
async fn attempts_failing_with(fail: impl Fn() -> BoxError + Clone) -> usize {
    let count = Arc::new(Mutex::new(0));
    let counted = count.clone();
    let client = service_fn(move |_: Request<String>| {
        *counted.lock().unwrap() += 1;
        std::future::ready(Err::<Response<Bytes>, _>(fail()))
    });
    let service = RetryLayer::new(policy().max_retries(1)).layer(client);
    service.oneshot(Request::new(String::new())).await.unwrap_err();
    *count.lock().unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_lost_connection_is_recognized_wherever_it_is_in_the_chain_of_sources() {
    #[derive(Debug)]
    struct Wrapper(BoxError);

    impl std::fmt::Display for Wrapper {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("wrapper")
        }
    }

    impl std::error::Error for Wrapper {
        fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
            Some(&*self.0)
        }
    }

    let wrapped = |error: BoxError| BoxError::from(Wrapper(io::Error::other(Wrapper(error)).into()));
    let reset = || io::Error::from(io::ErrorKind::ConnectionReset).into();
    let denied = || io::Error::from(io::ErrorKind::PermissionDenied).into();
    assert_eq!(attempts_failing_with(move || wrapped(reset())).await, 2);
    assert_eq!(attempts_failing_with(move || wrapped(denied())).await, 1);
    // The wrapped error of an `io::Error` is not one of its sources, and is found all the same.
    let elapsed = || io::Error::other(tower::timeout::error::Elapsed::new()).into();
    assert_eq!(attempts_failing_with(move || wrapped(elapsed())).await, 2);
    let cancelled = || wrapped(tower_outbound::Error::from(never_admitted()).into());
    assert_eq!(attempts_failing_with(cancelled).await, 1);
    // The sources of an executor's error are redacted copies, and the client's error is found all the same.
    let executor = Executor::builder()
        .build(service_fn(move |_: Request<String>| {
            std::future::ready(Err::<Response<Bytes>, _>(wrapped(reset())))
        }))
        .unwrap();
    executor.start().unwrap();
    let service = RetryLayer::new(policy().max_retries(1)).layer(executor.clone().map_err(BoxError::from));
    service.oneshot(Request::new(String::new())).await.unwrap_err();
    assert_eq!(executor.monitor().totals().failed, 2);
}

fn never_admitted() -> CostExceedsBurst {
    let limiter = RateLimiter::new(Limits::new().tokens(Rate::per_second(1))).unwrap();
    limiter.check(Cost::tokens(9)).unwrap_err()
}

#[test]
fn a_request_that_was_never_sent_is_recognized_by_the_sources_of_its_error() {
    let refused = || io::Error::from(io::ErrorKind::ConnectionRefused);
    assert!(never_sent(&refused().into()));
    assert!(never_sent(&BoxError::from(io::Error::other(refused()))));
    assert!(!never_sent(&io::Error::from(io::ErrorKind::ConnectionReset).into()));
    assert!(!never_sent(&BoxError::from("refused")));
}
