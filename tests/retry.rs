//! Calls that are made again.

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
    Call, Executor, Limits, Rate, RequestStatus,
    error::{Cancelled, RetryAfterTooLong},
    provider::Provider,
    retry::{RetryPolicy, never_sent},
};

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// What the server does with one attempt.
#[derive(Clone, Debug)]
enum Answer {
    Code(u16, &'static [(&'static str, &'static str)], &'static str),
    Fails(io::ErrorKind),
    Stuck,
}

const fn code(code: u16) -> Answer {
    Answer::Code(code, &[], "")
}

const fn with(code: u16, headers: &'static [(&'static str, &'static str)]) -> Answer {
    Answer::Code(code, headers, "")
}

/// Answers like this one after the other, and then with 200; and notes when it was asked.
#[derive(Clone)]
struct Server {
    answers: Arc<Mutex<Vec<Answer>>>,
    asked: Arc<Mutex<Vec<Duration>>>,
    begun: Instant,
}

impl Server {
    fn new(answers: &[Answer]) -> Self {
        let mut answers = answers.to_vec();
        answers.reverse();
        Self {
            answers: Arc::new(Mutex::new(answers)),
            asked: Arc::default(),
            begun: Instant::now(),
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
                server.asked.lock().unwrap().push(server.begun.elapsed());
                let answer = server.answers.lock().unwrap().pop().unwrap_or(code(200));
                match answer {
                    Answer::Code(status, headers, body) => {
                        let mut response = Response::builder().status(status);
                        for (name, value) in headers {
                            response = response.header(*name, *value);
                        }
                        Ok(response.body(Bytes::from_static(body.as_bytes()))?)
                    }
                    Answer::Fails(kind) => Err(io::Error::from(kind).into()),
                    Answer::Stuck => std::future::pending().await,
                }
            }
        })
    }

    fn asked(&self) -> Vec<Duration> {
        self.asked.lock().unwrap().clone()
    }
}

/// No random waits: only what the server says.
fn policy() -> RetryPolicy {
    RetryPolicy::new()
        .backoff(Duration::ZERO, Duration::ZERO)
        .max_retries(3)
}

async fn ask(policy: RetryPolicy, answers: &[Answer]) -> (Server, Result<Response<Bytes>, BoxError>) {
    let server = Server::new(answers);
    let service = RetryLayer::new(policy).layer(server.client());
    let result = service.oneshot(Request::new("hello".into())).await;
    (server, result)
}

/// How often the server is asked.
async fn attempts(policy: RetryPolicy, answer: Answer) -> usize {
    let (server, _) = ask(policy, &[answer]).await;
    server.asked().len()
}

