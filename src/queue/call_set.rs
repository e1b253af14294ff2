//! [`CallSet`]: the futures of the calls that one worker task is running.
//!
//! A worker drives many calls in one task. Polling the futures of all calls whenever the task is woken would take
//! quadratic time. So each call occupies a slot that has its own waker, and a poll of the set polls only the slots that
//! were woken since the previous poll. Later calls reuse the slots and their allocations, so that most calls allocate
//! nothing here.

use crate::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicBool, Ordering},
};
use std::{
    future::Future,
    mem,
    pin::Pin,
    sync::{Arc, PoisonError},
    task::{Context, Poll, Wake, Waker},
};

/// A set of futures of type `F`, like `FuturesUnordered`, except that it keeps the allocations of completed futures for
/// later ones.
///
/// `F::default()` is an empty future, which a new slot holds until a call is made in it. A completed future must be
/// empty again, because the slot's next call reuses it.
pub(super) struct CallSet<F> {
    slots: Vec<Slot<F>>,
    /// The indices of the free slots, which are used from the end. Slots without an allocation are at the front, so
    /// that they are used last.
    free: Vec<usize>,
    /// How many free slots still have the allocation of an earlier call.
    free_allocated: usize,
    ready_queue: Arc<ReadyQueue>,
    /// The indices of the slots that [`poll`](Self::poll) is polling, empty at other times. Stored in the set to reuse
    /// the vector's allocation.
    polling: Vec<usize>,
}

struct Slot<F> {
    /// The future of the slot's call, or an empty future while the slot is free. `None` if no call has used the slot
    /// yet, or its allocation was freed.
    call: Option<Pin<Box<F>>>,
    is_occupied: bool,
    slot_waker: Arc<SlotWaker>,
    /// The slot's `SlotWaker` as a [`Waker`], with which the slot's future is polled.
    waker: Waker,
}

/// The slots that were woken and have not been polled since, in the order of the wake-ups.
struct ReadyQueue {
    ready: Mutex<ReadySlots>,
}

#[derive(Default)]
struct ReadySlots {
    slots: Vec<usize>,
    /// The waker of the worker task that polls the set. `None` between a wake-up of the task and the task's next poll.
    worker: Option<Waker>,
}

/// The waker of one slot: puts the slot into the ready queue and wakes the worker task.
struct SlotWaker {
    slot: usize,
    ready_queue: Arc<ReadyQueue>,
    /// Whether the slot was woken since its last poll, so that another wake-up has nothing to do.
    is_ready: AtomicBool,
}

/// The free slots may keep as many allocations as there are running calls, plus this number.
///
/// With 64, a worker whose number of running calls varies by less than 64 allocates nothing. After a burst of thousands
/// of calls, at most 64 allocations are left when no call is running.
const SPARE_SLOTS: usize = 64;

