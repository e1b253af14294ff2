//! The counts of a run, which are updated with each result that is written.

use crate::output::Finished;
use hdrhistogram::Histogram;
use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};
use tower_outbound::RequestStatus;

/// The number of distinct error messages that are counted separately. Requests with further messages are counted
/// together as `others`.
const MAX_PROBLEMS: usize = 100;

pub(crate) struct Counts {
    pub(crate) completed: u64,
    pub(crate) failed: u64,
    pub(crate) cancelled: u64,
    /// The number of responses with status 429.
    pub(crate) status_429: u64,
    /// The number of requests for each error message.
    pub(crate) problems: BTreeMap<String, u64>,
    /// The number of attempts that had neither a 2xx response nor status 429.
    pub(crate) other_failures: u64,
    /// The number of attempts that the provider admitted: all except those with status 429.
    pub(crate) requests: u64,
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
            other_failures: 0,
            requests: 0,
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
            let is_counted = self.problems.contains_key(&problem.message);
            let has_room = is_counted || self.problems.len() < MAX_PROBLEMS;
            let problem = if has_room { problem.message } else { "others".to_owned() };
            *self.problems.entry(problem).or_default() += 1;
        }
        let Some(event) = finished.event() else {
            return;
        };
        self.first_created = Some(self.first_created.unwrap_or(event.created_at).min(event.created_at));
        for attempt in &event.attempts {
            let is_success = attempt.status_code.is_some_and(|code| (200..300).contains(&code));
            match attempt.status_code {
                Some(429) => self.status_429 += 1,
                _ => {
                    self.other_failures += u64::from(!is_success);
                    self.requests += 1;
                    // A failed attempt uses no tokens.
                    if is_success {
                        self.tokens += event.api_tokens_used.unwrap_or_else(|| finished.tokens());
                    }
                }
            }
            // `None` is less than any time, so `max` returns the time.
            self.last_sent = self.last_sent.max(Some(attempt.started_at));
            self.last_ended = self.last_ended.max(attempt.ended_at);
            self.in_flight_time += between(Some(attempt.started_at), attempt.ended_at);
        }
        if let Some(used) = event.api_tokens_used {
            self.used += used;
            self.estimated += finished.tokens();
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

fn between(start: Option<SystemTime>, end: Option<SystemTime>) -> Duration {
    let time = end.zip(start).and_then(|(end, start)| end.duration_since(start).ok());
    time.unwrap_or_default()
}
