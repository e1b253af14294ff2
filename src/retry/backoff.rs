//! [`Backoff`]: how long a call waits before its next attempt. [`Delay`]: the future of that wait.

use crate::event::{WaitCause, WaitTimer};
use fastrand::Rng;
use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::time::{Sleep, sleep};

/// The settings and the shared state from which waits are computed. All clones of a policy share the state.
#[derive(Clone)]
pub(super) struct Backoff {
    /// The backoff before the first retry.
    pub(super) base: Duration,
    /// The bound up to which the backoff doubles with each retry.
    pub(super) cap: Duration,
    /// The generator of random delays. It is shared, so that concurrent calls draw different delays.
    rng: Arc<Mutex<Rng>>,
    /// How many calls wait for a delay that the server has requested.
    waiting: Arc<AtomicUsize>,
}

/// The future of a [`RetryPolicy`](super::RetryPolicy), which completes after the delay before a retry.
///
/// # Cancel safety
///
/// Dropping the future ends the delay and has no other effect. Tower's retry layer makes the retry only after the
/// future has completed.
#[must_use = "futures do nothing unless polled"]
pub struct Delay {
    duration: Duration,
    /// The timer, which is created at the first poll.
    sleep: Option<Pin<Box<Sleep>>>,
    wait: WaitTimer,
    /// Counts this call among those that wait for a delay that the server has requested. `None` for a backoff.
    waiting: Option<WaitingGuard>,
}

/// Counts one call in [`Backoff::waiting`] until it is dropped.
struct WaitingGuard(Arc<AtomicUsize>);

// === impl Backoff ===

impl Backoff {
    pub(super) fn new() -> Self {
        Self {
            base: Duration::from_millis(500),
            cap: Duration::from_secs(30),
            rng: Arc::new(Mutex::new(Rng::new())),
            waiting: Arc::default(),
        }
    }

    pub(super) fn seed(&mut self, seed: u64) {
        self.rng = Arc::new(Mutex::new(Rng::with_seed(seed)));
    }

    /// Returns the delay before the retry number `retries + 1` of a call that has `left` until its deadline. The delay
    /// is a random part of the backoff, which doubles with each retry. Returns `None` if the delay would not end
    /// before the deadline.
    pub(super) fn delay(&self, retries: u32, left: Duration) -> Option<Delay> {
        let duration = self.jitter(retries, Duration::MAX);
        (duration < left).then(|| Delay::new(duration, None))
    }

    /// Returns the delay of a call that the server has told to wait for `requested`, which must be less than `left`,
    /// the time until the deadline.
    ///
    /// The delay is not shorter than `requested`, not shorter than the random backoff, and ends before the deadline. If
    /// another call waits for a requested delay, the random backoff is added to `requested`: many calls that are
    /// refused together are told the same delay, and would otherwise come back, and be refused, in the same instant.
    pub(super) fn requested_delay(&self, requested: Duration, retries: u32, left: Duration) -> Delay {
        let jitter = self.jitter(retries, left.saturating_sub(requested));
        let guard = WaitingGuard(self.waiting.clone());
        let is_alone = guard.0.fetch_add(1, Ordering::Relaxed) == 0;
        let duration = if is_alone {
            requested.max(jitter)
        } else {
            requested.saturating_add(jitter)
        };
        Delay::new(duration, Some(guard))
    }

    /// Returns a random part of the backoff before the retry number `retries + 1`, or of `max` if that is shorter.
    fn jitter(&self, retries: u32, max: Duration) -> Duration {
        let factor = 1_u32.checked_shl(retries).unwrap_or(u32::MAX);
        let backoff = self.base.saturating_mul(factor).min(self.cap).min(max);
        let mut rng = self.rng.lock().unwrap_or_else(PoisonError::into_inner);
        backoff.mul_f64(rng.f64())
    }
}

// === impl Delay ===

impl Delay {
    fn new(duration: Duration, waiting: Option<WaitingGuard>) -> Self {
        Self {
            duration,
            sleep: None,
            wait: WaitTimer::default(),
            waiting,
        }
    }

    pub(super) const fn duration(&self) -> Duration {
        self.duration
    }

    /// Returns where the delay comes from, for the event.
    pub(super) const fn origin(&self) -> &'static str {
        if self.waiting.is_some() {
            "requested by the server"
        } else {
            "backoff"
        }
    }
}

impl Future for Delay {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let duration = self.duration;
        // A retry without delay needs no timer, so it also works in a runtime whose timer is not enabled.
        if duration.is_zero() {
            return Poll::Ready(());
        }
        self.wait.wait_for(WaitCause::Backoff);
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(sleep(duration)));
        ready!(sleep.as_mut().poll(cx));
        self.wait.end();
        Poll::Ready(())
    }
}

impl fmt::Debug for Delay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Delay")
            .field("duration", &self.duration)
            .finish_non_exhaustive()
    }
}

// === impl WaitingGuard ===

impl Drop for WaitingGuard {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
