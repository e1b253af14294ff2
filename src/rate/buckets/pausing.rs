//! The pauses of a limiter, in which it admits no call.

use super::Buckets;
use crate::{
    clock::{LazyNow, nanos_between},
    rate::pause::{Pause, PauseChange, PauseSource},
};
use std::time::Duration;
use tokio::time::Instant;

impl Buckets {
    /// Sets the end of the user's pause to `until`, which may be earlier than before. `None` stands for an instant that
    /// is too far away to be represented.
    pub(in crate::rate) fn pause(&mut self, until: Option<Instant>, now: &mut LazyNow) -> PauseChange {
        let now = self.time(now);
        let until = self.end_of_pause(until);
        self.begin_pause(now);
        self.pauses.set(PauseSource::User, until, now)
    }

    /// Begins a pause of the provider that ends at `until`, or extends it to that instant.
    #[cfg(feature = "http")]
    pub(in crate::rate) fn extend_pause(&mut self, until: Option<Instant>, now: &mut LazyNow) -> PauseChange {
        let now = self.time(now);
        let until = self.end_of_pause(until);
        self.begin_pause(now);
        self.pauses.extend(PauseSource::Provider, until, now)
    }

    /// Keeps when a pause begins, unless the limiter is paused already.
    fn begin_pause(&mut self, now: u64) {
        let is_paused = self.pauses.until() > now;
        if let Some(queued) = self.queued.as_mut().filter(|_| !is_paused) {
            queued.paused_at = now;
        }
    }

    fn end_of_pause(&self, until: Option<Instant>) -> u64 {
        until.map_or(u64::MAX, |until| nanos_between(self.epoch, until))
    }

    /// Ends all pauses. Returns how the pause of each source has changed.
    pub(in crate::rate) fn resume(&mut self, now: &mut LazyNow) -> [(PauseSource, PauseChange); 2] {
        let now = self.time(now);
        PauseSource::ALL.map(|source| (source, self.pauses.set(source, 0, now)))
    }

    /// Returns the last pause if it ends after `instant`, which may be in the past.
    pub(in crate::rate) fn pause_since(&self, instant: Instant) -> Option<Pause> {
        let until = self.epoch.checked_add(Duration::from_nanos(self.pauses.until()));
        let until = until.filter(|until| *until > instant)?;
        let paused_at = self.queued.as_ref().map_or(0, |queued| queued.paused_at);
        let began = self.epoch.checked_add(Duration::from_nanos(paused_at));
        Some(Pause::new(self.pauses.source(), began, until))
    }
}
