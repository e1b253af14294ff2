//! Compares `Queue` with a model of it. The model is three lists (the calls and handles that wait for a place in the
//! queue, the queued calls, and the running calls) and the result of each call.
//!
//! The test controls the inner service: when it is ready, and whether it responds, fails or panics in any of its parts.
//! After each step the queue has to agree with the lists, and at the end every call has exactly one result.

mod support;

use proptest::{option, prelude::*, sample::Index};
use std::{
    collections::BTreeMap,
    future::Future,
    panic::resume_unwind,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
    task::{Context, Poll, Waker},
    thread,
};
use support::model::{Outcome, check, turns};
use tokio_test::task::{self, Spawn};
use tower::{BoxError, Layer, Service};
use tower_outbound::{
    Concurrency, ConcurrencyLimitLayer, Queue, QueueLayer,
    error::{Cancelled, Closed, Panicked},
    queue::ResponseFuture,
};

// === The steps ===

/// What `poll_ready` of the inner service does. It fails or panics only once; after that the service is ready.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Readiness {
    Ready,
    Pending,
    Fails,
    Panics,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Responds,
    Fails,
    Panics,
}

/// A request: its number, whether the service panics when it is called with the request, and whether the call's future
/// panics when it is dropped.
#[derive(Clone, Copy, Debug)]
struct Req {
    id: usize,
    panics_when_called: bool,
    panics_when_dropped: bool,
}

#[derive(Clone, Debug)]
enum Step {
    /// Makes a call with `try_call`. The two flags of this step and of the next two are those of [`Req`]: whether the
    /// service panics when it is called, and whether the call's future panics when it is dropped.
    TryCall(bool, bool),
    Call(bool, bool),
    /// Makes a call with one of [`HANDLES`] clones of the queue that are kept over many steps, and that may have been
    /// polled ready.
    CallOn(usize, bool, bool),
    PollReady(usize),
    DropHandle(usize),
    Poll(Index),
    Drop(Index),
    Cancel(Index),
    Detach(Index),
    End(Index, End),
    SetReadiness(Readiness),
    SetLimit(usize),
    Close,
    Abort,
}

const HANDLES: usize = 3;

#[derive(Clone, Debug)]
struct Case {
    capacity: usize,
    workers: usize,
    limit: Option<usize>,
    steps: Vec<Step>,
}

fn step() -> impl Strategy<Value = Step> {
    let bad = || (prop::bool::weighted(0.1), prop::bool::weighted(0.1));
    let end = prop_oneof![3 => Just(End::Responds), 1 => Just(End::Fails), 1 => Just(End::Panics)];
    let readiness = prop_oneof![
        5 => Just(Readiness::Ready),
        3 => Just(Readiness::Pending),
        1 => Just(Readiness::Fails),
        1 => Just(Readiness::Panics),
    ];
    let index = any::<Index>;
    prop_oneof![
        8 => bad().prop_map(|(called, dropped)| Step::TryCall(called, dropped)),
        12 => bad().prop_map(|(called, dropped)| Step::Call(called, dropped)),
        8 => (0..HANDLES, bad()).prop_map(|(handle, (called, dropped))| Step::CallOn(handle, called, dropped)),
        8 => (0..HANDLES).prop_map(Step::PollReady),
        3 => (0..HANDLES).prop_map(Step::DropHandle),
        12 => index().prop_map(Step::Poll),
        6 => index().prop_map(Step::Drop),
        5 => index().prop_map(Step::Cancel),
        4 => index().prop_map(Step::Detach),
        16 => (index(), end).prop_map(|(index, end)| Step::End(index, end)),
        10 => readiness.prop_map(Step::SetReadiness),
        3 => (1..4_usize).prop_map(Step::SetLimit),
        1 => Just(Step::Close),
        1 => Just(Step::Abort),
    ]
}

fn case() -> impl Strategy<Value = Case> {
    let steps = prop::collection::vec(step(), 1..50);
    (1..5_usize, 1..4_usize, option::of(1..4_usize), steps).prop_map(|(capacity, workers, limit, steps)| Case {
        capacity,
        workers,
        limit,
        steps,
    })
}

