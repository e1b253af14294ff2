//! Computes the figures of a run from its calls. This is pure arithmetic, without a clock or a limiter.

use crate::common::median;
use hdrhistogram::Histogram;
use std::time::Duration;

/// Two times count as different only if they differ by more than this tolerance. Each caller records the time itself
/// after it was woken, so two threads may record two admissions in the wrong order.
const TOLERANCE: Duration = Duration::from_millis(1);

/// One call of one caller. Times are counted from the start of the run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call {
    pub(crate) arrived: Duration,
    /// The time of the admission. For a call that was still waiting when the run ended, the end of the run.
    pub(crate) waited_until: Duration,
    pub(crate) admitted: bool,
    /// The tokens of the prompt if those of the answer are limited apart, and otherwise all tokens.
    pub(crate) tokens: u64,
    /// The tokens of the answer.
    pub(crate) output: u64,
}

/// A rate per second and its burst.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Budget {
    pub(crate) rate: u64,
    pub(crate) burst: u64,
}

/// A function that returns the cost of a call in one budget.
pub(crate) type CostOf = fn(&Call) -> u64;

/// The figures of one row of the printed table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Figures {
    /// The admitted amount, in percent of what the budgets allow. See [`achieved`].
    pub(crate) achieved: f64,
    /// The empirical burst of requests, of tokens and of the tokens of the answer, 0 if they are not limited. See
    /// [`empirical_burst`].
    pub(crate) bursts: [f64; 3],
    pub(crate) waits: Waits,
    /// The processor time of the process, in percent of one core.
    pub(crate) cpu: f64,
    /// The number of calls that were admitted before an earlier arrival. See [`overtakings`].
    pub(crate) overtaken: f64,
}

/// Quantiles of the times that calls waited, in milliseconds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Waits {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    pub(crate) max: f64,
}

// === impl Call ===

impl Call {
    pub(crate) fn one(&self) -> u64 {
        1
    }

    pub(crate) fn tokens(&self) -> u64 {
        self.tokens
    }

    pub(crate) fn output(&self) -> u64 {
        self.output
    }

    fn wait(&self) -> Duration {
        self.waited_until - self.arrived
    }
}

// === impl Budget ===

impl Budget {
    pub(crate) const fn new(rate: u64, burst: u64) -> Self {
        Self { rate, burst }
    }

    /// The amount that flows into the bucket during `time`.
    pub(crate) fn inflow(&self, time: Duration) -> f64 {
        self.rate as f64 * time.as_secs_f64()
    }
}

// === impl Figures ===

impl Figures {
    pub(crate) fn new(
        calls: &[Call],
        cpu: f64,
        budgets: &[(Budget, CostOf)],
        warm_up: Duration,
        end: Duration,
    ) -> Self {
        let admissions = admissions(calls);
        let mut bursts = [0.0; 3];
        for (burst, (budget, cost)) in bursts.iter_mut().zip(budgets) {
            *burst = empirical_burst(&admissions, *budget, *cost);
        }
        Self {
            achieved: achieved(&admissions, budgets, end),
            bursts,
            waits: waits(calls, warm_up),
            cpu,
            overtaken: overtakings(calls) as f64,
        }
    }

    /// Takes the median over all rounds, for each figure separately.
    pub(crate) fn median(rounds: &[Self]) -> Self {
        let bursts = std::array::from_fn(|budget| median(rounds.iter().map(|figures| figures.bursts[budget])));
        let median = |figure: fn(&Self) -> f64| median(rounds.iter().map(figure));
        Self {
            achieved: median(|figures| figures.achieved),
            bursts,
            waits: Waits {
                p50: median(|figures| figures.waits.p50),
                p99: median(|figures| figures.waits.p99),
                max: median(|figures| figures.waits.max),
            },
            cpu: median(|figures| figures.cpu),
            overtaken: median(|figures| figures.overtaken),
        }
    }
}

// === impl Waits ===

impl Waits {
    /// The ratio of the 99th percentile of the waits to their median.
    pub(crate) fn tail(&self) -> f64 {
        self.p99 / self.p50
    }
}

// === The figures ===

/// The admitted calls, in the order of their admission.
pub(crate) fn admissions(calls: &[Call]) -> Vec<Call> {
    let mut admissions: Vec<_> = calls.iter().filter(|call| call.admitted).copied().collect();
    admissions.sort_by_key(|call| call.waited_until);
    admissions
}

