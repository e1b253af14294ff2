//! [`UnreadBodies`]: a warning about bodies that are dropped before the tokens used were read from them.

use crate::{clock, sync::Mutex};
use std::{sync::PoisonError, time::Duration};
use tokio::time::Instant;

/// Counts the bodies of the responses of one layer that were dropped before their end, and logs a warning at most once
/// per [`PERIOD`].
#[derive(Debug)]
pub(super) struct UnreadBodies(Mutex<State>);

#[derive(Debug)]
struct State {
    logged: Option<Instant>,
    /// The bodies since the last warning.
    count: u64,
}

const PERIOD: Duration = Duration::from_secs(60);

// === impl UnreadBodies ===

impl UnreadBodies {
    pub(super) fn new() -> Self {
        Self(Mutex::new(State { logged: None, count: 0 }))
    }

    /// Counts a body, and logs the warning if it is due.
    pub(super) fn add(&self) {
        // The warning is logged after the lock is released, because a subscriber of the log is user code.
        if let Some(count) = self.count(clock::now()) {
            tracing::warn!(
                target: "tower_outbound",
                count,
                "The bodies of responses were dropped before their end, so the tokens that these calls used are not \
                 known and they stay charged as estimated: place a `CollectLayer` or a `BodyLayer` outside of the \
                 `UsageLayer`, and read bodies to their end"
            );
        }
    }

    /// Returns the number of bodies since the last warning, if the next one is due.
    fn count(&self, now: Instant) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.count += 1;
        if state
            .logged
            .is_some_and(|logged| now.saturating_duration_since(logged) < PERIOD)
        {
            return None;
        }
        state.logged = Some(now);
        Some(std::mem::take(&mut state.count))
    }
}
