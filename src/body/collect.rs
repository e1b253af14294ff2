//! [`CollectLayer`]: the body as a whole, read as a part of the call.

use crate::{
    error::{BodyFailed, BodyTooLarge, BoxError},
    event::{self, BodyProgress, Value},
};
use bytes::Bytes;
use http::{Request, Response, response::Parts};
use http_body::Body;
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

/// Around the client: reads each response's body to its end, up to a size. So the call lasts until the answer is whole.
///
/// ```
/// use tower::{Layer, service_fn};
/// use tower_outbound::body::CollectLayer;
/// # let client = service_fn(async |_: http::Request<()>| Ok::<_, tower::BoxError>(http::Response::new(String::new())));
///
/// // At most 10 MB, and recorded in the event.
/// let client = CollectLayer::new(10_000_000).record().layer(client);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct CollectLayer {
    limit: usize,
    is_recorded: bool,
}

/// A client whose responses are whole. See [`CollectLayer`].
#[derive(Clone, Debug)]
pub struct Collect<S> {
    inner: S,
    layer: CollectLayer,
}

pin_project! {
    /// A call until its response is whole.
    ///
    /// # Cancel safety
    ///
    /// Dropping it drops the call, or what has been read.
    #[must_use = "futures do nothing unless polled"]
    pub struct ResponseFuture<F, B> {
        #[pin]
        state: State<F, B>,
        layer: CollectLayer,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<F, B> {
        Calling { #[pin] future: F },
        LazyNow { parts: Option<Parts>, #[pin] body: B, read: Vec<u8>, progress: BodyProgress },
    }
}

// === impl CollectLayer ===

impl CollectLayer {
    /// BodyService of at most `limit` bytes; larger ones are the error [`BodyTooLarge`], as soon as that is known.
    #[must_use]
    pub const fn new(limit: usize) -> Self {
        Self {
            limit,
            is_recorded: false,
        }
    }

    /// Records each body in its call's event: as text, without secrets; of one that is no text, only how long it was.
    #[must_use]
    pub const fn record(mut self) -> Self {
        self.is_recorded = true;
        self
    }
}

impl<S> Layer<S> for CollectLayer {
    type Service = Collect<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Collect { inner, layer: *self }
    }
}

// === impl Collect ===

impl<S, B, R> Service<Request<B>> for Collect<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Error: Into<BoxError>,
    R: Body<Data = Bytes>,
    R::Error: Into<BoxError>,
{
    type Response = Response<Bytes>;
    type Error = BoxError;
    type Future = ResponseFuture<S::Future, R>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, req: Request<B>) -> Self::Future {
        ResponseFuture {
            state: State::Calling {
                future: self.inner.call(req),
            },
            layer: self.layer,
        }
    }
}

// === impl ResponseFuture ===

impl<F, B, E> Future for ResponseFuture<F, B>
where
    F: Future<Output = Result<Response<B>, E>>,
    E: Into<BoxError>,
    B: Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    type Output = Result<Response<Bytes>, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        let limit = this.layer.limit;
        loop {
            match this.state.as_mut().project() {
                StateProj::Calling { future } => {
                    let (parts, body) = ready!(future.poll(cx)).map_err(Into::into)?.into_parts();
                    if body.size_hint().lower() > limit as u64 {
                        return Poll::Ready(Err(BodyTooLarge::new(limit).into()));
                    }
                    this.state.set(State::LazyNow {
                        parts: Some(parts),
                        body,
                        read: Vec::new(),
                        progress: BodyProgress::default(),
                    });
                }
                StateProj::LazyNow {
                    parts,
                    mut body,
                    read,
                    progress,
                } => {
                    let frame = ready!(body.as_mut().poll_frame(cx)).transpose();
                    let Some(frame) = frame.map_err(|error| BodyFailed::new(&*error.into()))? else {
                        let bytes = Bytes::from(mem::take(read));
                        this.layer.tell(*progress, &bytes);
                        let parts = parts.take().expect("a future is not polled after it was ready");
                        return Poll::Ready(Ok(Response::from_parts(parts, bytes)));
                    };
                    if let Ok(data) = frame.into_data() {
                        progress.add(data.len());
                        if data.len() > limit - read.len() {
                            return Poll::Ready(Err(BodyTooLarge::new(limit).into()));
                        }
                        read.extend_from_slice(&data);
                    }
                }
            }
        }
    }
}

impl CollectLayer {
    fn tell(self, progress: BodyProgress, bytes: &Bytes) {
        let Some(event) = event::current() else { return };
        event.set_body_progress(progress);
        if self.is_recorded {
            event.set_response_body(match std::str::from_utf8(bytes) {
                Ok(text) => Value::from(text),
                Err(_) => Value::from(format!("[{} bytes]", bytes.len())),
            });
        }
    }
}

impl<F, B> fmt::Debug for ResponseFuture<F, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("collect::ResponseFuture").finish_non_exhaustive()
    }
}
