//! [`Calls`]: the calls that wait in a schedule, and the lists of them in which each waits.

use super::fair::Units;
use crate::rate::Cost;
use slab::Slab;

/// A call that waits.
#[derive(Debug)]
pub(super) struct QueuedCall<T> {
    pub(super) leaf: usize,
    pub(super) class: u8,
    /// When the call arrived plus the slack of its class, in nanoseconds: of two classes, the call with less goes first.
    pub(super) due: u64,
    pub(super) seq: u64,
    pub(super) cost: Cost,
    /// What the cost counts in the fair order.
    pub(super) units: Units,
    /// What the caller keeps with the call.
    pub(super) payload: T,
    before: Option<usize>,
    after: Option<usize>,
}

/// The calls of one class of one flow, in their order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct List {
    pub(super) first: Option<usize>,
    last: Option<usize>,
}

/// All calls that wait. Each is in the list of its flow and class, so that it can be cancelled wherever it stands.
#[derive(Debug)]
pub(super) struct Calls<T> {
    calls: Slab<QueuedCall<T>>,
}

impl<T> Calls<T> {
    pub(super) const fn new() -> Self {
        Self { calls: Slab::new() }
    }

    pub(super) fn get(&self, id: usize) -> Option<&QueuedCall<T>> {
        self.calls.get(id)
    }

    pub(super) fn len(&self) -> usize {
        self.calls.len()
    }

    /// Returns the call behind another one in the same list.
    pub(super) fn after(&self, id: usize) -> Option<usize> {
        self.calls.get(id)?.after
    }

    /// Returns the calls of a list in their order.
    pub(super) fn of(&self, list: List) -> impl Iterator<Item = &QueuedCall<T>> {
        let first = list.first.and_then(|id| self.calls.get(id));
        std::iter::successors(first, |call| self.calls.get(call.after?))
    }

    /// Adds a call to `list`, at its place by its sequence number. Almost every call has the highest one; only an attempt
    /// that is made again comes back with the number that it had.
    pub(super) fn insert(&mut self, list: &mut List, call: QueuedCall<T>) -> usize {
        let seq_of = |id: Option<usize>| id.and_then(|id| self.calls.get(id)).map(|call| call.seq);
        let (mut before, mut after) = (list.last, None);
        if seq_of(before).is_some_and(|last| call.seq < last) {
            (before, after) = (None, list.first);
            while seq_of(after).is_some_and(|seq| seq < call.seq) {
                before = after;
                after = after.and_then(|id| self.calls.get(id)?.after);
            }
        }
        let id = self.calls.insert(QueuedCall { before, after, ..call });
        self.link(list, before, Some(id));
        self.link_back(list, after, Some(id));
        id
    }

    /// Removes a call from `list`, in which it is.
    pub(super) fn remove(&mut self, list: &mut List, id: usize) -> QueuedCall<T> {
        let call = self.calls.remove(id);
        self.link(list, call.before, call.after);
        self.link_back(list, call.after, call.before);
        call
    }

    fn link(&mut self, list: &mut List, before: Option<usize>, after: Option<usize>) {
        match before.and_then(|id| self.calls.get_mut(id)) {
            Some(call) => call.after = after,
            None => list.first = after,
        }
    }

    fn link_back(&mut self, list: &mut List, after: Option<usize>, before: Option<usize>) {
        match after.and_then(|id| self.calls.get_mut(id)) {
            Some(call) => call.before = before,
            None => list.last = before,
        }
    }
}

impl<T> QueuedCall<T> {
    pub(super) const fn new(leaf: usize, class: u8, due: u64, seq: u64, cost: Cost, units: Units, payload: T) -> Self {
        Self {
            leaf,
            class,
            due,
            seq,
            cost,
            units,
            payload,
            before: None,
            after: None,
        }
    }
}
