//! Compares the events of calls with a model of them: what each event layer writes on the way in and on the way out, in
//! any stack of the three event layers, with and without a queue and retries.
//!
//! A case is a stack and a list of random steps. The steps start, poll and drop calls, let the client return or panic,
//! and use events from outside of their calls: they carry an event over to another future, watch it, or write to it.
//! After each step every record has to be as the model predicts, to the nanosecond. At the end every call has one
//! outcome, and every watcher has seen the statuses in order.

mod support;

use proptest::{option, prelude::*, sample::Index};
use std::{
    collections::BTreeMap,
    future::{Future, pending, ready},
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
    task::{Context, Poll, Waker},
    time::Duration,
};
use support::model::{Outcome, check, turns};
use tokio::{
    task::{JoinHandle, unconstrained},
    time::{Instant, advance},
};
use tokio_test::task::{self, Spawn};
use tower::{
    BoxError, Layer, Service,
    retry::{Policy, RetryLayer},
    util::BoxCloneService,
};
use tower_outbound::{
    EventHandle, EventLayer, NetworkRequestEvent, QueueLayer, RequestStatus,
    event::{self, Describe, Events, RequestDetails, ResponseDetails, Subscription},
};

// === The steps ===

/// Which layers a stack has. At least one of them is an event layer.
#[derive(Clone, Copy, Debug)]
struct Stack {
    queued: bool,
    queue: bool,
    processing: bool,
    /// The number of retries, if the stack has a retry layer. An event layer must be above the retry layer in the
    /// stack: otherwise each attempt would open an event of its own.
    retries: Option<usize>,
    calling: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    /// The client responds with status code 200.
    Responds,
    /// The client responds with status code 500, which the event records as a failure.
    RespondsBadly,
    Fails,
    Panics,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Stage {
    Queued,
    Processing,
    Calling,
}

#[derive(Clone, Debug)]
enum Step {
    /// Starts a call. If an index of an attempt is given, the client panics when it is called for that attempt.
    Start(Option<usize>),
    Poll(Index),
    Drop(Index),
    /// Ends an attempt that is running at the client. The client first writes a log message to the event.
    End(Index, End),
    Pass(u64),
    Log(Index),
    Metadata(Index, u8),
    /// Carries an event over to another future, which keeps the event open until the future is dropped.
    Carry(Index),
    DropCarrier(Index),
    InScope(Index, Index),
    /// Calls another service while an event is current. The other service has one event layer, of this stage.
    CallInScope(Index, Stage),
    Watch(Index),
    Subscribe,
}

#[derive(Clone, Debug)]
struct Case {
    stack: Stack,
    steps: Vec<Step>,
    /// Whether the future of a call that panics is dropped by the unwinding of the panic. Otherwise it is dropped
    /// afterwards.
    drops_at_once: bool,
}

fn stack() -> impl Strategy<Value = Stack> {
    (any::<[bool; 4]>(), option::of(0..3_usize)).prop_map(|([queued, queue, processing, calling], retries)| Stack {
        queued,
        queue,
        processing,
        retries: retries.filter(|_| queued || processing),
        calling: calling || !(queued || processing),
    })
}

fn step() -> impl Strategy<Value = Step> {
    let end = prop_oneof![
        3 => Just(End::Responds),
        1 => Just(End::RespondsBadly),
        3 => Just(End::Fails),
        2 => Just(End::Panics),
    ];
    let stage = prop_oneof![Just(Stage::Queued), Just(Stage::Processing), Just(Stage::Calling)];
    let index = any::<Index>;
    prop_oneof![
        4 => prop_oneof![8 => Just(None), 1 => Just(Some(0)), 1 => Just(Some(1))].prop_map(Step::Start),
        4 => index().prop_map(Step::Poll),
        2 => index().prop_map(Step::Drop),
        8 => (index(), end).prop_map(|(index, end)| Step::End(index, end)),
        4 => prop_oneof![Just(1), 1..5_000_000_000_u64].prop_map(Step::Pass),
        2 => index().prop_map(Step::Log),
        1 => (index(), 0..3_u8).prop_map(|(index, key)| Step::Metadata(index, key)),
        2 => index().prop_map(Step::Carry),
        2 => index().prop_map(Step::DropCarrier),
        1 => (index(), index()).prop_map(|(outer, inner)| Step::InScope(outer, inner)),
        1 => (index(), stage).prop_map(|(index, stage)| Step::CallInScope(index, stage)),
        2 => index().prop_map(Step::Watch),
        1 => Just(Step::Subscribe),
    ]
}

fn case() -> impl Strategy<Value = Case> {
    let steps = prop::collection::vec(step(), 1..40);
    (stack(), steps, any::<bool>()).prop_map(|(stack, steps, drops_at_once)| Case {
        stack,
        steps,
        drops_at_once,
    })
}

// === The client, which the steps control ===

#[derive(Clone, Copy, Debug)]
struct Req {
    id: usize,
    /// The index of the attempt for which the client panics when it is called, if it panics.
    panics: Option<usize>,
}

#[derive(Clone, Default)]
struct Client(Arc<Mutex<ClientState>>);

#[derive(Default)]
struct ClientState {
    /// The number of attempts that each call has made so far, by the number of the call.
    attempts: BTreeMap<usize, usize>,
    running: BTreeMap<usize, Control>,
    /// A description of each call that was made or polled while its event was not the current one. There should be
    /// none.
    misplaced: Vec<String>,
}

/// What the test needs to end a running attempt: how it is to end, and its waker.
#[derive(Default)]
struct Control {
    end: Option<End>,
    waker: Option<Waker>,
}

/// The future of one attempt at the client. The test decides when and how it ends.
struct Attempt {
    id: usize,
    client: Client,
}

fn name(id: usize) -> String {
    format!("call {id}")
}

/// Panics without calling the panic hook, which would print each of thousands of panics.
fn unwind() -> ! {
    resume_unwind(Box::new("unwinding"))
}

impl Client {
    fn lock(&self) -> MutexGuard<'_, ClientState> {
        self.0.lock().unwrap()
    }