impl<F: Future<Output = ()> + Default> CallSet<F> {
    pub(super) fn new() -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            free_allocated: 0,
            ready_queue: Arc::new(ReadyQueue {
                ready: Mutex::default(),
            }),
            polling: Vec::new(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    /// Takes a free slot and lets `make` make the call in it. Returns the slot's index, which the caller passes to
    /// [`poll_slot`](Self::poll_slot) next, or `None` if `make` returns `Ready` because the call has already ended.
    pub(super) fn insert(&mut self, make: impl FnOnce(Pin<&mut F>) -> Poll<()>) -> Option<usize> {
        let index = self.free.pop().unwrap_or_else(|| self.add_slot());
        self.free_allocated = self.free_allocated.saturating_sub(1);
        let call = self.slots[index].call.get_or_insert_with(|| Box::pin(F::default()));
        if make(call.as_mut()).is_ready() {
            self.release(index);
            return None;
        }
        self.slots[index].is_occupied = true;
        Some(index)
    }

    /// Polls the calls whose slots were woken, and registers the worker's waker `cx` for slots that are woken later.
    pub(super) fn poll(&mut self, cx: &Context<'_>) {
        if self.is_empty() {
            return;
        }
        let replaced = {
            let mut ready = self.ready_queue.lock();
            mem::swap(&mut ready.slots, &mut self.polling);
            match &ready.worker {
                Some(registered) if registered.will_wake(cx.waker()) => None,
                _ => ready.worker.replace(cx.waker().clone()),
            }
        };
        drop(replaced);
        let mut polling = mem::take(&mut self.polling);
        for index in polling.drain(..) {
            self.poll_slot(index);
        }
        self.polling = polling;
    }

    /// Polls the call in the slot with this index. Does nothing if the slot is free, as when a waker is used after its
    /// call has ended.
    #[inline]
    pub(super) fn poll_slot(&mut self, index: usize) {
        let Some(slot) = self.slots.get_mut(index) else { return };
        // The flag `is_ready` is cleared before the poll, so that a wake-up during the poll queues the slot again. A
        // swap clears it, because a store cannot have acquire ordering: the poll has to see everything that happened
        // before a wake-up that found the flag set and therefore did nothing.
        slot.slot_waker.is_ready.swap(false, Ordering::AcqRel);
        let Some(call) = slot.call.as_mut().filter(|_| slot.is_occupied) else {
            return;
        };
        if call.as_mut().poll(&mut Context::from_waker(&slot.waker)).is_ready() {
            slot.is_occupied = false;
            self.release(index);
        }
    }

    /// Marks the slot as free for another call, and frees the allocations and slots above the limit of [`SPARE_SLOTS`].
    fn release(&mut self, index: usize) {
        self.free.push(index);
        self.free_allocated += 1;
        let occupied = self.slots.len() - self.free.len();
        while self.free_allocated > SPARE_SLOTS + occupied {
            let oldest = self.free[self.free.len() - self.free_allocated];
            self.slots[oldest].call = None;
            self.free_allocated -= 1;
        }
        if occupied == 0 && self.slots.len() > SPARE_SLOTS {
            // Slots are removed only when no call is left: a waker refers to its slot by index, so an occupied slot
            // cannot be moved.
            self.slots.truncate(SPARE_SLOTS);
            self.slots.shrink_to_fit();
            self.free.retain(|index| *index < SPARE_SLOTS);
            self.free.shrink_to_fit();
            self.free_allocated = self.slots.iter().filter(|slot| slot.call.is_some()).count();
        }
    }

    fn add_slot(&mut self) -> usize {
        let index = self.slots.len();
        let slot_waker = Arc::new(SlotWaker {
            slot: index,
            ready_queue: self.ready_queue.clone(),
            is_ready: AtomicBool::new(false),
        });
        self.slots.push(Slot {
            call: None,
            is_occupied: false,
            waker: Waker::from(slot_waker.clone()),
            slot_waker,
        });
        index
    }
}

impl ReadyQueue {
    fn lock(&self) -> MutexGuard<'_, ReadySlots> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Wake for SlotWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.is_ready.swap(true, Ordering::AcqRel) {
            return;
        }
        let worker = {
            let mut ready = self.ready_queue.lock();
            ready.slots.push(self.slot);
            ready.worker.take()
        };
        if let Some(worker) = worker {
            worker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam_utils::CachePadded;
    use std::{hint, sync::atomic::AtomicU64, thread};

    /// The state that the waking thread and the polled future share. The two numbers are on separate cache lines:
    /// otherwise an access to one would refresh a stale value of the other and hide a missing synchronization.
    #[derive(Default)]
    struct Exchange {
        sent: CachePadded<AtomicU64>,
        received: CachePadded<AtomicU64>,
        is_over: AtomicBool,
        waker: Mutex<Option<Waker>>,
    }

    /// A future that copies `sent` to `received` at each poll. It locks a mutex only until it has received the first
    /// number: a lock would synchronize the two threads even if the slot's waker did not.
    #[derive(Default)]
    struct Receiver(Option<Arc<Exchange>>);

    impl Future for Receiver {
        type Output = ();

        fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
            if let Some(exchange) = &self.0 {
                let sent = exchange.sent.load(Ordering::Acquire);
                if exchange.received.swap(sent, Ordering::Release) == 0 {
                    *exchange.waker.lock().unwrap() = Some(cx.waker().clone());
                }
            }
            Poll::Pending
        }
    }

    const ROUNDS: u64 = if cfg!(miri) { 20 } else { 20_000 };

    #[test]
    fn a_wake_up_during_the_poll_of_its_slot_is_not_lost() {
        let exchange = Arc::new(Exchange::default());
        let worker = thread::spawn({
            let exchange = exchange.clone();
            move || {
                let mut call_set = CallSet::<Receiver>::new();
                let slot = call_set.insert(|mut call| {
                    call.set(Receiver(Some(exchange.clone())));
                    Poll::Pending
                });
                call_set.poll_slot(slot.unwrap());
                let cx = Context::from_waker(Waker::noop());
                while !exchange.is_over.load(Ordering::Relaxed) {
                    call_set.poll(&cx);
                }
            }
        });
        let waker = loop {
            if let Some(waker) = exchange.waker.lock().unwrap().take() {
                break waker;
            }
            thread::yield_now();
        };
        for round in 1..=ROUNDS {
            // The first wake-up of a round comes before there is a number to receive, so that the second wake-up, after
            // the number was sent, often comes while the slot is being polled.
            waker.wake_by_ref();
            (0..round * 7_919 % 300).for_each(|step| {
                hint::black_box(step);
            });
            exchange.sent.store(round, Ordering::Release);
            waker.wake_by_ref();
            let mut spins = 0_u64;
            while exchange.received.load(Ordering::Acquire) != round {
                spins += 1;
                assert!(spins < 1_000_000_000, "the wake-up of round {round} was lost");
                if spins.is_multiple_of(1_000) {
                    thread::yield_now();
                }
            }
        }
        exchange.is_over.store(true, Ordering::Relaxed);
        worker.join().unwrap();
    }
}
