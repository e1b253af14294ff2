//! [`Worker`]: a task that runs one call at a time, from its begin to its end.
//!
//! Each running call has a worker of its own, so that the runtime schedules the calls like any tasks: they have their
//! own cooperative budgets, run on any thread, and do not wait for each other. A worker whose call has ended runs the
//! next call, so that most calls need no new task. The [channel](super::channel) decides which worker begins the next
//! call.
//!
//! The service is user code and may panic. A panic fails only the call in which it happened; the worker continues.

use super::{
    channel::{Channel, Next, StartEpoch},
    message::{EarlyEnd, Message},
};
use crate::{
    deadline::PendingCost,
    error::{AcquireError, BoxError},
    event::Scope,
    panic::catch_unwind,
    schedule::{Eligible, Grant},
    semaphore::granted,
    sync::{Mutex, MutexGuard},
};
use pin_project_lite::pin_project;
use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, PoisonError},
    task::{Context, Poll, ready},
};
use tower_service::Service;

/// The inner service of a queue. It is locked only by the worker that has the channel's turn, and only within one poll.
/// `None` once it was dropped, because no further call begins.
pub(super) type SharedService<S> = Arc<Mutex<Option<S>>>;

pin_project! {
    /// The task of a worker. If it is dropped while it runs a call, because its runtime is shut down, the call is
    /// cancelled.
    pub(super) struct Worker<S, Req>
    where
        S: Service<Req>,
    {
        #[pin]
        future: Option<S::Future>,
        // The call of `future`.
        call: Option<RunningCall<Req, S::Response>>,
        // What the call has until its future was polled once.
        starting: Option<Starting>,
        service: SharedService<S>,
        id: usize,
        channel: Arc<Channel<Req, S::Response>>,
    }

    impl<S, Req> PinnedDrop for Worker<S, Req>
    where
        S: Service<Req>,
    {
        fn drop(this: Pin<&mut Self>) {
            let mut this = this.project();
            let _ = catch_unwind(|| this.future.set(None));
            if let Some(call) = this.call.take() {
                call.end(this.channel, Err(EarlyEnd::Cancelled));
            }
            let epoch = this.starting.take().map(|starting| starting.epoch);
            if this.channel.remove_worker(*this.id, epoch) {
                drop_service(this.service);
                this.channel.set_ended();
            }
        }
    }
}

/// What a call has from its begin until its future was polled once.
struct Starting {
    /// Counts the call among the starting ones.
    epoch: StartEpoch,
    /// Counts the call's cost among that of the calls that have not reached the limits: after the first poll, the
    /// limiter counts it.
    #[allow(dead_code, reason = "its drop is what matters")]
    demand: Option<PendingCost>,
}

/// What a running call has besides its future.
struct RunningCall<Req, Res> {
    message: Arc<Message<Req, Res>>,
    /// The call's event and span.
    scope: Scope,
    /// What a schedule has given the call.
    grant: Option<Box<Grant>>,
}

/// A call that a schedule has chosen, what it was given, and whether the service is ready for it.
type ChosenCall<Req, Res> = (Arc<Message<Req, Res>>, Box<Grant>, Result<(), BoxError>);

/// How many calls a worker begins in one poll before it yields to other tasks. They share the cooperative budget that
/// Tokio gives a task per poll, 128 operations, and a call that runs out of it has to be continued in another poll.
const MAX_STARTS_PER_POLL: usize = 32;

// === impl Worker ===

