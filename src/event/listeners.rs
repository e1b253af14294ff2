//! [`Listeners`]: functions that are told of every step of every call.

use super::change::Change;
use crate::panic::catch_unwind;
use std::sync::OnceLock;

/// The functions that are told of every step of every call, in the order in which they were added. None is ever removed.
///
/// A list to whose end further functions can be added, so that it is read without a lock: nearly always, it is empty.
pub(super) struct Listeners<H>(OnceLock<Box<Node<H>>>);

struct Node<H> {
    listener: Box<Listener<H>>,
    next: Listeners<H>,
}

/// Gets a handle to the event, if there is one, and the step.
type Listener<H> = dyn Fn(Option<&H>, Change<'_>) + Send + Sync;

impl<H> Listeners<H> {
    pub(super) const fn new() -> Self {
        Self(OnceLock::new())
    }

    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.0.get().is_none()
    }

    pub(super) fn add(&self, listener: impl Fn(Option<&H>, Change<'_>) + Send + Sync + 'static) {
        let mut node = Box::new(Node {
            listener: Box::new(listener),
            next: Self::new(),
        });
        let mut end = self;
        // A function that was added meanwhile is returned in place of the node.
        while let Err(back) = end.0.set(node) {
            node = back;
            while let Some(next) = end.0.get() {
                end = &next.next;
            }
        }
    }

    /// Tells all functions. A panic of one of them is logged, and has no further effect.
    #[cold]
    pub(super) fn tell(&self, handle: Option<&H>, change: Change<'_>) {
        let mut rest = self;
        while let Some(node) = rest.0.get() {
            if let Err(panic) = catch_unwind(|| (node.listener)(handle, change)) {
                tracing::error!(target: "tower_outbound", panic, "An observer of calls has panicked");
            }
            rest = &node.next;
        }
    }
}