    fn check_current(&self, id: usize) {
        let current = event::current().map(|event| event.request_id().to_string());
        if current.as_deref() != Some(&*name(id)) {
            self.lock().misplaced.push(format!("{id} runs in {current:?}"));
        }
    }
}

impl Service<Req> for Client {
    type Response = u16;
    type Error = BoxError;
    type Future = Attempt;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, req: Req) -> Attempt {
        self.check_current(req.id);
        let mut state = self.lock();
        let attempt = state.attempts.entry(req.id).or_default();
        *attempt += 1;
        let attempt = *attempt;
        if req.panics == Some(attempt - 1) {
            drop(state);
            unwind();
        }
        state.running.insert(req.id, Control::default());
        drop(state);
        Attempt {
            id: req.id,
            client: self.clone(),
        }
    }
}

impl Future for Attempt {
    type Output = Result<u16, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.client.check_current(self.id);
        let mut state = self.client.lock();
        let control = state.running.get_mut(&self.id).expect("the attempt runs");
        control.waker = Some(cx.waker().clone());
        let end = control.end.take();
        drop(state);
        let Some(end) = end else { return Poll::Pending };
        if let Some(event) = event::current() {
            event.log("from inside");
        }
        match end {
            End::Responds => Poll::Ready(Ok(200)),
            End::RespondsBadly => Poll::Ready(Ok(500)),
            End::Fails => Poll::Ready(Err("failed".into())),
            End::Panics => unwind(),
        }
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        let control = self.client.lock().running.remove(&self.id);
        // The control is dropped after the lock is released: it contains a waker, and dropping a waker may drop another
        // attempt, which takes the same lock.
        drop(control);
    }
}

#[derive(Clone)]
struct Named;

impl Describe<Req, u16> for Named {
    fn request(&self, req: &Req, details: &mut RequestDetails) {
        details.request_id(name(req.id));
    }

    fn response(&self, code: &u16, details: &mut ResponseDetails) {
        details.status_code(http::StatusCode::from_u16(*code).unwrap());
        if *code >= 500 {
            details.failure("Bad", "the response is bad");
        }
    }
}

#[derive(Clone)]
struct Retries(usize);

