//! Calls that are all in flight, and are answered at the same time.

use crate::{
    Scale,
    common::median,
    measure::{ThreadTime, current_thread},
    subject::UNREACHED,
    table::{Bar, Table},
};
use http::{Request, Response};
use std::{convert::Infallible, hint::black_box, iter, time::Duration};
use tokio::{sync::oneshot, task::yield_now};
use tower::service_fn;
use tower_outbound::{ExecutorBuilder, Rate};

const RATIO: Bar = Bar { max: 3.0, aim: 2.0 };

/// Measures calls of an executor, and plain tasks that do the same, from the first answer to the last outcome.
pub(crate) fn at_once(scale: &Scale, table: &mut Table) {
    let runtime = current_thread();
    let round = || {
        scale.answered.map(|n| {
            let calls = runtime.block_on(in_an_executor(n));
            let tasks = runtime.block_on(in_tasks(n));
            [calls, tasks].map(|time| time.as_nanos() as f64 / n as f64)
        })
    };
    let rounds: Vec<_> = iter::repeat_with(round).take(scale.rounds + 1).skip(1).collect();
    for (size, n) in scale.answered.into_iter().enumerate() {
        let median = |figure: fn([f64; 2]) -> f64| median(rounds.iter().map(|sizes| figure(sizes[size])));
        table.add("executor-ns", n, median(|[calls, _]| calls));
        table.add("tasks-ns", n, median(|[_, tasks]| tasks));
        table.add("ratio", n, median(|[calls, tasks]| calls / tasks));
    }
    let [.., most] = scale.answered;
    table.bar("ratio", most, RATIO);
}

async fn in_an_executor(n: usize) -> Duration {
    let executor = ExecutorBuilder::new()
        .queue_capacity(n)
        .concurrency_limit(n)
        .requests(Rate::per_second(UNREACHED))
        .tokens(Rate::per_second(UNREACHED))
        .build(service_fn(async |request: Request<oneshot::Receiver<()>>| {
            request.into_body().await.expect("the call is answered");
            Ok::<_, Infallible>(Response::new(()))
        }))
        .expect("the settings are valid");
    executor.start().expect("there is a runtime");
    let (mut answers, mut calls) = (Vec::with_capacity(n), Vec::with_capacity(n));
    for _ in 0..n {
        let (answer, answered) = oneshot::channel();
        answers.push(answer);
        let call = executor.submit(Request::new(answered)).await;
        calls.push(call.expect("the executor is running"));
    }
    while executor.monitor().calling() < n {
        yield_now().await;
    }

    let begun = ThreadTime::now();
    answer_all(answers);
    for call in calls {
        black_box(call.await.expect("the call succeeds"));
    }
    begun.elapsed()
}

async fn in_tasks(n: usize) -> Duration {
    let (mut answers, mut tasks) = (Vec::with_capacity(n), Vec::with_capacity(n));
    for _ in 0..n {
        let (answer, answered) = oneshot::channel();
        answers.push(answer);
        tasks.push(tokio::spawn(async move {
            answered.await.expect("the call is answered");
            Response::new(())
        }));
    }
    // Each task is polled before this one is polled again.
    yield_now().await;

    let begun = ThreadTime::now();
    answer_all(answers);
    for task in tasks {
        black_box(task.await.expect("the task does not panic"));
    }
    begun.elapsed()
}

fn answer_all(answers: Vec<oneshot::Sender<()>>) {
    for answer in answers {
        answer.send(()).expect("the call waits for its answer");
    }
}
