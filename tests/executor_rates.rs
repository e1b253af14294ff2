//! The rates of an executor: how its builder sets them, and what it refuses.

mod support;

use http::Request;
use support::{client, ms, request};
use tokio::time::Instant;
use tower_outbound::{Cost, Executor, ExecutorBuilder, Limits, Rate, RateLimiter};

fn limiter() -> RateLimiter {
    RateLimiter::new(Limits::new().requests(Rate::per_second(1))).unwrap()
}

#[tokio::test]
async fn rates_beside_a_shared_limiter_are_refused_in_either_order_with_the_names_of_both() {
    let rate = Rate::per_minute(60);
    type Set = fn(ExecutorBuilder, Rate) -> ExecutorBuilder;
    let setters: [(&str, Set); 6] = [
        ("requests", |builder, rate| builder.requests(rate)),
        ("tokens", |builder, rate| builder.tokens(rate)),
        ("input_tokens", |builder, rate| builder.input_tokens(rate)),
        ("output_tokens", |builder, rate| builder.output_tokens(rate)),
        ("budget", |builder, rate| builder.budget("images", rate)),
        ("limits", |builder, rate| builder.limits(Limits::new().tokens(rate))),
    ];
    for (name, set) in setters {
        let before = set(Executor::builder(), rate).limiter(limiter());
        let after = set(Executor::builder().limiter(limiter()), rate);
        for builder in [before, after] {
            let error = builder.build_for_closures::<()>().unwrap_err();
            assert_eq!(error.field(), "limiter");
            let text = error.to_string();
            assert!(
                text.contains("`limiter`") && text.contains(&format!("`{name}`")),
                "{text}"
            );
        }
    }
}

#[tokio::test]
async fn each_budget_has_the_rate_that_was_set_last() {
    let executor = Executor::builder()
        .requests(Rate::per_minute(1))
        .requests(Rate::per_minute(50))
        .input_tokens(Rate::per_minute(30_000))
        .output_tokens(Rate::per_minute(8_000))
        .budget("images", Rate::per_minute(3))
        .budget("images", Rate::per_minute(5))
        .build_for_closures::<()>()
        .unwrap();
    let available = executor.monitor().available();
    assert_eq!((available.requests, available.tokens), (Some(50), None));
    assert_eq!(
        (available.input_tokens, available.output_tokens),
        (Some(30_000), Some(8_000))
    );
    assert_eq!((available.of("images"), available.of("seconds")), (Some(5), None));
}

#[tokio::test]
async fn requests_have_their_default_rate_unless_limits_are_given_as_a_whole() {
    let available = |builder: ExecutorBuilder| {
        let executor = builder.build_for_closures::<()>().unwrap();
        executor.monitor().available()
    };
    let tokens = Rate::per_minute(1_000);
    let by_budget = available(Executor::builder().tokens(tokens));
    assert_eq!((by_budget.requests, by_budget.tokens), (Some(10), Some(1_000)));
    let as_a_whole = available(Executor::builder().limits(Limits::new().tokens(tokens)));
    assert_eq!((as_a_whole.requests, as_a_whole.tokens), (None, Some(1_000)));
}

#[tokio::test(start_paused = true)]
async fn a_call_waits_for_the_budget_that_it_costs_the_most_of() {
    let (client, arrivals) = client(ms(1));
    let executor = Executor::builder()
        .input_tokens(Rate::per_second(100))
        .output_tokens(Rate::per_second(50))
        .budget("images", Rate::per_second(5))
        .cost(|req: &Request<&'static str>| match *req.body() {
            "prompt" => Cost::input_output_tokens(100, 1),
            "answer" => Cost::input_output_tokens(1, 49),
            _ => Cost::request().with("images", 5),
        })
        .build(client)
        .unwrap();
    executor.start().unwrap();
    let begun = Instant::now();
    for kind in ["prompt", "answer", "image", "image"] {
        drop(executor.submit(request(kind)).await.unwrap());
    }
    executor.stop(tower_outbound::Shutdown::Graceful).await;
    // The second call waits for an input token, and the last one for five images.
    assert_eq!(arrivals.times(), [ms(0), ms(10), ms(10), ms(1_010)]);
    assert!(begun.elapsed() < ms(1_020));
}
