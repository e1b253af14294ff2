//! [`AttemptState`]: what an event keeps of one attempt of its call.

use super::{change::AttemptEnd, record::Attempt};
use std::time::SystemTime;
use tokio::time::Instant;

pub(super) struct AttemptState {
    pub(super) started: Instant,
    pub(super) ended: Option<Instant>,
    pub(super) status_code: Option<u16>,
    /// The type and the message of the error that the attempt ended with. A dropped attempt has the type `Cancelled`
    /// and no message.
    pub(super) error: Option<Box<(String, Option<String>)>>,
}

/// Whether an attempt may start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AttemptStart {
    /// The attempt was added to the event, with this index.
    Started(usize),
    /// The event has ended, and its record is final. The attempt starts and is not recorded.
    Ended,
    /// The attempt must not start: see [`Writer::finish_attempts`](super::handle::Writer::finish_attempts).
    Refused,
}

// === impl AttemptState ===

impl AttemptState {
    pub(super) const fn new(now: Instant) -> Self {
        Self {
            started: now,
            ended: None,
            status_code: None,
            error: None,
        }
    }

    /// Returns how the attempt has ended, which is the `number` of its call. `None` if it has not.
    pub(super) fn end(&self, number: u32) -> Option<AttemptEnd> {
        Some(AttemptEnd {
            number,
            duration: self.ended?.duration_since(self.started),
            status_code: self.status_code,
            error_type: self.error.as_ref().map(|error| error.0.clone()),
        })
    }

    /// Whether the attempt has ended with a response that is not tried again: one without a status, or with one below
    /// 400.
    pub(super) fn has_succeeded(&self) -> bool {
        self.ended.is_some() && self.error.is_none() && self.status_code.is_none_or(|code| code < 400)
    }

    pub(super) fn set_cancelled(&mut self) {
        self.error = Some(Box::new(("Cancelled".to_owned(), None)));
    }

    pub(super) fn snapshot(&self, utc: impl Fn(Instant) -> SystemTime) -> Attempt {
        let (error_type, error_message) = match self.error.as_deref() {
            Some((kind, message)) => (Some(kind.clone()), message.clone()),
            None => (None, None),
        };
        Attempt {
            started_at: utc(self.started),
            ended_at: self.ended.map(utc),
            status_code: self.status_code,
            error_type,
            error_message,
        }
    }
}

/// Returns the number of the attempt with this index.
pub(super) fn attempt_number(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX).saturating_add(1)
}
