//! [`RequestDurations`]: the durations of http requests, by OpenTelemetry's conventions.

use super::{
    cache::Cache,
    error_type::{OTHER, error_type},
    registry::{Attribute, Registry},
};
use crate::event::{AttemptEnd, EventHandle, instrument::HTTP_REQUEST_DURATION};
use ::metrics::{Histogram, Label};
use http::{Method, Uri};
use std::sync::Arc;

/// The durations of http requests, by method, server, status code and error.
pub(super) struct RequestDurations {
    registry: Arc<Registry>,
    labels: Vec<Label>,
    durations: Cache<Attributes, Histogram>,
    /// The durations of requests for which there is no place in `durations`, by method, status code and
    /// whether there was an error.
    others: Cache<Attributes, Histogram>,
}

#[derive(Clone, PartialEq)]
struct Attributes {
    method: &'static str,
    /// Empty if the URL names no server.
    address: String,
    port: Option<u16>,
    status_code: Option<u16>,
    error: Option<String>,
}

/// The number of combinations of attributes that are told apart. A crawler has more servers: the requests to further
/// ones have the server [`OTHER`].
const MAX_SERIES: usize = 512;

/// The methods that the conventions know.
const METHODS: [&str; 10] = [
    "GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "QUERY", "CONNECT", "TRACE",
];

/// Status codes that http defines a class for.
const STATUS_CODES: std::ops::Range<u16> = 100..600;

impl RequestDurations {
    pub(super) fn new(registry: Arc<Registry>, labels: Vec<Label>) -> Self {
        Self {
            registry,
            labels,
            durations: Cache::new(MAX_SERIES),
            others: Cache::new((METHODS.len() + 1) * (STATUS_CODES.len() + 1) * 2),
        }
    }

    /// Records an attempt, if its request has a method: that of a closure has none.
    pub(super) fn attempt_ended(&self, call: &EventHandle, end: &AttemptEnd) {
        let status_code = end.status_code.filter(|code| STATUS_CODES.contains(code));
        // The recorder is not called here: the event is locked.
        let found = call.with_request(|method, url| {
            let method = known_method(method?);
            let (address, port) = url.map_or(("", None), server);
            let hash = self.durations.hash((method, address, port, status_code));
            let known = self.durations.get(hash, |key| {
                key.status_code == status_code
                    && key.port == port
                    && key.method == method
                    && key.address == address
                    && key.error == end.error_type
            });
            Some(known.ok_or_else(|| {
                let key = Attributes {
                    method,
                    address: address.to_owned(),
                    port,
                    status_code,
                    error: end.error_type.clone(),
                };
                (hash, key)
            }))
        });
        match found {
            Some(Ok(histogram)) => histogram.record(end.duration),
            Some(Err((hash, key))) => self.record_new(hash, key, end),
            None => {}
        }
    }

    #[cold]
    fn record_new(&self, hash: u64, key: Attributes, end: &AttemptEnd) {
        let register = |key: Attributes| move || self.register(&key);
        let known = self.durations.get_or_insert(hash, key.clone(), register(key.clone()));
        let known = known.or_else(|| {
            let key = Attributes {
                address: OTHER.to_owned(),
                port: None,
                error: key.error.map(|_| OTHER.to_owned()),
                ..key
            };
            let hash = self.others.hash((key.method, key.status_code));
            self.others.get_or_insert(hash, key.clone(), register(key))
        });
        if let Some(histogram) = known {
            histogram.record(end.duration);
        }
    }

    fn register(&self, key: &Attributes) -> Histogram {
        let mut attributes: Vec<Attribute> = vec![("http.request.method", key.method.into())];
        if !key.address.is_empty() {
            attributes.push(("server.address", key.address.clone().into()));
        }
        if let Some(port) = key.port {
            attributes.push(("server.port", port.to_string().into()));
        }
        if let Some(code) = key.status_code {
            attributes.push(("http.response.status_code", code.to_string().into()));
        }
        if let Some(error) = error_type(key.error.as_deref(), key.status_code) {
            attributes.push(("error.type", error.into_owned().into()));
        }
        self.registry
            .histogram(&HTTP_REQUEST_DURATION, &self.labels, &attributes)
    }
}

fn known_method(method: &Method) -> &'static str {
    let known = METHODS.iter().find(|known| **known == method.as_str());
    known.copied().unwrap_or(OTHER)
}

fn server(url: &Uri) -> (&str, Option<u16>) {
    let default_port = || match url.scheme_str()? {
        "http" => Some(80),
        "https" => Some(443),
        _ => None,
    };
    let address = url.host().unwrap_or_default();
    (address, url.port_u16().or_else(default_port))
}
