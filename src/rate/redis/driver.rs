//! The driver: a task that sends the requests of the [coordinator](super::coordinator) to the store, one at a time.
//! Costs and reports that come up while a request is in flight are sent together in the next one.
//!
//! The driver is started in the current runtime by the first call that waits, the first pause or the first change of
//! the limits. It ends when the limiter is dropped, or when its runtime ends. If its runtime has ended, the next
//! waiting call that is polled starts another driver.

use super::{
    coordinator::{Coordinator, RequestSnapshot},
    goodbye,
    problem::StoreError,
    round_trips::RoundTrips,
    wire::{StoreReply, StoreRequest},
};
use crate::{error::StoreProblem, panic};
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

/// A connection to the store, which replaces itself when it is lost.
pub(super) trait Backend: Send + Sync {
    /// Sends `request` to the store and waits for the reply. If the returned future is dropped, the store may still
    /// have served the request.
    fn call<'a>(&'a self, request: &'a StoreRequest) -> ReplyFuture<'a>;

    /// Returns why a request has had no reply, if it times out now.
    fn timeout_problem(&self) -> StoreProblem {
        StoreProblem::Timeout
    }
}

pub(super) type ReplyFuture<'a> = Pin<Box<dyn Future<Output = Result<StoreReply, StoreError>> + Send + 'a>>;

/// Creates a [`Backend`]. The function is called in the driver's runtime, and the backend connects when it sends its
/// first request.
pub(super) type Connect = Box<dyn Fn() -> Arc<dyn Backend> + Send + Sync>;

/// The coordinator behind a lock, which the clones of a limiter and its driver share.
pub(super) struct SharedCoordinator {
    state: Mutex<DriverState>,
    driver_notify: Notify,
    connect: Connect,
    /// How long a round trip may take, if the server is not so far that it takes longer.
    timeout: Duration,
    round_trips: Arc<RoundTrips>,
}

struct DriverState {
    coordinator: Coordinator,
    has_driver: bool,
    /// Whether a thread of its own was started to report that this member leaves.
    has_left_without_runtime: bool,
}

/// A guard that the driver task owns. When the guard is dropped, it records that there is no driver, and wakes the
/// waiters so that one of them starts another driver.
struct DriverGuard(Arc<SharedCoordinator>);

/// A request to the store that was sent and has no reply yet.
struct InFlightRequest {
    started_at: Instant,
    snapshot: RequestSnapshot,
    round_trip: ReplyFuture<'static>,
}

// A step is handled where it is made, so its size does not matter.
#[allow(clippy::large_enum_variant)]
enum DriverStep {
    RoundTripEnded(Result<StoreReply, StoreError>),
    /// The driver was notified, or its timer has fired, so it checks what there is to do.
    Woken,
}

// === impl SharedCoordinator ===

impl SharedCoordinator {
    pub(super) fn new(
        coordinator: Coordinator,
        connect: Connect,
        timeout: Duration,
        round_trips: Arc<RoundTrips>,
    ) -> Self {
        Self {
            state: Mutex::new(DriverState {
                coordinator,
                has_driver: false,
                has_left_without_runtime: false,
            }),
            driver_notify: Notify::new(),
            connect,
            timeout,
            round_trips,
        }
    }

    /// Locks the state. A poisoned lock is used like any other: except for clones of wakers, no user code runs under
    /// it.
    fn lock(&self) -> MutexGuard<'_, DriverState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `f` with the coordinator while it is locked. Wakers that are no longer needed are dropped after the lock
    /// is released, because dropping a waker runs user code.
    pub(super) fn with_coordinator<T>(&self, f: impl FnOnce(&mut Coordinator) -> T) -> T {
        let (result, discarded) = {
            let mut state = self.lock();
            let result = f(&mut state.coordinator);
            (result, state.coordinator.take_discarded_wakers())
        };
        for waker in discarded {
            let _ = panic::catch_unwind(|| drop(waker));
        }
        result
    }

    /// Returns how long the last completed round trip to the store took; 0 before the first.
    pub(super) fn latency(&self) -> Duration {
        self.round_trips.last()
    }

    fn deadline(&self, request: &InFlightRequest) -> Instant {
        self.round_trips.deadline(request.started_at, self.timeout)
    }

    /// Returns a connection to the store for the current runtime.
    pub(super) fn connect(&self) -> Arc<dyn Backend> {
        (self.connect)()
    }

    /// Notifies the driver that there is something to send to the store, or starts a driver if there is none.
    ///
    /// Outside a Tokio runtime this function cannot start a driver. Then the next waiter that is polled in a runtime
    /// starts it.
    pub(super) fn notify_driver(self: &Arc<Self>) {
        let runtime = {
            let mut state = self.lock();
            let runtime = if state.has_driver {
                None
            } else {
                Handle::try_current().ok()
            };
            state.has_driver |= runtime.is_some();
            runtime
        };
        match runtime {
            Some(runtime) => drop(runtime.spawn(run(DriverGuard(self.clone())))),
            None => self.driver_notify.notify_one(),
        }
    }

    /// Starts a driver if there is none, for example because the former driver has ended with its runtime.
    pub(super) fn ensure_driver(self: &Arc<Self>) {
        if !self.lock().has_driver {
            self.notify_driver();
        }
    }

    /// Panics if there is no driver and the current runtime has no timer, so that the panic happens in the caller's
    /// task and not in the driver's.
    pub(super) fn check_timer(&self) {
        if !self.lock().has_driver {
            drop(time::sleep(Duration::ZERO));
        }
    }

