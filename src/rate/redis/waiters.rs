//! [`Waiters`]: the calls of this process that wait for a reservation or for the time that was reserved for them, in
//! the order in which they arrived.

use crate::{
    error::AcquireError,
    rate::{cost::Cost, demand::Demand},
};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    task::Waker,
};
use tokio::time::{Duration, Instant};

/// How long after its time a reservation may be used. If it were used later, it could exceed the limits together with
/// the reservations that follow. So it is given back, and a new one is requested. The error by which a process reads the
/// server's clock comes on top.
pub(super) const MAX_LATENESS: Duration = Duration::from_millis(5);
/// How long after its time a reservation is taken back if the waiter that has it was not polled.
const EXPIRES_AFTER: Duration = Duration::from_millis(6);

#[derive(Debug, Default)]
pub(super) struct Waiters {
    next_seq: u64,
    entries: BTreeMap<u64, WaiterEntry>,
    /// The queue: the sequence numbers of the waiters for whose costs no reservation has been requested from the store
    /// yet.
    queued: BTreeSet<u64>,
    /// The waiters that were given a reservation, with its time, in the order of these times. Some of these waiters may
    /// have been dropped or admitted since.
    reserved: VecDeque<(u64, Instant)>,
    /// The sum of the costs of the reservations that waiters hold and have not used yet.
    unused: Demand,
    /// Wakers that are no longer needed. They are dropped after the lock is released, because dropping a waker runs
    /// user code.
    discarded: Vec<Waker>,
}

#[derive(Debug)]
pub(super) struct WaiterEntry {
    pub(super) cost: Cost,
    /// When the waiter arrived.
    pub(super) since: Instant,
    /// Whether a schedule gives the reservation to the call that goes next then.
    is_of_schedule: bool,
    waker: Waker,
    stage: WaiterStage,
}

/// The progress of a waiter, from its arrival to its reservation or its rejection.
#[derive(Clone, Debug)]
pub(super) enum WaiterStage {
    /// The waiter has no reservation: it is in the queue, or its cost is in a request to the store.
    Waiting,
    Reserved(Reservation),
    /// The waiter's reservation was taken back, because the waiter was not polled in time. Its next poll puts it back
    /// into the queue.
    Expired,
    Rejected(AcquireError),
}

/// The right of one call to be admitted at the time `at`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reservation {
    pub(super) at: Instant,
    /// The time of the reservation by the store's clock, in microseconds since 1970; 0 if the local fallback made the
    /// reservation.
    pub(super) at_store: i64,
    /// Whether the store made this reservation, and not the local fallback.
    pub(super) is_from_store: bool,
    /// If the store made the reservation: how often the store had lost this member's estimates (costs charged before
    /// the true cost is known) by then. If a local fallback made it: the number of that fallback. A reservation whose
    /// generation is no longer the current one is not refunded.
    pub(super) generation: u64,
}

impl Waiters {
    /// Adds a waiter to the end of the queue, and returns its sequence number.
    pub(super) fn push(&mut self, cost: Cost, waker: Waker, now: Instant) -> u64 {
        let seq = self.next_seq;
        self.next_seq += 1;
        let entry = WaiterEntry {
            cost,
            since: now,
            is_of_schedule: false,
            waker,
            stage: WaiterStage::Waiting,
        };
        self.entries.insert(seq, entry);
        self.queued.insert(seq);
        seq
    }

    /// Returns the stage of the waiter (how far it has come: waiting, reserved, expired or rejected). `waker` is woken
    /// when the waiter is given a reservation or is rejected.
    pub(super) fn poll(&mut self, seq: u64, waker: Waker) -> WaiterStage {
        let entry = self.entries.get_mut(&seq).expect("a waiter is removed only once");
        self.discarded.push(std::mem::replace(&mut entry.waker, waker));
        entry.stage.clone()
    }

    /// Takes the wakers that are no longer needed, so that the caller drops them after it has released the lock.
    pub(super) fn take_discarded(&mut self) -> Vec<Waker> {
        std::mem::take(&mut self.discarded)
    }

    /// Puts the waiter back into the queue at its old place. A reservation that it has is taken away.
    pub(super) fn requeue(&mut self, seq: u64) {
        let entry = self.entries.get_mut(&seq).expect("a waiter is removed only once");
        if let WaiterStage::Reserved(_) = entry.stage {
            self.unused -= &entry.cost;
        }
        entry.stage = WaiterStage::Waiting;
        self.queued.insert(seq);
    }

    /// Removes the waiter. Returns its cost, and its reservation if it has one; `None` if there is no such waiter.
    pub(super) fn remove(&mut self, seq: u64) -> Option<(Cost, Option<Reservation>)> {
        let entry = self.entries.remove(&seq)?;
        self.queued.remove(&seq);
        let reservation = match entry.stage {
            WaiterStage::Reserved(reservation) => {
                self.unused -= &entry.cost;
                Some(reservation)
            }
            _ => None,
        };
        self.discarded.push(entry.waker);
        Some((entry.cost, reservation))
    }

