//! A call that ends when its response's body does, while its caller has the response as soon as there is a head.
//!
//! Two layers work together. [`BodyLayer`] stands around the client: it hands the response to the caller by a way of
//! its own, past all the layers above, and lets the *call* go on until the body is over. So whatever a layer holds for
//! a call (its permit, its event, its estimate of tokens, a deadline) it holds until then, and no layer has to know of
//! bodies. [`StreamLayer`] stands on top and waits for that response;
//! [`Executor::submit`](crate::Executor::submit) does so itself, if it was
//! [built for it](crate::ExecutorBuilder::build_streaming).
//!
//! Only a success is handed over like that. A response that says why there is none is short: it is read first, and goes
//! the ordinary way, so that a retry can look at it. So does the response of a call nobody waits for any more.

use super::stream_body::{End, StreamBody};
use crate::{
    error::{BodyFailed, BoxError, Cancelled, Panicked},
    event::{self, BodyProgress, Scope},
};
use bytes::Bytes;
use http::{Request, Response, response::Parts};
use http_body::Body;
use pin_project_lite::pin_project;
use std::{
    fmt,
    future::{Future, poll_fn},
    mem,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
};
use tokio::{sync::oneshot, task::JoinHandle};
use tower_layer::Layer;
use tower_service::Service;

/// Around the client: the call ends when its body does. See the [module docs](super#streams).
#[derive(Clone, Copy, Debug, Default)]
pub struct BodyLayer(());

/// A client whose calls end with their bodies. See the [module docs](super#streams).
#[derive(Clone, Debug)]
pub struct BodyService<S> {
    inner: S,
}

/// On top of a stack with a [`BodyLayer`] in it: returns the response when its head is there, and the call goes on. See
/// the [module docs](super#streams).
#[derive(Clone, Copy, Debug, Default)]
pub struct StreamLayer(());

/// A service that returns responses whose bodies are still on their way. See the [module docs](super#streams).
#[derive(Clone, Debug)]
pub struct StreamService<S> {
    inner: S,
}

/// No more is read of a response that is no success: it has said why by then.
const MOST_READ: usize = 64 * 1024;

/// Where the caller waits for a response: an extension of the request.
struct EarlyResponse<R> {
    waiting: Arc<Mutex<Option<oneshot::Sender<Response<R>>>>>,
    delivered: Delivered,
}

/// Whether the caller has the response of this request: another extension, to be asked without knowing its type.
#[derive(Clone, Default)]
struct Delivered(Arc<AtomicBool>);

/// The caller's end of it.
pub(crate) type EarlyResponseReceiver<R> = oneshot::Receiver<Response<R>>;

pin_project! {
    /// A call on the wire, until its body is over.
    ///
    /// # Cancel safety
    ///
    /// Dropped, the call is over, and its body's next frame is an error.
    #[must_use = "futures do nothing unless polled"]
    pub struct BodyFuture<F, B> {
        #[pin]
        state: State<F, B>,
        open_early_response: Option<EarlyResponse<StreamBody<B>>>,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<F, B> {
        Calling { #[pin] future: F },
        /// It is no success: what it says is read.
        LazyNow { parts: Option<Parts>, #[pin] body: B, read: Vec<u8>, progress: BodyProgress },
        /// The caller has it.
        Streaming { parts: Option<Parts>, end: oneshot::Receiver<End> },
    }
}

/// A call whose caller waits for its head.
///
/// # Cancel safety
///
/// Dropped before the head is there, the call is ended. After that, the body decides.
#[must_use = "dropping it ends the call"]
pub struct StreamFuture<R> {
    head: Option<EarlyResponseReceiver<R>>,
    call: Option<JoinHandle<Result<Response<R>, BoxError>>>,
}

// === impl EarlyResponse ===

impl<R: Send + 'static> EarlyResponse<R> {
    fn take<B>(request: &mut Request<B>) -> Option<Self> {
        request.extensions_mut().remove()
    }

    /// Hands the response to whoever waits for it; back, if nobody does.
    fn accept(&self, response: Response<R>) -> Result<(), Response<R>> {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(waiting) = waiting else { return Err(response) };
        self.delivered.0.store(true, Ordering::Release);
        waiting.send(response)
    }
}

impl<R> Clone for EarlyResponse<R> {
    fn clone(&self) -> Self {
        Self {
            waiting: self.waiting.clone(),
            delivered: self.delivered.clone(),
        }
    }
}

/// Lets a [`BodyLayer`] further down hand the response over as soon as its head is there.
pub(crate) fn open_early_response<B, R: Send + 'static>(request: &mut Request<B>) -> EarlyResponseReceiver<R> {
    let (waiting, head) = oneshot::channel::<Response<R>>();
    let delivered = Delivered::default();
    request.extensions_mut().insert(delivered.clone());
    request.extensions_mut().insert(EarlyResponse {
        waiting: Arc::new(Mutex::new(Some(waiting))),
        delivered,
    });
    head
}

/// Whether the caller has the response: then it is too late to make the call again.
pub(crate) fn is_delivered<B>(request: &Request<B>) -> bool {
    let delivered = request.extensions().get::<Delivered>();
    delivered.is_some_and(|delivered| delivered.0.load(Ordering::Acquire))
}

// === impl BodyLayer ===

impl BodyLayer {
    /// The layer.
    #[must_use]
    pub const fn new() -> Self {
        Self(())
    }
}

impl<S> Layer<S> for BodyLayer {
    type Service = BodyService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        BodyService { inner }
    }
}

