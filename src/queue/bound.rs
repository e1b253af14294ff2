//! [`Binding`]: the flow to which a handle of a scheduled queue is bound, and how the handle waits for a place for it.
//!
//! A handle that waits stands at the [door](super::door) like a call of its flow. When it is its turn, a free place is
//! *offered* to it: the handle is woken, and is ready. It does not have the place. If it is not called within 5 ms, the next
//! one is offered the place.

use super::channel::Channel;
use crate::{
    panic,
    schedule::{Flow, FlowKey},
    sync::{Mutex, MutexGuard},
};
use std::{
    sync::{Arc, PoisonError},
    task::{Context, Poll, Waker},
};

/// The flow of a handle.
pub(super) struct Binding<Req, Res> {
    channel: Arc<Channel<Req, Res>>,
    pub(super) flow: Flow,
    path: Arc<[FlowKey]>,
    /// Where the handle stands at the door. `None` while it need not wait.
    waiter: Option<Arc<ReadyWaiter>>,
}

/// A handle at the door.
pub(super) struct ReadyWaiter {
    /// Its key among the calls and handles of the channel.
    pub(super) key: u32,
    /// The number of its flow at the door.
    pub(super) flow: usize,
    /// The order in which it came to the door.
    pub(super) order: u64,
    state: Mutex<ReadyState>,
}

#[derive(Default)]
struct ReadyState {
    waker: Option<Waker>,
    /// Whether a place was offered to the handle.
    is_offered: bool,
}

impl<Req, Res> Binding<Req, Res> {
    pub(super) const fn new(channel: Arc<Channel<Req, Res>>, flow: Flow, path: Arc<[FlowKey]>) -> Self {
        Self {
            channel,
            flow,
            path,
            waiter: None,
        }
    }

    /// Waits until a call of the flow would get a place at once.
    pub(super) fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let waiter = match &self.waiter {
            Some(waiter) => waiter,
            None => match self.channel.wait_at_door(&self.path) {
                Some(waiter) => self.waiter.insert(waiter),
                None => return Poll::Ready(()),
            },
        };
        if waiter.poll_offered(cx).is_ready() || self.channel.is_closed() {
            return Poll::Ready(());
        }
        Poll::Pending
    }

    /// Ends the wait of the handle, because it is called. Returns whether a place was offered to it.
    pub(super) fn leave(&mut self) -> bool {
        let Some(waiter) = self.waiter.take() else { return false };
        let is_offered = waiter.lock().is_offered;
        self.channel.leave_door(&waiter);
        is_offered
    }
}

/// The clone does not wait.
impl<Req, Res> Clone for Binding<Req, Res> {
    fn clone(&self) -> Self {
        Self::new(self.channel.clone(), self.flow.clone(), self.path.clone())
    }
}

impl<Req, Res> Drop for Binding<Req, Res> {
    fn drop(&mut self) {
        if self.leave() {
            // The place that was offered to this handle goes to the next call or handle at the door.
            self.channel.give_places();
        }
    }
}

impl ReadyWaiter {
    pub(super) fn new(key: u32, flow: usize, order: u64) -> Arc<Self> {
        Arc::new(Self {
            key,
            flow,
            order,
            state: Mutex::new(ReadyState::default()),
        })
    }

    /// Offers a place to the handle.
    pub(super) fn offer(&self) {
        let waker = {
            let mut state = self.lock();
            state.is_offered = true;
            state.waker.take()
        };
        waker.into_iter().for_each(panic::wake);
    }

    fn poll_offered(&self, cx: &Context<'_>) -> Poll<()> {
        let mut state = self.lock();
        if state.is_offered {
            return Poll::Ready(());
        }
        let replaced = match &state.waker {
            Some(waker) if waker.will_wake(cx.waker()) => None,
            _ => state.waker.replace(cx.waker().clone()),
        };
        drop(state);
        drop(replaced);
        Poll::Pending
    }

    fn lock(&self) -> MutexGuard<'_, ReadyState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
