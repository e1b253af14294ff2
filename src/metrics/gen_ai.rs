//! [`GenAiMetrics`]: the metrics of calls to generative models, by OpenTelemetry's conventions.

use super::{
    cache::Cache,
    error_type::{MAX_ERROR_TYPES, OTHER, error_type},
    registry::{Attribute, Registry},
};
use crate::event::{
    CallEnd, RequestStatus,
    instrument::{GEN_AI_OPERATION_DURATION, GEN_AI_TOKEN_USAGE, Instrument},
};
use ::metrics::{Histogram, Label, SharedString};
use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

/// What the calls are, in all metrics of them.
#[derive(Clone)]
pub(super) struct GenAi {
    pub(super) operation: SharedString,
    pub(super) provider: SharedString,
}

pub(super) struct GenAiMetrics {
    registry: Arc<Registry>,
    labels: Vec<Label>,
    attributes: [Attribute; 2],
    duration: OnceLock<Histogram>,
    /// The durations of operations that ended in an error, by its type.
    failed: Cache<String, Histogram>,
    failed_otherwise: OnceLock<Histogram>,
    input: OnceLock<Histogram>,
    output: OnceLock<Histogram>,
}

impl GenAiMetrics {
    pub(super) fn new(gen_ai: &GenAi, registry: Arc<Registry>, labels: Vec<Label>) -> Self {
        Self {
            registry,
            labels,
            attributes: [
                ("gen_ai.operation.name", gen_ai.operation.clone()),
                ("gen_ai.provider.name", gen_ai.provider.clone()),
            ],
            duration: OnceLock::new(),
            failed: Cache::new(MAX_ERROR_TYPES),
            failed_otherwise: OnceLock::new(),
            input: OnceLock::new(),
            output: OnceLock::new(),
        }
    }

    /// Records a call that was on the wire.
    pub(super) fn call_ended(&self, end: &CallEnd) {
        let waits = end.waits.iter().map(|wait| wait.duration);
        let waited = waits.fold(Duration::ZERO, Duration::saturating_add);
        self.duration(end).record(end.duration.saturating_sub(waited));

        let tokens = end.tokens.unwrap_or_default();
        for (tokens, kind, histogram) in [
            (tokens.input, "input", &self.input),
            (tokens.output, "output", &self.output),
        ] {
            let Some(tokens) = tokens else { continue };
            let kind = || ("gen_ai.token.type", kind.into());
            let histogram = histogram.get_or_init(|| self.register(&GEN_AI_TOKEN_USAGE, Some(kind())));
            // Rounding above 2^53 does no harm.
            #[allow(clippy::cast_precision_loss)]
            histogram.record(tokens as f64);
        }
    }

    fn duration(&self, end: &CallEnd) -> &Histogram {
        let cancelled = (end.status == RequestStatus::Cancelled).then_some("Cancelled");
        let Some(error) = error_type(end.error_type.as_deref().or(cancelled), end.status_code) else {
            return self
                .duration
                .get_or_init(|| self.register(&GEN_AI_OPERATION_DURATION, None));
        };
        let register = |error: &str| {
            let attribute = ("error.type", error.to_owned().into());
            self.register(&GEN_AI_OPERATION_DURATION, Some(attribute))
        };
        let hash = self.failed.hash(&*error);
        let insert = || self.failed.get_or_insert(hash, error.to_string(), || register(&error));
        let known = self.failed.get(hash, |other| **other == *error);
        known
            .or_else(insert)
            .unwrap_or_else(|| self.failed_otherwise.get_or_init(|| register(OTHER)))
    }

    fn register(&self, of: &Instrument, attribute: Option<Attribute>) -> Histogram {
        let attributes: Vec<_> = self.attributes.iter().cloned().chain(attribute).collect();
        self.registry.histogram(of, &self.labels, &attributes)
    }
}
