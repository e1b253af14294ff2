//! [`Observer`]: code of the user's that is told of every step of every call.

#[cfg(feature = "http")]
use super::change::LimitReport;
use super::{
    change::{AttemptEnd, CallEnd, Change, Refusal},
    events::Events,
    handle::EventHandle,
};
use crate::cost::Cost;
#[cfg(feature = "http")]
use std::time::Duration;
use std::{fmt, sync::Arc};

/// Is called at every step of every call, and misses none: for metrics, accounting and audit logs.
///
/// [`Events::observe`] and [`ExecutorBuilder::observe`](crate::ExecutorBuilder::observe) register an observer. Its methods
/// do nothing by default, so an observer implements those that it needs.
///
/// Of each call, [`call_opened`](Self::call_opened) is called first and exactly once, and [`call_ended`](Self::call_ended)
/// exactly once. The steps between them are called at most once for the call, or for each of its attempts. A status can be
/// skipped, as by a call that is refused before it is queued. Steps that happen at once on two threads, such as the end of
/// an attempt and the cancellation of its call, can be observed in either order.
///
/// # What an observer may do
///
/// The methods are called synchronously, on the thread that makes the step, while the call waits for them:
///
/// - They must return quickly and must not block: no I/O, and no lock that is held for long. A counter, a histogram, or an
///   unbounded channel that another task empties are fine.
/// - They may use the event through the handle that they get: read it, and add notes and metadata. Nothing is locked
///   while they are called. A handle that is kept keeps the event in memory.
/// - A method that panics has no effect on the call; the panic is logged with `tracing` as an error.
///
/// To follow calls in a task of its own, which may be slow and may miss steps, use [`Events::subscribe`].
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use std::sync::{Arc, atomic::{AtomicU64, Ordering}};
/// use tower_outbound::{Call, EventHandle, Executor, event::{CallEnd, Observer, WaitCause}};
///
/// /// Adds up how long calls have waited for their rates.
/// #[derive(Default)]
/// struct RateWaits(AtomicU64);
///
/// impl Observer for RateWaits {
///     fn call_ended(&self, _: &EventHandle, end: &CallEnd) {
///         for wait in end.waits.iter().filter(|wait| wait.cause.budget().is_some()) {
///             self.0.fetch_add(wait.duration.as_millis() as u64, Ordering::Relaxed);
///         }
///     }
/// }
///
/// let waits = Arc::new(RateWaits::default());
/// let executor = Executor::builder().observe(waits.clone()).build_for_closures::<String>()?;
/// executor.start()?;
/// let call = Call::new(|| async { Ok::<_, std::io::Error>((200, String::from("hello"))) });
/// executor.submit(call).await?.await?;
/// assert_eq!(waits.0.load(Ordering::Relaxed), 0);
/// # Ok(())
/// # }
/// ```
pub trait Observer: Send + Sync {
    /// A call was made. Its event has what is recorded of the request.
    fn call_opened(&self, call: &EventHandle) {
        let _ = call;
    }

    /// The call has got a place in the queue: QUEUED.
    fn call_queued(&self, call: &EventHandle) {
        let _ = call;
    }

    /// The call was taken from the queue: PROCESSING.
    fn call_started(&self, call: &EventHandle) {
        let _ = call;
    }

    /// The call was charged to the rates of a limiter: once for each attempt that a limiter admits. If costs are settled,
    /// `cost` is an estimate.
    fn call_charged(&self, call: &EventHandle, cost: &Cost) {
        let _ = (call, cost);
    }

    /// The call was found to have `used` another cost, or the same, than it was `charged` for an attempt.
    fn call_settled(&self, call: &EventHandle, charged: &Cost, used: &Cost) {
        let _ = (call, charged, used);
    }

    /// An attempt of the call is on the wire: CALLING. The first attempt has the `number` 1, the first retry 2.
    fn attempt_started(&self, call: &EventHandle, number: u32) {
        let _ = (call, number);
    }

    /// An attempt of the call has ended.
    fn attempt_ended(&self, call: &EventHandle, end: &AttemptEnd) {
        let _ = (call, end);
    }

    /// The call has ended: COMPLETED, FAILED or CANCELLED.
    fn call_ended(&self, call: &EventHandle, end: &CallEnd) {
        let _ = (call, end);
    }

