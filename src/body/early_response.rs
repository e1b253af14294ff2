//! The early-response channel: hands a response to the caller before the call has ended.
//!
//! [`open_early_response`] puts the sender of the channel into the extensions of the http request, and returns the
//! receiver. The request carries the sender through all layers down to [`BodyService`](super::BodyService), which sends
//! the response as soon as its head has arrived, past the layers in between. The call itself ends later, together with
//! the body of the response.
//!
//! Another extension of the request, [`Delivered`], records whether the response was sent early: a call whose response
//! was sent early must not be retried. A retry policy reads the extension with [`is_delivered`], without having to know
//! the type of the response.

use http::{Request, Response};
use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicBool, Ordering},
};
use tokio::sync::oneshot;

/// The sending side of the early-response channel: an extension of the http request.
///
/// A retry policy clones the request with its extensions. The clones share one sender, so that at most one early
/// response is sent to the caller.
pub(super) struct EarlyResponse<R> {
    sender: Arc<Mutex<Option<oneshot::Sender<Response<R>>>>>,
    delivered: Delivered,
}

/// An extension of the http request: a flag that is true once the sender of the early-response channel was used. The
/// flag is also true if the response could not be sent because the caller had dropped the receiver.
#[derive(Clone, Default)]
pub(super) struct Delivered(Arc<AtomicBool>);

/// The caller's side of the early-response channel. Receiving fails when all copies of the sender were dropped without
/// sending an early response: those in the clones of the request, and those that calls have taken out of their
/// requests.
pub(crate) type EarlyResponseReceiver<R> = oneshot::Receiver<Response<R>>;

/// Opens an early-response channel for `request` and returns the receiver. A [`BodyLayer`](super::BodyLayer) further
/// down the stack sends the response through the channel as soon as the head of the response has arrived.
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

impl Delivered {
    /// Returns the flag of a request, if it has an early-response channel.
    #[cfg(feature = "json")]
    pub(super) fn of<B>(request: &Request<B>) -> Option<Self> {
        request.extensions().get().cloned()
    }

    pub(super) fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// Returns whether an early response to `request` was sent to the caller, or was to be sent but the caller had dropped
/// the receiver. A retry policy must not repeat such a call: the caller has its response, or does not wait for one.
pub(crate) fn is_delivered<B>(request: &Request<B>) -> bool {
    let delivered = request.extensions().get::<Delivered>();
    delivered.is_some_and(Delivered::is_set)
}

// === impl EarlyResponse ===

impl<R: Send + 'static> EarlyResponse<R> {
    /// Removes the sending side of the early-response channel from the request, and returns it. Returns `None` if the
    /// request has none: no channel was opened, or one for responses whose body has another type than `R`.
    pub(super) fn take<B>(request: &mut Request<B>) -> Option<Self> {
        request.extensions_mut().remove()
    }

    /// Sends the response to the caller through the early-response channel.
    ///
    /// # Errors
    ///
    /// Returns the unsent response if an early response was sent before, or if the caller has dropped the receiver.
    #[allow(clippy::result_large_err, reason = "returns the response that was not sent")]
    pub(super) fn send(&self, response: Response<R>) -> Result<(), Response<R>> {
        let sender = self.sender.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(sender) = sender else { return Err(response) };
        // The flag `delivered` is set before the response is sent, so that a thread that has received the response also
        // sees the flag.
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
