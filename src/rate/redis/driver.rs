//! The driver: a task that carries between the [coordinator](super::coordinator) and the store, one round trip at a time. Whoever
//! comes meanwhile goes along with the next.
//!
//! It is started by the first who waits, in its runtime, and ends when the limiter is dropped, or with that runtime; the
//! next who waits then starts another.

use super::{
    coordinator::{Coordinator, RequestSnapshot},
    store::StoreError,
    wire::{StoreReply, StoreRequest},
};
use crate::panic;
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
    fn call<'a>(
        &'a mut self,
        ask: &'a StoreRequest,
    ) -> Pin<Box<dyn Future<Output = Result<StoreReply, StoreError>> + Send + 'a>>;
}

/// Makes connections to the store; they live in the driver's runtime.
pub(super) type Connect = Box<dyn Fn() -> Box<dyn Backend> + Send + Sync>;

/// What the limiter and its driver share.
pub(super) struct SharedCoordinator {
    state: Mutex<State>,
    called: Notify,
    connect: Connect,
    timeout: Duration,
    latency: Mutex<Duration>,
}

struct State {
    coordinator: Coordinator,
    has_courier: bool,
}

/// A round trip.
struct InFlight {
    begun: Instant,
    said: RequestSnapshot,
    way: Pin<Box<dyn Future<Output = Back> + Send>>,
}

/// What comes back: the connection, and what was heard on it.
type Back = (Box<dyn Backend>, Result<StoreReply, StoreError>);

enum DriverEvent {
    Back(Back),
    Called,
}

/// Says that there is a driver, until it is dropped.
struct DriverGuard(Arc<SharedCoordinator>);

impl SharedCoordinator {
    pub(super) fn new(coordinator: Coordinator, connect: Connect, timeout: Duration) -> Self {
        Self {
            state: Mutex::new(State {
                coordinator,
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

    pub(super) fn look<T>(&self, look: impl FnOnce(&mut Coordinator) -> T) -> T {
        let (result, discarded) = {
            let mut state = self.lock();
            let result = look(&mut state.coordinator);
            (result, state.coordinator.discarded())
        };
        for waker in discarded {
            let _ = panic::catch_unwind(|| drop(waker));
        }
        result
    }

    /// How long the last round trip took.
    pub(super) fn latency(&self) -> Duration {
        *self.latency.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// There is something to carry. Without a driver and outside a runtime, the next who waits starts one.
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
            Some(runtime) => drop(runtime.spawn(carry(DriverGuard(self.clone())))),
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
        self.lock().coordinator.leaves();
        self.called.notify_one();
    }

    fn took(&self, latency: Duration) {
        *self.latency.lock().unwrap_or_else(PoisonError::into_inner) = latency;
    }
}

impl InFlight {
    fn new(mut backend: Box<dyn Backend>, ask: StoreRequest, said: RequestSnapshot, begun: Instant) -> Self {
        let way = Box::pin(async move {
            let result = backend.call(&ask).await;
            (backend, result)
        });
        Self { begun, said, way }
    }
}

async fn carry(on_duty: DriverGuard) {
    let office = on_duty.0.clone();
    // At rest, or on its way.
    let mut backend = Some((office.connect)());
    let mut trip: Option<InFlight> = None;
    // It may go off too early, which costs less than to set it anew each time.
    let mut alarm = pin!(time::sleep(Duration::ZERO));
    let mut is_set = false;
    loop {
        let mut called = pin!(office.called.notified());
        called.as_mut().enable();

        let now = Instant::now();
        let mut wakers = Vec::new();
        let late = trip.take_if(|trip| now >= trip.begun + office.timeout);
        let (due, is_over) = office.look(|coordinator| {
            if let Some(late) = late {
                // Whatever the connection does, it is over by now; and so is the connection.
                coordinator.failed(late.said, StoreError::new("it did not answer in time"), now);
                backend = Some((office.connect)());
            }
            coordinator.tend(now, &mut wakers);
            if let Some(at_rest) = backend.take() {
                match coordinator.say(now) {
                    Some((ask, said)) => trip = Some(InFlight::new(at_rest, ask, said, now)),
                    None => backend = Some(at_rest),
                }
            }
            (coordinator.due(trip.is_some(), now), coordinator.is_over())
        });
        wakers.into_iter().for_each(panic::wake);
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
                    return Poll::Ready(DriverEvent::Back(back));
                }
            }
            if called.as_mut().poll(cx).is_ready() {
                return Poll::Ready(DriverEvent::Called);
            }
            if is_set && alarm.as_mut().poll(cx).is_ready() {
                is_set = false;
                return Poll::Ready(DriverEvent::Called);
            }
            Poll::Pending
        });
        if let DriverEvent::Back((at_rest, result)) = happened.await {
            let InFlight { begun, said, .. } = trip.take().expect("it is back");
            backend = Some(at_rest);
            let now = Instant::now();
            office.took(now - begun);
            let wakers = office.look(|coordinator| match result {
                Ok(answer) => coordinator.answered(said, answer, now),
                Err(error) => {
                    coordinator.failed(said, error, now);
                    Vec::new()
                }
            });
            wakers.into_iter().for_each(panic::wake);
        }
    }
}

impl Drop for DriverGuard {
    fn drop(&mut self) {
        let wakers: Vec<Waker> = {
            let mut state = self.0.lock();
            state.has_courier = false;
            state.coordinator.abandoned(std::thread::panicking(), Instant::now());
            // One of them starts another.
            state.coordinator.wakers()
        };
        wakers.into_iter().for_each(panic::wake);
    }
}
