//! [`Adaptation`]: finds the limits of a provider from its 429 responses, when no header reports the limits.
//!
//! A provider that rejects a call says only that too much was sent, not how much it allows. The adaptation therefore
//! does what TCP's congestion control does for a network path. It multiplies the configured limits by one factor,
//! lowers the factor when calls are rejected, and raises it again when they are not.
//!
//! # One signal per episode
//!
//! Many calls are rejected for the same reason: all that were on the way when the provider's bucket ran empty. They are
//! one signal, as the packets that are lost within one window are for TCP (RFC 5681, section 3.1, and RFC 6582). An
//! *episode* begins with the rejection of a call that was sent after the limits were last lowered, and ends when a
//! [`ROUND`] has passed without a rejection and a call that was sent in it has succeeded, or [`PATIENCE`] after its last
//! lowering. The first rejection of an episode lowers the factor at once, by [`BETA`]. The limiter's buckets are emptied
//! with it, since the provider's bucket is empty, too: what they still hold would only be rejected.
//!
//! # A failing server is no signal
//!
//! Some servers reject with 503, as nginx does by default, and some fail with it now and then, whatever the limits are. A
//! 503 or 529 is a *doubtful* rejection: it counts only when, within [`PATIENCE`], there are
//! [`MIN_DOUBTFUL`] of them beyond [`DOUBTFUL_SHARE`] of the answers. This is a sequential test (Wald, 1945): a server
//! that fails for two of a hundred calls passes its bound about once in four hundred times, and one that is sent twice
//! too much after eight calls.
//!
//! # Down to what was measured
//!
//! If calls are still rejected after the lowering, the limits are far above the provider's. The share of the calls of a
//! round that were *not* rejected tells how far: while more is sent than is allowed, that share of it is what the
//! provider allows. At the end of such a round, the factor is multiplied by the share, and by [`MARGIN`], so that the
//! provider's bucket fills again. So limits that are twice as high as the provider's are found after a second, and not by
//! many blind steps. This is what BBR and TCP Westwood do with the rate of delivery. Calls that have not been answered
//! yet count as accepted: a provider rejects at once, while an answer may take a minute.
//!
//! Whether a call is rejected is known a round trip after it was sent. So a round is judged when the rejections of its
//! last calls have had the time to arrive which the first rejection took: otherwise those would begin another episode.
//!
//! # Up quickly, then in small steps
//!
//! After an episode the factor follows CUBIC's curve (RFC 9438, section 4.2): `C (t - K)^3 + W`, where `W` is the factor
//! that the provider allowed last, and `K` the time at which the curve reaches it. The curve rises quickly towards `W`,
//! is flat around it, and then rises faster and faster, so that a limit that was raised is found within seconds. `W` is
//! taken a little below the factor at which calls were rejected, so that clients that share a limit converge to equal
//! shares (fast convergence, section 4.7): the larger one gives up more, and all rise by the same amount.
//!
//! # Each try costs a rejection
//!
//! To find out whether more is allowed, more has to be sent, until a call is rejected. When two episodes in a row have
//! found the same limit, the curve stays at `W` until 200 calls were accepted for each one that the
//! last episode has cost, at most for 5 minutes. So a limit that does not change costs less than one call in a
//! hundred, and one that was raised is found after that many calls. Beyond `W`, the curve rises more slowly where
//! rejections take long: in a round trip, it should not rise by more than a lowering takes back.
//!
//! The provider's bucket holds something when the try begins, so the factor is above the limit for a while before a call
//! is rejected. Between two rejections, though, a bucket that was empty both times has let through exactly what its rate
//! added. So a try that fails returns to the average factor since the last rejection, or to `W`, which was held
//! without one, whichever is more. If the factor is then more than [`MOST_OVERSHOOT`] times as high, the limit was raised,
//! and the average tells nothing.
//!
//! What the provider's bucket can hold is not learned: after an idle time, a burst may be rejected, and begins an episode.

