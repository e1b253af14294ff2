//! Metrics of every call, for any exporter of the crate [`metrics`], such as Prometheus.
//!
//! [`Metrics`] is an [`Observer`]: every call is counted exactly once in each metric. Where OpenTelemetry's semantic
//! conventions have a metric, its name, unit, buckets and attributes are used: `http.client.request.duration`,
//! `gen_ai.client.operation.duration` and `gen_ai.client.token.usage`. The others are named `outbound.…`: the waits by
//! cause, the calls by status, what was refused, throttled, retried, charged and used, and the numbers of the
//! [`Monitor`]. [`INSTRUMENTS`] lists them all.
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use std::sync::Arc;
//! use tower_outbound::{Executor, metrics::Metrics};
//!
//! let metrics = Arc::new(Metrics::new().label("executor", "chat").gen_ai("chat", "openai"));
//! let executor = Executor::builder().observe(metrics.clone()).build_for_closures::<String>()?;
//! executor.start()?;
//! // Before each scrape: queue depth, calls in flight, limits and what is available of them.
//! metrics.record(&executor.monitor());
//! # Ok(())
//! # }
//! ```
//!
//! # The exporter
//!
//! Install the exporter before the first call: a metric is registered once, with the recorder that is installed when the
//! metric first gets a value. The crate `metrics` knows no buckets, so give those of each histogram to the exporter, as
//! the example `metrics` does with `set_buckets_for_metric`; without them, its Prometheus exporter makes summaries, which
//! cannot be added up over processes.
//!
//! The metrics do no I/O and take no lock while a call waits for them. What a value costs beyond that is up to the recorder. That
//! of `metrics-exporter-prometheus` keeps the values of histograms until the page is rendered, or until `run_upkeep`
//! is called: call that every few seconds, so that its memory is bounded also when no server scrapes it.
//!
//! # Labels
//!
//! No key, tenant, path or model is a label unless [`Metrics::label_metadata`] asks for it. `server.address` is one, as
//! the conventions require. The number of values is bounded: 512 combinations of server, method, status and error, and
//! 1,000 of the labels that were asked for. Further ones are counted with the value `_OTHER`.

mod cache;
mod call_metrics;
mod error_type;
mod gen_ai;
mod labels;
mod registry;
mod requests;

pub use crate::event::instrument::{
    AVAILABLE, CALL_DURATION, CALLS, CHARGED, ESTIMATE_ERROR, GEN_AI_OPERATION_DURATION, GEN_AI_TOKEN_USAGE,
    HTTP_REQUEST_DURATION, IN_FLIGHT, IN_FLIGHT_LIMIT, INSTRUMENTS, Instrument, InstrumentKind, LIMIT, PAUSE,
    QUEUE_DEPTH, REFUSED, RETRIES, THROTTLED, USED, WAIT,
};

use crate::{
    clock,
    cost::Cost,
    event::{AttemptEnd, CallEnd, EventHandle, Observer},
    executor::Monitor,
};
use ::metrics::{Label, Recorder, SharedString};
use gen_ai::GenAi;
use labels::Labels;
use registry::Registry;
use std::{
    fmt,
    sync::{Arc, OnceLock},
};

/// Records the metrics of every call. Register it with [`ExecutorBuilder::observe`](crate::ExecutorBuilder::observe) or
/// [`Events::observe`](crate::Events::observe), in an [`Arc`] if [`record`](Self::record) is to be called.
///
/// See the [module](self).
#[derive(Default)]
pub struct Metrics {
    registry: Registry,
    gen_ai: Option<GenAi>,
    /// The labels that were asked for: their names, and the keys of the metadata that they are.
    metadata_labels: Vec<(SharedString, String)>,
    /// The metrics, registered at the first step of the first call, when the exporter is installed.
    registered: OnceLock<Registered>,
}

struct Registered {
    registry: Arc<Registry>,
    calls: Labels,
}

impl Metrics {
    /// Creates metrics for the recorder that is installed globally when the first call is made.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Records with `recorder`, and not with the one that is installed globally.
    #[must_use]
    pub fn recorder(mut self, recorder: impl Recorder + Send + Sync + 'static) -> Self {
        self.registry.recorder = Some(Arc::new(recorder));
        self
    }

    /// Gives every metric a label with a constant value. With it, the metrics of several executors are told apart.
    #[must_use]
    pub fn label(mut self, name: impl Into<SharedString>, value: impl Into<SharedString>) -> Self {
        self.registry.labels.push(Label::new(name, value));
        self
    }

