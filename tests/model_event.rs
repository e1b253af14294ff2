//! Events against a model of them: what each layer writes on the way in and out, in any stack of the three, with a
//! queue and retries or without.
//!
//! The client does as it is told, the caller comes and goes, and others carry the event on, look at it, and write to it.
//! After each step the records have to be what the model says, to the nanosecond; at the end every call has come to one
//! outcome, and all who watched have seen it in order.

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

// === What is done ===

/// Which layers there are. At least one writes events.
#[derive(Clone, Copy, Debug)]
struct Stack {
    queued: bool,
    queue: bool,
    processing: bool,
    /// So many times; below one that opens the event, or each attempt would have its own.
    retries: Option<usize>,
    calling: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Answers,
    /// A response that counts as a failure.
    AnswersBadly,
    Fails,
    Panics,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Place {
    Queued,
    Processing,
    Calling,
}

#[derive(Clone, Debug)]
enum Step {
    /// A new call, and whether the client panics when it is called for the first time or the second.
    Start(Option<usize>),
    Poll(Index),
    Drop(Index),
    /// The attempt comes to its end, with a note from inside.
    End(Index, End),
    Pass(u64),
    Log(Index),
    Metadata(Index, u8),
    /// Somebody carries the event on.
    Carry(Index),
    LetGo(Index),
    InScope(Index, Index),
    /// In the scope of an event, another service is called.
    CallInScope(Index, Place),
    Watch(Index),
    Subscribe,
}

#[derive(Clone, Debug)]
struct Case {
    stack: Stack,
    steps: Vec<Step>,
    /// Whether a call that panics is dropped while it does, as a task's is, or afterwards.
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
        3 => Just(End::Answers),
        1 => Just(End::AnswersBadly),
        3 => Just(End::Fails),
        2 => Just(End::Panics),
    ];
    let place = prop_oneof![Just(Place::Queued), Just(Place::Processing), Just(Place::Calling)];
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
        2 => index().prop_map(Step::LetGo),
        1 => (index(), index()).prop_map(|(outer, inner)| Step::InScope(outer, inner)),
        1 => (index(), place).prop_map(|(index, place)| Step::CallInScope(index, place)),
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

// === The client, which does as it is told ===

#[derive(Clone, Copy, Debug)]
struct Req {
    id: usize,
    /// Which attempt panics when the client is called.
    panics: Option<usize>,
}

#[derive(Clone, Default)]
struct Told(Arc<Mutex<Telling>>);

#[derive(Default)]
struct Telling {
    attempts: BTreeMap<usize, usize>,
    alive: BTreeMap<usize, Ctl>,
    /// Calls that were not in their own scope.
    lost: Vec<String>,
}

#[derive(Default)]
struct Ctl {
    end: Option<End>,
    waker: Option<Waker>,
}

struct Work {
    id: usize,
    told: Told,
}

fn name(id: usize) -> String {
    format!("call {id}")
}

fn fall_over() -> ! {
    resume_unwind(Box::new("fell over"))
}

impl Told {
    fn lock(&self) -> MutexGuard<'_, Telling> {
        self.0.lock().unwrap()
    }

    fn look(&self, id: usize) {
        let current = event::current().map(|event| event.request_id().to_string());
        if current.as_deref() != Some(&*name(id)) {
            self.lock().lost.push(format!("{id} is in {current:?}"));
        }
    }
}

impl Service<Req> for Told {
    type Response = u16;
    type Error = BoxError;
    type Future = Work;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, req: Req) -> Work {
        self.look(req.id);
        let mut telling = self.lock();
        let attempt = telling.attempts.entry(req.id).or_default();
        *attempt += 1;
        let attempt = *attempt;
        if req.panics == Some(attempt - 1) {
            drop(telling);
            fall_over();
        }
        telling.alive.insert(req.id, Ctl::default());
        drop(telling);
        Work {
            id: req.id,
            told: self.clone(),
        }
    }
}

