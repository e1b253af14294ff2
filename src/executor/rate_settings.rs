//! [`RateSettings`]: what the builder of an executor was told about rates, and whether it contradicts itself.

use crate::{
    error::InvalidConfig,
    rate::{Budget, Limits, Rate, RateLimiter},
};

/// The rates of an executor: those of its own, or those of a limiter that it shares.
#[derive(Clone, Debug, Default)]
pub(super) struct RateSettings {
    own: Limits,
    /// Whether `own` was given as a whole. Then rates of single budgets are added to it, and there is no default.
    is_whole: bool,
    /// The builder's methods that have set `own`, for the error that names them.
    set_by: Vec<&'static str>,
    shared: Option<RateLimiter>,
}

/// The rate of requests of an executor for which no other is set, per second.
const DEFAULT_REQUESTS: u64 = 10;

// === impl RateSettings ===

impl RateSettings {
    /// Sets the rate of a budget in place of those that were set before. If limits were given as a whole, the rate is
    /// added to them.
    pub(super) fn set(&mut self, method: &'static str, budget: Budget, rate: Rate) {
        if !self.is_whole {
            let others = self.own.rates().filter(|(of, _)| *of != budget);
            self.own = others.fold(Limits::new(), |limits, (budget, rate)| limits.budget(budget, rate));
        }
        self.add(method, budget, rate);
    }

    /// Adds a rate to those that are set.
    pub(super) fn add(&mut self, method: &'static str, budget: Budget, rate: Rate) {
        self.own = std::mem::take(&mut self.own).budget(budget, rate);
        self.note(method);
    }

    /// Replaces all rates that were set before.
    pub(super) fn replace(&mut self, limits: Limits) {
        self.own = limits;
        self.is_whole = true;
        self.set_by.clear();
        self.note("limits");
    }

    /// Uses a limiter that is shared. A rate that is set, too, is an error when the executor is built.
    pub(super) fn share(&mut self, limiter: RateLimiter) {
        self.shared = Some(limiter);
    }

    fn note(&mut self, method: &'static str) {
        if !self.set_by.contains(&method) {
            self.set_by.push(method);
        }
    }

    /// Returns the limiter of the executor.
    pub(super) fn into_limiter(self) -> Result<RateLimiter, InvalidConfig> {
        if let Some(limiter) = self.shared {
            if self.set_by.is_empty() {
                return Ok(limiter);
            }
            let set_by = self.set_by.join("`, `");
            return Err(InvalidConfig::new(
                "limiter",
                format!("is shared, so its rates cannot be set here: leave out `limiter`, or leave out `{set_by}`"),
            ));
        }
        let has_requests = self.own.rates().any(|(budget, _)| budget == Budget::Requests);
        if self.is_whole || has_requests {
            return RateLimiter::new(self.own);
        }
        if self.own.rates().next().is_some() {
            tracing::info!(
                target: "tower_outbound",
                requests_per_second = DEFAULT_REQUESTS,
                "No rate of requests is set, so the default holds: set `requests`, or all rates with `limits`"
            );
        }
        let requests = Limits::new().requests(Rate::per_second(DEFAULT_REQUESTS));
        let all = self
            .own
            .rates()
            .fold(requests, |limits, (budget, rate)| limits.budget(budget, rate));
        RateLimiter::new(all)
    }
}
