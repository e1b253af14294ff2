//! How a [`Channel`] ends its calls before they have a response, when the queue is stopped.

use super::{
    channel::Channel,
    message::{EarlyEnd, Message},
};
use crate::{
    panic::{self, catch_unwind},
    sync::atomic::{AtomicBool, Ordering},
};
use std::sync::Arc;

impl<Req, Res> Channel<Req, Res> {
    /// Stops accepting calls, and cancels the accepted ones.
    pub(super) fn abort(self: &Arc<Self>) {
        self.stop(&self.aborted);
    }

    /// Stops accepting calls, and cancels the accepted ones, except those that are on the wire.
    ///
    /// The worker of a running call decides whether the call is on the wire, when it is not polling the call: so it
    /// cannot cancel a call that is just being sent.
    pub(super) fn finish_sent(self: &Arc<Self>) {
        self.stop(&self.only_sent);
    }

    /// A call that a worker has taken, and so is not queued any more, is ended by its worker, which sees the flag.
    fn stop(self: &Arc<Self>, flag: &AtomicBool) {
        flag.store(true, Ordering::Release);
        self.close();
        self.cancel_queued();
        let wakers = self.lock().workers.wakers();
        wakers.into_iter().for_each(panic::wake);
    }

    /// Ends a call that has begun, if all calls are to be cancelled.
    #[inline]
    pub(super) fn end_if_aborted(&self, message: &Message<Req, Res>) {
        if self.aborted.load(Ordering::Acquire) {
            cancel(message);
        }
    }

    /// Ends a call that a worker has taken and not begun, if such calls are to be cancelled.
    #[inline]
    pub(super) fn end_if_stopped(&self, message: &Message<Req, Res>) {
        if self.is_stopped() {
            cancel(message);
        }
    }

    /// Whether calls that have not begun are to be cancelled.
    pub(super) fn is_stopped(&self) -> bool {
        self.aborted.load(Ordering::Acquire) || self.finishes_only_sent()
    }

    /// Whether calls that are not on the wire are to be cancelled.
    pub(super) fn finishes_only_sent(&self) -> bool {
        self.only_sent.load(Ordering::Acquire)
    }
}

#[cold]
fn cancel<Req, Res>(message: &Message<Req, Res>) {
    let _ = catch_unwind(|| message.end_early(EarlyEnd::Cancelled));
}
