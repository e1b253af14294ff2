//! [`ExecutorInner`]: what the clones of an executor share, and how a call gets into the queue.

use super::{
    call_future::{CallFuture, EarlyOutcome, OpenEarlyResponse},
    monitor::Monitor,
    stack::{BoxCost, BoxDescribe},
};
use crate::{
    clock,
    deadline::{Deadline, DeadlineTimer, PendingDemand},
    error::Error,
    event::{self, EventHandle, Events, RequestDetails, Scope, Stage},
    queue::Queue,
    rate::{ApiTokens, Bursts, Cost},
};
use http::{Request, Response};
use std::{
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// Spawns the workers and returns the queue in front of them. This boxed function hides the types of the client and of
/// all layers from the executor's type.
pub(super) type Start<B, R> = Box<dyn Fn() -> Queue<Request<B>, Response<R>> + Send + Sync>;

/// The parts of an executor, which its builder puts together.
pub(super) struct ExecutorParts<B, R> {
    pub(super) start: Start<B, R>,
    /// Opens the early-response channel of a request. `Some` if the executor streams responses.
    pub(super) open_early_response: Option<OpenEarlyResponse<B, R>>,
    pub(super) describe: BoxDescribe<B, R>,
    pub(super) cost: BoxCost<B>,
    pub(super) timeout: Option<Duration>,
    pub(super) monitor: Monitor,
}

/// What the clones of an executor share. `ExecutorInner` is dropped with the last clone, and then cancels all calls.
pub(super) struct ExecutorInner<B, R> {
    parts: ExecutorParts<B, R>,
    /// The largest cost that the rate limiter admits, for each kind of budget (requests and tokens). It is kept here so
    /// that checking the cost of a call takes no lock.
    bursts: Arc<Bursts>,
    /// Counts the events of the calls, and sends every change of a call's status to subscribers.
    events: Events,
    /// The total cost of the submitted calls that have not left the queue, to compute how long a new call will wait
    /// behind them. `None` if the executor has no default timeout: a deadline set for a single call is then checked
    /// without this cost.
    pending_demand: Option<Arc<PendingDemand>>,
    state: Mutex<RunState<B, R>>,
    /// Locked while the executor is started, so that two starts do not run at once. Cloning the client and the layers
    /// runs user code. It is done under this lock and not under `state`: every `submit` locks `state`, and would have
    /// to wait for that code.
    starting: Mutex<()>,
}

pub(super) enum RunState<B, R> {
    Stopped,
    Running(Queue<Request<B>, Response<R>>),
    /// The executor is being stopped: it accepts no calls, and accepted calls may still run.
    Stopping(Queue<Request<B>, Response<R>>),
}

// === impl ExecutorInner ===

impl<B, R> ExecutorInner<B, R> {
    pub(super) fn new(parts: ExecutorParts<B, R>) -> Self {
        Self {
            bursts: parts.monitor.limiter().bursts(),
            events: parts.monitor.events().clone(),
            pending_demand: parts.timeout.map(|_| Arc::default()),
            parts,
            state: Mutex::new(RunState::Stopped),
            starting: Mutex::new(()),
        }
    }

    pub(super) const fn monitor(&self) -> &Monitor {
        &self.parts.monitor
    }

    pub(super) fn state(&self) -> MutexGuard<'_, RunState<B, R>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn start(&self) -> Result<(), Error> {
        let _starting = self.starting.lock().unwrap_or_else(PoisonError::into_inner);
        match &*self.state() {
            RunState::Running(queue) | RunState::Stopping(queue) if !queue.is_ended() => {
                return Err(Error::already_running());
            }
            RunState::Running(_) | RunState::Stopping(_) | RunState::Stopped => {}
        }
        let queue = (self.parts.start)();
        self.parts.monitor.watch(queue.places());
        let previous = mem::replace(&mut *self.state(), RunState::Running(queue));
        drop(previous);
        Ok(())
    }

    /// Returns a handle to the queue of the running executor.
    ///
    /// # Errors
    ///
    /// Returns an error with [`Error::is_not_running`] if the executor accepts no calls.
    pub(super) fn queue(&self) -> Result<Queue<Request<B>, Response<R>>, Error> {
        match &*self.state() {
            RunState::Running(queue) if !queue.is_closed() => Ok(queue.clone()),
            RunState::Running(_) | RunState::Stopping(_) | RunState::Stopped => Err(Error::not_running()),
        }
    }

    /// Returns the cost of the request. Fails if the cost is above the burst of a rate, since the call could never be
    /// admitted.
    pub(super) fn check(&self, request: &Request<B>) -> Result<Cost, Error> {
        let cost = self.parts.cost.cost(request);
        self.bursts.check(cost)?;
        Ok(cost)
    }

    /// Adds to the request the extensions that the layers read: its tokens, its deadline, and a guard that counts its
    /// cost in the pending demand (the total cost of the calls that have not left the queue). Fails if the wait for the
    /// rate limits alone would make the call miss its deadline.
    pub(super) fn prepare(&self, request: &mut Request<B>, cost: Cost) -> Result<(), Error> {
        if cost.tokens > 0 && request.extensions().get::<ApiTokens>().is_none() {
            // The number of tokens is put into the request's extension `ApiTokens`, which the event records. When the
            // layers compute the cost, a cost function that estimates tokens uses this number instead of estimating
            // again.
            request.extensions_mut().insert(ApiTokens(cost.tokens));
        }
        let deadline = Deadline::of(request).or_else(|| self.parts.timeout.map(Deadline::after));
        if let Some(deadline) = deadline {
            let pending = self
                .pending_demand
                .as_ref()
                .map(|demand| demand.cost())
                .unwrap_or_default();
            deadline.allows(self.parts.monitor.limiter().wait(cost, pending))?;
            request.extensions_mut().insert(deadline);
        }
        if let Some(demand) = &self.pending_demand {
            request.extensions_mut().insert(demand.add(cost));
        }
        Ok(())
    }

    /// Checks the request, opens its event, and puts the call into the queue, or lets it wait for a place.
    #[inline]
    pub(super) fn submit(
        &self,
        queue: &mut Queue<Request<B>, Response<R>>,
        mut request: Request<B>,
    ) -> Result<(EventHandle, CallFuture<B, R>), Error> {
        let cost = self.check(&request)?;
        self.prepare(&mut request, cost)?;
        // The event and the queue use one reading of the clock, since each reading takes time.
        let _cached_now = clock::cache();
        let (event, scope) = self.open_event(&request);
        let early = self.early_outcome(&mut request, &event);
        let queued = queue.call_in(scope, &mut Some(request));
        Ok((event, CallFuture::new(queued, early)))
    }

    pub(super) fn open_event(&self, request: &Request<B>) -> (EventHandle, Scope) {
        let describe = |details: &mut RequestDetails| self.parts.describe.request(request, details);
        let (writer, span) = self.events.open(describe, Stage::Queued);
        (writer.handle(), Scope::capture_with(writer, span))
    }

    /// Returns what may resolve the call's future before the queue does: the early-response channel and the timer of
    /// the deadline. `None` if the call has no deadline and its response is not streamed.
    #[inline]
    pub(super) fn early_outcome(&self, request: &mut Request<B>, event: &EventHandle) -> Option<Box<EarlyOutcome<R>>> {
        let deadline = Deadline::of(request);
        if deadline.is_none() && self.parts.open_early_response.is_none() {
            return None;
        }
        Some(Box::new(EarlyOutcome {
            response: self.parts.open_early_response.map(|open| open(request)),
            timer: deadline.map(|deadline| (DeadlineTimer::new(deadline), event.clone())),
        }))
    }

    /// Whether the current task is polling a call of this executor.
    pub(super) fn is_calling(&self) -> bool {
        event::current().is_some_and(|event| event.reports_to(&self.events))
    }

    /// Cancels all queued and running calls.
    pub(super) fn abort(&self) {
        let queue = match &*self.state() {
            RunState::Running(queue) | RunState::Stopping(queue) => queue.clone(),
            RunState::Stopped => return,
        };
        // The lock of `state` is released before the queue is aborted. Aborting drops requests and wakes callers, which
        // may run user code that uses the executor and locks `state` again.
        queue.abort();
    }
}

impl<B, R> Drop for ExecutorInner<B, R> {
    fn drop(&mut self) {
        self.abort();
    }
}
