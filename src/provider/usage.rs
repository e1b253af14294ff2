//! [`UsageLayer`]: what a response says was used.

use super::usage_report::{Report, Reported};
use crate::{error::BoxError, tokens::ApiTokensUsed};
use bytes::Bytes;
use http::{HeaderMap, Request, Response, header::CONTENT_TYPE};
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use std::{
    fmt,
    future::Future,
    mem,
    pin::Pin,
    task::{Context, Poll, ready},
};
use tower_layer::Layer;
use tower_service::Service;

/// Around the client, inside a [`BodyLayer`](crate::body::BodyLayer) or a [`CollectLayer`](crate::body::CollectLayer): finds out
/// how many tokens a response says were used, as its body passes by, and leaves that in the extension
/// [`ApiTokensUsed`], for [`ByUsage`](crate::rate::ByUsage) to settle and for the event to record.
///
/// It knows the shapes of OpenAI (chat and responses), Anthropic, Gemini, Mistral and whoever imitates them, in a whole
/// JSON document and in a stream of [server-sent events](https://html.spec.whatwg.org/multipage/server-sent-events.html);
/// and Mistral's header `x-ratelimit-tokens-query-cost`. Tokens that Anthropic reads from its cache are not counted, as
/// they do not count towards its limits.
///
/// Whatever else comes is passed on as it is, and no count is found. Documents above 8 MiB are not looked into, nor
/// events above 1 MiB.
#[derive(Clone, Copy)]
pub struct UsageLayer {
    read: fn(&[u8]) -> Option<u64>,
}

/// A client whose responses say what was used. See [`UsageLayer`].
#[derive(Clone)]
pub struct Usage<S> {
    inner: S,
    layer: UsageLayer,
}

pin_project! {
    /// A call whose response says what was used.
    ///
    /// # Cancel safety
    ///
    /// Dropping it drops the call.
    #[must_use = "futures do nothing unless polled"]
    pub struct ResponseFuture<F> {
        #[pin]
        future: F,
        layer: UsageLayer,
    }
}

pin_project! {
    /// A body that is looked into while it passes by.
    pub struct MeteredBody<B> {
        #[pin]
        body: B,
        meter: Option<Meter>,
    }
}

/// What has been seen of one body.
struct Meter {
    layer: UsageLayer,
    used: ApiTokensUsed,
    so_far: Reported,
    text: Text,
}

enum Text {
    /// One document.
    Document(Vec<u8>),
    /// The data of the event that is coming, and its line.
    Events { data: Vec<u8>, line: Vec<u8> },
}

const MOST_DOCUMENT: usize = 8 << 20;
const MOST_EVENT: usize = 1 << 20;
const QUERY_COST: &str = "x-ratelimit-tokens-query-cost";

// === impl UsageLayer ===

impl UsageLayer {
    /// For the shapes that are known.
    #[must_use]
    pub const fn new() -> Self {
        Self { read: |_| None }
    }

    /// For shapes of one's own: `read` is given each document or event that is JSON or not, and tells the tokens used so
    /// far. Where it tells none, the known shapes are tried.
    ///
    /// ```
    /// use tower_outbound::provider::UsageLayer;
    ///
    /// let layer = UsageLayer::with(|body| Some(body.len() as u64 / 4));
    /// ```
    #[must_use]
    pub const fn with(read: fn(&[u8]) -> Option<u64>) -> Self {
        Self { read }
    }
}

impl Default for UsageLayer {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for UsageLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("UsageLayer")
    }
}

impl<S> Layer<S> for UsageLayer {
    type Service = Usage<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Usage { inner, layer: *self }
    }
}

// === impl Usage ===

impl<S, B, R> Service<Request<B>> for Usage<S>
where
    S: Service<Request<B>, Response = Response<R>>,
{
    type Response = Response<MeteredBody<R>>;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, req: Request<B>) -> Self::Future {
        ResponseFuture {
            future: self.inner.call(req),
            layer: self.layer,
        }
    }
}

impl<S: fmt::Debug> fmt::Debug for Usage<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Usage")
            .field("inner", &self.inner)
            .finish_non_exhaustive()
    }
}