impl Policy<Req, u16, BoxError> for Retries {
    type Future = std::future::Ready<()>;

    fn retry(&mut self, _: &mut Req, result: &mut Result<u16, BoxError>) -> Option<Self::Future> {
        self.0 = self.0.checked_sub(usize::from(result.is_err()))?;
        result.is_err().then(|| ready(()))
    }

    fn clone_request(&mut self, req: &Req) -> Option<Req> {
        Some(*req)
    }
}

type Boxed = BoxCloneService<Req, u16, BoxError>;

fn layer(stage: Stage, events: &Events) -> EventLayer<Named> {
    let layer = match stage {
        Stage::Queued => EventLayer::queued(),
        Stage::Processing => EventLayer::processing(),
        Stage::Calling => EventLayer::calling(),
    };
    layer.describe(Named).report_to(events)
}

impl Stack {
    fn around(self, client: Client, events: &Events) -> Boxed {
        let mut service = BoxCloneService::new(client);
        if self.calling {
            service = BoxCloneService::new(layer(Stage::Calling, events).layer(service));
        }
        if let Some(retries) = self.retries {
            service = BoxCloneService::new(RetryLayer::new(Retries(retries)).layer(service));
        }
        if self.processing {
            service = BoxCloneService::new(layer(Stage::Processing, events).layer(service));
        }
        if self.queue {
            service = BoxCloneService::new(QueueLayer::new(1_000).unwrap().layer(service));
        }
        if self.queued {
            service = BoxCloneService::new(layer(Stage::Queued, events).layer(service));
        }
        service
    }

    /// Returns the stage of the outermost event layer, which opens the event.
    fn opener(self) -> Stage {
        match (self.queued, self.processing) {
            (true, _) => Stage::Queued,
            (false, true) => Stage::Processing,
            (false, false) => Stage::Calling,
        }
    }
}

// === The model ===

#[derive(Clone, Copy, Debug, PartialEq)]
enum Returned {
    Code(u16),
    Failed,
    Panicked,
    Cancelled,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Position {
    /// The call is in the queue.
    Queued,
    Running,
    /// The queue holds the result of the call, and the caller has not received it yet.
    Done(Returned),
    /// The caller has received the result or has dropped the call.
    Gone,
}

#[derive(Debug)]
struct Call {
    opener: Stage,
    position: Position,
    /// Each status of the call's event, and when it was written.
    statuses: Vec<(RequestStatus, Instant)>,
    outcome: Option<Returned>,
    attempts: Vec<(Instant, Option<(Instant, Returned)>)>,
    logs: Vec<(&'static str, Instant)>,
    metadata: BTreeMap<String, u64>,
    last_noted: Option<Instant>,
    carriers: usize,
    panics: Option<usize>,
    made: usize,
    retries: usize,
}

impl Returned {
    fn status(self) -> RequestStatus {
        match self {
            Self::Code(200) => RequestStatus::Completed,
            Self::Cancelled => RequestStatus::Cancelled,
            _ => RequestStatus::Failed,
        }
    }
}

impl Call {
    fn new(opener: Stage, position: Position) -> Self {
        Self {
            opener,
            position,
            statuses: Vec::new(),
            outcome: None,
            attempts: Vec::new(),
            logs: Vec::new(),
            metadata: BTreeMap::new(),
            last_noted: None,
            carriers: 0,
            panics: None,
            made: 0,
            retries: 0,
        }
    }

    fn status(&self) -> Option<RequestStatus> {
        self.statuses.last().map(|(status, _)| *status)
    }

    fn has_ended(&self) -> bool {
        self.status().is_some_and(RequestStatus::is_terminal)
    }

    /// Writes a status to the event, unless it is not later than the current one: the status never moves back.
    fn mark(&mut self, status: RequestStatus) {
        if self.status() < Some(status) {
            self.statuses.push((status, Instant::now()));
        }
    }

    /// Writes the outcome, unless there is one. The attempts that still run are closed: the record is final.
    fn finish(&mut self, returned: Returned) {
        if !self.has_ended() {
            for (_, end) in self.attempts.iter_mut().filter(|(_, end)| end.is_none()) {
                *end = Some((Instant::now(), Returned::Cancelled));
            }
            self.statuses.push((returned.status(), Instant::now()));
            self.outcome = Some(returned);
        }
    }

