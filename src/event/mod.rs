//! A record of every call: how far it has come, when, and how it ended.
//!
//! A program that makes many calls to an API has to find out what became of each: how long it waited and for what, how
//! often it was tried, what was sent and what came back. Every call has one event, a [`NetworkRequestEvent`], which is
//! written while the call runs and can be read at any time through an [`EventHandle`].
//!
//! ```text
//! PENDING ──▶ QUEUED ──▶ PROCESSING ──▶ CALLING ──▶ COMPLETED   with a response
//!    │           │            │            ├──────▶ FAILED      with an error
//!    └───────────┴────────────┴────────────┴──────▶ CANCELLED   before there was either
//! ```
//!
//! The status of a call only moves forward, and ends as exactly one of COMPLETED, FAILED and CANCELLED: also if the
//! call is dropped or aborted (CANCELLED), or panics (FAILED). A status can be skipped: a call that is rejected by a
//! limit fails without having been on the wire.
//!
//! # Layers
//!
//! [`EventLayer`] writes the event, from up to three places in a stack: [above the queue](EventLayer::queued), [below
//! the queue](EventLayer::processing) and [around the client](EventLayer::calling). On the way in, each of the three
//! writes a status; on the way out, the response or the error. The outcome of the call is written once, by the layer
//! that opened the event or by the layer below the queue, whichever returns first. Each of the three also works without
//! the others, and then records the whole call.
//!
//! A call's event is *current* while the call is made and polled, as a tracing span is. A closure that makes the call,
//! or a layer of your own, finds the current event with [`current`] and can add notes with [`EventHandle::log`].
//!
//! [`Events`] counts the events of a stack of layers, and sends every new status of an event to its subscribers. An
//! [`Observer`] is called at every step of every call, and misses none.
//!
//! # Waits
//!
//! What a call has waited for is in its [`waits`](NetworkRequestEvent::waits), by [cause](WaitCause): a place in the queue,
//! its turn, a permit, each budget of its rates, a pause, a backoff. The layers of this crate record it, also in a stack
//! without an executor.
//!
//! # Bounds
//!
//! An event keeps at most 1,000 notes, 1,000 metadata keys and 128 sources of an error. Further notes and keys are only
//! counted. A subscriber that falls more than 4,096 updates behind misses the oldest.
//!
//! # Secrets
//!
//! Credentials are redacted: the values of headers, query parameters and JSON fields whose name suggests a credential
//! (`authorization`, `x-api-key`, `cookie`, `api_key`, `token`, `sig`, …), the values of headers that are [marked as
//! sensitive](http::HeaderValue::set_sensitive), and the user info of URLs. In free text, such as notes and error
//! messages, credentials are redacted where they can be recognized. Bodies are recorded only if the caller asks for it.
//!
//! # The span
//!
//! Each event opens a tracing span `outbound_call` (level INFO, target `tower_outbound`), which is entered while the
//! call is made and polled. The span's fields are `request_id`, `http.request.method` and `server.address`, and at the
//! end of the call `status`, `http.response.status_code` and `error.type`.
//!
//! Spans of other layers may contain secrets: tower-http's `TraceLayer`, for example, records the whole URL. With
//! `.make_span_with(|_: &_| tracing::Span::current())`, `TraceLayer` uses the span of the event instead of its own.
//!
//! # Examples
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), tower::BoxError> {
//! use http::{Request, Response};
//! use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
//! use tower_outbound::{EventLayer, event::Events};
//!
//! let events = Events::new();
//! let mut updates = events.subscribe();
//! let mut service = ServiceBuilder::new()
//!     .layer(EventLayer::calling().report_to(&events))
//!     .service(service_fn(async |_: Request<()>| Ok::<_, tower::BoxError>(Response::new(()))));
//!
//! let request = Request::get("http://user:password@localhost/?key=secret&page=2").body(())?;
//! service.ready().await?.call(request).await?;
//!
//! let event = updates.recv().await.expect("an update")?.event.finished().await;
//! assert_eq!(event.status.to_string(), "COMPLETED");
//! assert_eq!(event.endpoint_url.as_deref(), Some("http://localhost/?key=[redacted]&page=2"));
//! assert_eq!(events.totals().completed, 1);
//! # Ok(())
//! # }
//! ```

// The modules from the lowest to the highest, each of which imports only from those before it: value, time, status,
// request_id, wait, formats, record, details, describe, change, attempt, state, listeners, reporter, server, handle,
// events, observer, scope, wait_timer, layer. `instrument`, the list of the metrics, imports nothing.
mod attempt;
mod change;
mod describe;
mod details;
mod events;
#[cfg(feature = "serde")]
mod formats;
mod handle;
#[cfg(feature = "metrics")]
pub(crate) mod instrument;
#[cfg(all(test, tower_outbound_loom))]
mod interleavings;
mod layer;
mod listeners;
mod observer;
mod record;
mod reporter;
mod request_id;
mod scope;
mod server;
mod state;
mod status;
mod time;
mod value;
mod wait;
mod wait_timer;

#[cfg(feature = "http")]
pub use change::LimitReport;
pub use change::{AttemptEnd, CallEnd, Refusal};
pub use describe::{Describe, Http, HttpWithBody, Metadata, Model, Nothing, Payload};
pub use details::{RequestDetails, ResponseDetails};
pub use events::{EventUpdate, Events, Lagged, Subscription};
pub use handle::EventHandle;
pub use layer::{EventLayer, EventService, ResponseFuture};
pub use observer::Observer;
pub use record::{Attempt, LogEntry, NetworkRequestEvent};
pub use reporter::Totals;
pub use request_id::RequestId;
pub use scope::current;
pub use server::Server;
pub use status::{ParseStatusError, RequestStatus};
pub use value::Value;
pub use wait::{ParseWaitCauseError, Wait, WaitCause};

/// Returns the text without secrets, as events show texts: user info and secret parameters of URLs, credentials after
/// `Bearer` or `Basic`, and quoted values of fields whose name suggests a secret are replaced by `[redacted]`.
///
/// For a program that shows what it has received beside its events, such as the body of a failed response. Free text is
/// redacted as far as secrets can be recognized.
///
/// ```
/// let body = r#"{"error": "not allowed", "api_key": "sk-12345678"}"#;
/// let shown = tower_outbound::event::redact_text(body);
/// assert_eq!(shown, r#"{"error": "not allowed", "api_key": "[redacted]"}"#);
/// ```
#[must_use]
pub fn redact_text(text: &str) -> std::borrow::Cow<'_, str> {
    crate::redact::text(text)
}

pub(crate) use describe::NoMethod;
pub(crate) use handle::Stage;
pub(crate) use observer::Observers;
pub(crate) use scope::{Scope, charged, settled, waited};
#[cfg(feature = "http")]
pub(crate) use scope::{is_observed, limit_reported, limiter_paused};
#[cfg(feature = "http")]
pub(crate) use state::BodyProgress;
pub(crate) use wait_timer::WaitTimer;
