//! [`TracingOutput`]: a tracing subscriber that keeps all spans and events as text.

use std::{
    fmt::Write,
    sync::{Arc, Mutex},
};
use tracing::{
    Metadata, Subscriber,
    field::{Field, Visit},
    span,
};
use tracing_subscriber::{Layer, layer::Context, registry::LookupSpan};

/// Collects all spans and events of tracing, except those of HTTP clients and servers: this crate has no control over
/// what hyper or reqwest logs about a connection at the level TRACE.
#[derive(Clone, Default)]
pub(crate) struct TracingOutput(Arc<Mutex<String>>);

impl TracingOutput {
    pub(crate) fn text(&self) -> String {
        self.0.lock().unwrap().clone()
    }
}

struct Fields<'a>(&'a mut String);

impl Visit for Fields<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        write!(self.0, " {field}={value:?}").unwrap();
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for TracingOutput {
    fn enabled(&self, metadata: &Metadata<'_>, _: Context<'_, S>) -> bool {
        let origin = metadata.target().split("::").next().unwrap_or_default();
        !["axum", "hyper", "hyper_util", "reqwest", "rustls", "tower_http"].contains(&origin)
    }

    fn on_new_span(&self, attributes: &span::Attributes<'_>, _: &span::Id, _: Context<'_, S>) {
        let mut text = self.0.lock().unwrap();
        write!(text, "\nspan {}", attributes.metadata().name()).unwrap();
        attributes.record(&mut Fields(&mut text));
    }

    fn on_record(&self, _: &span::Id, values: &span::Record<'_>, _: Context<'_, S>) {
        values.record(&mut Fields(&mut self.0.lock().unwrap()));
    }

    fn on_event(&self, event: &tracing::Event<'_>, context: Context<'_, S>) {
        let mut text = self.0.lock().unwrap();
        let inside = context.event_span(event).map_or("nothing", |span| span.name());
        write!(text, "\nin {inside}:").unwrap();
        event.record(&mut Fields(&mut text));
    }

    fn on_close(&self, _: span::Id, _: Context<'_, S>) {
        self.0.lock().unwrap().push_str("\nclosed");
    }
}
