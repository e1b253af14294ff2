//! [`Pause`]: a time in which a rate limiter admits no call, and who has begun it.

use std::{fmt, time::Duration};
use tokio::time::Instant;

/// A time in which a rate limiter admits no call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pause {
    source: PauseSource,
    /// When the limiter was first paused. `None` if that is not known, because another process has paused it.
    began: Option<Instant>,
    until: Instant,
}

/// Who has paused a rate limiter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PauseSource {
    /// The program, with [`pause_for`](super::RateLimiter::pause_for) or [`pause_until`](super::RateLimiter::pause_until).
    User,
    /// The provider, with a response that the [`FeedbackLayer`](crate::provider::FeedbackLayer) has read.
    Provider,
}

/// The ends of the current pauses of a limiter, one for each [`PauseSource`]. `T` is an instant, or a number that
/// stands for one; its default is earlier than every end of a pause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Pauses<T> {
    user: T,
    provider: T,
}

/// How the end of a source's pause has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PauseChange {
    Unchanged,
    Begun,
    Extended,
    Shortened,
    Ended,
}

// === impl Pause ===

impl Pause {
    pub(super) const fn new(source: PauseSource, began: Option<Instant>, until: Instant) -> Self {
        Self { source, began, until }
    }

    /// Returns who has begun the pause.
    #[must_use]
    pub const fn source(&self) -> PauseSource {
        self.source
    }

    /// Returns the end of the pause: calls are admitted from this instant on.
    #[must_use]
    pub const fn until(&self) -> Instant {
        self.until
    }

    /// Returns how much of the time from `since` to `now` the pause has lasted.
    pub(super) fn overlap(&self, since: Instant, now: Instant) -> Duration {
        let began = self.began.map_or(since, |began| began.max(since));
        self.until.min(now).saturating_duration_since(began)
    }
}

// === impl PauseSource ===

impl PauseSource {
    pub(super) const ALL: [Self; 2] = [Self::User, Self::Provider];
}

/// Writes `user` or `provider`.
impl fmt::Display for PauseSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::User => "user",
            Self::Provider => "provider",
        })
    }
}

// === impl Pauses ===

impl<T: Copy + Ord> Pauses<T> {
    /// Returns the end of the last pause. It may have passed.
    #[inline]
    pub(super) fn until(&self) -> T {
        self.user.max(self.provider)
    }

    /// Returns the source of the pause that ends last.
    pub(super) fn source(&self) -> PauseSource {
        if self.provider > self.user {
            PauseSource::Provider
        } else {
            PauseSource::User
        }
    }

    pub(super) const fn of(&self, source: PauseSource) -> T {
        match source {
            PauseSource::User => self.user,
            PauseSource::Provider => self.provider,
        }
    }

    /// Sets the end of the pause of `source` to `until`, and returns what that changes. An end that is not after `now`
    /// ends the pause now: no call is admitted as of an earlier time.
    pub(super) fn set(&mut self, source: PauseSource, until: T, now: T) -> PauseChange {
        let old = self.of(source);
        let change = match (old > now, until > now) {
            (false, false) => return PauseChange::Unchanged,
            (false, true) => PauseChange::Begun,
            (true, false) => PauseChange::Ended,
            (true, true) if until > old => PauseChange::Extended,
            (true, true) if until < old => PauseChange::Shortened,
            (true, true) => PauseChange::Unchanged,
        };
        *self.of_mut(source) = until.max(now);
        change
    }

    /// Sets the end of the pause of `source` to `until`, unless it is later already.
    #[cfg(any(test, feature = "http", feature = "redis"))]
    pub(super) fn extend(&mut self, source: PauseSource, until: T, now: T) -> PauseChange {
        self.set(source, until.max(self.of(source)), now)
    }

    #[cfg(feature = "redis")]
    pub(super) const fn new(user: T, provider: T) -> Self {
        Self { user, provider }
    }

    /// Replaces each end of a pause by what `change` returns for it.
    pub(super) fn map<U>(self, change: impl Fn(T) -> U) -> Pauses<U> {
        Pauses {
            user: change(self.user),
            provider: change(self.provider),
        }
    }

    pub(super) const fn of_mut(&mut self, source: PauseSource) -> &mut T {
        match source {
            PauseSource::User => &mut self.user,
            PauseSource::Provider => &mut self.provider,
        }
    }
}

// === impl PauseChange ===

impl PauseChange {
    /// Logs the change. `remaining` is the time until the new end of the pause. The caller must hold no lock, because a
    /// subscriber of the log is user code.
    pub(super) fn log(self, source: PauseSource, remaining: Duration) {
        match self {
            Self::Unchanged => {}
            Self::Begun if source == PauseSource::User => {
                tracing::info!(target: "tower_outbound", %source, ?remaining, "The rate limiter is paused");
            }
            Self::Begun => {
                tracing::warn!(target: "tower_outbound", %source, ?remaining, "The rate limiter is paused");
            }
            Self::Extended => {
                tracing::debug!(target: "tower_outbound", %source, ?remaining, "The rate limiter is paused for longer");
            }
            Self::Shortened => {
                tracing::info!(target: "tower_outbound", %source, ?remaining, "The rate limiter's pause ends earlier");
            }
            Self::Ended => tracing::info!(target: "tower_outbound", %source, "The rate limiter's pause was ended"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_replaces_only_its_own_pause() {
        use PauseSource::{Provider, User};
        let mut pauses = Pauses::default();
        assert_eq!(pauses.set(User, 50, 10), PauseChange::Begun);
        assert_eq!(pauses.extend(Provider, 80, 10), PauseChange::Begun);
        assert_eq!((pauses.until(), pauses.source()), (80, Provider));
        assert_eq!(pauses.set(User, 40, 10), PauseChange::Shortened);
        assert_eq!(pauses.extend(Provider, 70, 10), PauseChange::Unchanged);
        assert_eq!((pauses.until(), pauses.source()), (80, Provider));
        assert_eq!(pauses.set(User, 90, 20), PauseChange::Extended);
        assert_eq!((pauses.until(), pauses.source()), (90, User));
        assert_eq!(pauses.set(User, 5, 20), PauseChange::Ended);
        assert_eq!(pauses.set(Provider, 0, 20), PauseChange::Ended);
        assert_eq!(pauses.set(Provider, 0, 30), PauseChange::Unchanged);
        // The pauses have ended at 20, not before.
        assert_eq!(pauses.until(), 20);
    }
}
