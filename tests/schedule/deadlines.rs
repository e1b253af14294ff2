//! Which calls are refused in advance, because they would not meet their deadline.

use super::*;
use crate::support::pass;

/// A schedule of tenants whose batch calls count as if they had come ten minutes later.
fn classes() -> Schedule {
    let classes = Schedule::new().class("interactive", Duration::ZERO);
    classes.class("batch", ms(600_000)).level(Level::by("tenant"))
}

/// Returns an executor of one call a second, for which 100 batch calls of a tenant wait after the first.
async fn behind_a_backlog() -> (TestExecutor, Log, Vec<CallHandle<u64, ()>>) {
    behind_a_backlog_of(classes()).await
}

async fn behind_a_backlog_of(schedule: Schedule) -> (TestExecutor, Log, Vec<CallHandle<u64, ()>>) {
    let (executor, log) = executor(schedule, per_second(1), 10, Duration::ZERO);
    let batch = (0..101).map(|number| flow_call("a", number).class("batch"));
    let handles = submit_all(&executor, batch).await;
    pass(ms(500)).await;
    (executor, log, handles)
}

#[tokio::test(start_paused = true)]
async fn an_urgent_call_is_not_refused_because_of_the_batch_calls_of_its_own_flow() {
    let (executor, log, batch) = behind_a_backlog().await;
    for number in [200, 201] {
        let urgent = flow_call("a", number).class("interactive").timeout(ms(2_000));
        drop(executor.submit(urgent).await.unwrap());
    }
    // Two calls of its class go before this one, which begins after 2.5 s at the earliest.
    let late = flow_call("a", 202).class("interactive").timeout(ms(2_500));
    let error = executor.submit(late).await.unwrap_err();
    assert!(error.is_deadline_exceeded(), "{error}");
    let in_time = flow_call("a", 203).class("interactive").timeout(ms(2_501));
    executor.submit(in_time).await.unwrap().await.unwrap();
    assert_eq!(log.millis(), [(0, 0), (200, 1_000), (201, 2_000), (203, 3_000)]);
    drop(batch);
    executor.stop(Shutdown::Immediate).await;
}

#[tokio::test(start_paused = true)]
async fn a_batch_call_is_refused_because_of_those_before_it_and_of_urgent_ones() {
    let (executor, _, batch) = behind_a_backlog().await;
    let submit = async |timeout| {
        executor
            .submit(flow_call("a", 300).class("batch").timeout(timeout))
            .await
    };
    // 100 calls are before it, and it is half past a second.
    assert!(submit(ms(100_500)).await.unwrap_err().is_deadline_exceeded());
    submit(ms(100_501)).await.unwrap().cancel();
    pass(ms(0)).await;
    let urgent = submit_all(&executor, (400..410).map(|number| flow_call("a", number))).await;
    assert!(submit(ms(110_500)).await.unwrap_err().is_deadline_exceeded());
    drop(submit(ms(110_501)).await.unwrap());
    drop((batch, urgent));
    executor.stop(Shutdown::Immediate).await;
}

#[tokio::test(start_paused = true)]
async fn a_batch_call_that_has_waited_for_its_slack_counts_as_one_before_an_urgent_call() {
    let schedule = classes();
    let (executor, log, batch) = behind_a_backlog_of(schedule.clone()).await;
    schedule.pause("a", Instant::now() + ms(599_000)).unwrap();
    pass(ms(599_000)).await;
    // The batch calls are due half a second after this one, for which there is a budget in a second.
    let before = flow_call("a", 501).timeout(ms(1_010));
    executor.submit(before).await.unwrap().await.unwrap();
    pass(ms(1_000)).await;
    let after = flow_call("a", 502).timeout(ms(50_000));
    assert!(executor.submit(after).await.unwrap_err().is_deadline_exceeded());
    assert!(log.count(501) == 1 && log.count(502) == 0);
    drop(batch);
    executor.stop(Shutdown::Immediate).await;
}

#[tokio::test(start_paused = true)]
async fn a_call_is_not_refused_because_of_the_call_of_another_flow_that_would_be_the_next() {
    let schedule = classes();
    schedule.set_weight("b", 4).unwrap();
    let (executor, log, batch) = behind_a_backlog_of(schedule).await;
    let other = flow_call("b", 600).timeout(ms(510));
    executor.submit(other).await.unwrap().await.unwrap();
    assert_eq!(log.millis(), [(0, 0), (600, 1_000)]);
    let late = flow_call("b", 601).timeout(ms(999));
    assert!(executor.submit(late).await.unwrap_err().is_deadline_exceeded());
    drop(batch);
    executor.stop(Shutdown::Immediate).await;
}