impl<S, Req> Worker<S, Req>
where
    S: Service<Req>,
    S::Error: Into<BoxError>,
{
    pub(super) const fn new(service: SharedService<S>, id: usize, channel: Arc<Channel<Req, S::Response>>) -> Self {
        Self {
            future: None,
            call: None,
            starting: None,
            service,
            id,
            channel,
        }
    }

    /// Drives the worker's call. Ready when the worker has no call.
    fn poll_call(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut this = self.as_mut().project();
        let (Some(future), Some(call)) = (this.future.as_mut().as_pin_mut(), this.call.as_mut()) else {
            return Poll::Ready(());
        };
        this.channel.end_if_aborted(&call.message);
        if let Some(why) = call.early_end(this.channel) {
            self.conclude(Err(why));
            return Poll::Ready(());
        }
        let polled = catch_unwind(|| {
            let _entered = call.scope.enter();
            let _granted = call.grant.as_mut().map(|grant| grant.enter());
            future.poll(cx).map_err(Into::into)
        });
        match polled {
            Ok(Poll::Ready(result)) => self.conclude(Ok(result)),
            Ok(Poll::Pending) => match (call.early_end(this.channel), call.poll_refused(cx)) {
                (Some(why), _) => self.conclude(Err(why)),
                (None, Poll::Ready(refused)) => self.fail(refused.into_reason()),
                (None, Poll::Pending) => return Poll::Pending,
            },
            Err(panic) => self.fail(panic),
        }
        Poll::Ready(())
    }

    /// Ends the call with an error that is not the result of its future. The future is dropped before the failure is written,
    /// so that the call's permit is free when its event ends.
    fn fail(mut self: Pin<&mut Self>, error: BoxError) {
        let mut this = self.as_mut().project();
        let _ = catch_unwind(|| this.future.set(None));
        if let Some(call) = this.call.as_ref() {
            let error = call.fail(error);
            self.conclude(Ok(Err(error)));
        }
    }

    /// Ends the call. The call's future, and with it the call's permit, is dropped first, so that a caller that makes
    /// another call at once finds the permit free.
    fn conclude(self: Pin<&mut Self>, end: Result<Result<S::Response, BoxError>, EarlyEnd>) {
        let mut this = self.project();
        let _ = catch_unwind(|| this.future.set(None));
        if let Some(call) = this.call.take() {
            call.end(this.channel, end);
        }
    }

    /// Begins a call that has the turn: `message`, or the one that the schedule chooses. Waits until the service is ready
    /// for it, and calls the service.
    fn poll_begin(
        mut self: Pin<&mut Self>,
        message: Option<Arc<Message<Req, S::Response>>>,
        epoch: StartEpoch,
    ) -> Poll<()> {
        let mut this = self.as_mut().project();
        let channel = &*this.channel;
        let mut service = lock(this.service);
        let Some(service_ref) = service.as_mut() else {
            drop(service);
            match message {
                Some(message) => channel.not_begun(&message, epoch),
                None => channel.not_chosen(epoch),
            }
            return Poll::Ready(());
        };
        let (message, grant, ready) = match message {
            Some(message) => {
                let ready = loop {
                    channel.end_if_stopped(&message);
                    // The service's readiness is not polled for a call that has ended.
                    if message.ends_early() {
                        break Ok(());
                    }
                    let mut cx = Context::from_waker(channel.ready_waker());
                    match catch_unwind(|| service_ref.poll_ready(&mut cx).map_err(Into::into)) {
                        Ok(Poll::Ready(ready)) => break ready,
                        Ok(Poll::Pending) if channel.wait_until_ready(*this.id, Some(&message), epoch) => {
                            return Poll::Pending;
                        }
                        // The service's waker was woken, or the call has ended, since the service was polled.
                        Ok(Poll::Pending) => {}
                        Err(panic) => break Err(panic),
                    }
                };
                (message, None, ready)
            }
            None => match ready!(poll_choose(service_ref, channel, *this.id, epoch)) {
                Some((message, grant, ready)) => (message, Some(grant), ready),
                None => {
                    drop(service);
                    channel.not_chosen(epoch);
                    return Poll::Ready(());
                }
            },
        };
        let is_scheduled = grant.is_some();
        if is_scheduled {
            channel.end_if_stopped(&message);
        }
        let begun = message.begin(*this.id);
        if is_scheduled {
            channel.give_places();
        }
        let Some((req, scope, demand)) = begun else {
            drop(service);
            drop(grant);
            channel.not_begun(&message, epoch);
            return Poll::Ready(());
        };
        channel.enter();
        *this.starting = Some(Starting { epoch, demand });
        let call = this.call.insert(RunningCall { message, scope, grant });
        // The request, which may be large, is moved once, out of the option into the service.
        let mut req = Some(req);
        let made = match ready {
            Ok(()) => catch_unwind(|| {
                let _entered = call.scope.enter();
                let _granted = call.grant.as_mut().map(|grant| {
                    grant.begin();
                    grant.enter()
                });
                if let Some(req) = req.take() {
                    this.future.set(Some(service_ref.call(req)));
                }
            }),
            Err(error) => {
                let _ = catch_unwind(|| drop(req.take()));
                Err(error)
            }
        };
        drop(service);
        channel.give_back_turn();
        if let Err(error) = made {
            let error = call.fail(error);
            self.conclude(Ok(Err(error)));
        }
        Poll::Ready(())
    }
}

