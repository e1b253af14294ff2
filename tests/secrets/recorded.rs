//! Returns what an event records for a text, a URL, headers or a value.

#![allow(dead_code)]

use http::{HeaderMap, Request, Response};
use std::{collections::BTreeMap, convert::Infallible};
use tower::{Layer, Service, service_fn};
use tower_outbound::{
    EventHandle, EventLayer,
    event::{Metadata, Payload, Value},
};

/// Returns the event of this request. The request is never sent.
pub(crate) fn event(request: Request<()>) -> EventHandle {
    let client = service_fn(async |_: Request<()>| Ok::<_, Infallible>(Response::new(())));
    EventLayer::calling().layer(client).call(request).event()
}

/// Returns the text that an event records for a note with this text.
pub(crate) fn text(text: &str) -> String {
    let event = event(Request::new(()));
    event.log(text);
    event.snapshot().logs.remove(0).message
}

/// Returns the URL that an event records for a request to this URL; `None` if the text is not a URL.
pub(crate) fn url(url: &str) -> Option<String> {
    let request = Request::get(url).body(()).ok()?;
    event(request).snapshot().endpoint_url
}

pub(crate) fn headers(name: &'static str, value: &[u8]) -> HeaderMap {
    let request = Request::get("http://h/").header(name, value).body(()).unwrap();
    event(request).snapshot().headers
}

pub(crate) fn payload(value: Value) -> Value {
    let mut request = Request::new(());
    request.extensions_mut().insert(Payload(value));
    event(request).snapshot().payload.unwrap()
}

pub(crate) fn metadata(name: &str, value: Value) -> BTreeMap<String, Value> {
    let mut request = Request::new(());
    request
        .extensions_mut()
        .insert(Metadata([(name.to_owned(), value)].into()));
    event(request).snapshot().metadata
}
