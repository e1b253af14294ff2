//! [`Labels`]: finds the metrics of a call by the labels that were asked for.

use super::{cache::Cache, call_metrics::CallMetrics, error_type::OTHER, gen_ai::GenAi, registry::Registry};
use crate::{
    event::{EventHandle, Value},
    redact,
};
use ::metrics::{Label, SharedString};
use std::{borrow::Cow, sync::Arc};

/// The metrics of calls by their labels.
pub(super) struct Labels {
    registry: Arc<Registry>,
    gen_ai: Option<GenAi>,
    /// The names of the labels, and the keys of the metadata that they are.
    asked: Vec<(SharedString, String)>,
    /// The metrics of calls by the values of the labels.
    by_values: Cache<Vec<String>, CallMetrics>,
    /// The metrics of all calls if no label was asked for. Otherwise, those of calls with values for which there is no
    /// place in `by_values`.
    others: CallMetrics,
}

/// The number of combinations of values that are told apart.
const MAX_VALUES: usize = 1_000;

impl Labels {
    pub(super) fn new(registry: Arc<Registry>, gen_ai: Option<GenAi>, asked: Vec<(SharedString, String)>) -> Self {
        let others = asked.iter().map(|(name, _)| Label::new(name.clone(), OTHER)).collect();
        Self {
            others: CallMetrics::new(&registry, others, gen_ai.as_ref()),
            by_values: Cache::new(if asked.is_empty() { 0 } else { MAX_VALUES }),
            registry,
            gen_ai,
            asked,
        }
    }

    #[inline]
    pub(super) fn of(&self, call: &EventHandle) -> &CallMetrics {
        if self.asked.is_empty() {
            return &self.others;
        }
        self.by_values(call)
    }

    fn by_values(&self, call: &EventHandle) -> &CallMetrics {
        // The recorder is not called here: the event is locked.
        let found = call.with_metadata(|metadata| {
            let values: Vec<_> = self
                .asked
                .iter()
                .map(|(_, key)| text(metadata.and_then(|metadata| metadata.get(key))))
                .collect();
            let hash = self.by_values.hash(&values);
            let known = self.by_values.get(hash, |key| *key == values);
            known.ok_or_else(|| (hash, values.into_iter().map(Cow::into_owned).collect::<Vec<_>>()))
        });
        found.unwrap_or_else(|(hash, values)| {
            let labels = self.labels(&values);
            let register = || CallMetrics::new(&self.registry, labels, self.gen_ai.as_ref());
            let known = self.by_values.get_or_insert(hash, values, register);
            known.unwrap_or(&self.others)
        })
    }

    fn labels(&self, values: &[String]) -> Vec<Label> {
        let label = |((name, key), value): (&(SharedString, String), &String)| {
            let value = if redact::is_secret(key) {
                redact::REDACTED.to_owned()
            } else {
                redact::text(value).into_owned()
            };
            Label::new(name.clone(), value)
        };
        self.asked.iter().zip(values).map(label).collect()
    }
}

/// Returns the text of a label's value. A number and a boolean are written as in JSON.
fn text(value: Option<&Value>) -> Cow<'_, str> {
    match value {
        None | Some(Value::Null) => "".into(),
        Some(Value::String(text)) => text.into(),
        Some(value) => value.to_string().into(),
    }
}
