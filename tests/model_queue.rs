//! `Queue` against a model of it: three lists (who waits for a place, who has one, who runs) and what each came to.
//!
//! The inner service does as it is told: it is ready or not, answers, fails or panics in any of its parts. After each
//! step the lists have to be the same, and at the end every call has come to exactly one thing.

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

// === What is done ===

/// How the service answers when it is asked to be ready. The last two only once.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Door {
    Open,
    Shut,
    Fails,
    Panics,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Answers,
    Fails,
    Panics,
}

/// A request: its number, and what will go wrong.
#[derive(Clone, Copy, Debug)]
struct Req {
    id: usize,
    panics_when_called: bool,
    panics_when_dropped: bool,
}

#[derive(Clone, Debug)]
enum Step {
    /// Only if there is a place now.
    TryCall(bool, bool),
    Call(bool, bool),
    /// With one of a few handles that are kept, made ready or not.
    CallOn(usize, bool, bool),
    PollReady(usize),
    DropHandle(usize),
    Poll(Index),
    Drop(Index),
    Cancel(Index),
    Detach(Index),
    End(Index, End),
    Door(Door),
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
    let end = prop_oneof![3 => Just(End::Answers), 1 => Just(End::Fails), 1 => Just(End::Panics)];
    let door = prop_oneof![
        5 => Just(Door::Open),
        3 => Just(Door::Shut),
        1 => Just(Door::Fails),
        1 => Just(Door::Panics),
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
        10 => door.prop_map(Step::Door),
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

// === The service, which does as it is told ===

#[derive(Clone, Default)]
struct Told(Arc<Mutex<Telling>>);

#[derive(Default)]
struct Telling {
    shut: bool,
    fails: bool,
    panics: bool,
    asking: Vec<Waker>,
    asked: usize,
    /// In the order in which they came.
    begun: Vec<usize>,
    /// Those whose futures are there.
    alive: BTreeMap<usize, Ctl>,
}

#[derive(Default)]
struct Ctl {
    end: Option<End>,
    waker: Option<Waker>,
}

struct Work {
    req: Req,
    told: Told,
}

/// Without the noise of a hook.
fn fall_over() -> ! {
    resume_unwind(Box::new("fell over"))
}

impl Told {
    fn lock(&self) -> MutexGuard<'_, Telling> {
        self.0.lock().unwrap()
    }

    fn set(&self, door: Door) {
        let mut telling = self.lock();
        telling.shut = door == Door::Shut;
        telling.fails = door == Door::Fails;
        telling.panics = door == Door::Panics;
        let asking = std::mem::take(&mut telling.asking);
        drop(telling);
        asking.into_iter().for_each(Waker::wake);
    }

    fn end(&self, id: usize, end: End) {
        let mut telling = self.lock();
        let ctl = telling.alive.get_mut(&id).expect("it runs");
        ctl.end = Some(end);
        let waker = ctl.waker.take();
        drop(telling);
        waker.into_iter().for_each(Waker::wake);
    }
}

impl Service<Req> for Told {
    type Response = usize;
    type Error = BoxError;
    type Future = Work;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        let mut telling = self.lock();
        telling.asked += 1;
        if telling.shut {
            telling.asking.push(cx.waker().clone());
            return Poll::Pending;
        }
        let (fails, panics) = (telling.fails, telling.panics);
        (telling.fails, telling.panics) = (false, false);
        drop(telling);
        if panics {
            fall_over();
        }
        Poll::Ready(if fails { Err("not ready".into()) } else { Ok(()) })
    }

    fn call(&mut self, req: Req) -> Work {
        let mut telling = self.lock();
        telling.begun.push(req.id);
        if req.panics_when_called {
            drop(telling);
            fall_over();
        }
        let twice = telling.alive.insert(req.id, Ctl::default()).is_some();
        drop(telling);
        assert!(!twice, "called twice");
        Work {
            req,
            told: self.clone(),
        }
    }
}

impl Future for Work {
    type Output = Result<usize, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut telling = self.told.lock();
        let ctl = telling.alive.get_mut(&self.req.id).expect("it runs");
        ctl.waker = Some(cx.waker().clone());
        let end = ctl.end;
        drop(telling);
        match end {
            None => Poll::Pending,
            Some(End::Answers) => Poll::Ready(Ok(self.req.id)),
            Some(End::Fails) => Poll::Ready(Err(format!("{} failed", self.req.id).into())),
            Some(End::Panics) => fall_over(),
        }
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        let gone = self.told.lock().alive.remove(&self.req.id);
        // It is its waker's drop too.
        drop(gone);
        if self.req.panics_when_dropped && !thread::panicking() {
            fall_over();
        }
    }
}