    fn end_attempt(&mut self, returned: Returned) {
        if let Some((_, end)) = self.attempts.iter_mut().find(|(_, end)| end.is_none()) {
            *end = Some((Instant::now(), returned));
        }
    }

    /// Models the drop of a part of the stack, or of a carrying future, that could write to the event. If no other such
    /// part is left, the event ends as cancelled.
    fn writer_dropped(&mut self, stack: Stack) {
        let has_writer = match self.position {
            Position::Queued => stack.queued,
            Position::Running => true,
            Position::Done(_) => stack.queued,
            Position::Gone => false,
        };
        if !has_writer && self.carriers == 0 && !self.statuses.is_empty() {
            self.finish(Returned::Cancelled);
        }
    }

    fn start(&mut self, stack: Stack) {
        if stack.queued {
            self.mark(RequestStatus::Pending);
            if stack.queue {
                self.mark(RequestStatus::Queued);
            }
        }
        if !stack.queue {
            self.begin(stack);
        }
    }

    /// Models that the call enters the layers below the queue.
    fn begin(&mut self, stack: Stack) {
        self.position = Position::Running;
        if stack.processing {
            self.mark(RequestStatus::Pending);
            self.mark(RequestStatus::Processing);
        }
        self.attempt(stack);
    }

    fn attempt(&mut self, stack: Stack) {
        if stack.calling {
            self.mark(RequestStatus::Pending);
            self.mark(RequestStatus::Calling);
            if !self.has_ended() {
                self.attempts.push((Instant::now(), None));
            }
        }
        self.made += 1;
        if self.panics == Some(self.made - 1) {
            self.end_attempt(Returned::Panicked);
            self.leave(stack, Returned::Panicked);
        }
    }

    fn end(&mut self, stack: Stack, end: End) {
        self.log("from inside");
        let returned = match end {
            End::Responds => Returned::Code(200),
            End::RespondsBadly => Returned::Code(500),
            End::Fails => Returned::Failed,
            End::Panics => Returned::Panicked,
        };
        self.end_attempt(returned);
        if returned == Returned::Failed && self.retries > 0 {
            self.retries -= 1;
            self.attempt(stack);
        } else {
            self.leave(stack, returned);
        }
    }

    /// Models that the result of the call, or its panic, has left all layers below the queue.
    fn leave(&mut self, stack: Stack, returned: Returned) {
        if !(stack.queue && stack.queued) || stack.processing || returned == Returned::Panicked {
            // The outcome is written at this point by the processing layer, by the layer that opened the event if no
            // queue is below that layer, or, after a panic, by the queue itself.
            self.finish(returned);
        }
        self.position = if stack.queue {
            Position::Done(returned)
        } else {
            Position::Gone
        };
    }

    fn drop(&mut self, stack: Stack) {
        match self.position {
            Position::Queued => self.finish_if_opened(),
            Position::Running => {
                self.end_attempt(Returned::Cancelled);
                if stack.queue && stack.queued {
                    self.finish(Returned::Cancelled);
                }
            }
            Position::Done(_) | Position::Gone => {}
        }
        self.position = Position::Gone;
        self.writer_dropped(stack);
    }

    fn finish_if_opened(&mut self) {
        if !self.statuses.is_empty() {
            self.finish(Returned::Cancelled);
        }
    }