impl<S, B, R> Service<Request<B>> for BodyService<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Error: Into<BoxError>,
    R: Body<Data = Bytes> + Send + 'static,
    R::Error: Into<BoxError>,
{
    type Response = Response<StreamBody<R>>;
    type Error = BoxError;
    type Future = BodyFuture<S::Future, R>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, mut req: Request<B>) -> Self::Future {
        let open_early_response = EarlyResponse::take(&mut req);
        BodyFuture {
            state: State::Calling {
                future: self.inner.call(req),
            },
            open_early_response,
        }
    }
}

// === impl BodyFuture ===

impl<F, B, E> Future for BodyFuture<F, B>
where
    F: Future<Output = Result<Response<B>, E>>,
    E: Into<BoxError>,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    type Output = Result<Response<StreamBody<B>>, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        loop {
            let next = match this.state.as_mut().project() {
                StateProj::Calling { future } => {
                    let response = ready!(future.poll(cx)).map_err(Into::into)?;
                    let (parts, body) = response.into_parts();
                    let Some(open_early_response) = this.open_early_response.as_ref().filter(|_| !body.is_end_stream())
                    else {
                        return Poll::Ready(Ok(Response::from_parts(parts, StreamBody::alone(body))));
                    };
                    if parts.status.is_success() {
                        match deliver(open_early_response, parts, body) {
                            Ok(state) => state,
                            Err(response) => return Poll::Ready(Ok(response)),
                        }
                    } else {
                        State::LazyNow {
                            parts: Some(parts),
                            body,
                            read: Vec::new(),
                            progress: BodyProgress::default(),
                        }
                    }
                }
                StateProj::LazyNow {
                    parts,
                    mut body,
                    read,
                    progress,
                } => {
                    let frame = ready!(body.as_mut().poll_frame(cx)).transpose();
                    let frame = frame.map_err(|error| BodyFailed::new(&*error.into()))?;
                    let is_whole = frame.is_none() || body.is_end_stream();
                    if let Some(data) = frame.and_then(|frame| frame.into_data().ok()) {
                        progress.add(data.len());
                        let room = MOST_READ - read.len();
                        read.extend_from_slice(&data[..data.len().min(room)]);
                    }
                    if !is_whole && read.len() < MOST_READ {
                        continue;
                    }
                    record(*progress);
                    let parts = parts.take().expect("a future is not polled after it was ready");
                    let body = StreamBody::whole(mem::take(read).into());
                    return Poll::Ready(Ok(Response::from_parts(parts, body)));
                }
                StateProj::Streaming { parts, end } => {
                    // A body never goes without a word.
                    let end = ready!(Pin::new(end).poll(cx)).unwrap_or(End::Dropped(BodyProgress::default()));
                    let parts = parts.take().expect("a future is not polled after it was ready");
                    return Poll::Ready(ended(parts, end));
                }
            };
            this.state.set(next);
        }
    }
}

