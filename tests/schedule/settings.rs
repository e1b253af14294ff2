//! Weights, limits, pauses and the limits of the executor, changed while calls wait.

use super::*;
use crate::support::{pass, settle};
use tower_outbound::{error::InvalidConfig, schedule::Flow};

#[tokio::test(start_paused = true)]
async fn a_paused_key_begins_no_call_until_it_is_resumed_and_delays_no_others() {
    let schedule = tenants();
    let (executor, log) = executor(schedule.clone(), per_second(10), 5, ms(10));
    schedule.pause("a", Instant::now() + ms(10_000)).unwrap();
    let handles = submit_all(&executor, [flow_call("a", 0), flow_call("b", 1), flow_call("b", 2)]).await;
    sleep(ms(1_000)).await;
    assert_eq!(schedule.waiting(), 1);
    schedule.resume("a").unwrap();
    all_end_well(handles).await;
    assert_eq!(log.millis(), [(1, 0), (2, 100), (0, 1_000)]);
    schedule.pause("a", Instant::now() + ms(500)).unwrap();
    all_end_well(submit_all(&executor, [flow_call("a", 3)]).await).await;
    assert_eq!(log.millis()[3], (3, 1_510));
}

#[tokio::test(start_paused = true)]
async fn limits_that_are_set_act_on_calls_that_wait() {
    let schedule = tenants();
    let (executor, log) = executor(schedule.clone(), per_second(1_000), 5, ms(0));
    schedule.set_limits("a", &per_second(1)).unwrap();
    let handles = submit_all(&executor, (0..4).map(|number| flow_call("a", number))).await;
    sleep(ms(1_500)).await;
    schedule.set_limits("a", &per_second(10)).unwrap();
    all_end_well(handles).await;
    let at: Vec<_> = log.millis().into_iter().map(|(_, at)| at).collect();
    assert_eq!(&at[..2], [0, 1_000]);
    assert!((1_500..=1_600).contains(&at[2]), "{at:?}");
    assert_eq!(at[3], at[2] + 100);
    let error = schedule.set_limits("a", &Limits::new().requests(Rate::per_second(10).initial(1)));
    assert!(error.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_weight_that_is_set_counts_from_then_on() {
    let schedule = tenants();
    let (executor, log) = executor(schedule.clone(), per_second(100), 5, ms(0));
    let calls = (0..400).flat_map(|number| [flow_call("a", number), flow_call("b", 1_000 + number)]);
    let handles = submit_all(&executor, calls).await;
    let share_of_a = |log: &Log| log.numbers().iter().filter(|number| **number < 1_000).count();
    sleep(ms(1_995)).await;
    assert_eq!(share_of_a(&log), 100);
    schedule.set_weight("a", 4).unwrap();
    sleep(ms(2_000)).await;
    let more = share_of_a(&log) - 100;
    assert!((159..=161).contains(&more), "{more}");
    all_end_well(handles).await;
    for (keys, weight) in [(vec!["a"], 0), (vec!["a", "b"], 1), (vec![], 1)] {
        assert!(schedule.set_weight(keys, weight).is_err());
    }
}

#[tokio::test(start_paused = true)]
async fn a_limiter_that_is_paused_or_changed_holds_and_releases_the_calls_that_wait() {
    let schedule = tenants();
    let (executor, log) = executor(schedule.clone(), per_second(10), 5, ms(0));
    let handles = submit_all(&executor, (0..6).map(call)).await;
    pass(ms(150)).await;
    let limiter = executor.monitor().limiter().clone();
    limiter.pause_for(ms(1_000));
    sleep(ms(500)).await;
    assert_eq!((executor.monitor().in_flight(), schedule.waiting()), (0, 4));
    limiter.resume();
    pass(ms(0)).await;
    assert_eq!(log.millis()[2..], [(2, 650)]);
    limiter.set_limits(per_second(1_000)).unwrap();
    all_end_well(handles).await;
    assert!(log.millis()[5].1 <= 660, "{:?}", log.millis());
    executor.monitor().concurrency().set(1).unwrap();
    settle().await;
    assert_nothing_is_left(&executor, &schedule);
}

#[tokio::test(start_paused = true)]
async fn a_higher_concurrency_limit_lets_a_call_that_waits_begin_at_once() {
    let schedule = tenants();
    let (executor, log) = executor(schedule, Limits::new(), 1, ms(1_000));
    let handles = submit_all(&executor, (0..3).map(call)).await;
    pass(ms(300)).await;
    executor.monitor().concurrency().set(2).unwrap();
    all_end_well(handles).await;
    assert_eq!(log.millis(), [(0, 0), (1, 300), (2, 1_000)]);
}

#[tokio::test(start_paused = true)]
async fn a_schedule_serves_one_executor_at_a_time_with_the_limits_of_that_one() {
    let schedule = tenants();
    let build = |limits| {
        let (client, log) = client(ms(10));
        let executor = Executor::builder()
            .concurrency_limit(1)
            .limits(limits)
            .schedule(schedule.clone());
        (executor.build(client).unwrap(), log)
    };
    let ((first, first_log), (second, second_log)) = (build(per_second(1)), build(per_second(10)));
    first.start().unwrap();
    let error = second.start().unwrap_err();
    assert_eq!(error.find::<InvalidConfig>().unwrap().field(), "schedule");
    all_end_well(submit_all(&first, (0..3).map(call)).await).await;
    assert_eq!(first_log.millis(), [(0, 0), (1, 1_000), (2, 2_000)]);
    first.stop(Shutdown::Graceful).await;
    second.start().unwrap();
    assert!(first.start().is_err());
    all_end_well(submit_all(&second, (0..3).map(call)).await).await;
    second.stop(Shutdown::Graceful).await;
    let times: Vec<_> = second_log.millis().into_iter().map(|(_, at)| at - 2_010).collect();
    assert_eq!(times, [0, 100, 200]);
    first.start().unwrap();
    sleep(ms(10_000)).await;
    all_end_well(submit_all(&first, (3..6).map(call)).await).await;
    let times: Vec<_> = first_log.millis()[3..].iter().map(|(_, at)| *at).collect();
    assert_eq!((times[1] - times[0], times[2] - times[1]), (1_000, 1_000));
    assert_nothing_is_left(&first, &schedule);
}

#[tokio::test(start_paused = true)]
async fn a_function_of_the_executor_names_flow_and_class_where_the_call_does_not() {
    let schedule = Schedule::new()
        .class("interactive", Duration::ZERO)
        .class("batch", ms(60_000))
        .level(Level::by("tenant"));
    let by_number = |request: &Request| {
        let number = *request.body();
        let class = if number % 2 == 0 { "interactive" } else { "batch" };
        Flow::from(number / 100).class(class)
    };
    let (client, log) = client(Duration::ZERO);
    let executor = Executor::builder()
        .limits(per_second(1))
        .schedule_by(schedule.clone(), by_number)
        .build(client)
        .unwrap();
    executor.start().unwrap();
    let named = [
        call(0),
        call(101),
        call(103).class("interactive"),
        call(104),
        call(105).flow("other"),
        call(107).flow(["other"]).class("batch"),
    ];
    let mut extension = request(102);
    extension.extensions_mut().insert(Flow::from("third").class("batch"));
    let calls = named.into_iter().chain([extension.into()]);
    let handles = submit_all(&executor, calls).await;
    settle().await;
    let mut waiting: Vec<_> = schedule
        .flows(10)
        .iter()
        .map(|flow| (flow.keys[0].to_string(), flow.waiting))
        .collect();
    waiting.sort_unstable();
    let expected = [("1", 3), ("other", 2), ("third", 1)];
    assert_eq!(waiting, expected.map(|(flow, waiting)| (flow.to_owned(), waiting)));
    all_end_well(handles).await;
    let of_one: Vec<_> = log
        .numbers()
        .into_iter()
        .filter(|number| [101, 103, 104].contains(number))
        .collect();
    assert_eq!(of_one, [103, 104, 101]);
    executor.stop(Shutdown::Graceful).await;
}