    fn log(&mut self, text: &'static str) {
        self.logs.push((text, Instant::now()));
        self.last_noted = Some(Instant::now());
    }
}

// === The real events, which have to match the model ===

type Response = Pin<Box<dyn Future<Output = Result<u16, BoxError>> + Send>>;
type Carried = Pin<Box<dyn Future<Output = ()>>>;

struct Bench {
    stack: Stack,
    drops_at_once: bool,
    client: Client,
    events: Events,
    service: Boxed,
    updates: Subscription,
    later_updates: Vec<Subscription>,
    callers: Vec<(usize, Spawn<Response>)>,
    handles: BTreeMap<usize, EventHandle>,
    carriers: Vec<(usize, Spawn<Carried>)>,
    watching: Vec<(usize, JoinHandle<Watched>)>,
    seen: BTreeMap<usize, Vec<RequestStatus>>,
    calls: Vec<Call>,
}

/// What a watcher of an event returns: the statuses that it saw, and the final record.
type Watched = (Vec<RequestStatus>, NetworkRequestEvent);

async fn watch(mut handle: EventHandle) -> Watched {
    let finished = handle.clone();
    let mut seen = Vec::new();
    loop {
        let status = handle.changed().await;
        seen.push(status);
        if status.is_terminal() {
            return (seen, finished.finished().await);
        }
    }
}

fn drain(updates: &mut Subscription, mut on_update: impl FnMut(usize, RequestStatus, EventHandle)) {
    loop {
        // Without `unconstrained`, Tokio's cooperative budget of the task would make `recv` pending and end the loop
        // early.
        let Poll::Ready(Some(update)) = task::spawn(unconstrained(updates.recv())).poll() else {
            return;
        };
        let update = update.expect("no update was missed");
        let id = update.event.request_id().to_string();
        let id = id.strip_prefix("call ").unwrap().parse().unwrap();
        on_update(id, update.status, update.event);
    }
}

impl Bench {
    fn start(case: &Case) -> Self {
        let (client, events) = (Client::default(), Events::new());
        Self {
            stack: case.stack,
            drops_at_once: case.drops_at_once,
            service: case.stack.around(client.clone(), &events),
            client,
            updates: events.subscribe(),
            events,
            later_updates: Vec::new(),
            callers: Vec::new(),
            handles: BTreeMap::new(),
            carriers: Vec::new(),
            watching: Vec::new(),
            seen: BTreeMap::new(),
            calls: Vec::new(),
        }
    }

    fn pick(&self, index: &Index) -> Option<(usize, EventHandle)> {
        let at = index.index(self.handles.len().max(1));
        self.handles.iter().nth(at).map(|(id, handle)| (*id, handle.clone()))
    }

    async fn step(&mut self, step: &Step) -> Outcome {
        match step {
            Step::Start(panics) => self.call(*panics),
            Step::Poll(index) if !self.callers.is_empty() => self.poll(index.index(self.callers.len()))?,
            Step::Drop(index) if !self.callers.is_empty() => {
                self.drop_caller(index.index(self.callers.len()));
            }
            Step::End(index, end) => self.end(index, *end)?,
            Step::Pass(nanos) => advance(Duration::from_nanos(*nanos)).await,
            Step::Log(index) => {
                if let Some((id, handle)) = self.pick(index) {
                    handle.log("from outside");
                    self.calls[id].log("from outside");
                }
            }
            Step::Metadata(index, key) => {
                if let Some((id, handle)) = self.pick(index) {
                    let (call, key) = (&mut self.calls[id], format!("key {key}"));
                    let value = call.logs.len() as u64;
                    handle.set_metadata(key.clone(), value);
                    call.metadata.insert(key, value);
                    call.last_noted = Some(Instant::now());
                }
            }
            Step::Carry(index) => {
                if let Some((id, handle)) = self.pick(index) {
                    let carried: Carried = Box::pin(handle.instrument(pending()));
                    let mut carrier = task::spawn(carried);
                    let _: Poll<()> = carrier.poll();
                    self.carriers.push((id, carrier));
                    self.calls[id].carriers += 1;
                }
            }
            Step::DropCarrier(index) if !self.carriers.is_empty() => {
                self.drop_carrier(index.index(self.carriers.len()));
            }
            Step::InScope(outer, inner) => {
                if let (Some((outer, first)), Some((inner, second))) = (self.pick(outer), self.pick(inner)) {
                    let current = || event::current().map(|event| event.request_id().to_string());
                    let seen = first.in_scope(|| (current(), second.in_scope(current), current()));
                    prop_assert_eq!(seen, (Some(name(outer)), Some(name(inner)), Some(name(outer))));
                    prop_assert_eq!(current(), None);
                }
            }
            Step::CallInScope(index, stage) => self.call_in_scope(index, *stage)?,
            Step::Watch(index) => {
                if let Some((id, handle)) = self.pick(index) {
                    self.watching.push((id, tokio::spawn(watch(handle))));
                }
            }
            Step::Subscribe => self.later_updates.push(self.events.subscribe()),
            _ => {}
        }
        Ok(())
    }