// === The service ===

/// The inner service of the queue, which the test controls.
#[derive(Clone, Default)]
struct Inner(Arc<Mutex<Control>>);

#[derive(Default)]
struct Control {
    is_pending: bool,
    fails: bool,
    panics: bool,
    /// The wakers of the tasks that wait until the service is ready.
    wakers: Vec<Waker>,
    /// The number of times that `poll_ready` was called.
    readiness_polls: usize,
    /// The numbers of the calls that reached the service, in order.
    begun: Vec<usize>,
    /// The calls whose futures have not been dropped, by the number of the call.
    alive: BTreeMap<usize, CallControl>,
}

#[derive(Default)]
struct CallControl {
    end: Option<End>,
    waker: Option<Waker>,
}

/// The future of a call to the inner service. The test decides when and how it ends.
struct Work {
    req: Req,
    inner: Inner,
}

/// Panics without calling the panic hook, which would print each of thousands of panics.
fn panic_quietly() -> ! {
    resume_unwind(Box::new("on purpose"))
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, Control> {
        self.0.lock().unwrap()
    }

    fn set(&self, readiness: Readiness) {
        let mut control = self.lock();
        control.is_pending = readiness == Readiness::Pending;
        control.fails = readiness == Readiness::Fails;
        control.panics = readiness == Readiness::Panics;
        let wakers = std::mem::take(&mut control.wakers);
        drop(control);
        wakers.into_iter().for_each(Waker::wake);
    }

    fn end(&self, id: usize, end: End) {
        let mut control = self.lock();
        let call = control.alive.get_mut(&id).expect("the call is running");
        call.end = Some(end);
        let waker = call.waker.take();
        drop(control);
        waker.into_iter().for_each(Waker::wake);
    }
}

impl Service<Req> for Inner {
    type Response = usize;
    type Error = BoxError;
    type Future = Work;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        let mut control = self.lock();
        control.readiness_polls += 1;
        if control.is_pending {
            control.wakers.push(cx.waker().clone());
            return Poll::Pending;
        }
        let (fails, panics) = (control.fails, control.panics);
        (control.fails, control.panics) = (false, false);
        drop(control);
        if panics {
            panic_quietly();
        }
        Poll::Ready(if fails { Err("not ready".into()) } else { Ok(()) })
    }

    fn call(&mut self, req: Req) -> Work {
        let mut control = self.lock();
        control.begun.push(req.id);
        if req.panics_when_called {
            drop(control);
            panic_quietly();
        }
        let twice = control.alive.insert(req.id, CallControl::default()).is_some();
        drop(control);
        assert!(!twice, "called twice");
        Work {
            req,
            inner: self.clone(),
        }
    }
}

impl Future for Work {
    type Output = Result<usize, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut control = self.inner.lock();
        let call = control.alive.get_mut(&self.req.id).expect("the call is running");
        call.waker = Some(cx.waker().clone());
        let end = call.end;
        drop(control);
        match end {
            None => Poll::Pending,
            Some(End::Responds) => Poll::Ready(Ok(self.req.id)),
            Some(End::Fails) => Poll::Ready(Err(format!("{} failed", self.req.id).into())),
            Some(End::Panics) => panic_quietly(),
        }
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        let removed = self.inner.lock().alive.remove(&self.req.id);
        // The removed entry is dropped after the lock is released: it contains a waker, and dropping a waker may drop
        // another call, which takes the same lock.
        drop(removed);
        if self.req.panics_when_dropped && !thread::panicking() {
            panic_quietly();
        }
    }
}

// === The model ===

#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    WaitingForPlace,
    Queued,
    Running,
    Ended(Result<usize, Failure>),
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Failure {
    NotReady,
    Failed,
    Panicked,
    Cancelled,
    Closed,
}

/// A waiter for a place in the queue: a call, or a handle whose `poll_ready` was pending.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Waiter {
    Call(usize),
    Handle(usize),
}

