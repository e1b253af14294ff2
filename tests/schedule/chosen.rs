//! A call is chosen when its permit and its budgets are there, and holds nothing before.

use super::*;
use crate::support::{pass, settle};
use tower_outbound::{Concurrency, Cost};

#[tokio::test(start_paused = true)]
async fn no_permit_is_held_by_a_call_that_waits_for_its_rate() {
    let schedule = tenants();
    let (executor, log) = executor(schedule.clone(), per_second(10), 3, ms(10));
    let handles = submit_all(&executor, (0..20).map(|number| flow_call("a", number))).await;
    pass(ms(5)).await;
    for second in 0..19 {
        assert_eq!(executor.monitor().in_flight(), 1, "{second}");
        sleep(ms(45)).await;
        assert_eq!(executor.monitor().in_flight(), 0, "{second}");
        assert_eq!(schedule.waiting(), 19 - second);
        pass(ms(55)).await;
    }
    all_end_well(handles).await;
    assert!(log.millis().iter().map(|(_, at)| *at).eq((0..20).map(|n| n * 100)));
    settle().await;
    assert_nothing_is_left(&executor, &schedule);
}

#[tokio::test(start_paused = true)]
async fn executors_that_share_a_concurrency_limit_do_not_wait_for_the_rate_of_another() {
    let permits = Concurrency::new(1).unwrap();
    let build = |limits| {
        let (client, log) = client(ms(1));
        let executor = Executor::builder()
            .concurrency(permits.clone())
            .limits(limits)
            .schedule(tenants())
            .build(client)
            .unwrap();
        executor.start().unwrap();
        (executor, log)
    };
    let (slow, slow_log) = build(per_second(1));
    let (quick, quick_log) = build(per_second(100));
    let slow_handles = submit_all(&slow, (0..5).map(call)).await;
    let quick_handles = submit_all(&quick, (0..50).map(call)).await;
    all_end_well(quick_handles).await;
    let last = quick_log.millis().last().unwrap().1;
    assert!((490..=495).contains(&last), "{last}");
    all_end_well(slow_handles).await;
    let at: Vec<_> = slow_log.millis().iter().map(|(_, at)| *at).collect();
    assert_eq!(at, [0, 1_000, 2_000, 3_000, 4_000]);
}

#[tokio::test(start_paused = true)]
async fn a_call_that_waited_and_was_not_chosen_is_given_nothing_back() {
    let permits = Concurrency::new(1).unwrap();
    let build = |limits| {
        let (client, _) = client(ms(1));
        let executor = Executor::builder()
            .concurrency(permits.clone())
            .limits(limits)
            .schedule(tenants())
            .build(client)
            .unwrap();
        executor.start().unwrap();
        executor
    };
    let slow = build(per_second(1).tokens(Rate::per_day(1_000)));
    let quick = build(Limits::new());
    let costly = |flow: &'static str| flow_call(flow, 0).cost(Cost::tokens(100));
    let handles = submit_all(&slow, (0..3).map(|_| costly("a"))).await;
    for _ in 0..50 {
        // While the other executor has the permit, another call becomes the first one, and leaves.
        pass(ms(10)).await;
        let quick = submit_all(&quick, [call(0)]).await;
        settle().await;
        assert_eq!(permits.in_flight(), 1);
        let urgent = slow.submit(costly("b")).await.unwrap();
        settle().await;
        urgent.cancel();
        settle().await;
        all_end_well(quick).await;
    }
    all_end_well(handles).await;
    assert_eq!(slow.monitor().available().of("tokens"), Some(700));
}

#[tokio::test(start_paused = true)]
async fn an_urgent_call_that_comes_while_the_rate_is_used_up_goes_first() {
    let schedule = Schedule::new()
        .class("interactive", Duration::ZERO)
        .class("batch", Duration::from_secs(600));
    let (executor, log) = executor(schedule, per_second(1), 5, ms(10));
    let batch = submit_all(&executor, (0..4).map(|number| call(number).class("batch"))).await;
    sleep(ms(1_500)).await;
    let urgent = submit_all(&executor, [call(100).class("interactive")]).await;
    all_end_well(urgent).await;
    all_end_well(batch).await;
    let expected = [(0, 0), (1, 1_000), (100, 2_000), (2, 3_000), (3, 4_000)];
    assert_eq!(log.millis(), expected);
}

