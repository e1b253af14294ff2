//! [`Executor::run`] and [`Executor::stop`]: how an executor ends, and the report of it.

use super::{
    Executor,
    inner::{Inner, RunState},
};
use crate::{error::Error, event::Totals};
use std::{future::Future, mem, sync::Arc, time::Duration};
use tokio::time::{self, Instant};

/// How to [stop](Executor::stop) an executor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shutdown {
    /// Finish all accepted calls, however long that takes.
    Graceful,
    /// Finish accepted calls for at most this long, and then cancel those that are left.
    Within(Duration),
    /// Cancel all calls now.
    Immediate,
}

/// The calls that ended *while* an executor was stopped, by outcome. [`Monitor::totals`](super::Monitor::totals) counts
/// all calls since the executor was built.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct StopReport {
    /// Calls that ended with a response.
    pub completed: u64,
    /// Calls that ended with an error.
    pub failed: u64,
    /// Calls that were cancelled.
    pub cancelled: u64,
    /// Calls that had not ended when `stop` returned. Zero, unless a call of the executor itself stopped it
    /// [gracefully](Shutdown::Graceful): such a stop waits for no call.
    pub left: u64,
    /// How long the stop took.
    pub elapsed: Duration,
}

/// Cancels all calls of an executor when it is dropped, unless it was disarmed.
struct AbortOnDrop<B, R>(Option<Arc<Inner<B, R>>>);

// === impl Executor ===

impl<B, R> Executor<B, R> {
    /// Starts, runs `work` with this executor, and stops gracefully.
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
    /// As [`start`](Self::start).
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, or `work` panics, all calls of the executor are cancelled.
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

    /// Stops accepting calls, finishes or cancels the accepted ones as `how` says, and returns when the last has ended.
    ///
    /// A `submit` that waits for a place fails with [`is_closed`](crate::Error::is_closed). Stopping an executor that
    /// is not running does nothing. A second stop while a first one waits takes effect at once, and both return.
    ///
    /// A call of this executor may stop it, too. A graceful stop would then wait for the call that waits for the stop,
    /// so it returns at once: the report counts the calls that are [left](StopReport::left), and these are finished in
    /// the background. Any other stop cancels the call that awaits it. The call is recognized by its
    /// [event](crate::event::current). A task that the call spawns and waits for must carry the event over
    /// ([`instrument`](crate::EventHandle::instrument)); without it, a graceful stop in that task never returns.
    ///
    /// # Panics
    ///
    /// [`Shutdown::Within`] panics outside a Tokio runtime with its timer enabled. The executor is not stopped then.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, the executor still finishes the accepted calls and stops, but [`Shutdown::Within`] no
    /// longer cancels the calls that are left when its time is up.
    pub async fn stop(&self, how: Shutdown) -> StopReport {
        if let Shutdown::Within(_) = how {
            // Panics without a timer, before anything has been changed.
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
            Shutdown::Within(limit) => {
                if time::timeout(limit, queue.ended()).await.is_err() {
                    queue.abort();
                }
            }
            Shutdown::Immediate => queue.abort(),
        }
        queue.ended().await;
        {
            let mut state = self.inner.state();
            // Meanwhile another stop may have returned and the executor may have been started again.
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
    const fn new(inner: Arc<Inner<B, R>>) -> Self {
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
