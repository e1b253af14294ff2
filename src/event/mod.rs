//! A record of every call: where it is, when it got there, and how it ended.
//!
//! ```text
//! PENDING ──▶ QUEUED ──▶ PROCESSING ──▶ CALLING ──▶ COMPLETED   a response arrived
//!    │           │            │            ├──────▶ FAILED      an error came instead
//!    └───────────┴────────────┴────────────┴──────▶ CANCELLED   it was ended before
//! ```
//!
//! Statuses only move forward, and every call ends in exactly one of the last three, however it ends: answered, failed,
//! dropped, aborted or panicked. A status can be skipped: a call that is refused fails without having been on the wire.
//!
//! [`EventLayer`] writes the record. There is one type of it for three places in a stack, and one rule: *on the way in
//! it writes its status, on the way out what came back*. The outcome is written once, by the layer that opened the
//! event or the one below the queue, whichever is first. CachePadded around a client, any of the three is a complete
//! recorder.
//!
//! A call's event is *current* while the call is made and polled, as a tracing span is: [`current`] finds it, so that a
//! closure or a layer of one's own can [`log`](EventHandle::log) to it.
//!
//! # Secrets
//!
//! Values of headers, query parameters and JSON fields whose name says that they are credentials (`authorization`,
//! `x-api-key`, `cookie`, `api_key`, `token`, `sig`, …) and of headers marked as sensitive are redacted before they are
//! recorded; URLs lose their user info. Bodies are only recorded when given for it.
//!
//! # The span
//!
//! Each event opens a tracing span `outbound_call` (level INFO, target `tower_outbound`), which is current with it.
//! Fields: `request_id`, `http.request.method`, `server.address`, and at the end `status`, `http.response.status_code`
//! and `error.type`.
//!
//! Layers of others may be less discreet. tower-http's `TraceLayer`, for one, opens a span with the whole URL in it;
//! with `.make_span_with(|_: &_| tracing::Span::current())` it uses this one instead.
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

mod describe;
mod events;
mod handle;
#[cfg(feature = "serde")]
mod headers;
#[cfg(all(test, tower_outbound_loom))]
mod interleavings;
mod layer;
mod record;
mod scope;
mod state;
#[cfg(feature = "serde")]
mod time;
mod utc;
mod value;

pub use describe::{Describe, Http, HttpWithBody, Metadata, Nothing, Payload, RequestDetails, ResponseDetails};
pub use events::{EventUpdate, Events, Lagged, Subscription, Totals};
pub use handle::EventHandle;
pub use layer::{EventLayer, EventService, ResponseFuture};
pub use record::{Attempt, LogEntry, NetworkRequestEvent, ParseStatusError, RequestId, RequestStatus};
pub use scope::current;
pub use value::Value;

pub(crate) use describe::NoMethod;
pub(crate) use handle::Writer;
pub(crate) use scope::{Scope, Stage};
#[cfg(feature = "http")]
pub(crate) use state::BodyProgress;
