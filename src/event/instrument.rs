//! [`Instrument`]: the metrics of calls, with their names, units, buckets and attributes.

/// A metric: its name, its unit, and its attributes, which are labels in Prometheus.
///
/// The names, units, buckets and attributes of `http.client.request.duration` and `gen_ai.client.*` are those of
/// OpenTelemetry's semantic conventions, [version 1.41](https://github.com/open-telemetry/semantic-conventions/tree/v1.41.0).
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Instrument {
    /// The name, with dots. An exporter for Prometheus replaces them by underscores.
    pub name: &'static str,
    /// What the metric does with its values.
    pub kind: InstrumentKind,
    /// The unit, as [UCUM](https://ucum.org) writes it: `s` for seconds, and `{call}` or the like for a count of something.
    pub unit: &'static str,
    /// What is measured.
    pub description: &'static str,
    /// The upper bounds of a histogram's buckets. Empty for other metrics.
    pub buckets: &'static [f64],
    /// The names of the attributes that a value can have. An attribute that does not apply is left out.
    pub attributes: &'static [&'static str],
}

/// What a metric does with its values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum InstrumentKind {
    /// Adds them up.
    Counter,
    /// Keeps the last one.
    Gauge,
    /// Counts them by size.
    Histogram,
}

use InstrumentKind::{Counter, Gauge, Histogram};

/// From 1 ms, a short wait for a rate, to 120 s, two periods of a rate per minute.
const WAIT_SECONDS: &[f64] = &[
    0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 90.0, 120.0,
];
/// Those of waits, and up to an hour for calls that are queued for long.
const CALL_SECONDS: &[f64] = &[
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3_600.0,
];
const RATIOS: &[f64] = &[
    0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 1.5, 2.0, 4.0, 10.0,
];

/// An attempt: from when the client gets the request until it has returned the response or an error.
pub const HTTP_REQUEST_DURATION: Instrument = Instrument {
    name: "http.client.request.duration",
    kind: Histogram,
    unit: "s",
    description: "Duration of HTTP client requests.",
    buckets: &[
        0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    ],
    attributes: &[
        "http.request.method",
        "server.address",
        "server.port",
        "error.type",
        "http.response.status_code",
    ],
};

/// A call, from its creation to its end, less what it has waited for by the causes of [`WAIT`].
pub const GEN_AI_OPERATION_DURATION: Instrument = Instrument {
    name: "gen_ai.client.operation.duration",
    kind: Histogram,
    unit: "s",
    description: "GenAI operation duration.",
    buckets: &[
        0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92,
    ],
    attributes: &["gen_ai.operation.name", "gen_ai.provider.name", "error.type"],
};

/// The tokens that the response of a call says were used: one value for those of the input and one for those of the
/// output.
pub const GEN_AI_TOKEN_USAGE: Instrument = Instrument {
    name: "gen_ai.client.token.usage",
    kind: Histogram,
    unit: "{token}",
    description: "Number of input and output tokens used.",
    buckets: &[
        1.0,
        4.0,
        16.0,
        64.0,
        256.0,
        1_024.0,
        4_096.0,
        16_384.0,
        65_536.0,
        262_144.0,
        1_048_576.0,
        4_194_304.0,
        16_777_216.0,
        67_108_864.0,
    ],
    attributes: &["gen_ai.operation.name", "gen_ai.provider.name", "gen_ai.token.type"],
};

/// Calls by their end: `COMPLETED`, `FAILED` or `CANCELLED`.
pub const CALLS: Instrument = Instrument {
    name: "outbound.calls",
    kind: Counter,
    unit: "{call}",
    description: "Calls that have ended.",
    buckets: &[],
    attributes: &["outbound.status"],
};

/// Calls from their creation to their end, with all waits and all attempts.
pub const CALL_DURATION: Instrument = Instrument {
    name: "outbound.call.duration",
    kind: Histogram,
    unit: "s",
    description: "Time from when a call was made until it ended, with its waits and all its attempts.",
    buckets: CALL_SECONDS,
    attributes: &["outbound.status"],
};

/// What a call has waited for: one value for each cause, when the call ends. A call that has not waited for a cause has no
/// value for it.
pub const WAIT: Instrument = Instrument {
    name: "outbound.wait",
    kind: Histogram,
    unit: "s",
    description: "Time that a call has waited for one cause, of the calls that have waited for it.",
    buckets: WAIT_SECONDS,
    attributes: &["outbound.cause", "outbound.budget"],
};

