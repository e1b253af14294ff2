//! How a [`Channel`] ends its calls before they have a response, when the queue is stopped.

use super::{
    channel::Channel,
    message::{EarlyEnd, Ended},
};
use crate::{
    panic::{self, catch_unwind},
    sync::atomic::Ordering,
};
use std::sync::Arc;

impl<Req, Res> Channel<Req, Res> {
    /// Stops accepting calls, and cancels the accepted ones.
    pub(super) fn abort(self: &Arc<Self>) {
        self.close();
        self.cancel_queued();
        let calls = self.lock().workers.calls();
        for message in calls {
            let _ = catch_unwind(|| self.end_early(&message, EarlyEnd::Cancelled));
        }
    }

    /// Stops accepting calls, and cancels the accepted ones, except those that are on the wire.
    ///
    /// The worker of a running call decides whether the call is on the wire, when it is not polling the call: so it
    /// cannot cancel a call that is just being sent.
    pub(super) fn finish_sent(self: &Arc<Self>) {
        self.only_sent.store(true, Ordering::Release);
        self.close();
        self.cancel_queued();
        let calls = self.lock().workers.calls();
        for message in calls {
            let ended = catch_unwind(|| message.end_queued(EarlyEnd::Cancelled));
            match ended {
                Ok(Ended::ByWorker(worker)) => {
                    let waker = self.lock().workers.waker(worker);
                    waker.into_iter().for_each(panic::wake);
                }
                // The call has not begun: the worker that has taken it finds it ended.
                Ok(Ended::InQueue) | Err(_) => self.remove_deadline(&message),
                Ok(Ended::Before) => {}
            }
        }
    }

    /// Whether calls that are not on the wire are to be cancelled.
    pub(super) fn finishes_only_sent(&self) -> bool {
        self.only_sent.load(Ordering::Acquire)
    }
}
