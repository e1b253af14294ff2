//! [`Running`]: the calls that one worker drives.
//!
//! Each has a seat, and each seat a bell: a call that is woken rings it, and only calls that have rung are polled. Seats
//! are used again by the calls that follow, so that a call costs no allocation here; and a call is polled in its seat at
//! once, so that it has taken its permit, or its stand in a line, before the worker begins the next one.

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
pub(super) struct Running<F> {
    seats: Vec<Seat<F>>,
    /// Those without a call: first those without room, which are used last.
    free: Vec<usize>,
    /// How many of the free ones have room.
    roomy: usize,
    desk: Arc<Desk>,
    /// Seats that have rung and are being served.
    serving: Vec<usize>,
}

struct Seat<F> {
    /// An empty one, or none, if the seat is not taken.
    call: Option<Pin<Box<F>>>,
    is_taken: bool,
    bell: Arc<Bell>,
    waker: Waker,
}

/// Where the bells ring.
struct Desk {
    rung: Mutex<Rung>,
}

#[derive(Default)]
struct Rung {
    seats: Vec<usize>,
    worker: Option<Waker>,
}

struct Bell {
    seat: usize,
    desk: Arc<Desk>,
    /// Whether it has rung and was not served since.
    rung: AtomicBool,
}

/// So many free seats keep their room for calls to come, beside as many as there are calls.
const SPARE: usize = 64;

impl<F: Future<Output = ()> + Default> Running<F> {
    pub(super) fn new() -> Self {
        Self {
            seats: Vec::new(),
            free: Vec::new(),
            roomy: 0,
            desk: Arc::new(Desk { rung: Mutex::default() }),
            serving: Vec::new(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.free.len() == self.seats.len()
    }

    /// Takes a seat for a call, which `make` makes there; `None` if it is over at once. To be [served](Self::serve) next.
    pub(super) fn seat(&mut self, make: impl FnOnce(Pin<&mut F>) -> Poll<()>) -> Option<usize> {
        let at = self.free.pop().unwrap_or_else(|| self.add_seat());
        self.roomy = self.roomy.saturating_sub(1);
        let call = self.seats[at].call.get_or_insert_with(|| Box::pin(F::default()));
        if make(call.as_mut()).is_ready() {
            self.leave(at);
            return None;
        }
        self.seats[at].is_taken = true;
        Some(at)
    }

    /// Polls the calls that were woken. The worker is woken when there are more.
    pub(super) fn poll(&mut self, cx: &Context<'_>) {
        if self.is_empty() {
            return;
        }
        let before = {
            let mut rung = self.desk.lock();
            mem::swap(&mut rung.seats, &mut self.serving);
            match &rung.worker {
                Some(known) if known.will_wake(cx.waker()) => None,
                _ => rung.worker.replace(cx.waker().clone()),
            }
        };
        drop(before);
        let mut serving = mem::take(&mut self.serving);
        for at in serving.drain(..) {
            self.serve(at);
        }
        self.serving = serving;
    }

    /// Polls the call in this seat, if there is one: bells can ring late.
    #[inline]
    pub(super) fn serve(&mut self, at: usize) {
        let Some(seat) = self.seats.get_mut(at) else { return };
        // Before the poll, and not a mere store: what the poll reads must not be older than a bell that was not heard.
        seat.bell.rung.swap(false, Ordering::AcqRel);
        let Some(call) = seat.call.as_mut().filter(|_| seat.is_taken) else {
            return;
        };
        if call.as_mut().poll(&mut Context::from_waker(&seat.waker)).is_ready() {
            seat.is_taken = false;
            self.leave(at);
        }
    }

    /// The seat is free for another call. After a rush, its room is given back.
    fn leave(&mut self, at: usize) {
        self.free.push(at);
        self.roomy += 1;
        let taken = self.seats.len() - self.free.len();
        while self.roomy > SPARE + taken {
            let oldest = self.free[self.free.len() - self.roomy];
            self.seats[oldest].call = None;
            self.roomy -= 1;
        }
        if taken == 0 && self.seats.len() > SPARE {
            // Only when nobody sits: the others' bells know their seat by its number.
            self.seats.truncate(SPARE);
            self.seats.shrink_to_fit();
            self.free.retain(|at| *at < SPARE);
            self.free.shrink_to_fit();
            self.roomy = self.seats.iter().filter(|seat| seat.call.is_some()).count();
        }
    }

    fn add_seat(&mut self) -> usize {
        let seat = self.seats.len();
        let bell = Arc::new(Bell {
            seat,
            desk: self.desk.clone(),
            rung: AtomicBool::new(false),
        });
        self.seats.push(Seat {
            call: None,
            is_taken: false,
            waker: Waker::from(bell.clone()),
            bell,
        });
        seat
    }
}

impl Desk {
    fn lock(&self) -> MutexGuard<'_, Rung> {
        self.rung.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.rung.swap(true, Ordering::AcqRel) {
            return;
        }
        let worker = {
            let mut rung = self.desk.lock();
            rung.seats.push(self.seat);
            rung.worker.take()
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
    struct Alone(AtomicU64);

    #[derive(Default)]
    struct Shared {
        said: Alone,
        heard: Alone,
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
                let mut running = Running::<Listener>::new();
                let seat = running.seat(|mut call| {
                    call.set(Listener(Some(shared.clone())));
                    Poll::Pending
                });
                running.serve(seat.unwrap());
                let cx = Context::from_waker(Waker::noop());
                while !shared.is_over.load(Ordering::Relaxed) {
                    running.poll(&cx);
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
            // Rung before there is anything to hear, so that the second ring comes while the seat is served.
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
