//! Cancelling queued calls.

use crate::{
    FEW_ROUNDS, Scale,
    common::median,
    measure::{ThreadTime, current_thread},
    subject::{Blocker, Subject, fill, submit_first},
    table::Table,
};
use http::{Request, Response};
use std::{iter, time::Duration};
use tower_outbound::{CallHandle, Executor, Queue, Shutdown, queue::ResponseFuture};

pub(crate) fn cancel(scale: &Scale, table: &mut Table) {
    let [_, _, n] = scale.sizes;
    table.add("handles-ns", n, time_to_cancel(n, cancel_handles));
    table.add("futures-ns", n, time_to_cancel(n, drop_futures));
    table.add("stop-ns", n, time_to_cancel(n, stop));
}

/// Returns the nanoseconds per call in which `cancel` cancels `n` queued calls.
fn time_to_cancel<S: Subject>(n: usize, cancel: impl AsyncFn(S, Blocker, Vec<S::Call>) -> Duration) -> f64 {
    let runtime = current_thread();
    let round = || {
        runtime.block_on(async {
            let blocker = Blocker::new();
            let mut subject = S::start(n + 1, &blocker);
            let first = submit_first(&mut subject).await;
            let calls = fill(&mut subject, n, true).await;
            assert_eq!(subject.depth(), n, "all calls are queued");
            let elapsed = cancel(subject, blocker, calls).await;
            drop(first);
            elapsed.as_nanos() as f64 / n as f64
        })
    };
    median(iter::repeat_with(round).take(FEW_ROUNDS + 1).skip(1))
}

/// Cancels each call by its handle.
async fn cancel_handles(executor: Executor<(), ()>, blocker: Blocker, calls: Vec<CallHandle<(), ()>>) -> Duration {
    let n = calls.len() as u64;
    let begun = ThreadTime::now();
    for call in calls {
        call.cancel();
    }
    let elapsed = begun.elapsed();

    let monitor = executor.monitor();
    assert_eq!((monitor.queue_depth(), monitor.totals().cancelled), (0, n));
    blocker.unblock();
    let report = executor.stop(Shutdown::Graceful).await;
    assert_eq!((report.completed, report.cancelled, blocker.ended()), (1, 0, 1));
    elapsed
}

/// Cancels each call by dropping its future.
async fn drop_futures(
    queue: Queue<Request<()>, Response<()>>,
    blocker: Blocker,
    calls: Vec<ResponseFuture<Request<()>, Response<()>>>,
) -> Duration {
    let begun = ThreadTime::now();
    drop(calls);
    let elapsed = begun.elapsed();

    assert_eq!(queue.depth(), 0);
    blocker.unblock();
    queue.close();
    queue.ended().await;
    assert_eq!(blocker.ended(), 1, "only the first call was made");
    elapsed
}

/// Cancels all calls by stopping the executor, while their handles still exist.
async fn stop(executor: Executor<(), ()>, blocker: Blocker, calls: Vec<CallHandle<(), ()>>) -> Duration {
    let begun = ThreadTime::now();
    let report = executor.stop(Shutdown::Immediate).await;
    let elapsed = begun.elapsed();

    let monitor = executor.monitor();
    let (all, totals) = (calls.len() as u64 + 1, monitor.totals());
    assert_eq!((report.cancelled, totals.opened, totals.cancelled), (all, all, all));
    assert_eq!((monitor.queue_depth(), blocker.ended()), (0, 0));
    elapsed
}