#[tokio::test(start_paused = true)]
async fn only_what_may_pass_is_tried_again() {
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
        (with(503, &[("x-should-retry", "false")]), 1),
        (with(429, &[("x-should-retry", "false"), ("retry-after", "1")]), 1),
        (Answer::Fails(io::ErrorKind::ConnectionRefused), 2),
        (Answer::Fails(io::ErrorKind::ConnectionReset), 2),
        (Answer::Fails(io::ErrorKind::UnexpectedEof), 2),
        (Answer::Fails(io::ErrorKind::TimedOut), 2),
        (Answer::Fails(io::ErrorKind::PermissionDenied), 1),
    ] {
        assert_eq!(attempts(policy(), answer.clone()).await, times, "{answer:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn errors_of_ones_own_can_be_tried_again_too() {
    let denied = |error: &BoxError| {
        let error = error.downcast_ref::<io::Error>();
        error.is_some_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
    };
    let answer = Answer::Fails(io::ErrorKind::PermissionDenied);
    assert_eq!(attempts(policy().retry_errors(denied), answer).await, 2);
}

#[tokio::test(start_paused = true)]
async fn what_waiting_does_not_help_is_known_by_each_provider() {
    let of = |provider| policy().provider(provider);
    let quota = Answer::Code(
        429,
        &[],
        r#"{"error":{"message":"You exceeded your current quota","type":"insufficient_quota","code":"insufficient_quota"}}"#,
    );
    let rate = Answer::Code(
        429,
        &[],
        r#"{"error":{"type":"requests","code":"rate_limit_exceeded"}}"#,
    );
    let json = cfg!(feature = "json");
    assert_eq!(attempts(of(Provider::OpenAi), quota).await, if json { 1 } else { 2 });
    assert_eq!(attempts(of(Provider::OpenAi), rate).await, 2);
    // A cap on what may be spent has no time to come back at.
    assert_eq!(attempts(of(Provider::Anthropic), code(429)).await, 1);
    assert_eq!(
        attempts(of(Provider::Anthropic), with(429, &[("retry-after", "1")])).await,
        2
    );
    assert_eq!(attempts(of(Provider::Anthropic), code(529)).await, 2);
    // GitHub's limits come as a 403.
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
async fn gemini_says_in_the_body_when_to_come_back_and_whether_at_all() {
    const MINUTE: &str = r#"{"error":{"code":429,"message":"Please retry in 46s.","status":"RESOURCE_EXHAUSTED","details":[
        {"@type":"type.googleapis.com/google.rpc.QuotaFailure","violations":[{"quotaId":"GenerateRequestsPerMinutePerProjectPerModel"}]},
        {"@type":"type.googleapis.com/google.rpc.RetryInfo","retryDelay":"46s"}]}}"#;
    const DAY: &str = r#"{"error":{"code":429,"details":[{"violations":[{"quotaId":"GenerateRequestsPerDayPerProjectPerModel"}]},{"retryDelay":"5s"}]}}"#;
    const NONE: &str = r#"{"error":{"code":429,"message":"Quota exceeded, limit: 0, model: x"}}"#;
    const TEN: &str = r#"{"error":{"code":429,"message":"Quota exceeded, limit: 0.5, limit: 05, limit: 10"}}"#;
    const LONG: &str = r#"[{"error":{"details":[{"retryDelay":"10h17m5.723541104s"}]}}]"#;
    let of = || policy().provider(Provider::Gemini);
    let (server, result) = ask(of(), &[Answer::Code(429, &[], MINUTE)]).await;
    assert_eq!(
        (server.asked(), result.unwrap().status().as_u16()),
        (vec![ms(0), ms(46_000)], 200)
    );
    assert_eq!(attempts(of(), Answer::Code(429, &[], DAY)).await, 1);
    assert_eq!(attempts(of(), Answer::Code(429, &[], NONE)).await, 1);
    assert_eq!(attempts(of(), Answer::Code(429, &[], TEN)).await, 2);
    let (_, result) = ask(of(), &[Answer::Code(429, &[], LONG)]).await;
    let error = result.unwrap_err().downcast::<RetryAfterTooLong>().unwrap();
    assert_eq!(error.delay(), Duration::new(10 * 3_600 + 17 * 60 + 5, 723_541_104));
}

#[tokio::test(start_paused = true)]
async fn a_servers_delay_is_waited_in_full_and_no_longer() {
    let answers = [
        with(429, &[("retry-after", "7")]),
        with(503, &[("retry-after-ms", "1500"), ("retry-after", "9")]),
        with(503, &[("retry-after", "0")]),
    ];
    let (server, result) = ask(RetryPolicy::new().provider(Provider::OpenAi), &answers).await;
    assert_eq!(result.unwrap().status(), 200);
    assert_eq!(server.asked(), [ms(0), ms(7_000), ms(8_500), ms(8_500)]);
}

#[tokio::test(start_paused = true)]
async fn a_delay_above_the_ceiling_fails_at_once_and_says_which() {
    let (server, result) = ask(policy().max_delay(ms(20_000)), &[with(429, &[("retry-after", "21")])]).await;
    let error = result.unwrap_err();
    let told = error.downcast_ref::<RetryAfterTooLong>().unwrap();
    assert_eq!((told.delay(), told.ceiling()), (ms(21_000), ms(20_000)));
    assert_eq!(told.status(), 429);
    assert_eq!(
        error.to_string(),
        "429 Too Many Requests: come back in 21s, which is more than 20s"
    );
    assert_eq!((server.asked(), server.begun.elapsed()), (vec![ms(0)], ms(0)));
    let (server, _) = ask(policy().max_delay(ms(20_000)), &[with(429, &[("retry-after", "20")])]).await;
    assert_eq!(server.asked(), [ms(0), ms(20_000)]);
}