/// The time an exact limiter would have needed for these admissions in this order, in percent of the time from the
/// first admission to the end of the run. With a single budget, this is `(admitted - burst) / (rate x elapsed)`.
pub(crate) fn achieved(admissions: &[Call], budgets: &[(Budget, CostOf)], end: Duration) -> f64 {
    let Some(first) = admissions.first() else {
        return 0.0;
    };
    let mut levels: Vec<_> = budgets.iter().map(|(budget, _)| budget.burst as f64).collect();
    let mut needed = 0.0;
    for call in admissions {
        let missing = budgets.iter().zip(&levels);
        let wait = missing.map(|((budget, cost), level)| (cost(call) as f64 - level) / budget.rate as f64);
        let wait = wait.fold(0.0, f64::max);
        needed += wait;
        for ((budget, cost), level) in budgets.iter().zip(&mut levels) {
            *level = (*level + wait * budget.rate as f64).min(budget.burst as f64) - cost(call) as f64;
        }
    }
    100.0 * needed / (end - first.waited_until).as_secs_f64()
}

/// The amount that all calls but the first used, in percent of what flows in between the first admission and the last,
/// without the time that was `lost`. If the burst is that of one call, an exact limiter reaches 100 %.
pub(crate) fn used_rate(admissions: &[Call], budget: Budget, cost: CostOf, lost: Duration) -> f64 {
    let [first, .., last] = admissions else {
        return 0.0;
    };
    let used: u64 = admissions[1..].iter().map(cost).sum();
    let time = (last.waited_until - first.waited_until).saturating_sub(lost);
    100.0 * used as f64 / budget.inflow(time)
}

/// The largest value of `admitted - rate x length` over all windows that begin and end with an admission. This is the
/// burst of the smallest bucket that would have allowed these admissions.
pub(crate) fn empirical_burst(admissions: &[Call], budget: Budget, cost: CostOf) -> f64 {
    let (mut largest, mut level, mut before) = (0.0_f64, 0.0_f64, Duration::ZERO);
    for call in admissions {
        level = (level - budget.inflow(call.waited_until - before)).max(0.0) + cost(call) as f64;
        largest = largest.max(level);
        before = call.waited_until;
    }
    largest
}

/// The waits of the calls that were admitted after `warm_up`, when the queue has reached its full length, and of the
/// calls that were still waiting at the end and had waited for longer than `warm_up`. The maximum is that of all calls.
pub(crate) fn waits(calls: &[Call], warm_up: Duration) -> Waits {
    let mut histogram = Histogram::<u64>::new(3).expect("three digits are a valid precision");
    let is_counted = |call: &&Call| call.waited_until >= warm_up && (call.admitted || call.wait() > warm_up);
    for call in calls.iter().filter(is_counted) {
        histogram += micros(call.wait());
    }
    let longest = micros(calls.iter().map(Call::wait).max().unwrap_or_default());
    // The histogram rounds up, so a quantile could exceed the maximum.
    let quantile = |quantile| histogram.value_at_quantile(quantile).min(longest) as f64 / 1e3;
    Waits {
        p50: quantile(0.5),
        p99: quantile(0.99),
        max: longest as f64 / 1e3,
    }
}

/// The number of calls that were admitted although a call that had arrived earlier was still waiting. Both the arrivals
/// and the ends of the waits must differ by more than [`TOLERANCE`].
pub(crate) fn overtakings(calls: &[Call]) -> usize {
    let mut calls = calls.to_vec();
    calls.sort_by_key(|call| call.arrived);
    let (mut earlier, mut last_of_them, mut overtakings) = (0, Duration::ZERO, 0);
    for call in &calls {
        while calls[earlier].arrived + TOLERANCE < call.arrived {
            last_of_them = last_of_them.max(calls[earlier].waited_until);
            earlier += 1;
        }
        if call.admitted && call.waited_until + TOLERANCE < last_of_them {
            overtakings += 1;
        }
    }
    overtakings
}

/// The largest number of calls that an exact bucket would have admitted by each time, as the corners of a polyline. The
/// line rises at the rate, and is never more than one burst above the number of calls that the measured limiter had
/// admitted.
pub(crate) fn envelope(admissions: &[Call], budget: Budget, end: Duration) -> Vec<(Duration, f64)> {
    let mut corners = vec![(Duration::ZERO, budget.burst as f64)];
    let (mut at, mut allowed) = (Duration::ZERO, budget.burst as f64);
    let times = admissions.iter().map(|call| call.waited_until).chain([end]);
    for (admitted, time) in times.enumerate() {
        let full = (admitted as u64 + budget.burst) as f64;
        let reached = allowed + budget.inflow(time - at);
        if reached > full && allowed < full {
            corners.push((
                at + Duration::from_secs_f64((full - allowed) / budget.rate as f64),
                full,
            ));
        }
        allowed = reached.min(full);
        at = time;
        corners.push((at, allowed));
    }
    corners
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