    /// Gives the metrics of calls a label: what the [metadata](crate::Call::metadata) of a call has under `key`, or an
    /// empty text. For a model, the conventions name the label `gen_ai.request.model`.
    ///
    /// Every value multiplies the number of series, so only label what has few values. Calls beyond 1,000 combinations
    /// of values get the value `_OTHER`. The value of a key whose name suggests a credential is redacted. Metadata that
    /// is set after the first step of the call may not be in all of its metrics.
    #[must_use]
    pub fn label_metadata(mut self, name: impl Into<SharedString>, key: impl Into<String>) -> Self {
        self.metadata_labels.push((name.into(), key.into()));
        self
    }

    /// Records the metrics of generative models, `gen_ai.client.operation.duration` and `gen_ai.client.token.usage`:
    /// calls are this operation, such as `chat` or `embeddings`, of this provider, such as `openai` or `anthropic`.
    /// OpenTelemetry's conventions have lists of both. Default: not recorded.
    ///
    /// The duration of an operation is that of the call without its [waits](crate::event::WaitCause), and so includes
    /// its retries. A call that was never on the wire is not recorded. Token usage is known if a
    /// `UsageLayer` (feature `json`) is in the stack, or if [`ApiTokensUsed`](crate::ApiTokensUsed) is set.
    #[must_use]
    pub fn gen_ai(mut self, operation: impl Into<SharedString>, provider: impl Into<SharedString>) -> Self {
        self.gen_ai = Some(GenAi {
            operation: operation.into(),
            provider: provider.into(),
        });
        self
    }

    /// Sets the gauges to what the monitor shows now: queue depth, calls in flight and their limit, the rates, what is
    /// available of their budgets, and the pause. Call it before each scrape.
    ///
    /// These are numbers of an instant and no sum of events, so they are read when they are needed and cost calls
    /// nothing. A rate that was removed keeps its last value.
    pub fn record(&self, monitor: &Monitor) {
        let registry = &self.registered().registry;
        let set = |of, attributes: &[_], value: f64| registry.gauge(of, attributes).set(value);
        // Rounding above 2^53 does no harm.
        #[allow(clippy::cast_precision_loss)]
        let count = |of, count: usize| set(of, &[], count as f64);
        count(&QUEUE_DEPTH, monitor.queue_depth());
        count(&IN_FLIGHT, monitor.in_flight());
        count(&IN_FLIGHT_LIMIT, monitor.concurrency().get());
        let paused = monitor.paused();
        let pause = paused.map_or(0.0, |pause| {
            pause.until().saturating_duration_since(clock::now()).as_secs_f64()
        });
        set(&PAUSE, &[], pause);
        let available = monitor.available();
        for (budget, rate) in monitor.limiter().limits().rates() {
            let attribute = ("outbound.budget", budget.name().into());
            let period = ("outbound.period", rate.period().as_secs_f64().to_string().into());
            set(&LIMIT, &[attribute.clone(), period], rate.amount());
            if let Some(available) = available.of(budget) {
                #[allow(clippy::cast_precision_loss)]
                set(&AVAILABLE, &[attribute], available as f64);
            }
        }
    }

    fn calls(&self) -> &Labels {
        &self.registered().calls
    }

    #[inline]
    fn registered(&self) -> &Registered {
        self.registered.get_or_init(|| self.register())
    }

    #[cold]
    fn register(&self) -> Registered {
        self.registry.describe();
        let registry = Arc::new(self.registry.clone());
        let calls = Labels::new(registry.clone(), self.gen_ai.clone(), self.metadata_labels.clone());
        Registered { registry, calls }
    }
}

impl Observer for Metrics {
    fn call_opened(&self, _: &EventHandle) {
        self.registered();
    }

    fn call_charged(&self, call: &EventHandle, cost: &Cost) {
        self.calls().of(call).call_charged(cost);
    }

    fn call_settled(&self, call: &EventHandle, charged: &Cost, used: &Cost) {
        self.calls().of(call).call_settled(charged, used);
    }

    fn attempt_started(&self, call: &EventHandle, number: u32) {
        if number > 1 {
            self.calls().of(call).retries.increment(1);
        }
    }

    fn attempt_ended(&self, call: &EventHandle, end: &AttemptEnd) {
        let metrics = self.calls().of(call);
        if end.status_code == Some(429) {
            metrics.throttled.increment(1);
        }
        metrics.requests.attempt_ended(call, end);
    }

    fn call_ended(&self, call: &EventHandle, end: &CallEnd) {
        self.calls().of(call).call_ended(end);
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The values of labels may be names of tenants.
        let labels: Vec<_> = self.registry.labels.iter().map(metrics::Label::key).collect();
        f.debug_struct("Metrics")
            .field("labels", &labels)
            .field("metadata_labels", &self.metadata_labels)
            .finish_non_exhaustive()
    }
}