// === The model ===

#[derive(Clone, Copy, Debug, PartialEq)]
enum Stands {
    /// Has no place.
    Entering,
    Queued,
    Running,
    Over(Result<usize, Why>),
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Why {
    NotReady,
    Failed,
    Panicked,
    Cancelled,
    Closed,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum InLine {
    Call(usize),
    Handle(usize),
}

#[derive(Debug)]
struct Model {
    capacity: usize,
    limit: Option<usize>,
    door: Door,
    closed: bool,
    line: Vec<InLine>,
    queued: Vec<usize>,
    running: Vec<usize>,
    begun: Vec<usize>,
    calls: Vec<(Req, Stands)>,
}

impl Model {
    fn has_place(&self) -> bool {
        self.queued.len() < self.capacity
    }

    fn over(&mut self, id: usize, result: Result<usize, Why>) {
        self.line.retain(|in_line| *in_line != InLine::Call(id));
        self.queued.retain(|queued| *queued != id);
        self.running.retain(|running| *running != id);
        self.calls[id].1 = Stands::Over(result);
    }

    fn accept(&mut self, id: usize) {
        self.queued.push(id);
        self.calls[id].1 = Stands::Queued;
    }

    /// What the workers do until they can do no more.
    fn work(&mut self) {
        while let Some(&id) = self.queued.first() {
            if self.limit.is_some_and(|limit| self.running.len() >= limit) {
                return;
            }
            match self.door {
                Door::Shut => return,
                Door::Fails => {
                    self.door = Door::Open;
                    self.over(id, Err(Why::NotReady));
                }
                Door::Panics => {
                    self.door = Door::Open;
                    self.over(id, Err(Why::Panicked));
                }
                Door::Open => {
                    self.begun.push(id);
                    if self.calls[id].0.panics_when_called {
                        self.over(id, Err(Why::Panicked));
                    } else {
                        self.queued.remove(0);
                        self.running.push(id);
                        self.calls[id].1 = Stands::Running;
                    }
                }
            }
        }
    }

    fn end(&mut self, id: usize, end: End) {
        // The limit drops what it called before it hands the result on; the queue drops it by itself.
        let spoilt = self.limit.is_some() && self.calls[id].0.panics_when_dropped;
        let result = match end {
            End::Panics => Err(Why::Panicked),
            _ if spoilt => Err(Why::Panicked),
            End::Answers => Ok(id),
            End::Fails => Err(Why::Failed),
        };
        self.over(id, result);
    }

    fn abort(&mut self) {
        self.closed = true;
        for id in [&self.queued[..], &self.running[..]].concat() {
            self.over(id, Err(Why::Cancelled));
        }
    }

    fn is_ended(&self) -> bool {
        self.closed && self.queued.is_empty() && self.running.is_empty()
    }
}

// === The queue beside it ===

struct Caller {
    id: usize,
    /// Nobody can wake it before.
    was_polled: bool,
    future: Spawn<ResponseFuture<Req, usize>>,
}

struct Bench {
    told: Told,
    limit: Option<Concurrency>,
    queue: Queue<Req, usize>,
    handles: Vec<Spawn<Queue<Req, usize>>>,
    /// Which of them were told that it is their turn, and did not use it.
    ready: [bool; HANDLES],
    callers: Vec<Caller>,
    model: Model,
}

fn why(error: &BoxError) -> Option<Why> {
    let text = error.to_string();
    [
        (error.is::<Closed>(), Why::Closed),
        (error.is::<Cancelled>(), Why::Cancelled),
        (error.is::<Panicked>(), Why::Panicked),
        (text == "not ready", Why::NotReady),
        (text.ends_with(" failed"), Why::Failed),
    ]
    .into_iter()
    .find_map(|(is, why)| is.then_some(why))
}

impl Bench {
    fn start(case: &Case) -> Self {
        let told = Told::default();
        let layer = QueueLayer::new(case.capacity).unwrap().workers(case.workers).unwrap();
        let (queue, limit) = match case.limit {
            Some(limit) => {
                let limit = ConcurrencyLimitLayer::new(limit).unwrap();
                (layer.layer(limit.layer(told.clone())), Some(limit.limit().clone()))
            }
            None => (layer.layer(told.clone()), None),
        };
        Self {
            told,
            limit,
            handles: (0..HANDLES).map(|_| task::spawn(queue.clone())).collect(),
            ready: [false; HANDLES],
            queue,
            callers: Vec::new(),
            model: Model {
                capacity: case.capacity,
                limit: case.limit,
                door: Door::Open,
                closed: false,
                line: Vec::new(),
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
        self.model.calls.push((req, Stands::Entering));
        req
    }

    fn made(&mut self, id: usize, future: ResponseFuture<Req, usize>) {
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
                let accepted = has_place && self.model.line.is_empty();
                match self.queue.clone().try_call(req) {
                    Ok(future) => {
                        prop_assert!(accepted, "there was no place for it");
                        self.model.accept(req.id);
                        self.made(req.id, future);
                    }
                    Err(refused) => {
                        prop_assert!(!accepted, "there was a place for it");
                        prop_assert_eq!(refused.is_closed(), self.model.closed);
                        prop_assert_eq!(refused.into_request().id, req.id);
                        self.model.over(req.id, Err(Why::Closed));
                    }
                }
            }
            Step::Call(called, dropped) => {
                let req = self.request(called, dropped);
                let future = self.queue.clone().call(req);
                self.entered(req.id, has_place && self.model.line.is_empty(), future)?;
            }
            Step::CallOn(handle, called, dropped) => {
                let req = self.request(called, dropped);
                let future = self.handles[handle].enter(|_, mut queue| queue.call(req));
                let line = &mut self.model.line;
                let stood = line.iter().position(|in_line| *in_line == InLine::Handle(handle));
                let accepted = has_place && stood.map_or(line.is_empty(), |at| at == 0);
                match stood {
                    // The call has its handle's place in line.
                    Some(at) if accepted || self.model.closed => drop(line.remove(at)),
                    Some(at) => line[at] = InLine::Call(req.id),
                    None => {}
                }
                self.entered(req.id, accepted, future)?;
            }
            Step::PollReady(handle) => self.poll_ready(handle, has_place)?,
            Step::DropHandle(handle) => {
                self.handles[handle] = task::spawn(self.queue.clone());
                self.ready[handle] = false;
                self.model.line.retain(|in_line| *in_line != InLine::Handle(handle));
            }
            Step::Poll(index) if callers > 0 => self.poll(index.index(callers))?,
            Step::Drop(index) if callers > 0 => {
                let caller = self.callers.swap_remove(index.index(callers));
                drop(caller.future);
                self.given_up(caller.id)?;
            }
            Step::Cancel(index) if callers > 0 => {
                let caller = &mut self.callers[index.index(callers)];
                let id = caller.id;
                caller.future.cancel();
                self.given_up(id)?;
            }
            Step::Detach(index) if callers > 0 => {
                let caller = self.callers.swap_remove(index.index(callers));
                caller.future.into_inner().detach();
                if self.model.calls[caller.id].1 == Stands::Entering {
                    self.model.over(caller.id, Err(Why::Cancelled));
                }
            }
            Step::End(index, end) if !self.model.running.is_empty() => {
                let id = self.model.running[index.index(self.model.running.len())];
                self.told.end(id, end);
                self.model.end(id, end);
            }
            Step::Door(door) => {
                self.told.set(door);
                self.model.door = door;
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

    fn entered(&mut self, id: usize, accepted: bool, future: ResponseFuture<Req, usize>) -> Outcome {
        prop_assert_eq!(future.is_accepted(), accepted);
        if accepted {
            self.model.accept(id);
        }
        self.made(id, future);
        Ok(())
    }

    fn poll_ready(&mut self, handle: usize, has_place: bool) -> Outcome {
        let line = &mut self.model.line;
        let at = line.iter().position(|in_line| *in_line == InLine::Handle(handle));
        let expected = has_place && at.map_or(line.is_empty(), |at| at == 0);
        self.ready[handle] = expected;
        match self.handles[handle].enter(|cx, mut queue| queue.poll_ready(cx)) {
            Poll::Ready(Ok(())) => prop_assert!(expected, "ready without a place, or before its turn"),
            Poll::Ready(Err(error)) => {
                prop_assert!(self.model.closed && error.is::<Closed>());
                line.retain(|in_line| *in_line != InLine::Handle(handle));
            }
            Poll::Pending => {
                prop_assert!(!expected && !self.model.closed, "should be ready");
                if at.is_none() {
                    line.push(InLine::Handle(handle));
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
        if model.calls[id].1 == Stands::Entering {
            let at = model.line.iter().position(|in_line| *in_line == InLine::Call(id));
            if model.closed {
                model.over(id, Err(Why::Closed));
            } else if model.has_place() && at.map_or(model.line.is_empty(), |at| at == 0) {
                model.line.retain(|in_line| *in_line != InLine::Call(id));
                model.accept(id);
            } else if at.is_none() {
                model.line.push(InLine::Call(id));
            }
            let is_accepted = self.callers[index].future.is_accepted();
            prop_assert_eq!(is_accepted, self.model.calls[id].1 == Stands::Queued);
        }
        match (polled, self.model.calls[id].1) {
            (Poll::Pending, Stands::Over(expected)) => prop_assert!(false, "{id} should be over: {expected:?}"),
            (Poll::Pending, _) => {}
            (Poll::Ready(result), stands) => {
                let result = result.map_err(|error| why(&error).expect("an error of ours"));
                prop_assert_eq!(Stands::Over(result), stands);
                self.callers.swap_remove(index);
            }
        }
        Ok(())
    }

    /// No task has run since, and a place is free already.
    fn given_up(&mut self, id: usize) -> Outcome {
        if !matches!(self.model.calls[id].1, Stands::Over(_)) {
            self.model.over(id, Err(Why::Cancelled));
        }
        prop_assert_eq!(self.queue.depth(), self.model.queued.len());
        Ok(())
    }

    /// Lets the workers work; and those in line answer when they are called.
    async fn settle(&mut self) -> Outcome {
        loop {
            turns(3).await;
            self.model.work();
            let called =
                |caller: &Caller| caller.future.is_woken() && self.model.line.contains(&InLine::Call(caller.id));
            let Some(index) = self.callers.iter().position(called) else {
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
        let telling = self.told.lock();
        prop_assert_eq!(&telling.begun, &model.begun, "order: {:?}", model);
        let mut running = model.running.clone();
        running.sort_unstable();
        prop_assert_eq!(telling.alive.keys().copied().collect::<Vec<_>>(), running);
        drop(telling);
        // Whoever could have a place has been told,
        let is_called = model.has_place() || model.closed;
        match model.line.first() {
            Some(InLine::Handle(handle)) if is_called && (model.closed || !self.ready[*handle]) => {
                prop_assert!(self.handles[*handle].is_woken(), "{handle} was not called: {model:?}");
            }
            _ => {}
        }
        // and whoever could know more.
        for caller in self.callers.iter().filter(|caller| caller.was_polled) {
            let knows = match model.calls[caller.id].1 {
                Stands::Entering => is_called && model.line.first() == Some(&InLine::Call(caller.id)),
                Stands::Queued | Stands::Running => false,
                Stands::Over(_) => true,
            };
            prop_assert!(
                !knows || caller.future.is_woken(),
                "{} was not told: {model:?}",
                caller.id
            );
        }
        Ok(())
    }

    /// Everything accepted comes to its end, and every caller hears of it.
    async fn finish(&mut self) -> Outcome {
        for handle in 0..HANDLES {
            self.step(&Step::DropHandle(handle))?;
            self.settle().await?;
        }
        self.step(&Step::Door(Door::Open))?;
        self.settle().await?;
        self.check()?;
        while !self.callers.is_empty() || !self.model.running.is_empty() {
            for index in (0..self.callers.len()).rev() {
                self.poll(index)?;
            }
            self.settle().await?;
            for id in self.model.running.clone() {
                self.told.end(id, End::Answers);
                self.model.end(id, End::Answers);
            }
            self.settle().await?;
            self.check()?;
        }
        for (req, stands) in &self.model.calls {
            prop_assert!(matches!(stands, Stands::Over(_)), "{} was lost: {stands:?}", req.id);
        }
        self.step(&Step::Close)?;
        self.settle().await?;
        self.check()?;
        prop_assert!(self.queue.is_ended());
        Ok(())
    }
}

#[test]
fn the_queue_does_what_three_lists_do() {
    check(file!(), &case(), |case| async move {
        let mut bench = Bench::start(&case);
        for step in &case.steps {
            let wanted = |(_, stands): &(Req, Stands)| matches!(stands, Stands::Entering | Stands::Queued);
            let nobody = !bench.model.calls.iter().any(wanted);
            let before = (bench.told.lock().asked, bench.model.calls.len());
            bench.step(step)?;
            bench.settle().await?;
            bench.check()?;
            if nobody && bench.model.calls.len() == before.1 {
                prop_assert_eq!(bench.told.lock().asked, before.0, "asked to be ready for nobody");
            }
        }
        bench.finish().await
    });
}
