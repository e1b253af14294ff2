//! The load: which tenant makes which calls, and when.

use std::time::Duration;

/// The tenants, in the order of the table and of the picture.
pub(crate) const TENANTS: [Tenant; 3] = [
    Tenant {
        name: "flood",
        about: "1,000 calls at once",
        calls: 1_000,
        starts: Duration::ZERO,
        interval: Duration::ZERO,
    },
    Tenant {
        name: "steady",
        about: "25 calls/s",
        calls: 100,
        starts: Duration::ZERO,
        interval: Duration::from_millis(40),
    },
    Tenant {
        name: "trickle",
        about: "5 calls/s from 1 s on",
        calls: 15,
        starts: Duration::from_secs(1),
        interval: Duration::from_millis(200),
    },
];

/// The models, of which one has a limit of its own.
pub(crate) const MODELS: [&str; 2] = ["small", "large"];

/// Requests per second of the whole account.
pub(crate) const ACCOUNT: u64 = 250;
/// Requests per second of the model `large`, for all tenants together.
pub(crate) const LARGE: u64 = 50;

/// What one tenant does.
pub(crate) struct Tenant {
    pub(crate) name: &'static str,
    pub(crate) about: &'static str,
    pub(crate) calls: u32,
    pub(crate) starts: Duration,
    /// The time between two of its calls.
    pub(crate) interval: Duration,
}

impl Tenant {
    /// When a call is submitted, after the start of the run.
    pub(crate) fn submitted_at(&self, call: u32) -> Duration {
        self.starts + self.interval * call
    }

    /// Every fifth call is for the large model.
    pub(crate) const fn model(call: u32) -> &'static str {
        if call % 5 == 4 { MODELS[1] } else { MODELS[0] }
    }
}
