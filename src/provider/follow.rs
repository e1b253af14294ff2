//! [`Following`]: applies what a provider reports about its own buckets to a limiter, up as well as down.

use super::{adapt::Adaptation, info::Window};
use crate::rate::{Budget, Limits, RateLimiter, Report};
use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::time::Instant;

/// What was learned about one limit of a provider: see [`FeedbackLayer::learned`](super::FeedbackLayer::learned).
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Learned {
    /// What the limit counts.
    pub budget: Budget,
    /// The period of the limit.
    pub period: Duration,
    /// The amount per period that the limiter admits now.
    pub amount: f64,
    /// What the provider's bucket can hold. `None` if no response has told it.
    pub capacity: Option<u64>,
    /// What the provider's bucket probably holds now. `None` if no response has told it.
    pub level: Option<u64>,
    /// How the amount is known.
    pub source: Source,
}

/// How a limit of a provider is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Source {
    /// It is the configured one. The provider has reported none, and has rejected no calls for it.
    Configured,
    /// The provider has reported it.
    Told,
    /// It was found from the provider's rejections.
    Found,
}

/// The state of following, shared by all clones of a [`FeedbackLayer`](super::FeedbackLayer).
pub(super) struct Following {
    adaptation: Arc<Adaptation>,
    state: Mutex<State>,
    in_flight: Arc<AtomicUsize>,
    /// Whether a response has come since the limiter began to follow.
    is_answered: AtomicBool,
}

/// A call on its way to the provider. Counted until it is dropped.
pub(super) struct InFlight {
    /// The stamp with which the limiter has recorded the call.
    stamp: u64,
    /// Whether no other call was on its way when this one was sent.
    is_alone: bool,
    count: Arc<AtomicUsize>,
}

struct State {
    /// The configured limits.
    most: Limits,
    /// What the provider has reported about each rate of `most`.
    told: Vec<Told>,
}

#[derive(Clone, Copy, Default)]
struct Told {
    limit: Option<u64>,
    /// The stamp of the call whose response has reported the limit. Responses to earlier calls do not replace it.
    stamp: u64,
    has_level: bool,
}

/// What one response reports about one rate.
#[derive(Clone, Copy, Default)]
struct Reported {
    limit: Option<u64>,
    /// The window with the least that remains.
    level: Option<(u64, Window)>,
}

// === impl Following ===

impl Following {
    pub(super) fn new(limiter: &RateLimiter) -> Self {
        let most = limiter.limits();
        limiter.follow(&most, true);
        Self {
            adaptation: Arc::new(Adaptation::new(limiter)),
            state: Mutex::new(State::new(most)),
            in_flight: Arc::default(),
            is_answered: AtomicBool::new(false),
        }
    }

    pub(super) const fn adaptation(&self) -> &Arc<Adaptation> {
        &self.adaptation
    }

    /// Records that a call is sent now.
    pub(super) fn on_sent(&self, limiter: &RateLimiter) -> InFlight {
        InFlight {
            is_alone: self.in_flight.fetch_add(1, Ordering::AcqRel) == 0,
            stamp: limiter.stamp_sent(),
            count: self.in_flight.clone(),
        }
    }

    /// Returns whether the provider has reported what is left of a limit.
    pub(super) fn is_told(&self) -> bool {
        self.lock().told.iter().any(|told| told.has_level)
    }

    /// Applies what the response to a call, which was sent at `sent`, reports.
    pub(super) fn observe(&self, limiter: &RateLimiter, windows: &[Window], call: &InFlight, sent: Instant) {
        if !self.is_answered.swap(true, Ordering::AcqRel) {
            limiter.end_start();
        }
        if windows.is_empty() {
            return;
        }
        let mut state = self.lock();
        if let Some(most) = self.adaptation.replaced(limiter) {
            limiter.follow(&most, false);
            self.is_answered.store(false, Ordering::Release);
            *state = State::new(most);
        }
        let reported = state.reported(windows);
        if state.set_told(&reported, call.stamp) {
            let told = state.told.iter().map(|told| told.limit);
            self.adaptation.set_configured(limiter, state.most.lowered_to(told));
        }
        for (index, ((budget, rate), reported)) in state.most.rates().zip(&reported).enumerate() {
            if let Some((remaining, window)) = reported.level {
                let amount = reported
                    .limit
                    .map_or(rate.amount(), |limit| rate.amount().min(limit as f64));
                let report = Report {
                    remaining,
                    capacity: window.capacity(amount, rate.period()),
                    stamp: call.stamp,
                    is_alone: call.is_alone,
                };
                limiter.report(index, (budget, rate.period()), &report, sent);
            }
        }
    }

    pub(super) fn learned(&self, limiter: &RateLimiter) -> Vec<Learned> {
        let state = self.lock();
        let is_found = self.adaptation.factor() < 1.0;
        let mut levels = limiter.followed_levels().into_iter();
        let limits = limiter.limits();
        let learned = limits.rates().enumerate().map(|(index, (budget, rate))| {
            let level = levels.next();
            let told = state.told.get(index).copied().unwrap_or_default();
            let most = state.most.rates().nth(index);
            Learned {
                budget,
                period: rate.period(),
                amount: rate.amount(),
                capacity: level.and_then(|level| level.capacity),
                level: level.filter(|_| told.has_level).map(|level| level.level),
                source: match told.limit {
                    _ if is_found && most.is_some_and(|(_, most)| rate.amount() < most.amount()) => Source::Found,
                    Some(_) => Source::Told,
                    None => Source::Configured,
                },
            }
        });
        learned.collect()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl State ===

impl State {
    fn new(most: Limits) -> Self {
        Self {
            told: vec![Told::default(); most.rates().count()],
            most,
        }
    }

    /// Returns what a response reports about each rate. Of several limits that apply to one rate, the least counts.
    fn reported(&self, windows: &[Window]) -> Vec<Reported> {
        let mut reported = vec![Reported::default(); self.told.len()];
        for window in windows {
            let Some(of_rate) = window.index_in(&self.most).and_then(|index| reported.get_mut(index)) else {
                continue;
            };
            if let Some(limit) = window.limit.filter(|limit| *limit > 0) {
                of_rate.limit = Some(of_rate.limit.map_or(limit, |least| least.min(limit)));
            }
            if let Some(remaining) = window.remaining {
                if of_rate.level.is_none_or(|(least, _)| remaining < least) {
                    of_rate.level = Some((remaining, *window));
                }
            }
        }
        reported
    }

    /// Stores the reported limits of a response to the call with this stamp. Returns whether one of them is new.
    fn set_told(&mut self, reported: &[Reported], stamp: u64) -> bool {
        let mut is_changed = false;
        for ((told, reported), (budget, rate)) in self.told.iter_mut().zip(reported).zip(self.most.rates()) {
            told.has_level |= reported.level.is_some();
            let Some(limit) = reported.limit.filter(|_| stamp >= told.stamp) else {
                continue;
            };
            told.stamp = stamp;
            if told.limit != Some(limit) {
                told.limit = Some(limit);
                is_changed = true;
                tracing::info!(
                    target: "tower_outbound",
                    %budget,
                    period = ?rate.period(),
                    limit,
                    most = rate.amount(),
                    "The provider has reported its limit"
                );
            }
        }
        is_changed
    }
}

// === impl InFlight ===

impl Drop for InFlight {
    fn drop(&mut self) {
        self.count.fetch_sub(1, Ordering::AcqRel);
    }
}
