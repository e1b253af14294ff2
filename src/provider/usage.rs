//! [`UsageLayer`]: finds the number of tokens that a call used in the body of its response.

use super::usage_report::{UsageReport, UsageTotals};
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

/// Finds the number of tokens that a call used in the body of its response, and leaves it in the response's extension
/// [`ApiTokensUsed`], for [`ByUsage`](crate::rate::ByUsage) to settle and for the event to record. Placed around the
/// client, inside a [`BodyLayer`](crate::body::BodyLayer) or a [`CollectLayer`](crate::body::CollectLayer).
///
/// The formats of OpenAI (chat and responses), Anthropic, Gemini, Mistral and APIs that copy them are read, in a JSON
/// document or in a stream of [server-sent events](https://html.spec.whatwg.org/multipage/server-sent-events.html).
/// Mistral's header `x-ratelimit-tokens-query-cost` is read with the head. Tokens that Anthropic reads from its cache
/// are not counted, as they do not count towards its limits.
///
/// The body is passed on unchanged while it is read. No usage is found in
///
/// - a response that is not a success (2xx),
/// - a body that fails or is dropped before its end,
/// - a document above 8 MiB,
/// - a stream with an event above 1 MiB.
#[derive(Clone, Copy)]
pub struct UsageLayer {
    read: fn(&[u8]) -> Option<u64>,
}

/// The service of [`UsageLayer`]. Errors are those of the client.
#[derive(Clone)]
pub struct Usage<S> {
    inner: S,
    layer: UsageLayer,
}

pin_project! {
    /// A call until the head of its response has arrived.
    ///
    /// # Cancel safety
    ///
    /// Dropping it ends the call.
    #[must_use = "futures do nothing unless polled"]
    pub struct ResponseFuture<F> {
        #[pin]
        future: F,
        layer: UsageLayer,
    }
}

pin_project! {
    /// A body that is searched for the number of tokens used while it is read: the body of [`Usage`]'s responses.
    pub struct MeteredBody<B> {
        #[pin]
        body: B,
        // `None` if the body is not searched, and after its end.
        scanner: Option<Scanner>,
    }
}

/// Searches one body.
struct Scanner {
    layer: UsageLayer,
    used: ApiTokensUsed,
    totals: UsageTotals,
    framing: Framing,
}

/// How the body is divided into documents, with the part of the current one that has arrived.
enum Framing {
    /// The body is one document.
    Document(Vec<u8>),
    /// The body is a stream of server-sent events: the data of the current event, and its current line.
    Events { data: Vec<u8>, line: Vec<u8> },
}

/// The largest document that is kept in memory to be parsed.
const MAX_DOCUMENT_BYTES: usize = 8 << 20;
/// The largest event that is kept in memory to be parsed.
const MAX_EVENT_BYTES: usize = 1 << 20;
/// Mistral's header with the tokens used.
const QUERY_COST: &str = "x-ratelimit-tokens-query-cost";

// === impl UsageLayer ===

impl UsageLayer {
    /// Reads the formats listed [above](Self).
    #[must_use]
    pub const fn new() -> Self {
        Self { read: |_| None }
    }

    /// Reads another format first: `read` is called with each document, or the data of each event, be it JSON or not,
    /// and returns the number of tokens that the call has used so far. Where it returns `None`, the formats listed
    /// [above](Self) are tried.
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
        let scanner = parts.status.is_success().then(|| Scanner {
            layer: *this.layer,
            used,
            totals: UsageTotals::default(),
            framing: Framing::of(&parts.headers),
        });
        Poll::Ready(Ok(Response::from_parts(parts, MeteredBody { body, scanner })))
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
                if let (Some(scanner), Some(data)) = (this.scanner.as_mut(), frame.data_ref()) {
                    if scanner.observe(data).is_err() {
                        *this.scanner = None;
                    }
                }
                if this.body.is_end_stream() {
                    finish(this.scanner);
                }
            }
            // The numbers that arrived before the failure may be too low: the charge stays as it was estimated.
            Some(Err(_)) => *this.scanner = None,
            None => finish(this.scanner),
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

/// Records what was found, once.
fn finish(scanner: &mut Option<Scanner>) {
    if let Some(scanner) = scanner.take() {
        scanner.finish();
    }
}

// === impl Scanner ===

/// The document or the event is too large to be kept in memory: the search of this body ends.
struct TooLarge;

impl Scanner {
    /// Searches the next bytes of the body.
    fn observe(&mut self, bytes: &[u8]) -> Result<(), TooLarge> {
        match &mut self.framing {
            Framing::Document(document) => {
                document.extend_from_slice(bytes);
                if document.len() > MAX_DOCUMENT_BYTES {
                    return Err(TooLarge);
                }
                Ok(())
            }
            Framing::Events { .. } => bytes
                .split_inclusive(|byte| *byte == b'\n')
                .try_for_each(|part| self.observe_line(part)),
        }
    }

    /// Searches a part of a line of an event stream. The last part of a line ends in `\n`.
    fn observe_line(&mut self, part: &[u8]) -> Result<(), TooLarge> {
        let Framing::Events { data, line } = &mut self.framing else {
            return Ok(());
        };
        line.extend_from_slice(part);
        if line.len() + data.len() > MAX_EVENT_BYTES {
            return Err(TooLarge);
        }
        let Some(whole) = line.strip_suffix(b"\n") else {
            return Ok(());
        };
        let whole = whole.strip_suffix(b"\r").unwrap_or(whole);
        if let Some(text) = whole.strip_prefix(b"data:") {
            data.extend_from_slice(text);
            data.push(b'\n');
        }
        // An empty line ends an event.
        let event = whole.is_empty().then(|| mem::take(data));
        line.clear();
        if let Some(event) = event {
            self.read_document(&event);
        }
        Ok(())
    }

    /// Reads a document, or the data of an event.
    fn read_document(&mut self, document: &[u8]) {
        match (self.layer.read)(document) {
            Some(used) => self.totals = UsageTotals::of(used),
            None => self.totals.update(&UsageReport::read(document)),
        }
    }

    /// Reads what is left at the end of the body, and records the tokens used, if any number was found.
    fn finish(mut self) {
        let rest = match &mut self.framing {
            Framing::Document(document) => mem::take(document),
            Framing::Events { data, .. } => mem::take(data),
        };
        if !rest.is_empty() {
            self.read_document(&rest);
        }
        if let Some(used) = self.totals.tokens() {
            self.used.set(used);
        }
    }
}

impl Framing {
    /// The framing that the content type of a response stands for. Anything but an event stream is one document.
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
