//! The courier: a task that carries between the [desk](super::desk) and the store, one round trip at a time. Whoever
//! comes meanwhile goes along with the next.
//!
//! It is started by the first who waits, in its runtime, and ends when the limiter is dropped, or with that runtime; the
//! next who waits then starts another.

use super::{
    ask::{Answer, Ask},
    desk::{Desk, Said},
    store::StoreError,
};
use crate::guard;
use std::{
    future::{Future, poll_fn},
    pin::{Pin, pin},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Poll, Waker},
    time::Duration,
};
use tokio::{
    runtime::Handle,
    sync::Notify,
    time::{self, Instant},
};

/// What a store does.
pub(super) trait Backend: Send {
    fn call<'a>(&'a mut self, ask: &'a Ask) -> Pin<Box<dyn Future<Output = Result<Answer, StoreError>> + Send + 'a>>;
}

/// Makes connections to the store; they live in the courier's runtime.
pub(super) type Connect = Box<dyn Fn() -> Box<dyn Backend> + Send + Sync>;

/// What the limiter and its courier share.
pub(super) struct Office {
    state: Mutex<State>,
    called: Notify,
    connect: Connect,
    timeout: Duration,
    latency: Mutex<Duration>,
}

struct State {
    desk: Desk,
    has_courier: bool,
}

/// A round trip.
struct Trip {
    begun: Instant,
    said: Said,
    way: Pin<Box<dyn Future<Output = Back> + Send>>,
}

/// What comes back: the connection, and what was heard on it.
type Back = (Box<dyn Backend>, Result<Answer, StoreError>);

enum Happened {
    Back(Back),
    Called,
}

/// Says that there is a courier, until it is dropped.
struct OnDuty(Arc<Office>);

impl Office {
    pub(super) fn new(desk: Desk, connect: Connect, timeout: Duration) -> Self {
        Self {
            state: Mutex::new(State {
                desk,
                has_courier: false,
            }),
            called: Notify::new(),
            connect,
            timeout,
            latency: Mutex::default(),
        }
    }

    /// No code but ours runs under this lock, so a poisoned one is as good as any.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn look<T>(&self, look: impl FnOnce(&mut Desk) -> T) -> T {
        let (result, discarded) = {
            let mut state = self.lock();
            let result = look(&mut state.desk);
            (result, state.desk.discarded())
        };
        for waker in discarded {
            let _ = guard::guarded(|| drop(waker));
        }
        result
    }

    /// How long the last round trip took.
    pub(super) fn latency(&self) -> Duration {
        *self.latency.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// There is something to carry. Without a courier and outside a runtime, the next who waits starts one.
    pub(super) fn call(self: &Arc<Self>) {
        let start = {
            let mut state = self.lock();
            let runtime = if state.has_courier {
                None
            } else {
                Handle::try_current().ok()
            };
            state.has_courier |= runtime.is_some();
            runtime
        };
        match start {
            Some(runtime) => drop(runtime.spawn(carry(OnDuty(self.clone())))),
            None => self.called.notify_one(),
        }
    }

    /// The same, if there is something new, or nobody who carries.
    pub(super) fn call_if_needed(self: &Arc<Self>, is_new: bool) {
        if is_new || !self.lock().has_courier {
            self.call();
        }
    }

    /// Panics if there is no timer that could end the waiting, here, where it is seen.
    pub(super) fn check_timer(&self) {
        if !self.lock().has_courier {
            drop(time::sleep(Duration::ZERO));
        }
    }

    /// Nobody is left who could use the limiter.
    pub(super) fn close(&self) {
        self.lock().desk.leaves();
        self.called.notify_one();
    }

    fn took(&self, latency: Duration) {
        *self.latency.lock().unwrap_or_else(PoisonError::into_inner) = latency;
    }
}

impl Trip {
    fn new(mut backend: Box<dyn Backend>, ask: Ask, said: Said, begun: Instant) -> Self {
        let way = Box::pin(async move {
            let result = backend.call(&ask).await;
            (backend, result)
        });
        Self { begun, said, way }
    }
}

async fn carry(on_duty: OnDuty) {
    let office = on_duty.0.clone();
    // At rest, or on its way.
    let mut backend = Some((office.connect)());
    let mut trip: Option<Trip> = None;
    // It may go off too early, which costs less than to set it anew each time.
    let mut alarm = pin!(time::sleep(Duration::ZERO));
    let mut is_set = false;
    loop {
        let mut called = pin!(office.called.notified());
        called.as_mut().enable();

        let now = Instant::now();
        let mut wakers = Vec::new();
        let late = trip.take_if(|trip| now >= trip.begun + office.timeout);
        let (due, is_over) = office.look(|desk| {
            if let Some(late) = late {
                // Whatever the connection does, it is over by now; and so is the connection.
                desk.failed(late.said, StoreError::new("it did not answer in time"), now);
                backend = Some((office.connect)());
            }
            desk.tend(now, &mut wakers);
            if let Some(at_rest) = backend.take() {
                match desk.say(now) {
                    Some((ask, said)) => trip = Some(Trip::new(at_rest, ask, said, now)),
                    None => backend = Some(at_rest),
                }
            }
            (desk.due(trip.is_some(), now), desk.is_over())
        });
        wakers.into_iter().for_each(guard::wake);
        if is_over && trip.is_none() {
            return;
        }

        let given_up = trip.as_ref().map(|trip| trip.begun + office.timeout);
        let due = [due, given_up].into_iter().flatten().min();
        if let Some(due) = due.filter(|due| !is_set || *due < alarm.deadline()) {
            alarm.as_mut().reset(due);
            is_set = true;
        }
        let happened = poll_fn(|cx| {
            if let Some(trip) = &mut trip {
                if let Poll::Ready(back) = trip.way.as_mut().poll(cx) {
                    return Poll::Ready(Happened::Back(back));
                }
            }
            if called.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Happened::Called);
            }
            if is_set && alarm.as_mut().poll(cx).is_ready() {
                is_set = false;
                return Poll::Ready(Happened::Called);
            }
            Poll::Pending
        });
        if let Happened::Back((at_rest, result)) = happened.await {
            let Trip { begun, said, .. } = trip.take().expect("it is back");
            backend = Some(at_rest);
            let now = Instant::now();
            office.took(now - begun);
            let wakers = office.look(|desk| match result {
                Ok(answer) => desk.answered(said, answer, now),
                Err(error) => {
                    desk.failed(said, error, now);
                    Vec::new()
                }
            });
            wakers.into_iter().for_each(guard::wake);
        }
    }
}

impl Drop for OnDuty {
    fn drop(&mut self) {
        let wakers: Vec<Waker> = {
            let mut state = self.0.lock();
            state.has_courier = false;
            state.desk.abandoned(std::thread::panicking(), Instant::now());
            // One of them starts another.
            state.desk.wakers()
        };
        wakers.into_iter().for_each(guard::wake);
    }
}