#[derive(Debug)]
struct Model {
    capacity: usize,
    limit: Option<usize>,
    readiness: Readiness,
    closed: bool,
    waiting: Vec<Waiter>,
    queued: Vec<usize>,
    running: Vec<usize>,
    begun: Vec<usize>,
    calls: Vec<(Req, State)>,
}

impl Model {
    fn has_place(&self) -> bool {
        self.queued.len() < self.capacity
    }

    fn set_result(&mut self, id: usize, result: Result<usize, Failure>) {
        self.waiting.retain(|waiter| *waiter != Waiter::Call(id));
        self.queued.retain(|queued| *queued != id);
        self.running.retain(|running| *running != id);
        self.calls[id].1 = State::Ended(result);
    }

    fn accept(&mut self, id: usize) {
        self.queued.push(id);
        self.calls[id].1 = State::Queued;
    }

    /// Models the workers of the queue: they make queued calls while the concurrency limit and the service allow it.
    fn work(&mut self) {
        while let Some(&id) = self.queued.first() {
            if self.limit.is_some_and(|limit| self.running.len() >= limit) {
                return;
            }
            match self.readiness {
                Readiness::Pending => return,
                Readiness::Fails => {
                    self.readiness = Readiness::Ready;
                    self.set_result(id, Err(Failure::NotReady));
                }
                Readiness::Panics => {
                    self.readiness = Readiness::Ready;
                    self.set_result(id, Err(Failure::Panicked));
                }
                Readiness::Ready => {
                    self.begun.push(id);
                    if self.calls[id].0.panics_when_called {
                        self.set_result(id, Err(Failure::Panicked));
                    } else {
                        self.queued.remove(0);
                        self.running.push(id);
                        self.calls[id].1 = State::Running;
                    }
                }
            }
        }
    }

    fn end(&mut self, id: usize, end: End) {
        // A concurrency limit drops the service's future inside its own `poll`, so a panic of that drop fails the call.
        // Without a concurrency limit, the queue drops the future only after it has the result, and the panic changes
        // nothing.
        let panics_at_end = self.limit.is_some() && self.calls[id].0.panics_when_dropped;
        let result = match end {
            End::Panics => Err(Failure::Panicked),
            _ if panics_at_end => Err(Failure::Panicked),
            End::Responds => Ok(id),
            End::Fails => Err(Failure::Failed),
        };
        self.set_result(id, result);
    }

    fn abort(&mut self) {
        self.closed = true;
        for id in [&self.queued[..], &self.running[..]].concat() {
            self.set_result(id, Err(Failure::Cancelled));
        }
    }

    fn is_ended(&self) -> bool {
        self.closed && self.queued.is_empty() && self.running.is_empty()
    }
}

// === The queue and the model ===

struct Caller {
    id: usize,
    /// Whether the future was polled, and so has a waker that the queue must wake when the state of the call changes.
    was_polled: bool,
    future: Spawn<ResponseFuture<Req, usize>>,
}

/// The queue under test and its model. Every step is applied to both.
struct Comparison {
    inner: Inner,
    limit: Option<Concurrency>,
    queue: Queue<Req, usize>,
    handles: Vec<Spawn<Queue<Req, usize>>>,
    /// Whether the last `poll_ready` of each handle returned `Ready`. Such a handle need not be notified again.
    ready: [bool; HANDLES],
    callers: Vec<Caller>,
    model: Model,
}

fn failure(error: &BoxError) -> Option<Failure> {
    let text = error.to_string();
    [
        (error.is::<Closed>(), Failure::Closed),
        (error.is::<Cancelled>(), Failure::Cancelled),
        (error.is::<Panicked>(), Failure::Panicked),
        (text == "not ready", Failure::NotReady),
        (text.ends_with(" failed"), Failure::Failed),
    ]
    .into_iter()
    .find_map(|(is, failure)| is.then_some(failure))
}

