//! [`MemberPauses`]: the times until which no member of the quota admits a call, and what this member has yet to report
//! of them to the store.

use crate::rate::pause::{PauseChange, PauseSource, Pauses};
use tokio::time::Instant;

/// For each source the end of a pause; `None` if there was no pause.
pub(in crate::rate::redis) type PauseEnds = Pauses<Option<Instant>>;

/// For each source the end of a pause that a member has set: `Some(None)` if it has ended the pause, and `None` if it
/// has changed nothing.
pub(super) type PauseReport = Pauses<Option<Option<Instant>>>;

#[derive(Default)]
pub(super) struct MemberPauses {
    ends: PauseEnds,
    /// What this member has set and what has not reached the store yet.
    unreported: PauseReport,
}

impl MemberPauses {
    /// Returns the end of the last pause; `None` if there is no pause at `now`.
    pub(super) fn until(&self, now: Instant) -> Option<Instant> {
        self.ends.until().filter(|until| *until > now)
    }

    /// Returns the source of the pause that ends last.
    pub(super) fn source(&self) -> PauseSource {
        self.ends.source()
    }

    /// Returns what this member has set and what has to be reported to the store.
    pub(super) const fn unreported(&self) -> PauseReport {
        self.unreported
    }

    pub(super) fn has_unreported(&self) -> bool {
        self.unreported.until().is_some()
    }

    /// Sets the end of the pause of `source` for all members. An end that is not after `now` ends the pause. The pause
    /// of the provider is only extended, unless it is ended.
    pub(super) fn set(&mut self, source: PauseSource, until: Instant, now: Instant) -> PauseChange {
        let (until, now) = (Some(until), Some(now));
        let change = if source == PauseSource::Provider && until > now {
            self.ends.extend(source, until, now)
        } else {
            self.ends.set(source, until, now)
        };
        // An end is reported even if it changes nothing here: the store may have a pause that this member does not know.
        if change != PauseChange::Unchanged || until <= now {
            *self.unreported.of_mut(source) = Some(until.filter(|_| until > now));
        }
        change
    }

    /// Takes over the ends of the store's pauses, which it has announced or replied. `reported` is what this
    /// member has reported to get that reply. An end that it has set since stays. Returns whether the last pause ends earlier.
    pub(super) fn on_store(&mut self, reported: PauseReport, ends: PauseEnds) -> bool {
        let before = self.ends.until();
        for source in PauseSource::ALL {
            if self.unreported.of(source) == reported.of(source) {
                *self.unreported.of_mut(source) = None;
            }
            if self.unreported.of(source).is_none() {
                *self.ends.of_mut(source) = ends.of(source);
            }
        }
        self.ends.until() < before
    }
}
