//! [`Running`]: the calls that one worker drives.
//!
//! Each has a seat, and each seat a bell: a call that is woken rings it, and only calls that have rung are polled. Seats
//! are used again by the calls that follow, so that a call costs no allocation here; and a call is polled in its seat at
//! once, so that it has taken its permit, and its stand in a line, before the next one begins.

use std::{
    future::Future,
    mem,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
};

/// The default of an `F` is an empty one: no call sits there. Empty is also what it is when it is done.
pub(super) struct Running<F> {
    seats: Vec<Seat<F>>,
    /// Those without a call.
    free: Vec<usize>,
    desk: Arc<Desk>,
    /// Seats that have rung and are being served.
    serving: Vec<usize>,
}

struct Seat<F> {
    call: Pin<Box<F>>,
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

/// So many free seats are kept for calls to come, beside as many as are taken.
const SPARE: usize = 64;

impl<F: Future<Output = ()> + Default> Running<F> {
    pub(super) fn new() -> Self {
        Self {
            seats: Vec::new(),
            free: Vec::new(),
            desk: Arc::new(Desk { rung: Mutex::default() }),
            serving: Vec::new(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.free.len() == self.seats.len()
    }

    /// Takes a seat for a call, which `begin` makes there and polls for the first time.
    #[inline]
    pub(super) fn start(&mut self, begin: impl FnOnce(Pin<&mut F>, &mut Context<'_>) -> Poll<()>) {
        let at = self.free.pop().unwrap_or_else(|| self.add_seat());
        self.seats[at].is_taken = true;
        self.serve(at, begin);
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
            self.serve(at, F::poll);
        }
        self.serving = serving;
    }

    #[inline]
    fn serve(&mut self, at: usize, poll: impl FnOnce(Pin<&mut F>, &mut Context<'_>) -> Poll<()>) {
        // Both may be gone: bells can ring late.
        let Some(seat) = self.seats.get_mut(at) else { return };
        // Before the poll: from now on it may ring again.
        seat.bell.rung.store(false, Ordering::Release);
        if !seat.is_taken {
            return;
        }
        if poll(seat.call.as_mut(), &mut Context::from_waker(&seat.waker)).is_ready() {
            seat.is_taken = false;
            self.free.push(at);
            self.shrink();
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
            call: Box::pin(F::default()),
            is_taken: false,
            waker: Waker::from(bell.clone()),
            bell,
        });
        seat
    }

    /// After a rush, gives back what it took. Only when nobody sits: the others' bells know their seat by its number.
    fn shrink(&mut self) {
        if self.seats.len() > SPARE && self.is_empty() {
            self.seats.truncate(SPARE);
            self.free.clear();
            self.free.extend(0..SPARE);
        }
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