impl Future for Work {
    type Output = Result<u16, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.told.look(self.id);
        let mut telling = self.told.lock();
        let ctl = telling.alive.get_mut(&self.id).expect("it runs");
        ctl.waker = Some(cx.waker().clone());
        let end = ctl.end.take();
        drop(telling);
        let Some(end) = end else { return Poll::Pending };
        if let Some(event) = event::current() {
            event.log("from inside");
        }
        match end {
            End::Answers => Poll::Ready(Ok(200)),
            End::AnswersBadly => Poll::Ready(Ok(500)),
            End::Fails => Poll::Ready(Err("failed".into())),
            End::Panics => fall_over(),
        }
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        let gone = self.told.lock().alive.remove(&self.id);
        // It is its waker's drop too.
        drop(gone);
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
            details.failure("Bad", "it was bad");
        }
    }
}

#[derive(Clone)]
struct Again(usize);

impl Policy<Req, u16, BoxError> for Again {
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

fn layer(place: Place, events: &Events) -> EventLayer<Named> {
    let layer = match place {
        Place::Queued => EventLayer::queued(),
        Place::Processing => EventLayer::processing(),
        Place::Calling => EventLayer::calling(),
    };
    layer.describe(Named).report_to(events)
}

impl Stack {
    fn around(self, told: Told, events: &Events) -> Boxed {
        let mut service = BoxCloneService::new(told);
        if self.calling {
            service = BoxCloneService::new(layer(Place::Calling, events).layer(service));
        }
        if let Some(retries) = self.retries {
            service = BoxCloneService::new(RetryLayer::new(Again(retries)).layer(service));
        }
        if self.processing {
            service = BoxCloneService::new(layer(Place::Processing, events).layer(service));
        }
        if self.queue {
            service = BoxCloneService::new(QueueLayer::new(1_000).unwrap().layer(service));
        }
        if self.queued {
            service = BoxCloneService::new(layer(Place::Queued, events).layer(service));
        }
        service
    }

    /// The outermost.
    fn opener(self) -> Place {
        match (self.queued, self.processing) {
            (true, _) => Place::Queued,
            (false, true) => Place::Processing,
            (false, false) => Place::Calling,
        }
    }
}

// === The model ===

#[derive(Clone, Copy, Debug, PartialEq)]
enum Came {
    Code(u16),
    Failed,
    Panicked,
    Cancelled,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Stands {
    /// In the queue.
    Waiting,
    Running,
    /// In the queue's hands, to be fetched.
    Done(Came),
    Gone,
}

#[derive(Debug)]
struct Call {
    opener: Place,
    stands: Stands,
    /// Each status and when it came.
    statuses: Vec<(RequestStatus, Instant)>,
    came: Option<Came>,
    attempts: Vec<(Instant, Option<(Instant, Came)>)>,
    logs: Vec<(&'static str, Instant)>,
    metadata: BTreeMap<String, u64>,
    touched: Option<Instant>,
    carriers: usize,
    panics: Option<usize>,
    made: usize,
    retries: usize,
}

impl Came {
    fn status(self) -> RequestStatus {
        match self {
            Self::Code(200) => RequestStatus::Completed,
            Self::Cancelled => RequestStatus::Cancelled,
            _ => RequestStatus::Failed,
        }
    }
}

impl Call {
    fn new(opener: Place, stands: Stands) -> Self {
        Self {
            opener,
            stands,
            statuses: Vec::new(),
            came: None,
            attempts: Vec::new(),
            logs: Vec::new(),
            metadata: BTreeMap::new(),
            touched: None,
            carriers: 0,
            panics: None,
            made: 0,
            retries: 0,
        }
    }

    fn status(&self) -> Option<RequestStatus> {
        self.statuses.last().map(|(status, _)| *status)
    }

    fn is_over(&self) -> bool {
        self.status().is_some_and(RequestStatus::is_terminal)
    }

    /// Forward only.
    fn mark(&mut self, status: RequestStatus) {
        if self.status() < Some(status) {
            self.statuses.push((status, Instant::now()));
        }
    }

    fn finish(&mut self, came: Came) {
        if !self.is_over() {
            self.statuses.push((came.status(), Instant::now()));
            self.came = Some(came);
        }
    }

    fn end_attempt(&mut self, came: Came) {
        if let Some((_, end)) = self.attempts.iter_mut().find(|(_, end)| end.is_none()) {
            *end = Some((Instant::now(), came));
        }
    }