    fn call(&mut self, panics: Option<usize>) {
        let id = self.calls.len();
        let mut call = Call::new(self.stack.opener(), Position::Queued);
        call.panics = panics;
        call.retries = self.stack.retries.unwrap_or(0);
        call.start(self.stack);
        self.calls.push(call);
        let service = &mut self.service;
        if let Ok(future) = catch_unwind(AssertUnwindSafe(|| service.call(Req { id, panics }))) {
            self.callers.push((id, task::spawn(future)));
        }
    }

    fn end(&mut self, index: &Index, end: End) -> Outcome {
        let running: Vec<_> = (0..self.calls.len())
            .filter(|id| self.client.lock().running.contains_key(id))
            .collect();
        if running.is_empty() {
            return Ok(());
        }
        let id = running[index.index(running.len())];
        let mut state = self.client.lock();
        let control = state.running.get_mut(&id).expect("the attempt runs");
        control.end = Some(end);
        let waker = control.waker.take();
        drop(state);
        waker.into_iter().for_each(Waker::wake);
        if self.stack.queue {
            // In a stack with a queue, the workers poll the call, and its caller need not.
            self.calls[id].end(self.stack, end);
            return Ok(());
        }
        let caller = self.callers.iter().position(|(caller, _)| *caller == id);
        self.calls[id].end(self.stack, end);
        self.poll(caller.expect("the caller polls the call"))
    }

    fn poll(&mut self, index: usize) -> Outcome {
        let (id, mut caller) = self.callers.swap_remove(index);
        let drops_at_once = self.drops_at_once;
        let polled = catch_unwind(AssertUnwindSafe(|| {
            if drops_at_once {
                // If `poll` panics, the unwinding drops the caller's future.
                let mut caller = Some(caller);
                let polled = caller.as_mut().expect("not taken").poll();
                (polled, caller)
            } else {
                let polled = catch_unwind(AssertUnwindSafe(|| caller.poll()));
                match polled {
                    Ok(polled) => (polled, Some(caller)),
                    Err(panic) => {
                        drop(caller);
                        resume_unwind(panic)
                    }
                }
            }
        }));
        let call = &mut self.calls[id];
        match polled {
            Ok((Poll::Pending, caller)) => {
                prop_assert!(
                    matches!(call.position, Position::Queued | Position::Running),
                    "{call:?}"
                );
                self.callers.extend(caller.map(|caller| (id, caller)));
            }
            Ok((Poll::Ready(result), _)) => {
                let returned = match call.position {
                    Position::Done(returned) => returned,
                    _ => Returned::Cancelled,
                };
                if self.stack.queue {
                    prop_assert_ne!(returned, Returned::Cancelled, "{:?}", call);
                    prop_assert_eq!(
                        result.as_ref().ok().copied().map(Returned::Code),
                        match returned {
                            Returned::Code(_) => Some(returned),
                            _ => None,
                        }
                    );
                    if self.stack.queued {
                        call.finish(returned);
                    }
                }
                call.position = Position::Gone;
                call.writer_dropped(self.stack);
            }
            Err(_) => prop_assert_eq!(call.position, Position::Gone, "only the client panics"),
        }
        Ok(())
    }

    fn drop_caller(&mut self, at: usize) {
        let (id, caller) = self.callers.swap_remove(at);
        drop(caller);
        self.calls[id].drop(self.stack);
    }

    fn drop_carrier(&mut self, at: usize) {
        let (id, carrier) = self.carriers.swap_remove(at);
        drop(carrier);
        self.calls[id].carriers -= 1;
        self.calls[id].writer_dropped(self.stack);
    }