// === impl ResponseFuture ===

impl<F, R, E> Future for ResponseFuture<F>
where
    F: Future<Output = Result<Response<R>, E>>,
{
    type Output = Result<Response<MeteredBody<R>>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let (mut parts, body) = ready!(this.future.poll(cx))?.into_parts();
        let used = parts.extensions.get_or_insert_with(ApiTokensUsed::unknown).clone();
        if let Some(cost) = query_cost(&parts.headers) {
            used.set(cost);
        }
        let meter = parts.status.is_success().then(|| Meter {
            layer: *this.layer,
            used,
            so_far: Reported::default(),
            text: Text::of(&parts.headers),
        });
        Poll::Ready(Ok(Response::from_parts(parts, MeteredBody { body, meter })))
    }
}

impl<F> fmt::Debug for ResponseFuture<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("usage::ResponseFuture").finish_non_exhaustive()
    }
}

fn query_cost(headers: &HeaderMap) -> Option<u64> {
    headers.get(QUERY_COST)?.to_str().ok()?.trim().parse().ok()
}

// === impl MeteredBody ===

impl<B> Body for MeteredBody<B>
where
    B: Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let mut this = self.project();
        let frame = ready!(this.body.as_mut().poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => {
                if let (Some(meter), Some(data)) = (this.meter.as_mut(), frame.data_ref()) {
                    if !meter.see(data) {
                        *this.meter = None;
                    }
                }
                if this.body.is_end_stream() {
                    end(this.meter);
                }
            }
            // What it said before it broke off is not all.
            Some(Err(_)) => *this.meter = None,
            None => end(this.meter),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl<B> fmt::Debug for MeteredBody<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MeteredBody").finish_non_exhaustive()
    }
}

fn end(meter: &mut Option<Meter>) {
    if let Some(meter) = meter.take() {
        meter.end();
    }
}

// === impl Meter ===

impl Meter {
    /// Looks at the next bytes. Returns whether it is worth going on.
    fn see(&mut self, bytes: &[u8]) -> bool {
        match &mut self.text {
            Text::Document(text) => {
                text.extend_from_slice(bytes);
                text.len() <= MOST_DOCUMENT
            }
            Text::Events { .. } => bytes
                .split_inclusive(|byte| *byte == b'\n')
                .all(|part| self.see_line(part)),
        }
    }

    /// A part of a line, with its end perhaps.
    fn see_line(&mut self, part: &[u8]) -> bool {
        let Text::Events { data, line } = &mut self.text else {
            return true;
        };
        line.extend_from_slice(part);
        if line.len() + data.len() > MOST_EVENT {
            return false;
        }
        let Some(whole) = line.strip_suffix(b"\n") else {
            return true;
        };
        let whole = whole.strip_suffix(b"\r").unwrap_or(whole);
        if let Some(text) = whole.strip_prefix(b"data:") {
            data.extend_from_slice(text);
            data.push(b'\n');
        }
        let event = whole.is_empty().then(|| mem::take(data));
        line.clear();
        if let Some(event) = event {
            self.report(&event);
        }
        true
    }

    /// A document, or the data of an event.
    fn report(&mut self, text: &[u8]) {
        match (self.layer.read)(text) {
            Some(used) => self.so_far = Reported::total(used),
            None => self.so_far.add(&Report::read(text)),
        }
    }

    fn end(mut self) {
        let rest = match &mut self.text {
            Text::Document(text) => mem::take(text),
            Text::Events { data, .. } => mem::take(data),
        };
        if !rest.is_empty() {
            self.report(&rest);
        }
        if let Some(used) = self.so_far.tokens() {
            self.used.set(used);
        }
    }
}

impl Text {
    fn of(headers: &HeaderMap) -> Self {
        let kind = headers.get(CONTENT_TYPE).map_or(&b""[..], |kind| kind.as_bytes());
        if kind.len() >= 17 && kind[..17].eq_ignore_ascii_case(b"text/event-stream") {
            Self::Events {
                data: Vec::new(),
                line: Vec::new(),
            }
        } else {
            Self::Document(Vec::new())
        }
    }
}
