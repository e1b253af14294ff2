//! [`ExecutorInner`]: what the clones of an executor share, and how a call gets into the queue.

use super::{
    call::TrySubmitError,
    call_future::{CallFuture, OpenEarlyResponse},
    monitor::Monitor,
    nested::NestedWaits,
    stack::{BoxCost, BoxDescribe},
};
use crate::{
    clock,
    deadline::{Deadline, PendingDemand},
    error::{Error, InvalidConfig, Refused},
    event::{self, EventHandle, Events, Refusal, RequestDetails, Scope, Stage},
    queue::{self, CallContext, Queue},
    rate::{ApiTokens, Budget, Bursts, Cost, Demand},
    schedule::{RequestFlow, Schedule, ScheduledCall},
};
use http::{Request, Response};
use std::{
    mem,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::sync::oneshot;

/// Makes the stack and returns the queue in front of it. This boxed function hides the types of the client and of
/// all layers from the executor's type.
pub(super) type Start<B, R> = Box<dyn Fn() -> Queue<Request<B>, Response<R>> + Send + Sync>;

/// The queue's future of a call.
type Queued<B, R> = queue::ResponseFuture<Request<B>, Response<R>>;

/// The receiving end of a call's early-response channel. `None` if responses are not streamed.
type EarlyResponse<R> = Option<Box<oneshot::Receiver<Response<R>>>>;

/// When a full queue probably has a free place, if no rate holds up its calls: how long they take is not known.
const UNKNOWN_WAIT: Duration = Duration::from_millis(100);

/// Says whose call a request is.
type BoxFlow<B> = Box<dyn RequestFlow<B> + Send + Sync>;

/// What an admitted call has besides its request.
struct Admission<R> {
    context: CallContext,
    event: EventHandle,
    early_response: EarlyResponse<R>,
}

/// The parts of an executor, which its builder puts together.
pub(super) struct ExecutorParts<B, R> {
    pub(super) start: Start<B, R>,
    /// Opens the early-response channel of a request. `Some` if the executor streams responses.
    pub(super) open_early_response: Option<OpenEarlyResponse<B, R>>,
    pub(super) describe: BoxDescribe<B, R>,
    pub(super) cost: BoxCost<B>,
    pub(super) schedule: Option<Schedule>,
    /// Says whose call a request is, if there is a schedule.
    pub(super) flow: BoxFlow<B>,
    pub(super) timeout: Option<Duration>,
    pub(super) monitor: Monitor,
}

/// What the clones of an executor share. `ExecutorInner` is dropped with the last clone, and then cancels all calls.
pub(super) struct ExecutorInner<B, R> {
    parts: ExecutorParts<B, R>,
    /// The largest cost that the rate limiter admits, for each budget. It is kept here so
    /// that checking the cost of a call takes no lock.
    bursts: Arc<Bursts>,
    /// Whether to warn of the first cost that names tokens, but none of the kinds of tokens that are limited.
    warns_of_untold_kinds: AtomicBool,
    /// Counts the events of the calls, and sends every change of a call's status to subscribers.
    events: Events,
    /// The total cost of the submitted calls that have not reached the limits, to compute how long a new call will wait
    /// behind them.
    pending_demand: Arc<PendingDemand>,
    nested_waits: Arc<NestedWaits>,
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
        let limits = parts.monitor.limiter().limits();
        let is_kind = |budget| matches!(budget, Budget::InputTokens | Budget::OutputTokens);
        Self {
            bursts: parts.monitor.limiter().bursts(),
            warns_of_untold_kinds: AtomicBool::new(limits.rates().any(|(budget, _)| is_kind(budget))),
            events: parts.monitor.events().clone(),
            pending_demand: Arc::default(),
            nested_waits: NestedWaits::new(parts.monitor.events().clone(), parts.monitor.concurrency().clone()),
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
        if self.parts.schedule.as_ref().is_some_and(Schedule::is_used) {
            let problem = InvalidConfig::new("schedule", "must not be used by another queue that has not ended");
            return Err(Error::new(problem));
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

    /// Tells the observers of a call that is refused with this error and has no event.
    #[cold]
    pub(super) fn refused(&self, error: Error) -> Error {
        self.events.refused(Refusal::of(&error));
        error
    }

    /// Returns the cost of the request. Fails if the cost is above the burst of a rate, since the call could never be
    /// admitted.
    fn check(&self, request: &mut Request<B>) -> Result<Cost, Error> {
        self.parts.cost.prepare(request);
        let cost = self.parts.cost.cost(request);
        self.bursts.check(&cost)?;
        if cost.tokens > 0 && cost.input_tokens == 0 && cost.output_tokens == 0 {
            self.warn_of_untold_kinds();
        }
        Ok(cost)
    }

    fn warn_of_untold_kinds(&self) {
        if self.warns_of_untold_kinds.load(Ordering::Relaxed)
            && self.warns_of_untold_kinds.swap(false, Ordering::Relaxed)
        {
            tracing::warn!(
                target: "tower_outbound",
                "The cost of a call names tokens, but no input and no output tokens, which are limited: nothing is charged to \
                 those limits. Use `Cost::input_output_tokens`, or `Cost::from(ApiTokens(n))`"
            );
        }
    }

    /// Admits a call into the queue, or lets it wait for a place.
    #[inline]
    pub(super) fn submit(
        &self,
        queue: &mut Queue<Request<B>, Response<R>>,
        request: Request<B>,
    ) -> Result<CallFuture<B, R>, Error> {
        // The request is large, and is not moved until it is in the queue.
        let mut slot = Some(request);
        let request = slot.as_mut().expect("the request is there until it is queued");
        let cost = self.check(request).map_err(|error| self.refused(error))?;
        let _cached_now = clock::cache();
        // If the queue was closed just now, the returned future fails with `Closed`, like that of a call that waits.
        let place = queue.try_place().unwrap_or_default();
        let admission = self
            .admit(request, cost, place.is_some())
            .map_err(|error| self.refused(error))?;
        let queued = queue.call_in(place, admission.context, &mut slot);
        Ok(self.future(queued, admission.event, admission.early_response))
    }

    /// Admits a call into the queue if there is a free place now. A full queue refuses the request unchanged.
    #[allow(clippy::result_large_err, reason = "it hands the request back")]
    pub(super) fn try_submit(
        &self,
        queue: &mut Queue<Request<B>, Response<R>>,
        mut request: Request<B>,
    ) -> Result<CallFuture<B, R>, TrySubmitError<B>> {
        let cost = self.check(&mut request).map_err(|error| self.refused(error))?;
        let place = match queue.try_place() {
            Ok(Some(place)) => place,
            Ok(None) => {
                // With a schedule, the next place may be for the call of another flow.
                let ahead = self.parts.schedule.as_ref().map_or(0, |schedule| {
                    queue.places_ahead_of(&schedule.call(&self.parts.flow.flow(&request), cost))
                });
                let refused = Refused::full(request).free_after(self.time_until_place(ahead));
                self.events.refused(Refusal::Full);
                return Err(TrySubmitError::Refused(refused));
            }
            Err(_) => {
                self.events.refused(Refusal::Closed);
                return Err(TrySubmitError::Refused(Refused::closed(request)));
            }
        };
        let _cached_now = clock::cache();
        let admission = self
            .admit(&mut request, cost, true)
            .map_err(|error| self.refused(error))?;
        let queued = queue.call_at(place, &mut Some(request), admission.context);
        let queued = queued.map_err(TrySubmitError::Refused)?;
        Ok(self.future(queued, admission.event, admission.early_response))
    }

    /// The one place where calls are admitted: computes the call's deadline, and opens its event. Fails if the wait for
    /// the rate limits alone would make the call miss its deadline. The event is QUEUED if the call `has_place`.
    ///
    /// The caller has turned on the [cache of the clock](clock::cache), so that the event and the queue use one reading,
    /// since each reading takes time. The request is borrowed, because it is large, and each move would copy it.
    #[inline]
    fn admit(&self, request: &mut Request<B>, cost: Cost, has_place: bool) -> Result<Admission<R>, Error> {
        if cost.tokens > 0 && request.extensions().get::<ApiTokens>().is_none() {
            // The number of tokens is put into the request's extension `ApiTokens`, which the event records. The cost is
            // an extension, too, so that a cost function that estimates tokens uses it when the layers compute the cost,
            // instead of estimating again. An estimate that is prepared to be computed again is not kept.
            request.extensions_mut().insert(ApiTokens(cost.tokens));
            if cost.has_more_than_requests_and_tokens() && !self.parts.cost.prepare(request) {
                request.extensions_mut().insert(cost);
            }
        }
        let in_request = Deadline::of(request);
        let deadline = in_request.or_else(|| self.parts.timeout.map(Deadline::after));
        let scheduled = self.parts.schedule.as_ref();
        let scheduled = scheduled.map(|schedule| (schedule, self.scheduled_call(schedule, request, cost)));
        if let Some(deadline) = deadline {
            // With a schedule, only the calls of the same flow are certain to go first.
            let ahead = match &scheduled {
                Some((schedule, call)) => schedule.demand_ahead(call),
                None => self.pending_demand.sum(),
            };
            let wait = self.parts.monitor.limiter().wait(&cost, &ahead);
            deadline.allows(wait).map_err(Error::from)?;
            if in_request.is_none() {
                request.extensions_mut().insert(deadline);
            }
        }
        let (event, scope) = self.open_event(request, has_place);
        let early_response = self.parts.open_early_response.map(|open| Box::new(open(request)));
        let context = CallContext {
            scope,
            deadline: deadline.map(Deadline::instant),
            demand: Some(self.pending_demand.add(&cost)),
            scheduled: scheduled.map(|(_, call)| call),
        };
        Ok(Admission {
            context,
            event,
            early_response,
        })
    }

    /// Returns the time after which the full queue probably has a free place, and `ahead` others were given away. What it is computed from is documented at
    /// [`Refused::retry_after`].
    fn time_until_place(&self, ahead: u64) -> Duration {
        let monitor = &self.parts.monitor;
        let pending = self.pending_demand.sum();
        // The calls that wait for a place are pending, too, and count by their requests.
        let queued = usize::try_from(pending.requests).unwrap_or(usize::MAX);
        let queued = queued.max(monitor.queue_depth()).max(1);
        let mean = pending.mean(queued);
        let behind_limiter = monitor.limiter().wait(&mean, &Demand::default());
        let behind_queue = monitor.limiter().wait(&mean, &pending);
        // The limiter says how long the last call in a line waits. The first one waits shorter by as many calls as wait
        // between them, each for the time that the queued calls take on average.
        let each = behind_queue.saturating_sub(behind_limiter) / u32::try_from(queued).unwrap_or(u32::MAX);
        let at_limiter = monitor.in_flight().saturating_sub(monitor.calling());
        let of_others = each.saturating_mul(u32::try_from(at_limiter).unwrap_or(u32::MAX));
        let of_first = behind_limiter.saturating_sub(of_others);
        // Calls in flight that do not wait for this limiter can make the difference too small.
        let known = [of_first, each].into_iter().find(|wait| !wait.is_zero());
        let of_ahead = each.saturating_mul(u32::try_from(ahead).unwrap_or(u32::MAX));
        known.unwrap_or(UNKNOWN_WAIT).saturating_add(of_ahead)
    }

    /// Returns what the schedule has to know about a call.
    #[cold]
    fn scheduled_call(&self, schedule: &Schedule, request: &Request<B>, cost: Cost) -> Arc<ScheduledCall> {
        schedule.call(&self.parts.flow.flow(request), cost)
    }

    #[inline]
    fn future(&self, queued: Queued<B, R>, event: EventHandle, early_response: EarlyResponse<R>) -> CallFuture<B, R> {
        CallFuture::new(queued, early_response, event, self.nested_waits.clone())
    }

    fn open_event(&self, request: &Request<B>, has_place: bool) -> (EventHandle, Scope) {
        let describe = |details: &mut RequestDetails| self.parts.describe.request(request, details);
        let (writer, span) = self.events.open(describe, Stage::Queued, has_place);
        (writer.handle(), Scope::capture_with(writer, span))
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
