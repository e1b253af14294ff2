//! [`Workers`]: the workers of a queue, and which of them are idle.

use super::channel::StartEpoch;
use std::{mem, task::Waker};

/// The workers of a queue, each with an id.
pub(super) struct Workers {
    entries: Vec<Option<Entry>>,
    /// The ids without a worker.
    free: Vec<usize>,
    /// The ids of the idle workers. The one that was idle last is woken first, because its memory is likely in a cache.
    idle: Vec<usize>,
}

struct Entry {
    /// The waker of the worker's task. `None` until its first poll, which does what a wake-up would.
    waker: Option<Waker>,
    /// Set when the worker is woken or spawned for a queued call, which counts as starting since.
    assignment: Option<StartEpoch>,
    is_idle: bool,
}

/// How many idle workers are kept besides as many as calls are in flight. At least one worker is always kept: when it
/// is dropped, the queue knows that its runtime is shut down.
const SPARE_WORKERS: usize = 4;

impl Workers {
    pub(super) const fn new() -> Self {
        Self {
            entries: Vec::new(),
            free: Vec::new(),
            idle: Vec::new(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.free.len() == self.entries.len()
    }

    /// Adds a worker that is about to be spawned, and returns its id.
    pub(super) fn add(&mut self) -> usize {
        let entry = Some(Entry {
            waker: None,
            assignment: None,
            is_idle: false,
        });
        if let Some(id) = self.free.pop() {
            self.entries[id] = entry;
            return id;
        }
        self.entries.push(entry);
        self.entries.len() - 1
    }

    /// Adds a worker that is about to be spawned for a queued call.
    pub(super) fn add_assigned(&mut self, epoch: StartEpoch) -> usize {
        let id = self.add();
        if let Some(entry) = self.entry(id) {
            entry.assignment = Some(epoch);
        }
        id
    }

    /// Removes a worker. Returns what was kept of it, which is to be dropped without the lock.
    pub(super) fn remove(&mut self, id: usize) -> impl Sized + use<> {
        self.end_idle(id);
        let removed = self.entries.get_mut(id).and_then(Option::take);
        if removed.is_some() {
            self.free.push(id);
        }
        if self.is_empty() {
            *self = Self::new();
        }
        removed
    }

    /// Assigns an idle worker to a queued call, and returns its waker, which a worker has from its first poll on. `None`
    /// if no worker is idle.
    pub(super) fn assign(&mut self, epoch: StartEpoch) -> Option<Option<Waker>> {
        let entry = self.idle.pop().and_then(|id| self.entries[id].as_mut())?;
        entry.is_idle = false;
        entry.assignment = Some(epoch);
        Some(entry.waker.clone())
    }

    /// Ends the assignment of a worker that is polled, and that is therefore no longer idle.
    pub(super) fn take_assignment(&mut self, id: usize) -> Option<StartEpoch> {
        self.end_idle(id);
        self.entry(id)?.assignment.take()
    }

    /// Sets the waker of the worker, which stays the same for as long as the worker exists.
    pub(super) fn set_waker(&mut self, id: usize, waker: &Waker) {
        let Some(entry) = self.entry(id) else { return };
        if !entry
            .waker
            .as_ref()
            .is_some_and(|registered| registered.will_wake(waker))
        {
            entry.waker = Some(waker.clone());
        }
    }

    /// Notes that the worker waits for a call.
    pub(super) fn set_idle(&mut self, id: usize) {
        if let Some(entry) = self.entry(id).filter(|entry| !entry.is_idle) {
            entry.is_idle = true;
            self.idle.push(id);
        }
    }

    /// Returns the wakers of the idle workers, which are no longer idle.
    pub(super) fn take_idle(&mut self) -> Vec<Waker> {
        let idle = mem::take(&mut self.idle);
        let taken = idle.into_iter().filter_map(|id| {
            let entry = self.entry(id)?;
            entry.is_idle = false;
            entry.waker.clone()
        });
        taken.collect()
    }

    /// Whether enough workers are idle while so many calls are in flight, so that a further one ends.
    pub(super) fn has_spare(&self, in_flight: usize) -> bool {
        self.idle.len() >= SPARE_WORKERS + in_flight
    }

    /// Returns the waker of an idle worker, which is no longer idle, if more are idle than are kept while so many calls
    /// are in flight.
    pub(super) fn take_surplus(&mut self, in_flight: usize) -> Option<Waker> {
        if self.idle.len() <= SPARE_WORKERS + in_flight {
            return None;
        }
        let entry = self.idle.pop().and_then(|id| self.entries[id].as_mut())?;
        entry.is_idle = false;
        entry.waker.clone()
    }

    pub(super) fn waker(&self, id: usize) -> Option<Waker> {
        self.entries.get(id)?.as_ref()?.waker.clone()
    }

    /// Returns the waker of an idle worker, which stays idle until it is polled.
    pub(super) fn any_idle(&self) -> Option<Waker> {
        self.waker(*self.idle.last()?)
    }

    /// Returns the wakers of all workers.
    pub(super) fn wakers(&self) -> Vec<Waker> {
        let entries = self.entries.iter().flatten();
        entries.filter_map(|entry| entry.waker.clone()).collect()
    }

    fn end_idle(&mut self, id: usize) {
        let Some(entry) = self.entry(id).filter(|entry| entry.is_idle) else {
            return;
        };
        entry.is_idle = false;
        if let Some(position) = self.idle.iter().rposition(|idle| *idle == id) {
            self.idle.remove(position);
        }
    }

    fn entry(&mut self, id: usize) -> Option<&mut Entry> {
        self.entries.get_mut(id)?.as_mut()
    }
}