impl Comparison {
    fn start(case: &Case) -> Self {
        let inner = Inner::default();
        let layer = QueueLayer::new(case.capacity).unwrap().workers(case.workers).unwrap();
        let (queue, limit) = match case.limit {
            Some(limit) => {
                let limit = ConcurrencyLimitLayer::new(limit).unwrap();
                (layer.layer(limit.layer(inner.clone())), Some(limit.limit().clone()))
            }
            None => (layer.layer(inner.clone()), None),
        };
        Self {
            inner,
            limit,
            handles: (0..HANDLES).map(|_| task::spawn(queue.clone())).collect(),
            ready: [false; HANDLES],
            queue,
            callers: Vec::new(),
            model: Model {
                capacity: case.capacity,
                limit: case.limit,
                readiness: Readiness::Ready,
                closed: false,
                waiting: Vec::new(),
                queued: Vec::new(),
                running: Vec::new(),
                begun: Vec::new(),
                calls: Vec::new(),
            },
        }
    }

    fn request(&mut self, panics_when_called: bool, panics_when_dropped: bool) -> Req {
        let req = Req {
            id: self.model.calls.len(),
            panics_when_called,
            panics_when_dropped,
        };
        self.model.calls.push((req, State::WaitingForPlace));
        req
    }

    fn add_caller(&mut self, id: usize, future: ResponseFuture<Req, usize>) {
        let future = task::spawn(future);
        self.callers.push(Caller {
            id,
            was_polled: false,
            future,
        });
    }

    fn step(&mut self, step: &Step) -> Outcome {
        let has_place = self.model.has_place() && !self.model.closed;
        let callers = self.callers.len();
        match *step {
            Step::TryCall(called, dropped) => {
                let req = self.request(called, dropped);
                let accepted = has_place && self.model.waiting.is_empty();
                match self.queue.clone().try_call(req) {
                    Ok(future) => {
                        prop_assert!(accepted, "there was no place for it");
                        self.model.accept(req.id);
                        self.add_caller(req.id, future);
                    }
                    Err(refused) => {
                        prop_assert!(!accepted, "there was a place for it");
                        prop_assert_eq!(refused.is_closed(), self.model.closed);
                        prop_assert_eq!(refused.into_request().id, req.id);
                        self.model.set_result(req.id, Err(Failure::Closed));
                    }
                }
            }
            Step::Call(called, dropped) => {
                let req = self.request(called, dropped);
                let future = self.queue.clone().call(req);
                self.called(req.id, has_place && self.model.waiting.is_empty(), future)?;
            }
            Step::CallOn(handle, called, dropped) => {
                let req = self.request(called, dropped);
                let future = self.handles[handle].enter(|_, mut queue| queue.call(req));
                let waiting = &mut self.model.waiting;
                let place = waiting.iter().position(|waiter| *waiter == Waiter::Handle(handle));
                let accepted = has_place && place.map_or(waiting.is_empty(), |at| at == 0);
                match place {
                    // The call takes over the position of its handle among the waiters.
                    Some(at) if accepted || self.model.closed => drop(waiting.remove(at)),
                    Some(at) => waiting[at] = Waiter::Call(req.id),
                    None => {}
                }
                self.called(req.id, accepted, future)?;
            }
            Step::PollReady(handle) => self.poll_ready(handle, has_place)?,
            Step::DropHandle(handle) => {
                self.handles[handle] = task::spawn(self.queue.clone());
                self.ready[handle] = false;
                self.model.waiting.retain(|waiter| *waiter != Waiter::Handle(handle));
            }
            Step::Poll(index) if callers > 0 => self.poll(index.index(callers))?,
            Step::Drop(index) if callers > 0 => {
                let caller = self.callers.swap_remove(index.index(callers));
                drop(caller.future);
                self.cancelled(caller.id)?;
            }
            Step::Cancel(index) if callers > 0 => {
                let caller = &mut self.callers[index.index(callers)];
                let id = caller.id;
                caller.future.cancel();
                self.cancelled(id)?;
            }
            Step::Detach(index) if callers > 0 => {
                let caller = self.callers.swap_remove(index.index(callers));
                caller.future.into_inner().detach();
                if self.model.calls[caller.id].1 == State::WaitingForPlace {
                    self.model.set_result(caller.id, Err(Failure::Cancelled));
                }
            }
            Step::End(index, end) if !self.model.running.is_empty() => {
                let id = self.model.running[index.index(self.model.running.len())];
                self.inner.end(id, end);
                self.model.end(id, end);
            }
            // Below a concurrency limit, the calls wait for the service themselves, without a permit. The model does not
            // say in which order they get one when the service is ready.
            Step::SetReadiness(Readiness::Pending) if self.limit.is_some() => {}
            Step::SetReadiness(readiness) => {
                self.inner.set(readiness);
                self.model.readiness = readiness;
            }
            Step::SetLimit(limit) => {
                if let Some(concurrency) = &self.limit {
                    concurrency.set(limit).unwrap();
                    self.model.limit = Some(limit);
                }
            }
            Step::Close => {
                self.queue.close();
                self.model.closed = true;
            }
            Step::Abort => {
                self.queue.abort();
                self.model.abort();
            }
            _ => {}
        }
        Ok(())
    }