use super::tries::{Average, Price, is_same_limit};
use crate::rate::{Limits, Rate, RateLimiter};
use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};
use tokio::time::Instant;

/// The factor by which the first rejection of an episode multiplies the rates. TCP's is 0.5, CUBIC's 0.7: they must also
/// empty the queue of a router, while a provider has none.
const BETA: f64 = 0.9;
/// The factor by which each further rejection of an episode multiplies the rates if it asks for a pause. Few calls are
/// rejected then, whatever the limits, so nothing can be measured; and each rejection costs the time of a pause.
const PAUSED_BETA: f64 = 0.7;
/// How far below the measured rate the rates are set, so that the provider's bucket gains again.
const MARGIN: f64 = 0.97;
/// CUBIC's constant: how fast the factor rises, in configured amounts per cubed second. From half the configured amount
/// to all of it takes 8 seconds.
const C: f64 = 0.001;
/// For how long the calls of a round are counted, from the first one.
const ROUND: Duration = Duration::from_secs(1);
/// The number of calls that a round has at least, unless it lasts for [`PATIENCE`]: fewer measure nothing.
const ROUND_CALLS: u32 = 10;
/// The longest time of a round, and the time without a rejection after which an episode ends without a success.
const PATIENCE: Duration = Duration::from_secs(5);
/// The least that a measured round leaves of the rates. The share of a few calls says little, so more is left then.
const MIN_SHARE: f64 = 0.1;
const MIN_SHARE_OF_FEW: f64 = 0.5;
/// The share of the answers that may be doubtful rejections without being a signal.
const DOUBTFUL_SHARE: f64 = 0.06;
/// The number of doubtful rejections beyond that share that are a signal.
const MIN_DOUBTFUL: f64 = 4.0;
/// The smallest change by which the rates are raised, so that waiting calls are not woken for each response.
const STEP: f64 = 1.01;
/// The lowest rates, as a fraction of the configured amounts. Without a lower bound, a long outage that is answered
/// with 429s would lower the rates further and further.
const MIN_FACTOR: f64 = 0.01;
/// How far below the average factor the rates are raised after a try, and how far below that they are lowered at first.
const AVERAGE_MARGIN: f64 = 0.98;
const BETA_OF_AVERAGE: f64 = 0.95;
/// How many times the known limit a factor is at most while only the bucket of the provider is used up.
const MOST_OVERSHOOT: f64 = 1.7;
/// The longest period of a rate that is adapted, if any rate has a period as short. A longer one is a quota, such as
/// that of a day: a rejected call does not say that the quota is smaller.
const LONGEST_PERIOD: Duration = Duration::from_secs(60);

/// The state of the adaptation of one limiter, shared by all clones of a [`FeedbackLayer`](super::FeedbackLayer).
pub(super) struct Adaptation {
    state: Mutex<AdaptationState>,
}

struct AdaptationState {
    /// The configured limits. The limits in force are the configured ones multiplied by `factor`.
    configured: Limits,
    /// The limits that the adaptation set last. If the limiter now has other limits, user code has changed them.
    applied: Limits,
    /// The factor by which the configured limits are multiplied, from [`MIN_FACTOR`] to 1.
    factor: f64,
    /// When the limits were last lowered. Calls that were sent before do not lower them again.
    lowered: Instant,
    phase: Phase,
    /// The factor that the last episode has found to be the limit. `None` if it is not known.
    last_found: Option<f64>,
    /// How long the rejection took to arrive that began the episode.
    delay: Duration,
    /// What the last episode has cost.
    price: Price,
    /// The average factor since the last rejection.
    average: Average,
    /// The answers while there is no episode.
    answers: Answers,
    /// Whether user code has set other limits since [`Adaptation::replaced`] was called last.
    is_replaced: bool,
}

/// How the provider has rejected a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rejection {
    /// For its limits.
    Certain,
    /// For its limits, and the limiter is paused for the delay that the provider asks for.
    Pausing,
    /// For its limits, or because the server fails.
    Doubtful,
}

