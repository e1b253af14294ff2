//! [`LimitWait`]: what a call waits for at the rate limit, recorded in its event.

use super::{admission::Admission, budget::Budget, pause::Pause};
use crate::event::{self, WaitCause, WaitTimer};
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::time::Instant;

/// What a call waits for at the rate limit: the pause of the limiter, one of the call's budgets, or the service below.
/// It is recorded in the current event, also if the call is dropped while it waits.
#[derive(Debug, Default)]
pub(super) struct LimitWait {
    timer: WaitTimer,
    /// The last pause that was seen since the call waits. Boxed: most calls meet none.
    pause: Option<Box<Pause>>,
}

impl LimitWait {
    /// The call waits for the limiter.
    #[cold]
    pub(super) fn wait_for_limit(&mut self, admission: &Admission) {
        if matches!(self.timer.cause(), None | Some(WaitCause::Service)) {
            self.timer.wait_for(admission.waits_for());
        }
        self.see_pause(admission);
    }

    /// The call waits for the service below, and could be charged now.
    #[cold]
    pub(super) fn wait_for_service(&mut self, admission: &Admission) {
        if self.timer.cause() != Some(WaitCause::Service) {
            self.end(admission);
        }
        self.timer.wait_for(WaitCause::Service);
    }

    /// The call waits no longer: it was charged, or has failed.
    #[inline]
    pub(super) fn end(&mut self, admission: &Admission) {
        if self.timer.is_running() {
            self.see_pause(admission);
            self.record(admission.waited_for());
        }
    }

    /// Looks whether the call waits for a pause, or has waited for one, and notes the first one that it meets.
    fn see_pause(&mut self, admission: &Admission) {
        let Some(since) = self.timer.since() else { return };
        let Some(pause) = admission.pause_since(since) else {
            return;
        };
        if self.pause.is_none() {
            note(pause);
        }
        self.pause = Some(Box::new(pause));
    }

    /// Records the wait. As far as a pause has lasted, it was a wait for the pause, and apart from that for `binding`, the
    /// budget that was available last, if that is known.
    #[cold]
    fn record(&mut self, binding: Option<Budget>) {
        if self.timer.cause() == Some(WaitCause::Service) {
            if !self.timer.record().is_zero() {
                warn_of_order();
            }
            return;
        }
        let Some((cause, since)) = self.timer.take() else {
            return;
        };
        let now = Instant::now();
        let cause = match (cause, binding) {
            (WaitCause::Budget(_), Some(budget)) => WaitCause::Budget(budget),
            _ => cause,
        };
        let paused = self.pause.as_deref().filter(|_| cause.budget().is_some());
        let paused = paused.map(|pause| pause.overlap(since, now)).unwrap_or_default();
        event::waited(WaitCause::Pause, paused);
        event::waited(cause, now.duration_since(since).saturating_sub(paused));
    }
}

impl Drop for LimitWait {
    #[inline]
    fn drop(&mut self) {
        if self.timer.is_running() {
            self.record(None);
        }
    }
}

/// Warns, once in a process, of a concurrency limit below a rate limit.
fn warn_of_order() {
    static HAS_WARNED: AtomicBool = AtomicBool::new(false);
    if !HAS_WARNED.swap(true, Ordering::Relaxed) {
        tracing::warn!(
            target: "tower_outbound",
            "A call whose rates were available has waited for a permit of a concurrency limit below its rate limit, and others \
             behind it with it: place the concurrency limit outside the rate limit"
        );
    }
}

/// Notes in the current event that its call waits for `pause`, or has waited for it if it is over.
fn note(pause: Pause) {
    let Some(event) = event::current() else { return };
    let source = pause.source();
    let remaining = pause.until().saturating_duration_since(Instant::now());
    event.log(if remaining.is_zero() {
        format!("Waited for a pause of the rate limiter that the {source} had begun")
    } else {
        format!("Waits for a pause of the rate limiter that the {source} has begun and that ends in {remaining:?}")
    });
}
