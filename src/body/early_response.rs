//! The early-response channel: hands a response to the caller before the call has ended.
//!
//! [`open_early_response`] puts the sending side into the request's extensions and returns the receiver. The request
//! carries the sender through all layers down to [`BodyService`](super::BodyService), which sends the response as soon
//! as its head has arrived, past the layers in between. The call itself ends later, with the body.
//!
//! A second extension, [`Delivered`], records whether the response was sent. A retry policy reads it with
//! [`is_delivered`], without knowing the type of the response.

use http::{Request, Response};
use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicBool, Ordering},
};
use tokio::sync::oneshot;

/// The sending side: an extension of the request.
///
/// A retry policy clones the request with its extensions. The clones share one sender, so that at most one response is
/// sent.
pub(super) struct EarlyResponse<R> {
    sender: Arc<Mutex<Option<oneshot::Sender<Response<R>>>>>,
    delivered: Delivered,
}

/// Whether a response of this request was sent to the caller: an extension of the request.
#[derive(Clone, Default)]
struct Delivered(Arc<AtomicBool>);

/// The caller's side. It fails when the request is dropped, or taken out of the channel, without an early response.
pub(crate) type EarlyResponseReceiver<R> = oneshot::Receiver<Response<R>>;

/// Lets a [`BodyLayer`](super::BodyLayer) further down send the response of `request` as soon as its head has arrived.
pub(crate) fn open_early_response<B, R: Send + 'static>(request: &mut Request<B>) -> EarlyResponseReceiver<R> {
    let (sender, receiver) = oneshot::channel::<Response<R>>();
    let delivered = Delivered::default();
    request.extensions_mut().insert(delivered.clone());
    request.extensions_mut().insert(EarlyResponse {
        sender: Arc::new(Mutex::new(Some(sender))),
        delivered,
    });
    receiver
}

/// Whether a response of this request was sent to the caller. If so, the call must not be retried.
pub(crate) fn is_delivered<B>(request: &Request<B>) -> bool {
    let delivered = request.extensions().get::<Delivered>();
    delivered.is_some_and(|delivered| delivered.0.load(Ordering::Acquire))
}

// === impl EarlyResponse ===

impl<R: Send + 'static> EarlyResponse<R> {
    /// Removes the sending side from the request. `None` if the channel was not opened for this type of response.
    pub(super) fn take<B>(request: &mut Request<B>) -> Option<Self> {
        request.extensions_mut().remove()
    }

    /// Sends the response to the caller.
    ///
    /// # Errors
    ///
    /// Returns the response if one was sent before, or if the caller has dropped the receiver.
    #[allow(clippy::result_large_err, reason = "returns the response that was not sent")]
    pub(super) fn send(&self, response: Response<R>) -> Result<(), Response<R>> {
        let sender = self.sender.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(sender) = sender else { return Err(response) };
        // Set before the response is sent, so that it is visible to every thread that sees the response.
        self.delivered.0.store(true, Ordering::Release);
        sender.send(response)
    }
}

impl<R> Clone for EarlyResponse<R> {
    fn clone(&self) -> Self {
        Self {
            sender: self.sender.clone(),
            delivered: self.delivered.clone(),
        }
    }
}