    /// A writer is gone. If it was the last one, there will be no outcome.
    fn let_go(&mut self, stack: Stack) {
        let has_writer = match self.stands {
            Stands::Waiting => stack.queued,
            Stands::Running => true,
            Stands::Done(_) => stack.queued,
            Stands::Gone => false,
        };
        if !has_writer && self.carriers == 0 && !self.statuses.is_empty() {
            self.finish(Came::Cancelled);
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

    /// Below the queue.
    fn begin(&mut self, stack: Stack) {
        self.stands = Stands::Running;
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
            self.attempts.push((Instant::now(), None));
        }
        self.made += 1;
        if self.panics == Some(self.made - 1) {
            self.end_attempt(Came::Panicked);
            self.emerge(stack, Came::Panicked);
        }
    }

    fn end(&mut self, stack: Stack, end: End) {
        self.log("from inside");
        let came = match end {
            End::Answers => Came::Code(200),
            End::AnswersBadly => Came::Code(500),
            End::Fails => Came::Failed,
            End::Panics => Came::Panicked,
        };
        self.end_attempt(came);
        if came == Came::Failed && self.retries > 0 {
            self.retries -= 1;
            self.attempt(stack);
        } else {
            self.emerge(stack, came);
        }
    }

    /// Comes out above everything below the queue.
    fn emerge(&mut self, stack: Stack, came: Came) {
        if !(stack.queue && stack.queued) || stack.processing || came == Came::Panicked {
            // By the layer below the queue, or the one that opened the event, or the queue itself.
            self.finish(came);
        }
        self.stands = if stack.queue { Stands::Done(came) } else { Stands::Gone };
    }

    fn drop(&mut self, stack: Stack) {
        match self.stands {
            Stands::Waiting => self.finish_if_opened(),
            Stands::Running => {
                self.end_attempt(Came::Cancelled);
                if stack.queue && stack.queued {
                    self.finish(Came::Cancelled);
                }
            }
            Stands::Done(_) | Stands::Gone => {}
        }
        self.stands = Stands::Gone;
        self.let_go(stack);
    }

    fn finish_if_opened(&mut self) {
        if !self.statuses.is_empty() {
            self.finish(Came::Cancelled);
        }
    }

    fn log(&mut self, text: &'static str) {
        self.logs.push((text, Instant::now()));
        self.touched = Some(Instant::now());
    }
}

// === The events beside it ===

type Response = Pin<Box<dyn Future<Output = Result<u16, BoxError>> + Send>>;
type Carried = Pin<Box<dyn Future<Output = ()>>>;

struct Bench {
    stack: Stack,
    drops_at_once: bool,
    told: Told,
    events: Events,
    service: Boxed,
    updates: Subscription,
    late: Vec<Subscription>,
    callers: Vec<(usize, Spawn<Response>)>,
    handles: BTreeMap<usize, EventHandle>,
    carriers: Vec<(usize, Spawn<Carried>)>,
    watching: Vec<(usize, JoinHandle<Watched>)>,
    seen: BTreeMap<usize, Vec<RequestStatus>>,
    calls: Vec<Call>,
}

/// What one saw who waited for changes, and the record at the end.
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

fn drain(updates: &mut Subscription, mut tell: impl FnMut(usize, RequestStatus, EventHandle)) {
    loop {
        // A task may take only so many at one go, and this one has many to look at.
        let Poll::Ready(Some(update)) = task::spawn(unconstrained(updates.recv())).poll() else {
            return;
        };
        let update = update.expect("nobody lags");
        let id = update.event.request_id().to_string();
        let id = id.strip_prefix("call ").unwrap().parse().unwrap();
        tell(id, update.status, update.event);
    }
}

impl Bench {
    fn start(case: &Case) -> Self {
        let (told, events) = (Told::default(), Events::new());
        Self {
            stack: case.stack,
            drops_at_once: case.drops_at_once,
            service: case.stack.around(told.clone(), &events),
            told,
            updates: events.subscribe(),
            events,
            late: Vec::new(),
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
                self.give_up(index.index(self.callers.len()));
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
                    call.touched = Some(Instant::now());
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
            Step::LetGo(index) if !self.carriers.is_empty() => {
                self.put_down(index.index(self.carriers.len()));
            }
            Step::InScope(outer, inner) => {
                if let (Some((outer, first)), Some((inner, second))) = (self.pick(outer), self.pick(inner)) {
                    let current = || event::current().map(|event| event.request_id().to_string());
                    let seen = first.in_scope(|| (current(), second.in_scope(current), current()));
                    prop_assert_eq!(seen, (Some(name(outer)), Some(name(inner)), Some(name(outer))));
                    prop_assert_eq!(current(), None);
                }
            }
            Step::CallInScope(index, place) => self.call_in_scope(index, *place)?,
            Step::Watch(index) => {
                if let Some((id, handle)) = self.pick(index) {
                    self.watching.push((id, tokio::spawn(watch(handle))));
                }
            }
            Step::Subscribe => self.late.push(self.events.subscribe()),
            _ => {}
        }
        Ok(())
    }