    /// Calls a service with one event layer, of the stage `stage`, while the event of an earlier call is current. The
    /// layer writes to that event only if its stage is further in than the stage of the layer that opened the event.
    /// Otherwise the layer opens an event of its own.
    fn call_in_scope(&mut self, index: &Index, stage: Stage) -> Outcome {
        let Some((outer, handle)) = self.pick(index) else {
            return Ok(());
        };
        let id = self.calls.len();
        let client = tower::service_fn(|_: Req| ready(Ok::<_, BoxError>(200)));
        let mut service = layer(stage, &self.events).layer(client);
        let polled = handle.in_scope(|| task::spawn(service.call(Req { id, panics: None })).poll());
        prop_assert!(polled.is_ready());
        let attaches = (stage as u8) > (self.calls[outer].opener as u8);
        if !attaches {
            let mut call = Call::new(stage, Position::Gone);
            call.mark(RequestStatus::Pending);
            self.calls.push(call);
        }
        let call = if attaches {
            &mut self.calls[outer]
        } else {
            &mut self.calls[id]
        };
        match stage {
            Stage::Queued => {}
            Stage::Processing => call.mark(RequestStatus::Processing),
            Stage::Calling => {
                call.mark(RequestStatus::Calling);
                // This attempt starts and ends at the same time, while another attempt of the event may be running. An
                // event that has ended takes no attempt.
                let now = Instant::now();
                if !call.has_ended() {
                    call.attempts.push((now, Some((now, Returned::Code(200)))));
                }
            }
        }
        if !attaches || stage == Stage::Processing {
            call.finish(Returned::Code(200));
        }
        Ok(())
    }

    /// Lets the workers of the queue and the watchers of events run, and receives the updates of all events.
    async fn settle(&mut self) {
        turns(3).await;
        for call in &mut self.calls {
            if self.stack.queue && call.position == Position::Queued {
                call.begin(self.stack);
            }
        }
        let (handles, seen) = (&mut self.handles, &mut self.seen);
        drain(&mut self.updates, |id, status, handle| {
            handles.entry(id).or_insert(handle);
            seen.entry(id).or_default().push(status);
        });
    }

    fn check(&self) -> Outcome {
        let state = self.client.lock();
        prop_assert!(state.misplaced.is_empty(), "{:?}", state.misplaced);
        drop(state);
        prop_assert!(event::current().is_none());
        let opened = self.calls.iter().filter(|call| !call.statuses.is_empty());
        let totals = self.events.totals();
        prop_assert_eq!(totals.opened, opened.count() as u64);
        let ended = |status| self.calls.iter().filter(|call| call.status() == Some(status)).count() as u64;
        prop_assert_eq!(totals.completed, ended(RequestStatus::Completed));
        prop_assert_eq!(totals.failed, ended(RequestStatus::Failed));
        prop_assert_eq!(totals.cancelled, ended(RequestStatus::Cancelled));
        let attempts = self.calls.iter().flat_map(|call| &call.attempts);
        prop_assert_eq!(self.events.calling(), attempts.filter(|(_, end)| end.is_none()).count());
        for (id, call) in self.calls.iter().enumerate() {
            let statuses: Vec<_> = call.statuses.iter().map(|(status, _)| *status).collect();
            prop_assert_eq!(
                self.seen.get(&id).cloned().unwrap_or_default(),
                statuses,
                "{} {:?}",
                id,
                call
            );
            if let Some(handle) = self.handles.get(&id) {
                check_record(call, &handle.snapshot())?;
            }
        }
        Ok(())
    }