#[tokio::test(start_paused = true)]
async fn without_a_word_of_the_server_the_wait_is_a_random_part_of_a_time_that_doubles() {
    let mut first = Vec::new();
    for seed in 0..200 {
        let policy = RetryPolicy::new().backoff(ms(100), ms(300)).max_retries(4).seed(seed);
        let (server, result) = ask(policy.clone(), &[const { code(500) }; 9]).await;
        assert_eq!(result.unwrap().status(), 500);
        let asked = server.asked();
        assert_eq!(asked.len(), 5);
        for (at, most) in [100, 200, 300, 300].into_iter().enumerate() {
            // A timer has steps of a millisecond.
            assert!(asked[at + 1] - asked[at] <= ms(most + 1), "{asked:?}");
        }
        first.push((asked[1] - asked[0]).as_millis());
        let (again, _) = ask(policy.seed(seed), &[const { code(500) }; 9]).await;
        assert_eq!(again.asked(), asked);
    }
    first.sort_unstable();
    // All of it is used.
    assert!(
        first[20] < 20 && (40..60).contains(&first[100]) && first[180] > 80,
        "{first:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn calls_do_not_wait_the_same_time() {
    let server = Server::new(&[const { code(503) }; 50]);
    let service = RetryLayer::new(RetryPolicy::new().seed(1)).layer(server.client());
    let calls: Vec<_> = (0..50)
        .map(|_| tokio::spawn(service.clone().oneshot(Request::new(String::new()))))
        .collect();
    for call in calls {
        call.await.unwrap().unwrap();
    }
    let mut second = server.asked().split_off(50);
    second.dedup();
    assert!(second.len() > 40, "{second:?}");
}

#[tokio::test(start_paused = true)]
async fn a_call_is_made_again_so_often_and_no_more_than_the_budget_allows() {
    let (server, result) = ask(policy(), &[const { code(503) }; 9]).await;
    assert_eq!((server.asked().len(), result.unwrap().status().as_u16()), (4, 503));

    // Ten in ten seconds, and nothing for successes.
    let budget = Arc::new(TpsBudget::new(Duration::from_secs(10), 1, 0.0));
    let policy = policy().max_retries(100).budget(Some(budget));
    let (server, result) = ask(policy.clone(), &[const { code(503) }; 90]).await;
    assert_eq!((server.asked().len(), result.unwrap().status().as_u16()), (11, 503));
    let (server, _) = ask(policy.clone().budget(None), &[const { code(503) }; 90]).await;
    assert_eq!(server.asked().len(), 91);
}

#[tokio::test(start_paused = true)]
async fn the_calls_own_event_has_every_attempt_and_why_there_was_another() {
    let answers = [
        Answer::Fails(io::ErrorKind::ConnectionReset),
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
            "attempt 1: connection reset; again in 0ns",
            "attempt 2: 429 Too Many Requests; again in 2s, as the server asks",
            "attempt 3: 503 Service Unavailable; not again, as the server asks for 100s",
        ]
    );
    assert_eq!(
        (event.status, event.error_type.as_deref()),
        (RequestStatus::Failed, Some("RetryAfterTooLong"))
    );
    assert_eq!(event.time_calling(), Some(ms(2_000)));
}

#[tokio::test(start_paused = true)]
async fn of_a_provider_that_fails_at_random_every_call_has_its_whole_history_and_every_attempt_is_paid() {
    const CALLS: usize = 500;
    let mut dice = fastrand::Rng::with_seed(7);
    let answers: Vec<_> = (0..4 * CALLS)
        .map(|_| match dice.u32(..10) {
            0 => code(500),
            1 => with(429, &[("retry-after", "1")]),
            2 => Answer::Fails(io::ErrorKind::ConnectionReset),
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
    let seen = server.asked().len();
    assert_eq!(seen, attempts);
    assert!(seen > 650 && succeeded > 490, "{seen} {succeeded}");
    // What came back meanwhile is less than one in the seconds this took.
    let elapsed = server.begun.elapsed().as_secs_f64();
    let left = limiter.available();
    let back = |per_day: f64| (per_day * elapsed / 86_400.0).ceil() as u64;
    let charged = (10_000 - left.requests.unwrap(), 1_000_000 - left.tokens.unwrap());
    let seen = seen as u64;
    assert!(
        (seen - back(10_000.0)..=seen).contains(&charged.0),
        "{charged:?} {seen}"
    );
    assert!(
        (7 * seen - back(1_000_000.0)..=7 * seen).contains(&charged.1),
        "{charged:?} {seen}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_timeout_for_each_attempt_is_tried_again_and_one_around_them_all_is_not() {
    let server = Server::new(&[Answer::Stuck, code(200)]);
    let attempt = tower::timeout::TimeoutLayer::new(ms(100)).layer(server.client());
    let service = RetryLayer::new(policy()).layer(attempt);
    service.oneshot(Request::new(String::new())).await.unwrap();
    assert_eq!(server.asked(), [ms(0), ms(100)]);
}

#[tokio::test(start_paused = true)]
async fn a_call_whose_caller_has_the_response_is_not_made_again() {
    use http_body_util::BodyExt;
    let made = Arc::new(Mutex::new(0));
    let client = {
        let made = made.clone();
        service_fn(move |_: Request<String>| {
            *made.lock().unwrap() += 1;
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
    assert_eq!(*made.lock().unwrap(), 1);
}

#[test]
fn what_was_never_sent_is_known_by_its_chain() {
    let refused = || io::Error::from(io::ErrorKind::ConnectionRefused);
    assert!(never_sent(&refused().into()));
    assert!(never_sent(&BoxError::from(io::Error::other(refused()))));
    assert!(!never_sent(&io::Error::from(io::ErrorKind::ConnectionReset).into()));
    assert!(!never_sent(&BoxError::from("refused")));
}
