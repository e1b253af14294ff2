//! [`Pause`]: until when no member admits a call, and whether the store has yet to learn of it.

use tokio::time::Instant;

#[derive(Default)]
pub(super) struct Pause {
    until: Option<Instant>,
    /// The end of a pause that this member has begun and that the store does not have yet.
    unreported: Option<Instant>,
}

impl Pause {
    /// The end of the current pause.
    pub(super) fn until(&self, now: Instant) -> Option<Instant> {
        self.until.filter(|until| *until > now)
    }

    /// The end of a pause that is to be reported.
    pub(super) const fn unreported(&self) -> Option<Instant> {
        self.unreported
    }

    /// Begins or extends a pause of all members.
    pub(super) fn begin(&mut self, until: Instant) {
        if self.until.is_none_or(|current| current < until) {
            self.until = Some(until);
            self.unreported = Some(until);
        }
    }

    /// Begins or extends a pause that the store already has.
    pub(super) fn extend(&mut self, until: Instant) {
        self.until = self.until.max(Some(until));
    }

    /// Takes over the store's pause from the reply to a request that reported the pause until `reported`.
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