    /// The provider has reported, with the response to an attempt of the call, what one of its limits is and what is left of
    /// it: once for each limit that the response reports. A [`FeedbackLayer`](crate::provider::FeedbackLayer) reads it.
    #[cfg(feature = "http")]
    fn limit_reported(&self, call: &EventHandle, report: &LimitReport) {
        let _ = (call, report);
    }

    /// The response to an attempt of the call has paused the limiter for `pause`: once for each pause, and not when
    /// further responses make it longer. A [`FeedbackLayer`](crate::provider::FeedbackLayer) pauses it.
    #[cfg(feature = "http")]
    fn limiter_paused(&self, call: &EventHandle, pause: Duration) {
        let _ = (call, pause);
    }

    /// A call was refused when it was submitted to an executor, for example because the queue was full. Such a call has no
    /// event: it was not opened and does not end.
    fn call_refused(&self, refusal: Refusal) {
        let _ = refusal;
    }
}

/// The observers that an executor is built with.
#[derive(Clone, Default)]
pub(crate) struct Observers(Vec<Arc<dyn Observer>>);

impl<O: Observer + ?Sized> Observer for Arc<O> {
    fn call_opened(&self, call: &EventHandle) {
        (**self).call_opened(call);
    }

    fn call_queued(&self, call: &EventHandle) {
        (**self).call_queued(call);
    }

    fn call_started(&self, call: &EventHandle) {
        (**self).call_started(call);
    }

    fn call_charged(&self, call: &EventHandle, cost: &Cost) {
        (**self).call_charged(call, cost);
    }

    fn call_settled(&self, call: &EventHandle, charged: &Cost, used: &Cost) {
        (**self).call_settled(call, charged, used);
    }

    fn attempt_started(&self, call: &EventHandle, number: u32) {
        (**self).attempt_started(call, number);
    }

    fn attempt_ended(&self, call: &EventHandle, end: &AttemptEnd) {
        (**self).attempt_ended(call, end);
    }

    fn call_ended(&self, call: &EventHandle, end: &CallEnd) {
        (**self).call_ended(call, end);
    }

    #[cfg(feature = "http")]
    fn limit_reported(&self, call: &EventHandle, report: &LimitReport) {
        (**self).limit_reported(call, report);
    }

    #[cfg(feature = "http")]
    fn limiter_paused(&self, call: &EventHandle, pause: Duration) {
        (**self).limiter_paused(call, pause);
    }

    fn call_refused(&self, refusal: Refusal) {
        (**self).call_refused(refusal);
    }
}

impl Events {
    /// Registers an observer, which is called at every step that a call makes from now on. It stays registered as long as
    /// something reports to this `Events`. Of several observers, the first registered is called first.
    ///
    /// Calls do not wait for the observer's locks or I/O if it has none: see [`Observer`].
    pub fn observe(&self, observer: impl Observer + 'static) {
        self.listen(move |call, change| tell(&observer, call, change));
    }
}

// === impl Observers ===

impl Observers {
    pub(crate) fn add(&mut self, observer: impl Observer + 'static) {
        self.0.push(Arc::new(observer));
    }

    pub(crate) fn register(&self, events: &Events) {
        self.0.iter().for_each(|observer| events.observe(observer.clone()));
    }
}

impl fmt::Debug for Observers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Observers")
            .field("count", &self.0.len())
            .finish_non_exhaustive()
    }
}

/// Calls the method of the observer that stands for the step.
fn tell(observer: &impl Observer, call: Option<&EventHandle>, change: Change<'_>) {
    if let Change::Refused(refusal) = change {
        observer.call_refused(refusal);
    }
    let Some(call) = call else { return };
    match change {
        Change::Opened => observer.call_opened(call),
        Change::Queued => observer.call_queued(call),
        Change::Started => observer.call_started(call),
        Change::AttemptStarted { number } => observer.attempt_started(call, number),
        Change::AttemptEnded(end) => observer.attempt_ended(call, end),
        Change::Charged(cost) => observer.call_charged(call, cost),
        Change::Settled { charged, used } => observer.call_settled(call, charged, used),
        #[cfg(feature = "http")]
        Change::LimitReported(report) => observer.limit_reported(call, report),
        #[cfg(feature = "http")]
        Change::Paused(pause) => observer.limiter_paused(call, pause),
        Change::Ended(end) => observer.call_ended(call, end),
        Change::Refused(_) => {}
    }
}
