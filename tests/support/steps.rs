//! [`Steps`]: an observer that writes down what it is told.

use std::sync::Mutex;
use tower_outbound::{
    Cost, EventHandle, RequestStatus,
    event::{AttemptEnd, CallEnd, Observer},
};

/// Writes down each step, in words.
#[derive(Default)]
pub struct Steps(Mutex<Vec<String>>);

impl Steps {
    fn add(&self, step: impl Into<String>) {
        self.0.lock().unwrap().push(step.into());
    }

    pub fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl Observer for Steps {
    fn call_opened(&self, call: &EventHandle) {
        self.add(format!("opened {}", call.snapshot().endpoint_url.unwrap_or_default()));
    }

    fn call_queued(&self, call: &EventHandle) {
        assert!(call.status() >= RequestStatus::Queued);
        self.add("queued");
    }

    fn call_started(&self, _: &EventHandle) {
        self.add("started");
    }

    fn call_charged(&self, _: &EventHandle, cost: &Cost) {
        self.add(format!("charged {} requests, {} tokens", cost.requests, cost.tokens));
    }

    fn call_settled(&self, _: &EventHandle, charged: &Cost, used: &Cost) {
        self.add(format!("settled {} of {} tokens", used.tokens, charged.tokens));
    }

    fn attempt_started(&self, _: &EventHandle, number: u32) {
        self.add(format!("attempt {number}"));
    }

    fn attempt_ended(&self, _: &EventHandle, end: &AttemptEnd) {
        let result = end
            .status_code
            .map_or_else(|| format!("{:?}", end.error_type), |code| code.to_string());
        self.add(format!(
            "attempt {} ended after {:?}: {result}",
            end.number, end.duration
        ));
    }

    fn call_ended(&self, _: &EventHandle, end: &CallEnd) {
        let waits: Vec<_> = end
            .waits
            .iter()
            .map(|wait| format!("{} {:?}", wait.cause, wait.duration))
            .collect();
        self.add(format!(
            "{} after {:?}, waited [{}]",
            end.status,
            end.duration,
            waits.join(", ")
        ));
    }
}
