//! [`WaitTimer`]: measures how long a call waits at one layer, and records it in the current event.

use super::{
    scope::{is_current, time_waited, waited},
    wait::WaitCause,
};
use crate::clock;
use std::time::Duration;
use tokio::time::Instant;

/// Measures how long a call waits at one layer, and records it in the current event: when the wait ends, also if the
/// call is dropped.
///
/// A call that does not wait costs nothing: the wait is boxed, because most calls have none.
#[derive(Debug, Default)]
pub(crate) struct WaitTimer(Option<Box<Waiting>>);

#[derive(Debug)]
struct Waiting {
    cause: WaitCause,
    since: Instant,
    /// What the call had waited for in all when this wait began.
    waited: Duration,
}

impl WaitTimer {
    /// The call waits for `cause` now. If it has waited for something else until now, that is recorded.
    pub(crate) fn wait_for(&mut self, cause: WaitCause) {
        if self.0.as_ref().is_none_or(|waiting| waiting.cause != cause) {
            self.end();
            let since = clock::now();
            let waited = time_waited();
            self.0 = Some(Box::new(Waiting { cause, since, waited }));
        }
    }

    /// The call waits for `cause` now, if a call is being made or polled: a service can also wait until it is ready for the
    /// next call, which is then no call's wait.
    #[cold]
    pub(crate) fn wait_for_in_call(&mut self, cause: WaitCause) {
        if is_current() {
            self.wait_for(cause);
        }
    }

    /// The call waits no longer.
    #[inline]
    pub(crate) fn end(&mut self) {
        if self.0.is_some() {
            self.record();
        }
    }

    /// The call waits no longer. Returns how much of a wait for the service the service has recorded itself, as a wait for a
    /// permit of its own: that is not counted twice.
    #[cold]
    pub(crate) fn record(&mut self) -> Duration {
        let Some(waiting) = self.0.take() else {
            return Duration::ZERO;
        };
        let of_service = match waiting.cause {
            WaitCause::Service => time_waited().saturating_sub(waiting.waited),
            _ => Duration::ZERO,
        };
        let duration = clock::now().duration_since(waiting.since);
        waited(waiting.cause, duration.saturating_sub(of_service));
        of_service
    }

    #[inline]
    pub(crate) const fn is_running(&self) -> bool {
        self.0.is_some()
    }

    /// Returns what the call waits for.
    pub(crate) fn cause(&self) -> Option<WaitCause> {
        self.0.as_ref().map(|waiting| waiting.cause)
    }

    /// Returns since when the call waits.
    pub(crate) fn since(&self) -> Option<Instant> {
        self.0.as_ref().map(|waiting| waiting.since)
    }

    /// Returns what the call waits for and since when, and stops the timer. The caller records the wait.
    pub(crate) fn take(&mut self) -> Option<(WaitCause, Instant)> {
        self.0.take().map(|waiting| (waiting.cause, waiting.since))
    }
}

impl Drop for WaitTimer {
    #[inline]
    fn drop(&mut self) {
        self.end();
    }
}