impl<S, Req> Future for Worker<S, Req>
where
    S: Service<Req>,
    S::Error: Into<BoxError>,
{
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        for _ in 0..MAX_STARTS_PER_POLL {
            let polled = self.as_mut().poll_call(cx);
            let this = self.as_mut().project();
            let epoch = this.starting.take().map(|starting| starting.epoch);
            if polled.is_pending() {
                if let Some(epoch) = epoch {
                    if let Some(grant) = this.call.as_mut().and_then(|call| call.grant.as_mut()) {
                        grant.end_start();
                    }
                    this.channel.started(epoch);
                }
                return Poll::Pending;
            }
            match this.channel.next(*this.id, epoch, cx) {
                Next::Begin(message, epoch) => {
                    if self.as_mut().poll_begin(message, epoch).is_pending() {
                        return Poll::Pending;
                    }
                }
                Next::Wait => return Poll::Pending,
                Next::End => return Poll::Ready(()),
            }
        }
        // A call has begun, which is polled in the worker's next poll.
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

/// Waits until the service is ready and the schedule has chosen a call. Ready with `None` if no call waits.
// Kept out of the worker's poll, so that calls without a schedule are not slower for it.
#[inline(never)]
fn poll_choose<S, Req>(
    service: &mut S,
    channel: &Arc<Channel<Req, S::Response>>,
    id: usize,
    epoch: StartEpoch,
) -> Poll<Option<ChosenCall<Req, S::Response>>>
where
    S: Service<Req>,
    S::Error: Into<BoxError>,
{
    loop {
        let mut cx = Context::from_waker(channel.ready_waker());
        // A call that the schedule chooses brings its permit.
        let permits = channel.schedule().and_then(|scheduled| scheduled.schedule.permits());
        let expected = granted::expect(permits);
        let polled = catch_unwind(|| service.poll_ready(&mut cx).map_err(Into::into));
        drop(expected);
        let chosen = match polled.unwrap_or_else(|panic| Poll::Ready(Err(panic))) {
            Poll::Ready(ready) => channel
                .poll_choose(Eligible::All, &mut cx)
                .map(|chosen| chosen.map(|(message, grant)| (message, grant, ready))),
            // The calls that run may have to make their attempts before the service is ready for another call.
            Poll::Pending => channel.poll_choose(Eligible::Attempts, &mut cx).map(|_| None),
        };
        match chosen {
            Poll::Pending if channel.wait_until_ready(id, None, epoch) => return Poll::Pending,
            // The waker was woken since the service was polled.
            Poll::Pending => {}
            Poll::Ready(chosen) => return Poll::Ready(chosen),
        }
    }
}

fn lock<S>(service: &SharedService<S>) -> MutexGuard<'_, Option<S>> {
    service.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Drops the service, which runs user code, without the lock.
fn drop_service<S>(service: &SharedService<S>) {
    let service = lock(service).take();
    let _ = catch_unwind(move || drop(service));
}

/// Gives back what no layer has taken of what a schedule has given a call.
#[cold]
fn give_back(grant: Box<Grant>) {
    let _ = catch_unwind(move || drop(grant));
}

// === impl RunningCall ===

impl<Req, Res> RunningCall<Req, Res> {
    /// Returns why the call has to end now, if it has to. It must not be polled meanwhile.
    fn early_end(&self, channel: &Channel<Req, Res>) -> Option<EarlyEnd> {
        let why = self.message.early_end();
        if why.is_none() && channel.finishes_only_sent() && !self.scope.finish_attempts() {
            return Some(EarlyEnd::Cancelled);
        }
        why
    }

    /// Ready with the reason if the call has to fail because its schedule has refused a further attempt of it.
    fn poll_refused(&self, cx: &mut Context<'_>) -> Poll<AcquireError> {
        let grant = self.grant.as_ref();
        grant.map_or(Poll::Pending, |grant| grant.poll_refused(cx))
    }

    /// Writes a failure to the call's event and returns the failure. The layers below cannot write it, because it is a
    /// panic or an error from `poll_ready`. Writing formats the error, which runs user code: if that panics, the call
    /// fails with that panic instead.
    fn fail(&self, error: BoxError) -> BoxError {
        let Err(panic) = catch_unwind(|| self.scope.fail(&error)) else {
            return error;
        };
        let _ = catch_unwind(|| drop(error));
        let _ = catch_unwind(|| self.scope.fail(&panic));
        panic
    }

    /// Ends the call with its result, or early. Everything about the call is final before the caller is told: its
    /// future was dropped, it is no longer counted as in flight, and its event has ended.
    fn end(self, channel: &Channel<Req, Res>, end: Result<Result<Res, BoxError>, EarlyEnd>) {
        let Self { message, scope, grant } = self;
        if let Some(grant) = grant {
            give_back(grant);
        }
        channel.leave();
        // Each step is wrapped in `catch_unwind` because it may drop user values: a response that the caller does not
        // fetch, or a tracing span.
        let result = end.unwrap_or_else(|why| {
            let _ = catch_unwind(|| why.record(&scope));
            Err(why.into_error())
        });
        // The scope is dropped before the caller is woken, so that the caller has the last handle to the event and
        // frees the event's memory on the thread that allocated it.
        let _ = catch_unwind(move || drop(scope));
        let _ = catch_unwind(|| message.finish(result));
        channel.remove_deadline(&message);
        let _ = catch_unwind(move || drop(message));
    }
}
