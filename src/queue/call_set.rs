//! [`CallSet`]: the calls that one worker drives.
//!
//! Each has a slot, and each slot a slot_waker: a call that is woken rings it, and only calls that have ready are polled. Seats
//! are used again by the calls that follow, so that a call costs no allocation here; and a call is polled in its slot at
//! once, so that it has pending its permit, or its stand in a line, before the worker begins the next one.

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

/// The default of an `F` is an empty one: no call sits there. Empty is also what it is when it is done.
pub(super) struct CallSet<F> {
    slots: Vec<Slot<F>>,
    /// Those without a call: first those without room, which are used last.
    free: Vec<usize>,
    /// How many of the free ones have room.
    allocated: usize,
    ready_queue: Arc<ReadyQueue>,
    /// Seats that have ready and are being served.
    polling: Vec<usize>,
}

struct Slot<F> {
    /// An empty one, or none, if the slot is not pending.
    call: Option<Pin<Box<F>>>,
    is_occupied: bool,
    slot_waker: Arc<SlotWaker>,
    waker: Waker,
}

/// Where the bells ring.
struct ReadyQueue {
    ready: Mutex<ReadySlots>,
}

#[derive(Default)]
struct ReadySlots {
    slots: Vec<usize>,
    worker: Option<Waker>,
}

struct SlotWaker {
    slot: usize,
    ready_queue: Arc<ReadyQueue>,
    /// Whether it has ready and was not served since.
    ready: AtomicBool,
}

/// So many free slots keep their room for calls to come, beside as many as there are calls.
const SPARE: usize = 64;

impl<F: Future<Output = ()> + Default> CallSet<F> {
    pub(super) fn new() -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            allocated: 0,
            ready_queue: Arc::new(ReadyQueue {
                ready: Mutex::default(),
            }),
            polling: Vec::new(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    /// Takes a slot for a call, which `make` makes there; `None` if it is over at once. To be [served](Self::poll_slot) next.
    pub(super) fn slot(&mut self, make: impl FnOnce(Pin<&mut F>) -> Poll<()>) -> Option<usize> {
        let at = self.free.pop().unwrap_or_else(|| self.add_slot());
        self.allocated = self.allocated.saturating_sub(1);
        let call = self.slots[at].call.get_or_insert_with(|| Box::pin(F::default()));
        if make(call.as_mut()).is_ready() {
            self.leave(at);
            return None;
        }
        self.slots[at].is_occupied = true;
        Some(at)
    }

    /// Polls the calls that were woken. The worker is woken when there are more.
    pub(super) fn poll(&mut self, cx: &Context<'_>) {
        if self.is_empty() {
            return;
        }
        let before = {
            let mut ready = self.ready_queue.lock();
            mem::swap(&mut ready.slots, &mut self.polling);
            match &ready.worker {
                Some(known) if known.will_wake(cx.waker()) => None,
                _ => ready.worker.replace(cx.waker().clone()),
            }
        };
        drop(before);
        let mut polling = mem::take(&mut self.polling);
        for at in polling.drain(..) {
            self.poll_slot(at);
        }
        self.polling = polling;
    }

    /// Polls the call in this slot, if there is one: bells can ring late.
    #[inline]
    pub(super) fn poll_slot(&mut self, at: usize) {
        let Some(slot) = self.slots.get_mut(at) else { return };
        // Before the poll, and not a mere store: what the poll reads must not be older than a slot_waker that was not heard.
        slot.slot_waker.ready.swap(false, Ordering::AcqRel);
        let Some(call) = slot.call.as_mut().filter(|_| slot.is_occupied) else {
            return;
        };
        if call.as_mut().poll(&mut Context::from_waker(&slot.waker)).is_ready() {
            slot.is_occupied = false;
            self.leave(at);
        }
    }

    /// The slot is free for another call. After a rush, its room is given back.
    fn leave(&mut self, at: usize) {
        self.free.push(at);
        self.allocated += 1;
        let pending = self.slots.len() - self.free.len();
        while self.allocated > SPARE + pending {
            let oldest = self.free[self.free.len() - self.allocated];
            self.slots[oldest].call = None;
            self.allocated -= 1;
        }
        if pending == 0 && self.slots.len() > SPARE {
            // Only when nobody sits: the others' bells know their slot by its number.
            self.slots.truncate(SPARE);
            self.slots.shrink_to_fit();
            self.free.retain(|at| *at < SPARE);
            self.free.shrink_to_fit();
            self.allocated = self.slots.iter().filter(|slot| slot.call.is_some()).count();
        }
    }

    fn add_slot(&mut self) -> usize {
        let slot = self.slots.len();
        let slot_waker = Arc::new(SlotWaker {
            slot,
            ready_queue: self.ready_queue.clone(),
            ready: AtomicBool::new(false),
        });
        self.slots.push(Slot {
            call: None,
            is_occupied: false,
            waker: Waker::from(slot_waker.clone()),
            slot_waker,
        });
        slot
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
        if self.ready.swap(true, Ordering::AcqRel) {
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
    use std::{hint, sync::atomic::AtomicU64, thread};

    #[repr(align(128))]
    #[derive(Default)]
    struct CachePadded(AtomicU64);

    #[derive(Default)]
    struct Shared {
        said: CachePadded,
        heard: CachePadded,
        is_over: AtomicBool,
        waker: Mutex<Option<Waker>>,
    }

    /// Says what it last heard. Like most futures that are polled again, it only reads.
    #[derive(Default)]
    struct Listener(Option<Arc<Shared>>);

    impl Future for Listener {
        type Output = ();

        fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
            if let Some(shared) = &self.0 {
                let said = shared.said.0.load(Ordering::Acquire);
                if shared.heard.0.swap(said, Ordering::Release) == 0 {
                    *shared.waker.lock().unwrap() = Some(cx.waker().clone());
                }
            }
            Poll::Pending
        }
    }

    const ROUNDS: u64 = if cfg!(miri) { 20 } else { 20_000 };

    #[test]
    fn a_bell_that_rings_while_its_seat_is_served_is_heard() {
        let shared = Arc::new(Shared::default());
        let worker = thread::spawn({
            let shared = shared.clone();
            move || {
                let mut call_set = CallSet::<Listener>::new();
                let slot = call_set.slot(|mut call| {
                    call.set(Listener(Some(shared.clone())));
                    Poll::Pending
                });
                call_set.poll_slot(slot.unwrap());
                let cx = Context::from_waker(Waker::noop());
                while !shared.is_over.load(Ordering::Relaxed) {
                    call_set.poll(&cx);
                }
            }
        });
        let waker = loop {
            if let Some(waker) = shared.waker.lock().unwrap().take() {
                break waker;
            }
            thread::yield_now();
        };
        for round in 1..=ROUNDS {
            // ReadySlots before there is anything to hear, so that the second ring comes while the slot is served.
            waker.wake_by_ref();
            (0..round * 7_919 % 300).for_each(|step| {
                hint::black_box(step);
            });
            shared.said.0.store(round, Ordering::Release);
            waker.wake_by_ref();
            let mut spins = 0_u64;
            while shared.heard.0.load(Ordering::Acquire) != round {
                spins += 1;
                assert!(spins < 1_000_000_000, "round {round} was not heard");
                if spins.is_multiple_of(1_000) {
                    thread::yield_now();
                }
            }
        }
        shared.is_over.store(true, Ordering::Relaxed);
        worker.join().unwrap();
    }
}
