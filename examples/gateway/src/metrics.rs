//! What `/metrics` shows, in the text format of Prometheus: counted by an observer, which misses no call.

use std::{collections::BTreeMap, fmt::Write, sync::Mutex};
use tower_outbound::{
    EventHandle, Monitor,
    event::{AttemptEnd, CallEnd, Observer},
};

/// Counters, by their names and labels. The lock is held for an addition only: an observer must not block.
#[derive(Default)]
pub(crate) struct Metrics(Mutex<BTreeMap<(&'static str, String), f64>>);

impl Metrics {
    fn add(&self, name: &'static str, label: String, amount: f64) {
        *self.0.lock().unwrap().entry((name, label)).or_default() += amount;
    }

    /// Returns the page.
    pub(crate) fn page(&self, monitor: &Monitor) -> String {
        let (queued, in_flight) = (monitor.queue_depth(), monitor.in_flight());
        let mut page = format!("outbound_queue_depth {queued}\noutbound_in_flight {in_flight}\n");
        for ((name, label), value) in &*self.0.lock().unwrap() {
            _ = writeln!(page, "{name}{{{label}}} {value}");
        }
        page
    }
}

impl Observer for Metrics {
    fn attempt_ended(&self, _: &EventHandle, end: &AttemptEnd) {
        let code = end.status_code.map(|code| code.to_string());
        let code = code.or_else(|| end.error_type.clone()).unwrap_or_default();
        self.add("outbound_attempts_total", format!("code={code:?}"), 1.0);
    }

    fn call_ended(&self, _: &EventHandle, end: &CallEnd) {
        self.add("outbound_calls_total", format!("status=\"{}\"", end.status), 1.0);
        for wait in &end.waits {
            let cause = format!("cause=\"{}\"", wait.cause);
            self.add("outbound_wait_seconds_total", cause, wait.duration.as_secs_f64());
        }
        let tokens = end.tokens.unwrap_or_default();
        for (kind, tokens) in [("input", tokens.input), ("output", tokens.output)] {
            self.add(
                "outbound_tokens_total",
                format!("kind={kind:?}"),
                tokens.unwrap_or(0) as f64,
            );
        }
    }
}
