//! [`Waiters`]: the calls of this process that wait for a reservation or for its time, in the order in which they came.

use super::amounts::Amounts;
use crate::{error::AcquireError, rate::limits::Cost};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    task::Waker,
};
use tokio::time::{Duration, Instant};

/// A reservation that is used later than this after its time would bunch with the reservations that follow it. It is
/// given back instead, and a new one is requested.
pub(super) const MAX_LATENESS: Duration = Duration::from_millis(5);
/// A reservation that no waiter has polled for expires this long after its time.
const EXPIRES_AFTER: Duration = Duration::from_millis(6);

#[derive(Debug, Default)]
pub(super) struct Waiters {
    next_number: u64,
    entries: BTreeMap<u64, WaiterEntry>,
    /// The waiters whose costs are to be requested.
    queued: BTreeSet<u64>,
    /// The waiters that got a reservation, in the order of its time. Some of them may have left.
    reserved: VecDeque<(u64, Instant)>,
    /// The costs of all reservations that are not used yet.
    unused: Amounts,
    /// Wakers to drop after the lock is released: dropping a waker is user code.
    discarded: Vec<Waker>,
}

#[derive(Debug)]
pub(super) struct WaiterEntry {
    pub(super) cost: Cost,
    /// When the waiter came.
    pub(super) since: Instant,
    waker: Waker,
    stage: Stage,
}

/// How far a waiter has come.
#[derive(Clone, Debug)]
pub(super) enum Stage {
    /// Its cost is in the queue or in a request.
    Waiting,
    Reserved(Reservation),
    /// The time of its reservation has passed and it was not polled. Its next poll puts it back into the queue.
    Expired,
    Rejected(AcquireError),
}

/// The right to be admitted at one time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reservation {
    pub(super) at: Instant,
    /// The same by the store's clock, in microseconds; 0 if the local fallback made the reservation.
    pub(super) at_store: i64,
    /// Whether the store made the reservation, and not the local fallback.
    pub(super) is_from_store: bool,
    /// The generation of the store's estimates, or of the local fallback.
    pub(super) generation: u64,
}

impl Waiters {
    /// Adds a waiter to the end of the queue, and returns its number.
    pub(super) fn push(&mut self, cost: Cost, waker: Waker, now: Instant) -> u64 {
        let number = self.next_number;
        self.next_number += 1;
        let entry = WaiterEntry {
            cost,
            since: now,
            waker,
            stage: Stage::Waiting,
        };
        self.entries.insert(number, entry);
        self.queued.insert(number);
        number
    }

    /// Returns how far the waiter has come. `waker` is woken when that changes.
    pub(super) fn poll(&mut self, number: u64, waker: Waker) -> Stage {
        let entry = self.entries.get_mut(&number).expect("a waiter is removed only once");
        self.discarded.push(std::mem::replace(&mut entry.waker, waker));
        entry.stage.clone()
    }

    /// Takes the wakers that are no longer needed, to be dropped outside the lock.
    pub(super) fn take_discarded(&mut self) -> Vec<Waker> {
        std::mem::take(&mut self.discarded)
    }

    /// Puts the waiter back into the queue, at its old place, without its reservation.
    pub(super) fn requeue(&mut self, number: u64) {
        let entry = self.entries.get_mut(&number).expect("a waiter is removed only once");
        if let Stage::Reserved(_) = entry.stage {
            self.unused = self.unused.saturating_sub(entry.cost.into());
        }
        entry.stage = Stage::Waiting;
        self.queued.insert(number);
    }

    /// Removes the waiter, and returns its cost and its reservation, if it had one.
    pub(super) fn remove(&mut self, number: u64) -> Option<(Cost, Option<Reservation>)> {
        let entry = self.entries.remove(&number)?;
        self.queued.remove(&number);
        let reservation = match entry.stage {
            Stage::Reserved(reservation) => {
                self.unused = self.unused.saturating_sub(entry.cost.into());
                Some(reservation)
            }
            _ => None,
        };
        self.discarded.push(entry.waker);
        Some((entry.cost, reservation))
    }

    /// The waiters in the queue with their costs, in order.
    pub(super) fn queued(&self) -> impl Iterator<Item = (u64, Cost)> + '_ {
        self.queued.iter().map(|number| (*number, self.entries[number].cost))
    }

    pub(super) fn is_queue_empty(&self) -> bool {
        self.queued.is_empty()
    }

    /// When the first waiter in the queue came.
    pub(super) fn oldest(&self) -> Option<Instant> {
        self.queued.first().map(|number| self.entries[number].since)
    }

    /// Takes the waiters out of the queue, because their costs are in a request.
    pub(super) fn on_requested(&mut self, numbers: impl Iterator<Item = u64>) {
        for number in numbers {
            self.queued.remove(&number);
        }
    }

    /// Puts the waiter back into the queue, if it has not left: its cost was in a request and was not reserved.
    pub(super) fn on_not_reserved(&mut self, number: u64) {
        if self.entries.contains_key(&number) {
            self.queued.insert(number);
        }
    }

    /// Gives the waiter its reservation. Returns false if the waiter has left.
    #[must_use]
    pub(super) fn on_reserved(&mut self, number: u64, reservation: Reservation, wakers: &mut Vec<Waker>) -> bool {
        let Some(entry) = self.entries.get_mut(&number) else {
            return false;
        };
        entry.stage = Stage::Reserved(reservation);
        self.unused = self.unused.saturating_add(entry.cost.into());
        self.reserved.push_back((number, reservation.at));
        self.queued.remove(&number);
        wakers.push(entry.waker.clone());
        true
    }

    /// Rejects the waiters in the queue for which `reason` returns an error.
    pub(super) fn reject(&mut self, reason: impl Fn(&WaiterEntry) -> Option<AcquireError>, wakers: &mut Vec<Waker>) {
        let entries = &mut self.entries;
        self.queued.retain(|number| {
            let entry = entries.get_mut(number).expect("a queued waiter has an entry");
            let error = reason(entry);
            if let Some(error) = &error {
                entry.stage = Stage::Rejected(error.clone());
                wakers.push(entry.waker.clone());
            }
            error.is_none()
        });
    }

    /// Takes back the reservations whose time has passed and that no waiter has polled for.
    pub(super) fn expire(&mut self, now: Instant, mut on_expired: impl FnMut(Cost, Reservation)) {
        while let Some((number, at)) = self.reserved.front().copied() {
            let entry = self.entries.get_mut(&number);
            // The waiter may have left, or have another reservation by now.
            let entry =
                entry.filter(|entry| matches!(entry.stage, Stage::Reserved(reservation) if reservation.at == at));
            if let Some(entry) = entry {
                if now < at + EXPIRES_AFTER {
                    return;
                }
                if let Stage::Reserved(reservation) = std::mem::replace(&mut entry.stage, Stage::Expired) {
                    on_expired(entry.cost, reservation);
                    self.unused = self.unused.saturating_sub(entry.cost.into());
                }
            }
            self.reserved.pop_front();
        }
    }

    /// When [`expire`](Self::expire) has something to do.
    pub(super) fn next_expiry(&self) -> Option<Instant> {
        self.reserved.front().map(|(_, at)| *at + EXPIRES_AFTER)
    }

    /// The costs of all reservations that are not used yet.
    pub(super) const fn unused(&self) -> Amounts {
        self.unused
    }

    /// The wakers of all waiters.
    pub(super) fn wakers(&self) -> Vec<Waker> {
        self.entries.values().map(|entry| entry.waker.clone()).collect()
    }
}
