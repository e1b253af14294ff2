//! Charges that are estimates: shares and limits follow what the calls have really used.

use super::*;
use crate::support::{pass, settle};
use tower_outbound::Cost;

/// What a call is estimated to use, and what it uses.
type Estimates = fn(u64) -> (u64, u64);

/// Runs two flows, whose calls are numbered from 0 and from 1,000,000 on, for `time` at 1,000 tokens a second. Returns what
/// each has used.
async fn tokens_used(estimates: Estimates, time: Duration) -> (u64, u64) {
    let schedule = tenants();
    let (client, log) = client(ms(50));
    let executor = Executor::builder()
        .queue_capacity(20_000)
        .concurrency_limit(20)
        .limits(Limits::new().tokens(Rate::per_second(1_000)))
        .schedule(schedule.clone())
        .cost(move |request: &Request| Cost::tokens(estimates(*request.body()).0))
        .settle(move |charged: Cost, result: Result<&Response, &tower::BoxError>| {
            let number = result.ok()?.headers().get("number")?.to_str().ok()?.parse().ok()?;
            assert_eq!(charged.tokens, estimates(number).0);
            Some(Cost::tokens(estimates(number).1))
        })
        .build(Numbered(client))
        .unwrap();
    executor.start().unwrap();
    let numbers = (0..8_000).flat_map(|number| [("a", number), ("b", 1_000_000 + number)]);
    let handles = submit_all(&executor, numbers.map(|(flow, number)| flow_call(flow, number))).await;
    sleep(time).await;
    executor.stop(Shutdown::Immediate).await;
    drop(handles);
    assert_nothing_is_left(&executor, &schedule);
    let mut used = (0, 0);
    for number in log.numbers() {
        let used = if number < 1_000_000 { &mut used.0 } else { &mut used.1 };
        *used += estimates(number).1;
    }
    used
}

/// Puts the number of the request into a header of the response.
#[derive(Clone)]
struct Numbered(Client);

impl Service<Request> for Numbered {
    type Response = Response;
    type Error = io::Error;
    type Future = futures_util::future::BoxFuture<'static, Result<Response, io::Error>>;

    fn poll_ready(&mut self, cx: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), io::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let number = *request.body();
        let response = self.0.call(request);
        Box::pin(async move {
            let mut response = response.await?;
            response.headers_mut().insert("number", number.into());
            Ok(response)
        })
    }
}

#[tokio::test(start_paused = true)]
async fn shares_follow_what_calls_have_used_however_wrong_their_estimates_are() {
    let minute = Duration::from_secs(60);
    let exact: Estimates = |_| (10, 10);
    let low: Estimates = |number| if number < 1_000_000 { (10, 100) } else { (100, 100) };
    let high: Estimates = |number| if number < 1_000_000 { (1_000, 100) } else { (100, 100) };
    for (estimates, largest, open) in [(exact, 10, 0), (low, 100, 20 * 90), (high, 1_000, 2_000)] {
        let (a, b) = tokens_used(estimates, minute).await;
        // The bound: the largest call of each, and what the open estimates of the first flow are wrong by.
        assert!(a.abs_diff(b) <= 2 * largest + open, "{a} {b}");
        assert!(a + b >= 59_000, "{a} {b}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_limits_of_a_key_are_settled_with_what_its_calls_have_used() {
    let level = Level::by("tenant").limits(|_| Some(Limits::new().tokens(Rate::per_second(10).burst(100))));
    let schedule = Schedule::new().level(level);
    let (client, log) = client(ms(1_000));
    let executor = Executor::builder()
        .limits(Limits::new().tokens(Rate::per_hour(100_000)))
        .schedule(schedule.clone())
        .settle(|_: Cost, _: Result<&Response, &tower::BoxError>| Some(Cost::tokens(10)))
        .build(client)
        .unwrap();
    executor.start().unwrap();
    let handles = submit_all(&executor, (0..3).map(|number| flow_call("a", number).tokens(100))).await;
    pass(ms(1_500)).await;
    assert_eq!(schedule.waiting(), 1);
    all_end_well(handles).await;
    // The bucket is full again one second after each, when 90 of 100 tokens are given back.
    assert_eq!(log.millis(), [(0, 0), (1, 1_000), (2, 2_000)]);
    settle().await;
    assert_nothing_is_left(&executor, &schedule);
}

#[tokio::test(start_paused = true)]
async fn a_call_whose_charge_is_final_is_settled_when_it_begins() {
    let schedule = tenants();
    let (executor, _) = executor(schedule.clone(), per_second(10), 5, ms(5_000));
    let handles = submit_all(&executor, [flow_call("a", 0)]).await;
    pass(ms(100)).await;
    assert_eq!(executor.monitor().in_flight(), 1);
    assert!(schedule.flows(10).is_empty(), "{:?}", schedule.flows(10));
    all_end_well(handles).await;
}
