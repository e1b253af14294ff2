//! [`Executor::run`] and [`Executor::stop`], the ways to stop an executor, and the report of a stop.

use super::{
    Executor,
    inner::{ExecutorInner, RunState},
};
use crate::{error::Error, event::Totals};
use std::{future::Future, mem, sync::Arc, time::Duration};
use tokio::time::{self, Instant};

/// How to [stop](Executor::stop) an executor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shutdown {
    /// Finish all accepted calls, however long that takes.
    Graceful,
    /// Let accepted calls run for at most this duration, and then cancel those that have not ended.
    Within(Duration),
    /// Finish the calls whose request has been sent, for at most this duration, and cancel all others now. What is left
    /// of a large job is thus cancelled without losing a response that is paid for.
    ///
    /// | call | ends |
    /// |---|---|
    /// | waits for a place in the queue | with [`is_closed`](crate::Error::is_closed) |
    /// | is queued | cancelled |
    /// | waits for a permit, for the rate limits, or in a layer of the user before its first attempt | cancelled |
    /// | waits after an attempt with an error or a status of 400 or more, such as in a retry's backoff | cancelled |
    /// | is *on the wire*: its client was called and has not returned, or a body is read inside the call | with the result of that attempt; cancelled when the duration is over |
    /// | has got a response with another status, which a layer of the user still handles | the same |
    ///
    /// No call makes a further attempt: a retry of an attempt that was on the wire is cancelled. A call whose request is
    /// being sent while the stop begins counts as on the wire. An attempt that a layer of the user makes in a task of its
    /// own counts only if that task carries the call's event ([`instrument`](crate::EventHandle::instrument)).
    SentWithin(Duration),
    /// Cancel all queued and running calls now.
    Immediate,
}

/// The numbers of calls that ended *while* an executor was being stopped, by outcome.
/// [`Monitor::totals`](super::Monitor::totals) counts all calls since the executor was built.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct StopReport {
    /// The number of calls that ended with a response during the stop.
    pub completed: u64,
    /// The number of calls that ended with an error, or with a response that counts as a failure, during the stop.
    pub failed: u64,
    /// The number of calls that were cancelled during the stop.
    pub cancelled: u64,
    /// The number of calls that had not ended when `stop` returned. Zero, unless a call of the executor itself stopped
    /// it [gracefully](Shutdown::Graceful): such a stop waits for no call.
    pub left: u64,
    /// How long the stop took, from the call of `stop` until it returned.
    pub elapsed: Duration,
}

/// A guard that cancels all calls of an executor when the guard is dropped, unless it was disarmed.
struct AbortOnDrop<B, R>(Option<Arc<ExecutorInner<B, R>>>);

// === impl Executor ===

impl<B, R> Executor<B, R> {
    /// Starts the executor, runs `work` with it, stops it gracefully and returns what `work` has returned.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use tower_outbound::{Call, Executor};
    /// # let executor = Executor::builder().build_for_closures::<String>()?;
    /// let event = executor
    ///     .run(async |executor| {
    ///         let hello = || async { Ok::<_, std::io::Error>((200, String::from("hello"))) };
    ///         executor.submit(Call::new(hello)).await.map(|call| call.event().clone())
    ///     })
    ///     .await??;
    /// assert_eq!(event.status().to_string(), "COMPLETED");
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// Returns the errors of [`start`](Self::start).
    ///
    /// # Cancel safety
    ///
    /// If the future of `run` is dropped, or `work` panics, all calls of the executor are cancelled.
    pub async fn run<F, Fut>(&self, work: F) -> Result<Fut::Output, Error>
    where
        F: FnOnce(Self) -> Fut,
        Fut: Future,
    {
        self.start()?;
        let abort = AbortOnDrop::new(self.inner.clone());
        let result = work(self.clone()).await;
        self.stop(Shutdown::Graceful).await;
        abort.disarm();
        Ok(result)
    }