    fn called(&mut self, id: usize, accepted: bool, future: ResponseFuture<Req, usize>) -> Outcome {
        prop_assert_eq!(future.is_accepted(), accepted);
        if accepted {
            self.model.accept(id);
        }
        self.add_caller(id, future);
        Ok(())
    }

    fn poll_ready(&mut self, handle: usize, has_place: bool) -> Outcome {
        let waiting = &mut self.model.waiting;
        let at = waiting.iter().position(|waiter| *waiter == Waiter::Handle(handle));
        let expected = has_place && at.map_or(waiting.is_empty(), |at| at == 0);
        self.ready[handle] = expected;
        match self.handles[handle].enter(|cx, mut queue| queue.poll_ready(cx)) {
            Poll::Ready(Ok(())) => prop_assert!(expected, "ready without a free place, or before an earlier waiter"),
            Poll::Ready(Err(error)) => {
                prop_assert!(self.model.closed && error.is::<Closed>());
                waiting.retain(|waiter| *waiter != Waiter::Handle(handle));
            }
            Poll::Pending => {
                prop_assert!(!expected && !self.model.closed, "should be ready");
                if at.is_none() {
                    waiting.push(Waiter::Handle(handle));
                }
            }
        }
        Ok(())
    }

    fn poll(&mut self, index: usize) -> Outcome {
        let caller = &mut self.callers[index];
        let id = caller.id;
        caller.was_polled = true;
        let polled = caller.future.poll();
        let model = &mut self.model;
        if model.calls[id].1 == State::WaitingForPlace {
            let at = model.waiting.iter().position(|waiter| *waiter == Waiter::Call(id));
            if model.closed {
                model.set_result(id, Err(Failure::Closed));
            } else if model.has_place() && at.map_or(model.waiting.is_empty(), |at| at == 0) {
                model.waiting.retain(|waiter| *waiter != Waiter::Call(id));
                model.accept(id);
            } else if at.is_none() {
                model.waiting.push(Waiter::Call(id));
            }
            let is_accepted = self.callers[index].future.is_accepted();
            prop_assert_eq!(is_accepted, self.model.calls[id].1 == State::Queued);
        }
        match (polled, self.model.calls[id].1) {
            (Poll::Pending, State::Ended(expected)) => prop_assert!(false, "{id} should have ended: {expected:?}"),
            (Poll::Pending, _) => {}
            (Poll::Ready(result), state) => {
                let result = result.map_err(|error| failure(&error).expect("an error that the model has, too"));
                prop_assert_eq!(State::Ended(result), state);
                self.callers.swap_remove(index);
            }
        }
        Ok(())
    }

    /// Cancels the call in the model, and checks that its place in the queue is free before any task has run.
    fn cancelled(&mut self, id: usize) -> Outcome {
        if !matches!(self.model.calls[id].1, State::Ended(_)) {
            self.model.set_result(id, Err(Failure::Cancelled));
        }
        prop_assert_eq!(self.queue.depth(), self.model.queued.len());
        Ok(())
    }