/// Calls that ended in an error of this library before they were on the wire, or because a limit refused a retry.
pub const REFUSED: Instrument = Instrument {
    name: "outbound.refused",
    kind: Counter,
    unit: "{call}",
    description: "Calls that were refused.",
    buckets: &[],
    attributes: &["outbound.reason"],
};

/// Attempts whose response had the status 429.
pub const THROTTLED: Instrument = Instrument {
    name: "outbound.throttled",
    kind: Counter,
    unit: "{attempt}",
    description: "Attempts that the provider has rejected with the status 429.",
    buckets: &[],
    attributes: &[],
};

/// Attempts after the first of their call.
pub const RETRIES: Instrument = Instrument {
    name: "outbound.retries",
    kind: Counter,
    unit: "{attempt}",
    description: "Attempts that were made after the first of their call.",
    buckets: &[],
    attributes: &[],
};

/// What attempts were charged, by budget: estimates, where costs are settled. Also in budgets without a rate: tokens whose
/// kind is not known count as `tokens`, `input_tokens` and `output_tokens`.
pub const CHARGED: Instrument = Instrument {
    name: "outbound.charged",
    kind: Counter,
    unit: "1",
    description: "What attempts were charged, in what the budget counts: requests, tokens, ...",
    buckets: &[],
    attributes: &["outbound.budget"],
};

/// What attempts were found to have used when they were settled, by budget.
pub const USED: Instrument = Instrument {
    name: "outbound.used",
    kind: Counter,
    unit: "1",
    description: "What settled attempts have used, in what the budget counts: requests, tokens, ...",
    buckets: &[],
    attributes: &["outbound.budget"],
};

/// What was charged for a settled attempt, divided by what it has used: 1 for an exact estimate, 2 for one that was
/// twice too high. Not for an attempt that has used nothing.
pub const ESTIMATE_ERROR: Instrument = Instrument {
    name: "outbound.estimate.error",
    kind: Histogram,
    unit: "1",
    description: "What a settled attempt was charged, divided by what it has used.",
    buckets: RATIOS,
    attributes: &["outbound.budget"],
};

/// Calls that have a place in the queue and have not begun.
pub const QUEUE_DEPTH: Instrument = Instrument {
    name: "outbound.queue.depth",
    kind: Gauge,
    unit: "{call}",
    description: "Calls that are queued.",
    buckets: &[],
    attributes: &[],
};

/// Calls that hold a permit of the concurrency limit.
pub const IN_FLIGHT: Instrument = Instrument {
    name: "outbound.in_flight",
    kind: Gauge,
    unit: "{call}",
    description: "Calls that hold a permit of the concurrency limit.",
    buckets: &[],
    attributes: &[],
};

/// The most calls that may be in flight.
pub const IN_FLIGHT_LIMIT: Instrument = Instrument {
    name: "outbound.in_flight.limit",
    kind: Gauge,
    unit: "{call}",
    description: "The most calls that may hold a permit of the concurrency limit.",
    buckets: &[],
    attributes: &[],
};

/// The amount of each rate per its period, which is an attribute, in seconds.
pub const LIMIT: Instrument = Instrument {
    name: "outbound.limit",
    kind: Gauge,
    unit: "1",
    description: "The amount that a rate allows per period, in what its budget counts.",
    buckets: &[],
    attributes: &["outbound.budget", "outbound.period"],
};

/// What the buckets of a budget hold: the minimum over its rates.
pub const AVAILABLE: Instrument = Instrument {
    name: "outbound.available",
    kind: Gauge,
    unit: "1",
    description: "What the buckets of a budget hold now, in what it counts.",
    buckets: &[],
    attributes: &["outbound.budget"],
};

/// How long the pause of the rate limiter still lasts. Zero without a pause.
pub const PAUSE: Instrument = Instrument {
    name: "outbound.pause",
    kind: Gauge,
    unit: "s",
    description: "How long the rate limiter is still paused.",
    buckets: &[],
    attributes: &[],
};

/// All metrics.
pub const INSTRUMENTS: [Instrument; 18] = [
    HTTP_REQUEST_DURATION,
    GEN_AI_OPERATION_DURATION,
    GEN_AI_TOKEN_USAGE,
    CALLS,
    CALL_DURATION,
    WAIT,
    REFUSED,
    THROTTLED,
    RETRIES,
    CHARGED,
    USED,
    ESTIMATE_ERROR,
    QUEUE_DEPTH,
    IN_FLIGHT,
    IN_FLIGHT_LIMIT,
    LIMIT,
    AVAILABLE,
    PAUSE,
];
