//! Counts results as they are written.

use crate::result::Finished;
use hdrhistogram::Histogram;
use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};
use tower_outbound::RequestStatus;

/// Different problems that are told apart.
const MOST_PROBLEMS: usize = 100;

pub(crate) struct Tally {
    pub(crate) completed: u64,
    pub(crate) failed: u64,
    pub(crate) cancelled: u64,
    /// Answers that said 429.
    pub(crate) too_many: u64,
    /// How often, by what went wrong.
    pub(crate) problems: BTreeMap<String, u64>,
    /// Other attempts that were in vain.
    pub(crate) again: u64,
    /// What was admitted: all but 429s.
    pub(crate) requests: u64,
    pub(crate) tokens: u64,
    /// Of the answers that say what they used: how much that was, and how much was estimated.
    pub(crate) used: u64,
    pub(crate) estimated: u64,
    /// In microseconds.
    pub(crate) in_queue: Histogram<u64>,
    pub(crate) waiting: Histogram<u64>,
    pub(crate) calling: Histogram<u64>,
    first_made: Option<SystemTime>,
    last_sent: Option<SystemTime>,
    last_ended: Option<SystemTime>,
    on_wire: Duration,
}

impl Default for Tally {
    fn default() -> Self {
        // To three digits; it grows as needed.
        let histogram = || Histogram::new(3).expect("three digits are valid");
        Self {
            completed: 0,
            failed: 0,
            cancelled: 0,
            too_many: 0,
            problems: BTreeMap::new(),
            again: 0,
            requests: 0,
            tokens: 0,
            used: 0,
            estimated: 0,
            in_queue: histogram(),
            waiting: histogram(),
            calling: histogram(),
            first_made: None,
            last_sent: None,
            last_ended: None,
            on_wire: Duration::ZERO,
        }
    }
}

impl Tally {
    pub(crate) fn add(&mut self, finished: &Finished) {
        match finished.status() {
            RequestStatus::Completed => self.completed += 1,
            RequestStatus::Cancelled => self.cancelled += 1,
            _ => self.failed += 1,
        }
        if let Some(problem) = finished.problem() {
            let known = self.problems.contains_key(&problem.message);
            let room = known || self.problems.len() < MOST_PROBLEMS;
            let problem = if room { problem.message } else { "others".to_owned() };
            *self.problems.entry(problem).or_default() += 1;
        }
        let Some(event) = finished.event() else {
            return;
        };
        // `None` is less than any time.
        self.first_made = Some(self.first_made.unwrap_or(event.created_at).min(event.created_at));
        for attempt in &event.attempts {
            let is_success = attempt.status_code.is_some_and(|code| (200..300).contains(&code));
            match attempt.status_code {
                Some(429) => self.too_many += 1,
                _ => {
                    self.again += u64::from(!is_success);
                    self.requests += 1;
                    // What failed stays charged, but nothing was used.
                    if is_success {
                        self.tokens += event.api_tokens_used.unwrap_or_else(|| finished.tokens());
                    }
                }
            }
            self.last_sent = self.last_sent.max(Some(attempt.started_at));
            self.last_ended = self.last_ended.max(attempt.ended_at);
            self.on_wire += between(Some(attempt.started_at), attempt.ended_at);
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
                // Fails for times that no histogram can hold: hundreds of thousands of years.
                let _ = histogram.record(time.as_micros() as u64);
            }
        }
    }

    pub(crate) const fn written(&self) -> u64 {
        self.completed + self.failed + self.cancelled
    }

    /// From when the first request was made until the last one was sent.
    pub(crate) fn sending(&self) -> Duration {
        between(self.first_made, self.last_sent)
    }

    /// Requests in flight, on average.
    pub(crate) fn in_flight(&self) -> f64 {
        let time = between(self.first_made, self.last_ended).as_secs_f64();
        if time > 0.0 {
            self.on_wire.as_secs_f64() / time
        } else {
            0.0
        }
    }
}

fn between(start: Option<SystemTime>, end: Option<SystemTime>) -> Duration {
    let time = end.zip(start).and_then(|(end, start)| end.duration_since(start).ok());
    time.unwrap_or_default()
}