    /// Drops all futures of callers, and all futures that events were carried over to. After that every event must have
    /// ended, and every watcher must have seen its statuses in order.
    async fn finish(mut self) -> Outcome {
        while !self.callers.is_empty() {
            self.drop_caller(0);
            self.settle().await;
            self.check()?;
        }
        while !self.carriers.is_empty() {
            self.drop_carrier(0);
            self.settle().await;
            self.check()?;
        }
        for call in self.calls.iter().filter(|call| !call.statuses.is_empty()) {
            prop_assert!(call.has_ended(), "{call:?}");
        }
        turns(3).await;
        for (id, watching) in self.watching {
            prop_assert!(watching.is_finished(), "{id} has a watcher that was not woken");
            let (seen, last) = watching.await.unwrap();
            let call = &self.calls[id];
            let in_order = seen.is_sorted() && seen.iter().filter(|status| status.is_terminal()).count() == 1;
            prop_assert!(in_order && seen.last().copied() == call.status(), "{seen:?}: {call:?}");
            prop_assert_eq!(Some(last.status), call.status());
        }
        let all = self.seen;
        for mut later in self.later_updates {
            let mut seen = BTreeMap::<usize, Vec<RequestStatus>>::new();
            drain(&mut later, |id, status, _| seen.entry(id).or_default().push(status));
            for (id, seen) in seen {
                prop_assert!(all[&id].ends_with(&seen), "{id}: {seen:?} of {:?}", all[&id]);
            }
        }
        Ok(())
    }
}

/// Checks that the record of an event is as the model of its call predicts.
fn check_record(call: &Call, event: &NetworkRequestEvent) -> Outcome {
    prop_assert_eq!(Some(event.status), call.status());
    let opened = call.statuses[0].1;
    let utc = |instant: Instant| event.created_at + (instant - opened);
    let at = |status| {
        let mark = call.statuses.iter().find(|(marked, _)| *marked == status);
        mark.map(|(_, at)| utc(*at))
    };
    prop_assert_eq!(event.queued_at, at(RequestStatus::Queued));
    prop_assert_eq!(event.processing_started_at, at(RequestStatus::Processing));
    prop_assert_eq!(event.call_started_at, at(RequestStatus::Calling));
    let completed = call.statuses.last().filter(|(status, _)| status.is_terminal());
    prop_assert_eq!(event.completed_at, completed.map(|(_, at)| utc(*at)));

    let attempts = call
        .attempts
        .iter()
        .flat_map(|(start, end)| [Some(*start), end.map(|(end, _)| end)]);
    let marks = call.statuses.iter().map(|(_, at)| Some(*at));
    let updated = attempts.chain(marks).chain([call.last_noted]).flatten().max();
    prop_assert_eq!(Some(event.updated_at), updated.map(utc));

    let logs: Vec<_> = call.logs.iter().map(|(text, at)| (*text, utc(*at))).collect();
    let recorded: Vec<_> = event.logs.iter().map(|log| (&*log.message, log.at)).collect();
    prop_assert_eq!(recorded, logs);
    let metadata = call.metadata.iter().map(|(key, value)| (key.clone(), (*value).into()));
    prop_assert_eq!(&event.metadata, &metadata.collect());

    let code = |returned: Option<Returned>| match returned {
        Some(Returned::Code(code)) => Some(code),
        _ => None,
    };
    prop_assert_eq!(event.response_status_code, code(call.outcome));
    let error = match call.outcome {
        Some(Returned::Code(500)) => Some("Bad"),
        Some(Returned::Panicked) => Some("Panicked"),
        Some(Returned::Failed) => event.error_message.as_deref().filter(|message| *message == "failed"),
        _ => None,
    };
    prop_assert!(
        event.error_type.as_deref() == error || error == Some("failed"),
        "{event:?}"
    );

    prop_assert_eq!(event.attempts.len(), call.attempts.len());
    for (attempt, (start, end)) in event.attempts.iter().zip(&call.attempts) {
        prop_assert_eq!(attempt.started_at, utc(*start));
        prop_assert_eq!(attempt.ended_at, end.map(|(end, _)| utc(end)));
        let returned = end.map(|(_, returned)| returned);
        prop_assert_eq!(
            attempt.status_code.map(Returned::Code),
            returned.filter(|returned| matches!(returned, Returned::Code(_)))
        );
        let error = match returned {
            Some(Returned::Cancelled) => Some("Cancelled"),
            Some(Returned::Panicked) => Some("Panicked"),
            Some(Returned::Failed) => Some("dyn Error"),
            Some(Returned::Code(_)) | None => None,
        };
        let recorded = attempt.error_type.as_deref();
        prop_assert!(
            error.is_none() == recorded.is_none() && (error == Some("dyn Error") || error == recorded),
            "{attempt:?}"
        );
    }
    Ok(())
}

#[test]
fn an_event_records_every_call_as_the_model_predicts() {
    check(file!(), &case(), |case| async move {
        let mut bench = Bench::start(&case);
        for step in &case.steps {
            bench.step(step).await?;
            bench.settle().await;
            bench.check()?;
        }
        bench.finish().await
    });
}