    /// Called when the last clone of the limiter is dropped. The driver then reports to the store that this process no
    /// longer shares the quota, and ends.
    pub(super) fn close(self: &Arc<Self>) {
        let has_work = {
            let mut state = self.lock();
            state.coordinator.leave();
            !state.coordinator.has_ended()
        };
        if !has_work {
            self.driver_notify.notify_one();
            return;
        }
        self.notify_driver();
        if !self.lock().has_driver {
            self.leave_without_runtime();
        }
    }

    /// Reports that this member leaves from a thread of its own, if that has not been tried before.
    fn leave_without_runtime(self: &Arc<Self>) {
        let was_tried = std::mem::replace(&mut self.lock().has_left_without_runtime, true);
        if !was_tried {
            goodbye::leave_without_runtime(self.clone());
        }
    }
}

// === impl InFlightRequest ===

impl InFlightRequest {
    fn new(backend: Arc<dyn Backend>, request: StoreRequest, snapshot: RequestSnapshot, now: Instant) -> Self {
        let round_trip = Box::pin(async move { backend.call(&request).await });
        Self {
            started_at: now,
            snapshot,
            round_trip,
        }
    }
}

// === the task ===

/// Runs a driver in the current task, because the runtime of the former one has ended.
pub(super) async fn run_again(shared: Arc<SharedCoordinator>) {
    shared.lock().has_driver = true;
    run(DriverGuard(shared)).await;
}

async fn run(guard: DriverGuard) {
    let shared = guard.0.clone();
    let backend = shared.connect();
    let mut in_flight: Option<InFlightRequest> = None;
    let mut timer = pin!(time::sleep(Duration::ZERO));
    let mut is_timer_set = false;
    loop {
        // The notification is enabled before the coordinator is read, so that one that arrives in between is not lost.
        let mut notified = pin!(shared.driver_notify.notified());
        notified.as_mut().enable();

        let now = Instant::now();
        let mut wakers = Vec::new();
        let timed_out = in_flight.take_if(|in_flight| now >= shared.deadline(in_flight));
        // Dropping the future of the round trip takes locks of the connection, so it is dropped here.
        let timed_out = timed_out.map(|in_flight| (in_flight.snapshot, backend.timeout_problem()));
        let (next_wakeup, has_ended) = shared.with_coordinator(|coordinator| {
            if let Some((snapshot, problem)) = timed_out {
                coordinator.on_failure(snapshot, StoreError::new(problem), now);
            }
            coordinator.serve_locally(now, &mut wakers);
            if in_flight.is_none() {
                let next = coordinator.next_request(now);
                let backend = backend.clone();
                in_flight = next.map(|(request, snapshot)| InFlightRequest::new(backend, request, snapshot, now));
            }
            let next_wakeup = coordinator.next_wakeup(in_flight.is_some(), now);
            (next_wakeup, coordinator.has_ended())
        });
        wakers.into_iter().for_each(panic::wake);
        if has_ended && in_flight.is_none() {
            return;
        }

        // The deadline moves while the request is in flight, if it gets on. So it is looked at again when it is over.
        let deadline = in_flight.as_ref().map(|in_flight| shared.deadline(in_flight));
        let next_wakeup = [next_wakeup, deadline].into_iter().flatten().min();
        // The timer is reset only to an earlier time, never to a later one. So it sometimes fires before there is
        // anything to do, but this costs less than a reset in each round.
        if let Some(at) = next_wakeup.filter(|at| !is_timer_set || *at < timer.deadline()) {
            timer.as_mut().reset(at);
            is_timer_set = true;
        }
        let step = poll_fn(|cx| {
            if let Some(in_flight) = &mut in_flight {
                if let Poll::Ready(round_trip) = in_flight.round_trip.as_mut().poll(cx) {
                    return Poll::Ready(DriverStep::RoundTripEnded(round_trip));
                }
            }
            if notified.as_mut().poll(cx).is_ready() {
                return Poll::Ready(DriverStep::Woken);
            }
            if is_timer_set && timer.as_mut().poll(cx).is_ready() {
                is_timer_set = false;
                return Poll::Ready(DriverStep::Woken);
            }
            Poll::Pending
        });
        if let DriverStep::RoundTripEnded(result) = step.await {
            let mut ended = in_flight.take().expect("the request that has ended was in flight");
            let now = Instant::now();
            if result.is_ok() {
                ended.snapshot.sent_at = shared.round_trips.on_reply(ended.started_at, now);
            }
            let wakers = shared.with_coordinator(|coordinator| match result {
                Ok(reply) => coordinator.on_reply(ended.snapshot, reply, now),
                Err(error) => {
                    coordinator.on_failure(ended.snapshot, error, now);
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
            state.has_driver = false;
            let is_panic = std::thread::panicking();
            state.coordinator.on_driver_exit(is_panic, Instant::now());
            // All waiters are woken when the driver ends, because the first waiter that is polled starts another
            // driver.
            state.coordinator.wakers()
        };
        wakers.into_iter().for_each(panic::wake);
        let has_to_leave = {
            let state = self.0.lock();
            state.coordinator.is_leaving() && !state.coordinator.has_ended()
        };
        if has_to_leave && !std::thread::panicking() {
            // The limiter was dropped, and its runtime has ended before the driver could report that.
            self.0.leave_without_runtime();
        }
    }
}
