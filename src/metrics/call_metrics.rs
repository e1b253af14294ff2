//! [`CallMetrics`]: the metrics of calls that have the same labels, each registered once.

use super::{
    cache::Cache,
    gen_ai::{GenAi, GenAiMetrics},
    registry::{Attribute, Registry},
    requests::RequestDurations,
};
use crate::{
    budget::Budget,
    cost::Cost,
    event::{
        CallEnd, RequestStatus, Wait, WaitCause,
        instrument::{CALL_DURATION, CALLS, CHARGED, ESTIMATE_ERROR, REFUSED, RETRIES, THROTTLED, USED, WAIT},
    },
};
use ::metrics::{Counter, Histogram, Label};
use std::sync::{Arc, OnceLock};

/// The metrics of calls that have the same labels. Counters are registered at once, so that they are known to be zero;
/// histograms when they first get a value.
pub(super) struct CallMetrics {
    registry: Arc<Registry>,
    labels: Vec<Label>,
    calls: [Counter; 3],
    durations: [OnceLock<Histogram>; 3],
    waits: [OnceLock<Histogram>; 6],
    refused: [Counter; REASONS.len()],
    pub(super) throttled: Counter,
    pub(super) retries: Counter,
    budgets: [OnceLock<BudgetMetrics>; 4],
    named_budgets: Cache<Budget, BudgetMetrics>,
    pub(super) requests: RequestDurations,
    gen_ai: Option<GenAiMetrics>,
}

struct BudgetMetrics {
    wait: OnceLock<Histogram>,
    charged: Counter,
    used: Counter,
    estimate_error: OnceLock<Histogram>,
}

/// The types of the errors with which calls are refused, their reasons, and whether a call is refused by one also when
/// it was on the wire before.
const REASONS: [(&str, &str, bool); 6] = [
    ("Closed", "closed", false),
    ("DeadlineExceeded", "deadline_exceeded", false),
    ("CostExceedsBurst", "cost_exceeds_burst", true),
    ("Exhausted", "exhausted", true),
    ("TooManyKeys", "too_many_keys", true),
    ("StoreUnavailable", "store_unavailable", true),
];

const ENDS: [RequestStatus; 3] = [
    RequestStatus::Completed,
    RequestStatus::Failed,
    RequestStatus::Cancelled,
];

/// A process has at most this many names of budgets: see [`Budget`].
const MAX_BUDGETS: usize = 1_024;

impl CallMetrics {
    pub(super) fn new(registry: &Arc<Registry>, labels: Vec<Label>, gen_ai: Option<&GenAi>) -> Self {
        let counter = |of, attributes: &[Attribute]| registry.counter(of, &labels, attributes);
        Self {
            calls: ENDS.map(|status| counter(&CALLS, &[("outbound.status", status.as_str().into())])),
            durations: Default::default(),
            waits: Default::default(),
            refused: REASONS.map(|(_, reason, _)| counter(&REFUSED, &[("outbound.reason", reason.into())])),
            throttled: counter(&THROTTLED, &[]),
            retries: counter(&RETRIES, &[]),
            budgets: Default::default(),
            named_budgets: Cache::new(MAX_BUDGETS),
            requests: RequestDurations::new(registry.clone(), labels.clone()),
            gen_ai: gen_ai.map(|gen_ai| GenAiMetrics::new(gen_ai, registry.clone(), labels.clone())),
            registry: registry.clone(),
            labels,
        }
    }

    pub(super) fn call_charged(&self, cost: &Cost) {
        for (budget, amount) in cost.amounts().filter(|(_, amount)| *amount > 0) {
            if let Some(metrics) = self.budget(budget) {
                metrics.charged.increment(amount);
            }
        }
    }

    pub(super) fn call_settled(&self, charged: &Cost, used: &Cost) {
        for (budget, used) in used.amounts().filter(|(_, used)| *used > 0) {
            let Some(metrics) = self.budget(budget) else { continue };
            metrics.used.increment(used);
            if budget != Budget::Requests {
                let attribute = || [budget_attribute(budget)];
                let error = metrics
                    .estimate_error
                    .get_or_init(|| self.registry.histogram(&ESTIMATE_ERROR, &self.labels, &attribute()));
                // Rounding above 2^53 does no harm.
                #[allow(clippy::cast_precision_loss)]
                error.record(charged.of(budget) as f64 / used as f64);
            }
        }
    }

    pub(super) fn call_ended(&self, end: &CallEnd) {
        let status = match end.status {
            RequestStatus::Completed => 0,
            RequestStatus::Failed => 1,
            _ => 2,
        };
        self.calls[status].increment(1);
        let duration = self.durations[status].get_or_init(|| {
            let attributes = [("outbound.status", ENDS[status].as_str().into())];
            self.registry.histogram(&CALL_DURATION, &self.labels, &attributes)
        });
        duration.record(end.duration);
        for wait in &end.waits {
            self.waited(wait);
        }
        if let Some(kind) = &end.error_type {
            let mut reasons = REASONS.iter().zip(&self.refused);
            let reason = reasons.find(|((error, _, at_retry), _)| error == kind && (*at_retry || end.attempts == 0));
            if let Some((_, refused)) = reason {
                refused.increment(1);
            }
        }
        if let Some(gen_ai) = self.gen_ai.as_ref().filter(|_| end.attempts > 0) {
            gen_ai.call_ended(end);
        }
    }

    fn waited(&self, wait: &Wait) {
        let register = |attributes: &[Attribute]| self.registry.histogram(&WAIT, &self.labels, attributes);
        let cause = ("outbound.cause", wait.cause.name().into());
        let histogram = match wait.cause {
            WaitCause::Budget(budget) => {
                let Some(metrics) = self.budget(budget) else { return };
                metrics
                    .wait
                    .get_or_init(|| register(&[cause, budget_attribute(budget)]))
            }
            WaitCause::Place => self.waits[0].get_or_init(|| register(&[cause])),
            WaitCause::Turn => self.waits[1].get_or_init(|| register(&[cause])),
            WaitCause::Permit => self.waits[2].get_or_init(|| register(&[cause])),
            WaitCause::Pause => self.waits[3].get_or_init(|| register(&[cause])),
            WaitCause::Backoff => self.waits[4].get_or_init(|| register(&[cause])),
            WaitCause::Service => self.waits[5].get_or_init(|| register(&[cause])),
        };
        histogram.record(wait.duration);
    }

    fn budget(&self, budget: Budget) -> Option<&BudgetMetrics> {
        let built_in = match budget {
            Budget::Requests => 0,
            Budget::Tokens => 1,
            Budget::InputTokens => 2,
            Budget::OutputTokens => 3,
            Budget::Named(_) => {
                let hash = self.named_budgets.hash(budget);
                let known = self.named_budgets.get(hash, |other| *other == budget);
                return known.or_else(|| {
                    self.named_budgets
                        .get_or_insert(hash, budget, || self.new_budget(budget))
                });
            }
        };
        Some(self.budgets[built_in].get_or_init(|| self.new_budget(budget)))
    }

    #[cold]
    fn new_budget(&self, budget: Budget) -> BudgetMetrics {
        let attribute = [budget_attribute(budget)];
        BudgetMetrics {
            wait: OnceLock::new(),
            charged: self.registry.counter(&CHARGED, &self.labels, &attribute),
            used: self.registry.counter(&USED, &self.labels, &attribute),
            estimate_error: OnceLock::new(),
        }
    }
}

fn budget_attribute(budget: Budget) -> Attribute {
    ("outbound.budget", budget.name().into())
}
