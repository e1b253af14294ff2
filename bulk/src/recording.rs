//! [`Recording`]: how a run went over time, in a bounded amount of memory, for its report.

use crate::{
    limits::{Bounds, Pace},
    summary::counts::is_success,
    view::{Cause, Snapshot},
};
use std::time::{Duration, SystemTime};
use tower_outbound::NetworkRequestEvent;

/// The number of slots of time. When a run is longer than all of them, pairs of slots become one, and each is twice as
/// long.
const SLOTS: usize = 240;

/// The length of a slot at the start of a run.
const FIRST_LENGTH: Duration = Duration::from_millis(100);

/// What happened in one slot of time.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Slot {
    /// The attempts that were sent.
    pub(crate) requests: u64,
    /// The tokens of the attempts: those used by the successful ones, and the estimates of the others.
    pub(crate) tokens: u64,
    /// The attempts without a 2xx response.
    pub(crate) failures: u64,
    /// What the limits add in this time.
    pub(crate) allowed_requests: f64,
    pub(crate) allowed_tokens: f64,
}

#[derive(Clone, Debug)]
pub(crate) struct Recording {
    started: SystemTime,
    length: Duration,
    slots: Vec<Slot>,
    /// For how long the run waited for what.
    waits: [Duration; Cause::ALL.len()],
    /// The requests and the tokens that the limits allow at the start.
    pub(crate) initial: [f64; 2],
    /// Whether requests and tokens are limited.
    pub(crate) has_limit: [bool; 2],
}

impl Recording {
    pub(crate) fn new(started: SystemTime, bounds: &Bounds) -> Self {
        let initial = |pace: Option<Pace>| pace.map_or(0.0, |pace| pace.initial as f64);
        Self {
            started,
            length: FIRST_LENGTH,
            slots: Vec::new(),
            initial: [initial(bounds.requests), initial(bounds.tokens)],
            waits: Default::default(),
            has_limit: [bounds.requests.is_some(), bounds.tokens.is_some()],
        }
    }

    /// What the limits have added during the run: requests and tokens.
    pub(crate) fn added(&self) -> [f64; 2] {
        let sum = |added: fn(&Slot) -> f64| self.slots.iter().map(added).sum();
        [sum(|slot| slot.allowed_requests), sum(|slot| slot.allowed_tokens)]
    }

    /// Records the attempts of a request that has ended. `estimate` is its estimate of tokens.
    pub(crate) fn add(&mut self, event: &NetworkRequestEvent, estimate: u64) {
        for attempt in &event.attempts {
            let is_success = is_success(attempt);
            let slot = self.slot(attempt.started_at.duration_since(self.started).unwrap_or_default());
            slot.requests += 1;
            slot.failures += u64::from(!is_success);
            let used = event.api_tokens_used.filter(|_| is_success);
            slot.tokens = slot.tokens.saturating_add(used.unwrap_or(estimate));
        }
    }

    /// Records the state of the run, which has been so for the time `since`.
    pub(crate) fn sample(&mut self, snapshot: &Snapshot, since: Duration) {
        if let Some(at) = Cause::ALL.iter().position(|cause| *cause == snapshot.waits_for) {
            self.waits[at] += since;
        }
        let slot = self.slot(snapshot.elapsed);
        for level in &snapshot.budgets {
            let added = level.pace.per_minute as f64 * since.as_secs_f64() / 60.0;
            match level.cause {
                Cause::Tokens => slot.allowed_tokens += added,
                Cause::Requests => slot.allowed_requests += added,
                _ => {}
            }
        }
    }

    /// The slots with the time at which each ends.
    pub(crate) fn slots(&self) -> impl Iterator<Item = (Duration, Slot)> + '_ {
        let ends = (1..).map(|number: u32| self.length * number);
        ends.zip(self.slots.iter().copied())
    }

    /// For how long the run waited for what, without what it did not wait for.
    pub(crate) fn waits(&self) -> impl Iterator<Item = (Cause, Duration)> + '_ {
        let waits = Cause::ALL.into_iter().zip(self.waits);
        waits.filter(|(_, time)| !time.is_zero())
    }

    fn slot(&mut self, at: Duration) -> &mut Slot {
        while at >= self.length * SLOTS as u32 {
            self.double();
        }
        let index = (at.as_nanos() / self.length.as_nanos()) as usize;
        if index >= self.slots.len() {
            self.slots.resize(index + 1, Slot::default());
        }
        &mut self.slots[index]
    }

    fn double(&mut self) {
        self.length *= 2;
        self.slots = self
            .slots
            .chunks(2)
            .map(|pair| {
                pair.iter().fold(Slot::default(), |sum, slot| Slot {
                    requests: sum.requests + slot.requests,
                    tokens: sum.tokens.saturating_add(slot.tokens),
                    failures: sum.failures + slot.failures,
                    allowed_requests: sum.allowed_requests + slot.allowed_requests,
                    allowed_tokens: sum.allowed_tokens + slot.allowed_tokens,
                })
            })
            .collect();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds {
        requests: None,
        tokens: None,
        further: crate::limits::Further::NONE,
        concurrency: 1,
    };

    #[test]
    fn a_long_run_takes_no_more_slots_and_loses_nothing() {
        let mut recording = Recording::new(SystemTime::UNIX_EPOCH, &BOUNDS);
        for second in 0..100_000 {
            recording.slot(Duration::from_secs(second)).requests += 1;
        }
        assert!(recording.slots.len() <= SLOTS);
        assert_eq!(recording.slots().map(|(_, slot)| slot.requests).sum::<u64>(), 100_000);
        // Each slot has as many requests as it has seconds.
        let length = recording.length.as_secs_f64();
        for (end, slot) in recording.slots().take(100) {
            assert!((slot.requests as f64 - length).abs() <= 1.0, "{end:?}: {slot:?}");
        }
    }

    #[test]
    fn what_the_limits_allow_follows_their_changes() {
        let pace = |per_minute| Pace {
            per_minute,
            burst: 5,
            initial: 5,
            follows: false,
        };
        let bounds = Bounds {
            requests: Some(pace(60)),
            ..BOUNDS
        };
        let mut recording = Recording::new(SystemTime::UNIX_EPOCH, &bounds);
        let mut snapshot = crate::view::sample();
        snapshot.budgets.truncate(1);
        for (seconds, per_minute) in [(0, 60), (1, 60), (2, 120)] {
            snapshot.elapsed = Duration::from_secs(seconds);
            snapshot.budgets[0].pace = pace(per_minute);
            recording.sample(&snapshot, Duration::from_secs(1));
        }
        let allowed: f64 = recording.slots().map(|(_, slot)| slot.allowed_requests).sum();
        assert_eq!((recording.initial[0], allowed), (5.0, 1.0 + 1.0 + 2.0));
        assert_eq!(
            recording.waits().collect::<Vec<_>>(),
            [(Cause::Tokens, Duration::from_secs(3))]
        );
    }
}
