//! [`Waiters`]: who waits in this process, in order.

use crate::{error::AcquireError, rate::limits::Cost};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    task::Waker,
};
use tokio::time::{Duration, Instant};

use super::adjustments::{Amounts, add, amounts, less};

/// A reservation is for one moment. Used later than this, it would bunch with those that come after it; it is given
/// back then, and another one is asked for.
pub(super) const LATE: Duration = Duration::from_millis(5);
/// How long after its moment a reservation that nobody asks for is looked at.
const LAPSES: Duration = Duration::from_millis(6);

#[derive(Debug, Default)]
pub(super) struct Waiters {
    next: u64,
    seats: BTreeMap<u64, WaiterEntry>,
    /// Those that are to be asked for.
    queued: BTreeSet<u64>,
    /// Those that were granted, in the order of their moments; some may be gone.
    granted: VecDeque<(u64, Instant)>,
    /// What is granted and not used yet.
    pending: Amounts,
    /// Others' code, which is not to run under our lock.
    discarded: Vec<Waker>,
}

#[derive(Debug)]
pub(super) struct WaiterEntry {
    pub(super) cost: Cost,
    since: Instant,
    waker: Waker,
    stage: Stage,
}

#[derive(Clone, Debug)]
pub(super) enum Stage {
    /// To be asked for, or being asked for.
    Waiting,
    Granted(Reservation),
    /// Its moment has passed and nobody came. It is asked for again when somebody does.
    Lapsed,
    Refused(AcquireError),
}

/// A reservation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reservation {
    /// When to go.
    pub(super) at: Instant,
    /// The same by the store's clock, in microseconds; 0 for what is of our own share.
    pub(super) at_store: i64,
    /// Whether it is of the store, or of our own share.
    pub(super) shared: bool,
    /// Of which era of that.
    pub(super) era: u64,
}

impl Waiters {
    pub(super) fn join(&mut self, cost: Cost, waker: Waker, now: Instant) -> u64 {
        let number = self.next;
        self.next += 1;
        let seat = WaiterEntry {
            cost,
            since: now,
            waker,
            stage: Stage::Waiting,
        };
        self.seats.insert(number, seat);
        self.queued.insert(number);
        number
    }

    /// What has become of it. Its waker is told of what comes.
    pub(super) fn look(&mut self, number: u64, waker: Waker) -> Stage {
        let seat = self.seats.get_mut(&number).expect("it leaves once");
        self.discarded.push(std::mem::replace(&mut seat.waker, waker));
        seat.stage.clone()
    }

    /// To be dropped where it may do what it likes.
    pub(super) fn discarded(&mut self) -> Vec<Waker> {
        std::mem::take(&mut self.discarded)
    }

    /// It is to be asked for again, with its old number.
    pub(super) fn requeue(&mut self, number: u64) {
        let seat = self.seats.get_mut(&number).expect("it leaves once");
        if let Stage::Granted(_) = seat.stage {
            self.pending = less(self.pending, amounts(seat.cost));
        }
        seat.stage = Stage::Waiting;
        self.queued.insert(number);
    }

    /// It is gone: with its reservation, if it had one.
    pub(super) fn leave(&mut self, number: u64) -> Option<(Cost, Option<Reservation>)> {
        let seat = self.seats.remove(&number)?;
        self.queued.remove(&number);
        let grant = match seat.stage {
            Stage::Granted(grant) => {
                self.pending = less(self.pending, amounts(seat.cost));
                Some(grant)
            }
            _ => None,
        };
        self.discarded.push(seat.waker);
        Some((seat.cost, grant))
    }

    /// Those to be asked for, in order.
    pub(super) fn queued(&self) -> impl Iterator<Item = (u64, Cost)> + '_ {
        self.queued.iter().map(|number| (*number, self.seats[number].cost))
    }

    pub(super) fn is_queue_empty(&self) -> bool {
        self.queued.is_empty()
    }

    /// Since when the first of them waits.
    pub(super) fn oldest(&self) -> Option<Instant> {
        self.queued.first().map(|number| self.seats[number].since)
    }

    /// These are being asked for.
    pub(super) fn asked(&mut self, numbers: impl Iterator<Item = u64>) {
        for number in numbers {
            self.queued.remove(&number);
        }
    }

    /// It was asked for in vain.
    pub(super) fn unanswered(&mut self, number: u64) {
        if self.seats.contains_key(&number) {
            self.queued.insert(number);
        }
    }

    /// Returns false if it is gone.
    #[must_use]
    pub(super) fn grant(&mut self, number: u64, grant: Reservation, wakers: &mut Vec<Waker>) -> bool {
        let Some(seat) = self.seats.get_mut(&number) else {
            return false;
        };
        seat.stage = Stage::Granted(grant);
        add(&mut self.pending, amounts(seat.cost));
        self.granted.push_back((number, grant.at));
        self.queued.remove(&number);
        wakers.push(seat.waker.clone());
        true
    }

    /// Refuses whoever is in the queue for a reason.
    pub(super) fn refuse(&mut self, reason: impl Fn(&WaiterEntry) -> Option<AcquireError>, wakers: &mut Vec<Waker>) {
        let seats = &mut self.seats;
        self.queued.retain(|number| {
            let seat = seats.get_mut(number).expect("who is queued has a seat");
            let refused = reason(seat);
            if let Some(error) = &refused {
                seat.stage = Stage::Refused(error.clone());
                wakers.push(seat.waker.clone());
            }
            refused.is_none()
        });
    }

    /// Takes back reservations whose moment has passed and that nobody came for.
    pub(super) fn lapse(&mut self, now: Instant, mut lapsed: impl FnMut(Cost, Reservation)) {
        while let Some((number, at)) = self.granted.front().copied() {
            let seat = self.seats.get_mut(&number);
            let still = seat.filter(|seat| matches!(seat.stage, Stage::Granted(grant) if grant.at == at));
            if let Some(seat) = still {
                if now < at + LAPSES {
                    return;
                }
                if let Stage::Granted(grant) = std::mem::replace(&mut seat.stage, Stage::Lapsed) {
                    lapsed(seat.cost, grant);
                    self.pending = less(self.pending, amounts(seat.cost));
                }
            }
            self.granted.pop_front();
        }
    }

    /// When to look at that again.
    pub(super) fn lapses_at(&self) -> Option<Instant> {
        self.granted.front().map(|(_, at)| *at + LAPSES)
    }

    /// What is granted and not used.
    pub(super) const fn pending(&self) -> Amounts {
        self.pending
    }

    /// Everybody's.
    pub(super) fn wakers(&self) -> Vec<Waker> {
        self.seats.values().map(|seat| seat.waker.clone()).collect()
    }
}

impl WaiterEntry {
    pub(super) const fn since(&self) -> Instant {
        self.since
    }
}