/// The answers since the first doubtful rejection, for at most [`PATIENCE`].
#[derive(Clone, Copy)]
struct Answers {
    began: Instant,
    all: u32,
    doubtful: u32,
}

#[derive(Clone, Copy)]
enum Phase {
    /// The configured limits are in force.
    Configured,
    /// Calls were rejected, and the calls that were sent since the limits were lowered are counted.
    Episode(Round),
    /// The factor rises from `from`, its value at the instant `since`, towards `target`, and from the instant `beyond` on
    /// higher.
    Recovery {
        since: Instant,
        from: f64,
        target: f64,
        beyond: Option<Instant>,
    },
}

/// The calls that were sent since the limits were last lowered.
#[derive(Clone, Copy, Default)]
struct Round {
    /// When the first of them was sent. `None` before that: a pause may keep calls back for long.
    began: Option<Instant>,
    /// When the round was long enough. Calls that are sent later are not counted.
    ended: Option<Instant>,
    /// How long a rejection takes to arrive. The round is judged when those of its last calls are there.
    delay: Duration,
    sent: u32,
    rejected: u32,
    doubtful: u32,
    /// Whether one of them has succeeded.
    has_success: bool,
    /// The factor towards which the rates are raised after the episode.
    target: f64,
}

/// What follows from the calls so far.
enum Decision {
    Lower { factor: f64, target: f64 },
    Raise(f64),
}

// === impl Adaptation ===

impl Adaptation {
    pub(super) fn new(limiter: &RateLimiter) -> Self {
        let configured = limiter.limits();
        Self {
            state: Mutex::new(AdaptationState {
                applied: configured.clone(),
                configured,
                factor: 1.0,
                lowered: Instant::now(),
                phase: Phase::Configured,
                last_found: None,
                delay: Duration::ZERO,
                price: Price::default(),
                average: Average::new(Instant::now()),
                answers: Answers::new(Instant::now()),
                is_replaced: false,
            }),
        }
    }

    /// Counts a call that is sent at `now`.
    pub(super) fn on_sent(&self, limiter: &RateLimiter, now: Instant) {
        let mut state = self.lock();
        let is_first = state.on_sent(now);
        let applied = is_first.then(|| state.applied.clone());
        drop(state);
        // While the limiter was paused, its buckets have filled again. What they gained is not sent as one burst.
        if let Some(limits) = applied {
            empty(limiter, &limits);
        }
    }

    /// Notes that a call, which was sent at `sent`, was rejected.
    pub(super) fn on_throttled(&self, limiter: &RateLimiter, sent: Instant, rejection: Rejection) {
        self.change(limiter, true, |state, now| state.on_throttled(sent, now, rejection));
    }

    /// Notes that a call, which was sent at `sent`, has succeeded.
    pub(super) fn on_success(&self, limiter: &RateLimiter, sent: Instant) {
        self.change(limiter, false, |state, now| state.on_success(sent, now));
    }

    /// Sets the limits of the limiter as `decide` returns. Whether user code has set other limits is checked when that
    /// changes the limits, and at each rejection.
    fn change(
        &self,
        limiter: &RateLimiter,
        is_rejection: bool,
        decide: impl FnOnce(&mut AdaptationState, Instant) -> Option<Decision>,
    ) {
        let mut state = self.lock();
        let now = Instant::now();
        let decision = decide(&mut state, now);
        if decision.is_none() && !is_rejection {
            return;
        }
        if state.check_replaced(limiter, now) {
            return;
        }
        let Some(decision) = decision else { return };
        let is_lower = matches!(decision, Decision::Lower { .. });
        state.apply(&decision, now);
        let (factor, scaled) = (state.factor, scaled(&state.configured, state.factor));
        // Setting the limits fails if a scaled rate is too low to be represented. The limits of the limiter then stay
        // as they are.
        let is_set = limiter.set_limits(scaled.clone()).is_ok();
        if is_set {
            state.applied.clone_from(&scaled);
        }
        drop(state);
        if is_lower {
            empty(limiter, &scaled);
            tracing::info!(target: "tower_outbound", factor, "Lowered the limits, as the provider has rejected calls");
        } else if factor >= 1.0 {
            tracing::info!(target: "tower_outbound", factor, "Raised the limits to the configured ones");
        } else {
            tracing::debug!(target: "tower_outbound", factor, "Raised the limits, as the provider rejects no calls");
        }
    }