#[tokio::test(start_paused = true)]
async fn an_urgent_call_that_costs_less_does_not_wait_for_what_a_larger_one_needs() {
    let schedule = Schedule::new()
        .class("interactive", Duration::ZERO)
        .class("batch", Duration::from_secs(600));
    let limits = Limits::new().tokens(Rate::per_second(10).burst(100));
    let (executor, log) = executor(schedule, limits, 5, ms(10));
    let large = |number| call(number).class("batch").cost(Cost::tokens(100));
    let batch = submit_all(&executor, [large(0), large(1)]).await;
    sleep(ms(2_000)).await;
    let urgent = submit_all(&executor, [call(100).cost(Cost::tokens(15))]).await;
    all_end_well(urgent).await;
    all_end_well(batch).await;
    assert_eq!(log.millis(), [(0, 0), (100, 2_000), (1, 11_500)]);
}

#[tokio::test(start_paused = true)]
async fn an_aged_call_is_overtaken_only_for_as_long_as_its_slack() {
    let schedule = Schedule::new()
        .class("interactive", Duration::ZERO)
        .class("batch", ms(3_000));
    let (executor, log) = executor(schedule, per_second(1), 5, ms(10));
    let first = submit_all(&executor, [call(0), call(1).class("batch")]).await;
    let mut urgent = Vec::new();
    for second in 0..6 {
        urgent.extend(submit_all(&executor, [call(100 + second)]).await);
        sleep(ms(1_000)).await;
    }
    all_end_well(first).await;
    all_end_well(urgent).await;
    // Those that came up to three seconds later went first. The fourth came at the very instant, and later.
    assert_eq!(log.numbers(), [0, 100, 101, 102, 1, 103, 104, 105]);
}

#[tokio::test(start_paused = true)]
async fn flows_share_in_the_ratio_of_their_weights() {
    let schedule = Schedule::new().level(Level::by("tenant").weight(|tenant| if tenant == "gold" { 3 } else { 1 }));
    let (executor, log) = executor(schedule.clone(), per_second(100), 10, ms(10));
    let calls = (0..400).flat_map(|number| [flow_call("plain", number), flow_call("gold", 1_000 + number)]);
    let handles = submit_all(&executor, calls).await;
    sleep(ms(3_999)).await;
    let (plain, gold): (Vec<_>, Vec<_>) = log.numbers().into_iter().partition(|number| *number < 1_000);
    assert_eq!((plain.len(), gold.len()), (100, 300));
    all_end_well(handles).await;
    settle().await;
    assert_nothing_is_left(&executor, &schedule);
}

#[tokio::test(start_paused = true)]
async fn a_key_that_has_used_up_its_limits_delays_no_others() {
    let limits_of = |tenant: &str| (tenant == "slow").then(|| per_second(1));
    let schedule = Schedule::new().level(Level::by("tenant").limits(limits_of));
    let (executor, log) = executor(schedule.clone(), per_second(10), 3, ms(10));
    let calls = (0..100).flat_map(|number| [flow_call("slow", number), flow_call("free", 1_000 + number)]);
    let handles = submit_all(&executor, calls).await;
    sleep(ms(9_999)).await;
    let (slow, free): (Vec<_>, Vec<_>) = log.numbers().into_iter().partition(|number| *number < 1_000);
    assert_eq!((slow.len(), free.len()), (10, 90));
    let shown = schedule.flows(2);
    let shown = shown.iter().find(|flow| flow.keys == ["slow".into()]).unwrap();
    assert_eq!(shown.blocked_by.as_deref(), Some("tenant"));
    let blocked_until = shown.blocked_until.unwrap() - log.start;
    assert!((ms(9_999)..ms(11_000)).contains(&blocked_until), "{blocked_until:?}");
    all_end_well(handles).await;
    settle().await;
    assert_nothing_is_left(&executor, &schedule);
}
