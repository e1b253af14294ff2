//! [`Pause`]: the time until which no member of the quota admits a call, and whether it has yet to be reported to the
//! store.

use tokio::time::Instant;

#[derive(Default)]
pub(super) struct Pause {
    until: Option<Instant>,
    /// The end of a pause that this member has begun and that has not reached the store yet.
    unreported: Option<Instant>,
}

impl Pause {
    /// Returns the end of the current pause; `None` if there is no pause at `now`.
    pub(super) fn until(&self, now: Instant) -> Option<Instant> {
        self.until.filter(|until| *until > now)
    }

    /// Returns the end of a pause that this member has begun and that has to be reported to the store.
    pub(super) const fn unreported(&self) -> Option<Instant> {
        self.unreported
    }

    /// Begins a pause of all members that ends at `until`. Does nothing if the current pause ends later.
    pub(super) fn begin(&mut self, until: Instant) {
        if self.until.is_none_or(|current| current < until) {
            self.until = Some(until);
            self.unreported = Some(until);
        }
    }

    /// Begins or extends a pause that the store has already, so it is not reported.
    pub(super) fn extend(&mut self, until: Instant) {
        self.until = self.until.max(Some(until));
    }

    /// Takes over the end of the store's pause, `until`, from a reply. `reported` is the end that the request had
    /// reported.
    pub(super) fn on_reply(&mut self, reported: Option<Instant>, until: Option<Instant>) {
        if self.unreported == reported {
            self.unreported = None;
        }
        match until {
            Some(until) => self.extend(until),
            None if self.unreported.is_none() => self.until = None,
            None => {}
        }
    }
}
