//! [`OnTurn`]: the inner service of a call that waits for a limit, which is asked to be ready when the call's turn has
//! come, and not before.
//!
//! A service that is ready holds something for the call, such as a place in a `Buffer`, a permit of another limit, or a
//! connection. A call that waited with a ready service would keep that from others, and would find a connection that was
//! closed in the meantime.

use std::task::{Context, Poll};
use tower_service::Service;

/// The inner service of one call. See the [module docs](self).
pub(crate) struct OnTurn<S> {
    service: S,
    /// Whether the service was asked to be ready, so that it may hold something for the call.
    is_asked: bool,
}

impl<S> OnTurn<S> {
    /// Creates the inner service of a call from a service that was not asked to be ready.
    pub(crate) const fn new(service: S) -> Self {
        Self {
            service,
            is_asked: false,
        }
    }

    /// Waits until the service is ready. To be called when it is the call's turn.
    pub(crate) fn poll_ready<Req>(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>>
    where
        S: Service<Req>,
    {
        self.is_asked = true;
        self.service.poll_ready(cx)
    }

    /// Gives back what the service holds for the call, because the call has lost its turn and has to wait again: the
    /// service is replaced by a clone, which was not asked to be ready.
    pub(crate) fn give_back(&mut self)
    where
        S: Clone,
    {
        if self.is_asked {
            *self = Self::new(self.service.clone());
        }
    }

    /// Calls the service, which must be ready.
    pub(crate) fn call<Req>(&mut self, req: Req) -> S::Future
    where
        S: Service<Req>,
    {
        self.service.call(req)
    }
}