    /// Returns the sequence numbers and costs of the waiters in the queue, in the order of their arrival.
    pub(super) fn queued(&self) -> impl Iterator<Item = (u64, Cost)> + '_ {
        self.queued.iter().map(|seq| (*seq, self.entries[seq].cost))
    }

    /// Returns the costs of the waiters in the queue that are calls, and not places of a schedule.
    pub(super) fn queued_calls(&self) -> impl Iterator<Item = Cost> + '_ {
        let entries = self.queued.iter().map(|seq| &self.entries[seq]);
        entries.filter(|entry| !entry.is_of_schedule).map(|entry| entry.cost)
    }

    pub(super) fn set_of_schedule(&mut self, seq: u64) {
        if let Some(entry) = self.entries.get_mut(&seq) {
            entry.is_of_schedule = true;
        }
    }

    pub(super) fn is_queue_empty(&self) -> bool {
        self.queued.is_empty()
    }

    /// Returns when the first waiter in the queue arrived; `None` if the queue is empty.
    pub(super) fn oldest(&self) -> Option<Instant> {
        self.queued.first().map(|seq| self.entries[seq].since)
    }

    /// Takes the waiters out of the queue, because their costs are in a request to the store now.
    pub(super) fn on_requested(&mut self, seqs: impl Iterator<Item = u64>) {
        for seq in seqs {
            self.queued.remove(&seq);
        }
    }

    /// Puts the waiter back into the queue, because a request to the store has not reserved its cost. Does nothing if
    /// the waiter was dropped. Returns whether it was not.
    pub(super) fn on_not_reserved(&mut self, seq: u64) -> bool {
        let is_waiting = self.entries.contains_key(&seq);
        if is_waiting {
            self.queued.insert(seq);
        }
        is_waiting
    }

    /// Gives the waiter its reservation. Returns `false` if the waiter was dropped before, and the caller has to give
    /// the reservation back.
    #[must_use]
    pub(super) fn on_reserved(&mut self, seq: u64, reservation: Reservation, wakers: &mut Vec<Waker>) -> bool {
        let Some(entry) = self.entries.get_mut(&seq) else {
            return false;
        };
        entry.stage = WaiterStage::Reserved(reservation);
        self.unused += &entry.cost;
        self.reserved.push_back((seq, reservation.at));
        self.queued.remove(&seq);
        wakers.push(entry.waker.clone());
        true
    }

    /// Rejects the waiters in the queue for which `reason` returns an error, and adds their wakers to `wakers`.
    pub(super) fn reject(&mut self, reason: impl Fn(&WaiterEntry) -> Option<AcquireError>, wakers: &mut Vec<Waker>) {
        let entries = &mut self.entries;
        self.queued.retain(|seq| {
            let entry = entries.get_mut(seq).expect("a queued waiter has an entry");
            let error = reason(entry);
            if let Some(error) = &error {
                entry.stage = WaiterStage::Rejected(error.clone());
                wakers.push(entry.waker.clone());
            }
            error.is_none()
        });
    }

    /// Rejects the waiter, whose cost was in a request to the store, and adds its waker to `wakers`. Does nothing if the
    /// waiter was dropped.
    pub(super) fn reject_one(&mut self, seq: u64, error: AcquireError, wakers: &mut Vec<Waker>) {
        if let Some(entry) = self.entries.get_mut(&seq) {
            entry.stage = WaiterStage::Rejected(error);
            self.queued.remove(&seq);
            wakers.push(entry.waker.clone());
        }
    }

    /// Takes back the reservations whose time has passed by `EXPIRES_AFTER` and whose waiters were not polled, and
    /// passes each of them to `on_expired`.
    pub(super) fn expire(&mut self, now: Instant, mut on_expired: impl FnMut(Cost, Reservation)) {
        while let Some((seq, at)) = self.reserved.front().copied() {
            let entry = self.entries.get_mut(&seq);
            // The reservation may be obsolete: its waiter may have been dropped or admitted, or may have another one by
            // now. Then it is only removed from the list.
            let entry =
                entry.filter(|entry| matches!(entry.stage, WaiterStage::Reserved(reservation) if reservation.at == at));
            if let Some(entry) = entry {
                if now < at + EXPIRES_AFTER {
                    return;
                }
                if let WaiterStage::Reserved(reservation) = std::mem::replace(&mut entry.stage, WaiterStage::Expired) {
                    on_expired(entry.cost, reservation);
                    self.unused -= &entry.cost;
                }
            }
            self.reserved.pop_front();
        }
    }

    /// Returns when to call [`expire`](Self::expire) next; `None` if no waiter holds a reservation.
    pub(super) fn next_expiry(&self) -> Option<Instant> {
        self.reserved.front().map(|(_, at)| *at + EXPIRES_AFTER)
    }

    /// Returns the sum of the costs of the reservations that waiters hold and have not used yet.
    pub(super) fn unused(&self) -> Demand {
        self.unused.clone()
    }

    /// Returns the wakers of all waiters, in the queue or not.
    pub(super) fn wakers(&self) -> Vec<Waker> {
        self.entries.values().map(|entry| entry.waker.clone()).collect()
    }
}