    fn call(&mut self, panics: Option<usize>) {
        let id = self.calls.len();
        let mut call = Call::new(self.stack.opener(), Stands::Waiting);
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
            .filter(|id| self.told.lock().alive.contains_key(id))
            .collect();
        if running.is_empty() {
            return Ok(());
        }
        let id = running[index.index(running.len())];
        let mut telling = self.told.lock();
        let ctl = telling.alive.get_mut(&id).expect("it runs");
        ctl.end = Some(end);
        let waker = ctl.waker.take();
        drop(telling);
        waker.into_iter().for_each(Waker::wake);
        if self.stack.queue {
            // The workers do it.
            self.calls[id].end(self.stack, end);
            return Ok(());
        }
        let caller = self.callers.iter().position(|(caller, _)| *caller == id);
        self.calls[id].end(self.stack, end);
        self.poll(caller.expect("it is polled by its caller"))
    }

    fn poll(&mut self, index: usize) -> Outcome {
        let (id, mut caller) = self.callers.swap_remove(index);
        let drops_at_once = self.drops_at_once;
        let polled = catch_unwind(AssertUnwindSafe(|| {
            if drops_at_once {
                // What panics takes the call with it.
                let mut caller = Some(caller);
                let polled = caller.as_mut().expect("it is there").poll();
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
                prop_assert!(matches!(call.stands, Stands::Waiting | Stands::Running), "{call:?}");
                self.callers.extend(caller.map(|caller| (id, caller)));
            }
            Ok((Poll::Ready(result), _)) => {
                let came = match call.stands {
                    Stands::Done(came) => came,
                    _ => Came::Cancelled,
                };
                if self.stack.queue {
                    prop_assert_ne!(came, Came::Cancelled, "{:?}", call);
                    prop_assert_eq!(
                        result.as_ref().ok().copied().map(Came::Code),
                        match came {
                            Came::Code(_) => Some(came),
                            _ => None,
                        }
                    );
                    if self.stack.queued {
                        call.finish(came);
                    }
                }
                call.stands = Stands::Gone;
                call.let_go(self.stack);
            }
            Err(_) => prop_assert_eq!(call.stands, Stands::Gone, "only the client panics"),
        }
        Ok(())
    }

    fn give_up(&mut self, at: usize) {
        let (id, caller) = self.callers.swap_remove(at);
        drop(caller);
        self.calls[id].drop(self.stack);
    }

    fn put_down(&mut self, at: usize) {
        let (id, carrier) = self.carriers.swap_remove(at);
        drop(carrier);
        self.calls[id].carriers -= 1;
        self.calls[id].let_go(self.stack);
    }

    /// A layer belongs to the current event if it stands further in than whoever made it current.
    fn call_in_scope(&mut self, index: &Index, place: Place) -> Outcome {
        let Some((outer, handle)) = self.pick(index) else {
            return Ok(());
        };
        let id = self.calls.len();
        let client = tower::service_fn(|_: Req| ready(Ok::<_, BoxError>(200)));
        let mut service = layer(place, &self.events).layer(client);
        let polled = handle.in_scope(|| task::spawn(service.call(Req { id, panics: None })).poll());
        prop_assert!(polled.is_ready());
        let joins = (place as u8) > (self.calls[outer].opener as u8);
        if !joins {
            let mut call = Call::new(place, Stands::Gone);
            call.mark(RequestStatus::Pending);
            self.calls.push(call);
        }
        let call = if joins {
            &mut self.calls[outer]
        } else {
            &mut self.calls[id]
        };
        match place {
            Place::Queued => {}
            Place::Processing => call.mark(RequestStatus::Processing),
            Place::Calling => {
                call.mark(RequestStatus::Calling);
                // Before one that runs, whose end is still to come, or after.
                let now = Instant::now();
                call.attempts.push((now, Some((now, Came::Code(200)))));
            }
        }
        if !joins || place == Place::Processing {
            call.finish(Came::Code(200));
        }
        Ok(())
    }

    /// Lets the workers and watchers run, and hears of what they did.
    async fn settle(&mut self) {
        turns(3).await;
        for call in &mut self.calls {
            if self.stack.queue && call.stands == Stands::Waiting {
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
        let telling = self.told.lock();
        prop_assert!(telling.lost.is_empty(), "{:?}", telling.lost);
        drop(telling);
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
                same(call, &handle.snapshot())?;
            }
        }
        Ok(())
    }

    /// Everybody lets go: everything is over.
    async fn finish(mut self) -> Outcome {
        while !self.callers.is_empty() {
            self.give_up(0);
            self.settle().await;
            self.check()?;
        }
        while !self.carriers.is_empty() {
            self.put_down(0);
            self.settle().await;
            self.check()?;
        }
        for call in self.calls.iter().filter(|call| !call.statuses.is_empty()) {
            prop_assert!(call.is_over(), "{call:?}");
        }
        turns(3).await;
        for (id, watching) in self.watching {
            prop_assert!(watching.is_finished(), "{id} has a watcher that was not told");
            let (seen, last) = watching.await.unwrap();
            let call = &self.calls[id];
            let in_order = seen.is_sorted() && seen.iter().filter(|status| status.is_terminal()).count() == 1;
            prop_assert!(in_order && seen.last().copied() == call.status(), "{seen:?}: {call:?}");
            prop_assert_eq!(Some(last.status), call.status());
        }
        let all = self.seen;
        for mut late in self.late {
            let mut seen = BTreeMap::<usize, Vec<RequestStatus>>::new();
            drain(&mut late, |id, status, _| seen.entry(id).or_default().push(status));
            for (id, seen) in seen {
                prop_assert!(all[&id].ends_with(&seen), "{id}: {seen:?} of {:?}", all[&id]);
            }
        }
        Ok(())
    }
}

/// The record is what the model says, and its times follow each other.
fn same(call: &Call, event: &NetworkRequestEvent) -> Outcome {
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
    let updated = attempts.chain(marks).chain([call.touched]).flatten().max();
    prop_assert_eq!(Some(event.updated_at), updated.map(utc));

    let logs: Vec<_> = call.logs.iter().map(|(text, at)| (*text, utc(*at))).collect();
    let told: Vec<_> = event.logs.iter().map(|log| (&*log.message, log.at)).collect();
    prop_assert_eq!(told, logs);
    let metadata = call.metadata.iter().map(|(key, value)| (key.clone(), (*value).into()));
    prop_assert_eq!(&event.metadata, &metadata.collect());

    let code = |came: Option<Came>| match came {
        Some(Came::Code(code)) => Some(code),
        _ => None,
    };
    prop_assert_eq!(event.response_status_code, code(call.came));
    let error = match call.came {
        Some(Came::Code(500)) => Some("Bad"),
        Some(Came::Panicked) => Some("Panicked"),
        Some(Came::Failed) => event.error_message.as_deref().filter(|message| *message == "failed"),
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
        let came = end.map(|(_, came)| came);
        prop_assert_eq!(
            attempt.status_code.map(Came::Code),
            came.filter(|came| matches!(came, Came::Code(_)))
        );
        let error = match came {
            Some(Came::Cancelled) => Some("Cancelled"),
            Some(Came::Panicked) => Some("Panicked"),
            Some(Came::Failed) => Some("dyn Error"),
            Some(Came::Code(_)) | None => None,
        };
        let told = attempt.error_type.as_deref();
        prop_assert!(
            error.is_none() == told.is_none() && (error == Some("dyn Error") || error == told),
            "{attempt:?}"
        );
    }
    Ok(())
}

#[test]
fn an_event_says_of_every_call_what_became_of_it() {
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
