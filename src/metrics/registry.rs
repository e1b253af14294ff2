//! [`Registry`]: registers metrics with the recorder of the program.

use crate::event::instrument::{INSTRUMENTS, Instrument, InstrumentKind};
use ::metrics::{Counter, Gauge, Histogram, Key, Label, Level, Metadata, Recorder, SharedString, Unit};
use std::sync::Arc;

/// Registers metrics with a recorder.
#[derive(Clone, Default)]
pub(super) struct Registry {
    /// `None` for the global recorder.
    pub(super) recorder: Option<Arc<dyn Recorder + Send + Sync>>,
    /// The labels of every metric.
    pub(super) labels: Vec<Label>,
}

/// An attribute of one metric, and its value.
pub(super) type Attribute = (&'static str, SharedString);

const METADATA: Metadata<'static> = Metadata::new("tower_outbound", Level::INFO, Some(module_path!()));

impl Registry {
    pub(super) fn describe(&self) {
        self.with(|recorder| {
            for instrument in &INSTRUMENTS {
                let describe = match instrument.kind {
                    InstrumentKind::Counter => Recorder::describe_counter,
                    InstrumentKind::Gauge => Recorder::describe_gauge,
                    InstrumentKind::Histogram => Recorder::describe_histogram,
                };
                let unit = if instrument.unit == "s" {
                    Unit::Seconds
                } else {
                    Unit::Count
                };
                describe(
                    recorder,
                    instrument.name.into(),
                    Some(unit),
                    instrument.description.into(),
                );
            }
        });
    }

    pub(super) fn counter(&self, of: &Instrument, labels: &[Label], attributes: &[Attribute]) -> Counter {
        let key = self.key(of, labels, attributes);
        self.with(|recorder| recorder.register_counter(&key, &METADATA))
    }

    pub(super) fn gauge(&self, of: &Instrument, attributes: &[Attribute]) -> Gauge {
        let key = self.key(of, &[], attributes);
        self.with(|recorder| recorder.register_gauge(&key, &METADATA))
    }

    pub(super) fn histogram(&self, of: &Instrument, labels: &[Label], attributes: &[Attribute]) -> Histogram {
        let key = self.key(of, labels, attributes);
        self.with(|recorder| recorder.register_histogram(&key, &METADATA))
    }

    fn key(&self, of: &Instrument, labels: &[Label], attributes: &[Attribute]) -> Key {
        let attributes = attributes
            .iter()
            .inspect(|(name, _)| debug_assert!(of.attributes.contains(name), "{name} of {}", of.name))
            .map(|(name, value)| Label::new(*name, value.clone()));
        let labels = self.labels.iter().chain(labels).cloned();
        Key::from_parts(of.name, labels.chain(attributes).collect::<Vec<_>>())
    }

    fn with<T>(&self, act: impl FnOnce(&dyn Recorder) -> T) -> T {
        match &self.recorder {
            Some(recorder) => act(recorder),
            None => ::metrics::with_recorder(act),
        }
    }
}
