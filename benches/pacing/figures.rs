//! What the records of a run come to. Pure arithmetic: no clock, no limiter.

use hdrhistogram::Histogram;
use std::time::Duration;

/// How much later a moment has to be to count as later. A caller notes the time itself, after it was woken, so two
/// threads may note two admissions in the wrong order.
const TOLERANCE: Duration = Duration::from_millis(1);

/// One call of one caller, in time since the run began.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call {
    pub(crate) arrived: Duration,
    /// The end of the run if it was still waiting then.
    pub(crate) left: Duration,
    pub(crate) admitted: bool,
    pub(crate) tokens: u64,
}

/// A rate per second and its burst.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Budget {
    pub(crate) rate: u64,
    pub(crate) burst: u64,
}

/// What a call takes of one budget.
pub(crate) type CostOf = fn(&Call) -> u64;

/// One line of the table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Figures {
    /// Percent of what the budgets had room for.
    pub(crate) achieved: f64,
    /// Empirical burst of requests.
    pub(crate) requests: f64,
    /// Empirical burst of tokens.
    pub(crate) tokens: f64,
    pub(crate) waits: Waits,
    /// Processor time in percent of one core.
    pub(crate) cpu: f64,
    pub(crate) overtaken: f64,
}

/// Waits in milliseconds.
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

    fn wait(&self) -> Duration {
        self.left - self.arrived
    }
}

// === impl Budget ===

impl Budget {
    pub(crate) const fn new(rate: u64, burst: u64) -> Self {
        Self { rate, burst }
    }

    /// What comes in meanwhile.
    pub(crate) fn income(&self, time: Duration) -> f64 {
        self.rate as f64 * time.as_secs_f64()
    }
}

// === impl Figures ===

impl Figures {
    pub(crate) fn new(
        calls: &[Call],
        cpu: f64,
        [requests, tokens]: [Budget; 2],
        warm_up: Duration,
        end: Duration,
    ) -> Self {
        let admissions = admissions(calls);
        Self {
            achieved: achieved(&admissions, &[(requests, Call::one), (tokens, Call::tokens)], end),
            requests: empirical_burst(&admissions, requests, Call::one),
            tokens: empirical_burst(&admissions, tokens, Call::tokens),
            waits: waits(calls, warm_up),
            cpu,
            overtaken: overtakings(calls) as f64,
        }
    }

    /// The median of each figure by itself.
    pub(crate) fn median(rounds: &[Self]) -> Self {
        let median = |figure: fn(&Self) -> f64| median(rounds.iter().map(figure).collect());
        Self {
            achieved: median(|figures| figures.achieved),
            requests: median(|figures| figures.requests),
            tokens: median(|figures| figures.tokens),
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
    pub(crate) fn tail(&self) -> f64 {
        self.p99 / self.p50
    }
}

// === The figures ===

/// The calls that were admitted, in the order in which they were.
pub(crate) fn admissions(calls: &[Call]) -> Vec<Call> {
    let mut admissions: Vec<_> = calls.iter().filter(|call| call.admitted).copied().collect();
    admissions.sort_by_key(|call| call.left);
    admissions
}

/// The time an exact limiter would have needed for these admissions in this order, in percent of the time from the
/// first of them to the end of the run. With a single budget, `(admitted - burst) / (rate x elapsed)`.
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
    100.0 * needed / (end - first.left).as_secs_f64()
}

/// The largest of `admitted - rate x length` over all windows that begin and end with an admission: the burst of the
/// smallest bucket that would have allowed this.
pub(crate) fn empirical_burst(admissions: &[Call], budget: Budget, cost: CostOf) -> f64 {
    let (mut largest, mut level, mut before) = (0.0_f64, 0.0_f64, Duration::ZERO);
    for call in admissions {
        level = (level - budget.income(call.left - before)).max(0.0) + cost(call) as f64;
        largest = largest.max(level);
        before = call.left;
    }
    largest
}

/// The waits of those that were admitted after `warm_up`, when the line is as long as it will be, and of those still
/// waiting in the end who had waited longer than that. The longest one is that of all calls.
pub(crate) fn waits(calls: &[Call], warm_up: Duration) -> Waits {
    let mut histogram = Histogram::<u64>::new(3).expect("three digits are possible");
    let counts = |call: &&Call| call.left >= warm_up && (call.admitted || call.wait() > warm_up);
    for call in calls.iter().filter(counts) {
        histogram += micros(call.wait());
    }
    let longest = micros(calls.iter().map(Call::wait).max().unwrap_or_default());
    // The histogram rounds up.
    let quantile = |quantile| histogram.value_at_quantile(quantile).min(longest) as f64 / 1e3;
    Waits {
        p50: quantile(0.5),
        p99: quantile(0.99),
        max: longest as f64 / 1e3,
    }
}

/// How many calls were admitted while one that had arrived earlier was still waiting, both by more than a millisecond.
pub(crate) fn overtakings(calls: &[Call]) -> usize {
    let mut calls = calls.to_vec();
    calls.sort_by_key(|call| call.arrived);
    let (mut earlier, mut last_of_them, mut overtakings) = (0, Duration::ZERO, 0);
    for call in &calls {
        while calls[earlier].arrived + TOLERANCE < call.arrived {
            last_of_them = last_of_them.max(calls[earlier].left);
            earlier += 1;
        }
        if call.admitted && call.left + TOLERANCE < last_of_them {
            overtakings += 1;
        }
    }
    overtakings
}

/// The most a bucket would have admitted by each moment, as the corners of a line: it rises at the rate and stops at
/// one burst above what has been admitted.
pub(crate) fn envelope(admissions: &[Call], budget: Budget, end: Duration) -> Vec<(Duration, f64)> {
    let mut corners = vec![(Duration::ZERO, budget.burst as f64)];
    let (mut at, mut allowed) = (Duration::ZERO, budget.burst as f64);
    let moments = admissions.iter().map(|call| call.left).chain([end]);
    for (admitted, moment) in moments.enumerate() {
        let full = (admitted as u64 + budget.burst) as f64;
        let reached = allowed + budget.income(moment - at);
        if reached > full && allowed < full {
            corners.push((
                at + Duration::from_secs_f64((full - allowed) / budget.rate as f64),
                full,
            ));
        }
        allowed = reached.min(full);
        at = moment;
        corners.push((at, allowed));
    }
    corners
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 {
        values[middle]
    } else {
        f64::midpoint(values[middle - 1], values[middle])
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