    /// Lets the workers of the queue run, and polls the calls that were notified of a free place in the queue.
    async fn settle(&mut self) -> Outcome {
        loop {
            turns(3).await;
            self.model.work();
            let is_notified =
                |caller: &Caller| caller.future.is_woken() && self.model.waiting.contains(&Waiter::Call(caller.id));
            let Some(index) = self.callers.iter().position(is_notified) else {
                return Ok(());
            };
            self.poll(index)?;
        }
    }

    fn check(&self) -> Outcome {
        let model = &self.model;
        prop_assert_eq!(self.queue.depth(), model.queued.len(), "depth: {:?}", model);
        prop_assert_eq!(self.queue.in_flight(), model.running.len(), "in flight: {:?}", model);
        if let Some(limit) = &self.limit {
            prop_assert_eq!(limit.in_flight(), model.running.len(), "permits: {:?}", model);
        }
        prop_assert_eq!(self.queue.is_closed(), model.closed);
        prop_assert_eq!(self.queue.is_ended(), model.is_ended());
        let control = self.inner.lock();
        prop_assert_eq!(&control.begun, &model.begun, "order: {:?}", model);
        let mut running = model.running.clone();
        running.sort_unstable();
        prop_assert_eq!(control.alive.keys().copied().collect::<Vec<_>>(), running);
        drop(control);
        // If the queue has a free place or is closed, the first waiter must have been notified.
        let has_news = model.has_place() || model.closed;
        match model.waiting.first() {
            Some(Waiter::Handle(handle)) if has_news && (model.closed || !self.ready[*handle]) => {
                prop_assert!(
                    self.handles[*handle].is_woken(),
                    "handle {handle} was not notified: {model:?}"
                );
            }
            _ => {}
        }
        // Every caller that was polled must have been woken if its call has ended, or if its call is the first waiter
        // and can now get a place or an error.
        for caller in self.callers.iter().filter(|caller| caller.was_polled) {
            let expects_wake_up = match model.calls[caller.id].1 {
                State::WaitingForPlace => has_news && model.waiting.first() == Some(&Waiter::Call(caller.id)),
                State::Queued | State::Running => false,
                State::Ended(_) => true,
            };
            prop_assert!(
                !expects_wake_up || caller.future.is_woken(),
                "call {} was not woken: {model:?}",
                caller.id
            );
        }
        Ok(())
    }

    /// Lets every call end, and checks that every caller gets a result.
    async fn finish(&mut self) -> Outcome {
        for handle in 0..HANDLES {
            self.step(&Step::DropHandle(handle))?;
            self.settle().await?;
        }
        self.step(&Step::SetReadiness(Readiness::Ready))?;
        self.settle().await?;
        self.check()?;
        while !self.callers.is_empty() || !self.model.running.is_empty() {
            for index in (0..self.callers.len()).rev() {
                self.poll(index)?;
            }
            self.settle().await?;
            for id in self.model.running.clone() {
                self.inner.end(id, End::Responds);
                self.model.end(id, End::Responds);
            }
            self.settle().await?;
            self.check()?;
        }
        for (req, state) in &self.model.calls {
            prop_assert!(matches!(state, State::Ended(_)), "{} was lost: {state:?}", req.id);
        }
        self.step(&Step::Close)?;
        self.settle().await?;
        self.check()?;
        prop_assert!(self.queue.is_ended());
        Ok(())
    }
}

#[test]
fn the_queue_agrees_with_a_model_of_three_lists() {
    check(file!(), &case(), |case| async move {
        let mut comparison = Comparison::start(&case);
        for step in &case.steps {
            let wanted = |(_, state): &(Req, State)| matches!(state, State::WaitingForPlace | State::Queued);
            let is_idle = !comparison.model.calls.iter().any(wanted);
            let before = (comparison.inner.lock().readiness_polls, comparison.model.calls.len());
            comparison.step(step)?;
            comparison.settle().await?;
            comparison.check()?;
            if is_idle && comparison.model.calls.len() == before.1 {
                prop_assert_eq!(
                    comparison.inner.lock().readiness_polls,
                    before.0,
                    "the service was polled for readiness without a call"
                );
            }
        }
        comparison.finish().await
    });
}
