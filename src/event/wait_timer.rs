//! [`WaitTimer`]: measures how long a call waits at one layer, and records it in the current event.

use super::{scope::waited, wait::WaitCause};
use crate::clock;
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
}

impl WaitTimer {
    /// The call waits for `cause` now. If it has waited for something else until now, that is recorded.
    pub(crate) fn wait_for(&mut self, cause: WaitCause) {
        if self.0.as_ref().is_none_or(|waiting| waiting.cause != cause) {
            self.end();
            let since = clock::now();
            self.0 = Some(Box::new(Waiting { cause, since }));
        }
    }

    /// The call waits no longer.
    #[inline]
    pub(crate) fn end(&mut self) {
        if self.0.is_some() {
            self.record();
        }
    }

    #[cold]
    fn record(&mut self) {
        if let Some((cause, since)) = self.take() {
            waited(cause, clock::now().duration_since(since));
        }
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