    /// Stops accepting calls, finishes or cancels the accepted ones as `how` requires, and returns when the last call
    /// has ended.
    ///
    /// A [`submit`](Self::submit) that waits for a place in the queue fails with
    /// [`is_closed`](crate::Error::is_closed). Stopping an executor that is not running does nothing. If `stop` is
    /// called again while an earlier stop waits, the new `how` takes effect at once, and both return when the last call
    /// has ended.
    ///
    /// A call of the executor may itself stop the executor. A graceful stop would then wait for the call that awaits
    /// the stop, so it returns at once: the report counts the calls that are [left](StopReport::left), and these are
    /// finished in the background. Any other stop cancels the call that awaits it. `stop` recognizes such a call by the
    /// current [event](crate::event::current). If the call awaits the stop in a task that it has spawned, that task
    /// must carry the event ([`instrument`](crate::EventHandle::instrument)); otherwise a graceful stop in that task
    /// never returns.
    ///
    /// # Panics
    ///
    /// A stop with [`Shutdown::Within`] or [`Shutdown::SentWithin`] panics outside a Tokio runtime with its timer
    /// enabled. In that case, the executor is not stopped.
    ///
    /// # Cancel safety
    ///
    /// If the future of `stop` is dropped, the executor still finishes the accepted calls and stops. With
    /// [`Shutdown::Within`] or [`Shutdown::SentWithin`], the calls that are left after the given duration are then not
    /// cancelled.
    pub async fn stop(&self, how: Shutdown) -> StopReport {
        if let Shutdown::Within(_) | Shutdown::SentWithin(_) = how {
            // Creating a `Sleep` panics if the runtime has no timer. One is created here, so that the panic comes
            // before the executor has been changed.
            drop(time::sleep(Duration::ZERO));
        }
        let queue = {
            let mut state = self.inner.state();
            match mem::replace(&mut *state, RunState::Stopped) {
                RunState::Stopped => return StopReport::default(),
                RunState::Running(queue) | RunState::Stopping(queue) => {
                    *state = RunState::Stopping(queue.clone());
                    queue
                }
            }
        };
        let started = Instant::now();
        let before = self.inner.monitor().totals();
        queue.close();
        match how {
            Shutdown::Graceful if self.inner.is_calling() => {
                let left = (queue.depth() + queue.in_flight()) as u64;
                return self.stop_report(before, started, left);
            }
            Shutdown::Graceful => {}
            Shutdown::Within(limit) | Shutdown::SentWithin(limit) => {
                if let Shutdown::SentWithin(_) = how {
                    queue.finish_sent();
                }
                if time::timeout(limit, queue.ended()).await.is_err() {
                    queue.abort();
                }
            }
            Shutdown::Immediate => queue.abort(),
        }
        queue.ended().await;
        {
            let mut state = self.inner.state();
            // While this stop waited, another stop may have returned and the executor may have been started again. The
            // state of the new start must not be overwritten.
            if matches!(&*state, RunState::Stopping(stopping) if stopping.is_same(&queue)) {
                *state = RunState::Stopped;
            }
        }
        self.stop_report(before, started, 0)
    }

    fn stop_report(&self, before: Totals, started: Instant, left: u64) -> StopReport {
        let after = self.inner.monitor().totals();
        StopReport {
            completed: after.completed - before.completed,
            failed: after.failed - before.failed,
            cancelled: after.cancelled - before.cancelled,
            left,
            elapsed: started.elapsed(),
        }
    }
}

// === impl AbortOnDrop ===

impl<B, R> AbortOnDrop<B, R> {
    const fn new(inner: Arc<ExecutorInner<B, R>>) -> Self {
        Self(Some(inner))
    }

    fn disarm(mut self) {
        self.0 = None;
    }
}

impl<B, R> Drop for AbortOnDrop<B, R> {
    fn drop(&mut self) {
        if let Some(inner) = &self.0 {
            inner.abort();
        }
    }
}