    /// Returns the limits that user code has set, if it has done so since the last call of this method.
    pub(super) fn replaced(&self, limiter: &RateLimiter) -> Option<Limits> {
        let mut state = self.lock();
        state.check_replaced(limiter, Instant::now());
        let is_replaced = std::mem::take(&mut state.is_replaced);
        is_replaced.then(|| state.configured.clone())
    }

    /// Replaces the limits that the adaptation starts from, for example by those that the provider reports. What was
    /// found so far still applies: the limits in force are the new ones multiplied by the same factor.
    pub(super) fn set_configured(&self, limiter: &RateLimiter, configured: Limits) {
        let mut state = self.lock();
        if state.check_replaced(limiter, Instant::now()) {
            return;
        }
        let scaled = scaled(&configured, state.factor);
        if limiter.set_limits(scaled.clone()).is_ok() {
            (state.applied, state.configured) = (scaled, configured);
        }
    }

    /// Returns the factor by which the configured limits are multiplied.
    pub(super) fn factor(&self) -> f64 {
        self.lock().factor
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, AdaptationState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Decision ===

impl Decision {
    /// Lowers the factor by `beta`, without knowing what the provider allows: probably something in between.
    fn lower(factor: f64, beta: f64) -> Self {
        Self::Lower {
            factor: factor * beta,
            target: factor * (1.0 + beta) / 2.0,
        }
    }

    /// Lowers the factor further if the provider allows no more than this on average.
    fn at_most(self, average: f64) -> Self {
        match self {
            Self::Lower { factor, target } => {
                let target = target.min(average * AVERAGE_MARGIN);
                Self::Lower {
                    factor: factor.min(target * BETA_OF_AVERAGE),
                    target,
                }
            }
            Self::Raise(_) => self,
        }
    }
}

// === impl AdaptationState ===

impl AdaptationState {
    /// Returns whether user code has set other limits, which become the configured ones. What was found for the previous
    /// limits does not apply to them.
    fn check_replaced(&mut self, limiter: &RateLimiter, now: Instant) -> bool {
        let limits = limiter.limits();
        if limits == self.applied {
            return false;
        }
        self.applied = limits.clone();
        self.configured = limits;
        self.factor = 1.0;
        self.lowered = now;
        self.phase = Phase::Configured;
        self.last_found = None;
        self.is_replaced = true;
        true
    }

    /// Counts a call that is sent at `now`. Returns whether it is the first one after the limits were lowered.
    fn on_sent(&mut self, now: Instant) -> bool {
        let Phase::Episode(round) = &mut self.phase else {
            return false;
        };
        round.sent += u32::from(round.ended.is_none());
        round.end_if_long(now);
        round.began.replace(round.began.unwrap_or(now)).is_none()
    }

    fn on_throttled(&mut self, sent: Instant, now: Instant, rejection: Rejection) -> Option<Decision> {
        self.price.rejected = self.price.rejected.saturating_add(1);
        let average = self.average.restart(self.factor, now);
        if sent < self.lowered {
            return None;
        }
        let delay = now.duration_since(sent);
        match (&mut self.phase, rejection) {
            // The pause hides how many calls would be rejected.
            (Phase::Episode(_), Rejection::Pausing) => Some(Decision::lower(self.factor, PAUSED_BETA)),
            (Phase::Episode(round), _) if round.ended.is_some_and(|ended| sent > ended) => self.evaluate(now),
            (Phase::Episode(round), Rejection::Certain) => {
                round.rejected += 1;
                self.evaluate(now)
            }
            (Phase::Episode(round), Rejection::Doubtful) => {
                round.doubtful += 1;
                self.evaluate(now)
            }
            (_, Rejection::Doubtful) if !self.answers.count_doubtful(now) => None,
            _ => {
                self.delay = delay;
                // In a pause, the factor is not in force.
                let average = average.filter(|_| rejection != Rejection::Pausing);
                Some(self.begin_episode(average))
            }
        }
    }

    /// Lowers the factor as an episode begins. `average` is the average factor since the last rejection.
    fn begin_episode(&mut self, average: Option<f64>) -> Decision {
        // Calls are rejected at a factor that was held: the limit is lower now, or shared with others.
        let is_disturbed = self.price.is_known && matches!(self.phase, Phase::Recovery { beyond: None, .. });
        let average = average.filter(|_| !is_disturbed);
        let allowed = self.allowed(average);
        let found = average.unwrap_or(allowed).min(allowed);
        self.price = Price {
            is_known: average.is_some() && self.last_found.is_some_and(|last| is_same_limit(found, last)),
            rejected: 1,
            accepted: 0,
        };
        self.last_found = (!is_disturbed).then_some(found);
        Decision::lower(self.factor, BETA).at_most(allowed)
    }

    /// Returns the highest factor that the provider may allow, as an episode begins.
    fn allowed(&self, average: Option<f64>) -> f64 {
        match (self.phase, average) {
            _ if !self.price.is_known => self.factor,
            (
                Phase::Recovery {
                    target,
                    beyond: Some(_),
                    ..
                },
                Some(average),
            ) if self.factor <= target.max(average) * MOST_OVERSHOOT => {
                average.max(target / AVERAGE_MARGIN).min(self.factor)
            }
            (Phase::Recovery { beyond: Some(_), .. }, _) => self.factor,
            (_, average) => average.unwrap_or(self.factor).min(self.factor),
        }
    }

    fn on_success(&mut self, sent: Instant, now: Instant) -> Option<Decision> {
        self.price.accepted = self.price.accepted.saturating_add(1);
        if let Phase::Episode(round) = &mut self.phase {
            round.has_success |= sent >= self.lowered;
        } else {
            self.answers.all = self.answers.all.saturating_add(1);
        }
        self.evaluate(now)
    }

    /// Ends a round that has lasted long enough, and follows the curve after an episode.
    fn evaluate(&mut self, now: Instant) -> Option<Decision> {
        match &mut self.phase {
            Phase::Configured => None,
            Phase::Episode(round) => {
                round.end_if_long(now);
                let age = now.duration_since(round.began?);
                if now < round.ended? + round.delay {
                    return None;
                }
                let rejected = round.all_rejected();
                if rejected > 0 {
                    self.price.is_known = false;
                    let factor = self.factor * round.accepted_share(rejected);
                    return Some(Decision::Lower {
                        factor: factor * MARGIN,
                        target: factor,
                    });
                }
                if round.has_success || age >= PATIENCE {
                    self.phase = Phase::Recovery {
                        since: now,
                        from: self.factor,
                        target: round.target,
                        beyond: None,
                    };
                }
                None
            }
            Phase::Recovery {
                since,
                from,
                target,
                beyond,
            } => {
                let time = now.duration_since(*since);
                let until_target = Duration::from_secs_f64(((*target - *from).max(0.0) / C).cbrt());
                let start = match *beyond {
                    Some(start) => start,
                    None if time > until_target && self.price.is_paid(time) => *beyond.insert(now),
                    // Up to the target, the time is negative.
                    None => *since + until_target.max(time),
                };
                let time = now.duration_since(start).as_secs_f64() - start.duration_since(now).as_secs_f64();
                let most = target.max(*from);
                let c = if beyond.is_some() {
                    C / (1.0 + 10.0 * self.delay.as_secs_f64())
                } else {
                    C
                };
                let factor = (most + c * time.powi(3)).min(1.0);
                (factor >= self.factor * STEP || (factor >= 1.0 && self.factor < 1.0))
                    .then_some(Decision::Raise(factor))
            }
        }
    }

    fn apply(&mut self, decision: &Decision, now: Instant) {
        self.average.add(self.factor, now);
        match *decision {
            Decision::Lower { factor, target } => {
                self.factor = factor.max(MIN_FACTOR);
                self.lowered = now;
                self.phase = Phase::Episode(Round {
                    target: target.max(MIN_FACTOR),
                    delay: self.delay,
                    ..Round::default()
                });
            }
            Decision::Raise(factor) => {
                self.factor = factor;
                if factor >= 1.0 {
                    self.phase = Phase::Configured;
                }
            }
        }
    }
}

// === impl Round ===

impl Round {
    /// Ends the round at `now` if it has lasted long enough.
    fn end_if_long(&mut self, now: Instant) {
        let age = self.began.map_or(Duration::ZERO, |began| now.duration_since(began));
        if self.ended.is_none() && age >= ROUND && (age >= PATIENCE || self.sent >= ROUND_CALLS) {
            self.ended = Some(now);
        }
    }

    /// Returns how many calls were rejected. The doubtful ones among them count if they are many.
    fn all_rejected(&self) -> u32 {
        if are_many(self.doubtful, self.sent) {
            self.rejected + self.doubtful
        } else {
            self.rejected
        }
    }

    /// Returns the share of the calls that were not rejected, within the bounds for one round.
    fn accepted_share(&self, rejected: u32) -> f64 {
        let share = 1.0 - f64::from(rejected) / f64::from(self.sent.max(1));
        let min = if self.sent < ROUND_CALLS {
            MIN_SHARE_OF_FEW
        } else {
            MIN_SHARE
        };
        share.max(min)
    }
}

// === impl Answers ===

impl Answers {
    const fn new(began: Instant) -> Self {
        Self {
            began,
            all: 0,
            doubtful: 0,
        }
    }

    /// Counts a doubtful rejection. Returns whether the provider rejects calls for its limits.
    fn count_doubtful(&mut self, now: Instant) -> bool {
        if self.doubtful == 0 || now.duration_since(self.began) > PATIENCE {
            *self = Self::new(now);
        }
        self.all = self.all.saturating_add(1);
        self.doubtful += 1;
        let are_many = are_many(self.doubtful, self.all);
        if are_many {
            *self = Self::new(now);
        }
        are_many
    }
}

/// Returns whether doubtful rejections are so many among the calls that a failing server is not the reason.
fn are_many(doubtful: u32, all: u32) -> bool {
    f64::from(doubtful) >= MIN_DOUBTFUL + DOUBTFUL_SHARE * f64::from(all)
}

/// Returns the limits with the rates that are adapted multiplied by `factor`.
fn scaled(limits: &Limits, factor: f64) -> Limits {
    limits.scaled(factor, longest_period(limits))
}

/// Empties the buckets of the rates that are adapted.
fn empty(limiter: &RateLimiter, limits: &Limits) {
    let longest = longest_period(limits);
    let adapted = |rate: &Rate| rate.period() <= longest && !rate.refuses();
    for (budget, rate) in limits.rates().filter(|(_, rate)| adapted(rate)) {
        limiter.lower(budget, Some(rate.period()), 0);
    }
}

/// Returns the longest period of the rates that are adapted: those of at most a minute, or all if there are none. Rates
/// that refuse are never adapted: they are caps of the user's own.
fn longest_period(limits: &Limits) -> Duration {
    let is_short = |rate: &Rate| rate.period() <= LONGEST_PERIOD && !rate.refuses();
    if limits.rates().any(|(_, rate)| is_short(&rate)) {
        LONGEST_PERIOD
    } else {
        Duration::MAX
    }
}
