//! The counts of a run, which are updated with each result that is written.

use crate::{attempts::excerpt, output::Finished, price::Money, secrets::Secrets};
use hdrhistogram::Histogram;
use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};
use tower_outbound::{RequestStatus, event::Attempt};

/// The number of distinct error messages that are counted separately. Requests with further messages are counted
/// together as `others`.
const MAX_PROBLEMS: usize = 100;

/// The number of characters of a body that are shown.
const MAX_BODY: usize = 500;

pub(crate) struct Counts {
    pub(crate) completed: u64,
    pub(crate) failed: u64,
    pub(crate) cancelled: u64,
    /// The number of responses with status 429.
    pub(crate) status_429: u64,
    /// The requests that have failed, by their error message.
    pub(crate) problems: BTreeMap<String, Problems>,
    /// The cost of the requests whose answers report usage; `None` if no prices are given.
    pub(crate) cost: Option<Money>,
    /// The number of completed requests whose answers report no usage, and whose cost is not known.
    pub(crate) without_cost: u64,
    /// The number of attempts that had neither a 2xx response nor status 429. Cancelled ones do not count.
    pub(crate) other_failures: u64,
    /// The number of attempts, and of those with a 2xx response.
    pub(crate) requests: u64,
    pub(crate) successes: u64,
    /// The tokens of all successful attempts: those that the response reports as used, or the estimate if it reports
    /// none.
    pub(crate) tokens: u64,
    /// The used tokens that responses report.
    pub(crate) used: u64,
    /// The estimates for the requests whose responses report the used tokens.
    pub(crate) estimated: u64,
    /// The time in the queue, in microseconds.
    pub(crate) in_queue: Histogram<u64>,
    /// The time of waiting for the limits, in microseconds.
    pub(crate) waiting: Histogram<u64>,
    /// The time from the first attempt of a request to its end, in microseconds.
    pub(crate) calling: Histogram<u64>,
    first_created: Option<SystemTime>,
    last_sent: Option<SystemTime>,
    last_ended: Option<SystemTime>,
    in_flight_time: Duration,
    secrets: Secrets,
}

/// The requests that have failed with one error message.
#[derive(Debug, Default)]
pub(crate) struct Problems {
    pub(crate) count: u64,
    /// The beginning of the body of the first of them that has one.
    pub(crate) first_body: Option<String>,
}

impl Counts {
    /// Starts at zero. `has_prices` tells whether costs are counted. Failures are kept without `secrets`.
    pub(crate) fn new(has_prices: bool, secrets: Secrets) -> Self {
        Self {
            secrets,
            cost: has_prices.then(Money::default),
            ..Self::default()
        }
    }
}

impl Default for Counts {
    fn default() -> Self {
        // The histogram has a precision of three digits, and grows as needed.
        let histogram = || Histogram::new(3).expect("three digits are a valid precision");
        Self {
            completed: 0,
            failed: 0,
            cancelled: 0,
            status_429: 0,
            problems: BTreeMap::new(),
            cost: None,
            without_cost: 0,
            other_failures: 0,
            requests: 0,
            successes: 0,
            tokens: 0,
            used: 0,
            estimated: 0,
            in_queue: histogram(),
            waiting: histogram(),
            calling: histogram(),
            first_created: None,
            last_sent: None,
            last_ended: None,
            in_flight_time: Duration::ZERO,
            secrets: Secrets::default(),
        }
    }
}

impl Counts {
    pub(crate) fn add(&mut self, finished: &Finished) {
        match finished.status() {
            RequestStatus::Completed => self.completed += 1,
            RequestStatus::Cancelled => self.cancelled += 1,
            _ => self.failed += 1,
        }
        if let Some(problem) = finished.problem() {
            let message = self.secrets.hide(&problem.message).into_owned();
            let has_room = self.problems.contains_key(&message) || self.problems.len() < MAX_PROBLEMS;
            let problem = if has_room { message } else { "others".to_owned() };
            let problems = self.problems.entry(problem).or_default();
            problems.count += 1;
            if problems.first_body.is_none() {
                let body = finished.response().map(|response| response.body());
                problems.first_body = body.and_then(|body| excerpt(body, MAX_BODY, &self.secrets));
            }
        }
        match (&mut self.cost, finished.cost()) {
            (Some(sum), Some(cost)) => *sum += cost,
            (Some(_), None) => self.without_cost += u64::from(finished.status() == RequestStatus::Completed),
            (None, _) => {}
        }
        let Some(event) = finished.event() else {
            return;
        };
        self.first_created = Some(self.first_created.unwrap_or(event.created_at).min(event.created_at));
        for attempt in &event.attempts {
            let is_success = is_success(attempt);
            self.requests += 1;
            if is_success {
                self.successes += 1;
                let tokens = event.api_tokens_used.unwrap_or_else(|| finished.tokens());
                self.tokens = self.tokens.saturating_add(tokens);
            } else if attempt.status_code == Some(429) {
                self.status_429 += 1;
            } else if attempt.error_type.as_deref() != Some("Cancelled") {
                self.other_failures += 1;
            }
            // `None` is less than any time, so `max` returns the time.
            self.last_sent = self.last_sent.max(Some(attempt.started_at));
            self.last_ended = self.last_ended.max(attempt.ended_at);
            self.in_flight_time += between(Some(attempt.started_at), attempt.ended_at);
        }
        if let Some(used) = event.api_tokens_used {
            // A server may report any number.
            self.used = self.used.saturating_add(used);
            self.estimated = self.estimated.saturating_add(finished.tokens());
        }
        for (histogram, time) in [
            (&mut self.in_queue, event.time_in_queue()),
            (&mut self.waiting, event.time_waiting()),
            (&mut self.calling, event.time_calling()),
        ] {
            if let Some(time) = time {
                // Recording fails only for times above the range of a histogram: hundreds of thousands of years.
                let _ = histogram.record(time.as_micros() as u64);
            }
        }
    }

    /// The number of result lines that were written.
    pub(crate) const fn written(&self) -> u64 {
        self.completed + self.failed + self.cancelled
    }

    /// The time from the creation of the first request to the start of the last attempt.
    pub(crate) fn sending(&self) -> Duration {
        between(self.first_created, self.last_sent)
    }

    /// The average number of requests in flight.
    pub(crate) fn in_flight(&self) -> f64 {
        let time = between(self.first_created, self.last_ended).as_secs_f64();
        if time > 0.0 {
            self.in_flight_time.as_secs_f64() / time
        } else {
            0.0
        }
    }
}

/// Returns whether the attempt had a 2xx response, and one that is an answer.
pub(crate) fn is_success(attempt: &Attempt) -> bool {
    attempt.error_type.is_none() && attempt.status_code.is_some_and(|code| (200..300).contains(&code))
}

fn between(start: Option<SystemTime>, end: Option<SystemTime>) -> Duration {
    let time = end.zip(start).and_then(|(end, start)| end.duration_since(start).ok());
    time.unwrap_or_default()
}