/// The caller has the response from now on; or it comes back, if nobody waits for it.
#[allow(clippy::result_large_err, reason = "it hands the response back")]
fn deliver<F, B: Send + 'static>(
    open_early_response: &EarlyResponse<StreamBody<B>>,
    parts: Parts,
    body: B,
) -> Result<State<F, B>, Response<StreamBody<B>>> {
    let (told, end) = oneshot::channel();
    let response = Response::from_parts(parts.clone(), StreamBody::watched(body, told));
    match open_early_response.accept(response) {
        Ok(()) => Ok(State::Streaming {
            parts: Some(parts),
            end,
        }),
        Err(response) => Err(response.map(StreamBody::left_alone)),
    }
}

/// What becomes of a call whose body is over. Nobody looks at the response any more but the layers above.
fn ended<B>(parts: Parts, end: End) -> Result<Response<StreamBody<B>>, BoxError> {
    match end {
        End::Whole(progress) => {
            record(progress);
            Ok(Response::from_parts(parts, StreamBody::whole(Bytes::new())))
        }
        End::Failed(progress, error) => {
            record(progress);
            Err(error.into())
        }
        End::Dropped(progress) => {
            record(progress);
            // Whoever made the call has given it up.
            if let Some(event) = event::current() {
                event.cancel();
            }
            Err(Cancelled::new().into())
        }
    }
}

fn record(progress: BodyProgress) {
    if let Some(event) = event::current() {
        event.set_body_progress(progress);
    }
}

impl<F, B> fmt::Debug for BodyFuture<F, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BodyFuture").finish_non_exhaustive()
    }
}

// === impl StreamLayer ===

impl StreamLayer {
    /// The layer.
    #[must_use]
    pub const fn new() -> Self {
        Self(())
    }
}

impl<S> Layer<S> for StreamLayer {
    type Service = StreamService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        StreamService { inner }
    }
}

/// # Panics
///
/// `call` spawns a task that carries the call, so it panics outside a Tokio runtime.
impl<S, B, R> Service<Request<B>> for StreamService<S>
where
    S: Service<Request<B>, Response = Response<StreamBody<R>>>,
    S::Future: Send + 'static,
    S::Error: Into<BoxError>,
    R: Send + 'static,
{
    type Response = S::Response;
    type Error = BoxError;
    type Future = StreamFuture<StreamBody<R>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, mut req: Request<B>) -> Self::Future {
        let head = open_early_response(&mut req);
        let mut scope = Scope::capture();
        let mut call = Box::pin(self.inner.call(req));
        let call = tokio::spawn(poll_fn(move |cx| {
            let _entered = scope.enter();
            call.as_mut().poll(cx).map_err(Into::into)
        }));
        StreamFuture {
            head: Some(head),
            call: Some(call),
        }
    }
}

// === impl StreamFuture ===

impl<R> Future for StreamFuture<R> {
    type Output = Result<Response<R>, BoxError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if let Some(head) = &mut self.head {
            match Pin::new(head).poll(cx) {
                Poll::Ready(Ok(response)) => {
                    // From here on the body decides.
                    self.call = None;
                    return Poll::Ready(Ok(response));
                }
                Poll::Ready(Err(_)) => self.head = None,
                Poll::Pending => {}
            }
        }
        let call = self.call.as_mut().expect("a future is not polled after it was ready");
        let ended = ready!(Pin::new(call).poll(cx));
        self.call = None;
        Poll::Ready(match ended {
            Ok(result) => result,
            Err(error) => Err(match error.try_into_panic() {
                Ok(payload) => Panicked::from_payload(&*payload).into(),
                // Its runtime is shut down.
                Err(_) => Cancelled::new().into(),
            }),
        })
    }
}

impl<R> Drop for StreamFuture<R> {
    fn drop(&mut self) {
        if let Some(call) = &self.call {
            call.abort();
        }
    }
}

impl<R> fmt::Debug for StreamFuture<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StreamFuture").finish_non_exhaustive()
    }
}
