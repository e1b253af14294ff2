//! A queue or an executor whose calls wait.

use http::{Request, Response};
use std::{
    convert::Infallible,
    hint::black_box,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};
use tokio::{sync::Semaphore, task::yield_now};
use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
use tower_outbound::{
    CallHandle, ConcurrencyLimitLayer, Executor, ExecutorBuilder, Queue, QueueLayer, Rate, queue::ResponseFuture,
};

const URL: &str = "https://api.example.com/v1/chat/completions";
/// A rate per second that is never reached.
pub(crate) const UNREACHED: u64 = 1_000_000_000_000;

/// Makes a client whose calls block until the bench unblocks them.
#[derive(Clone)]
pub(crate) struct Blocker {
    permit: Arc<Semaphore>,
    /// The number of calls that have ended.
    ended: Arc<AtomicUsize>,
}

/// A started executor or queue with a concurrency limit of one.
pub(crate) trait Subject: Sized {
    type Call;

    fn start(capacity: usize, blocker: &Blocker) -> Self;
    async fn submit(&mut self) -> Self::Call;
    async fn response(call: Self::Call);
    /// Drops the handle without cancelling the call.
    fn detach(call: Self::Call);
    fn depth(&self) -> usize;
}

impl Blocker {
    pub(crate) fn new() -> Self {
        Self {
            permit: Arc::new(Semaphore::new(0)),
            ended: Arc::default(),
        }
    }

    pub(crate) fn unblock(&self) {
        self.permit.add_permits(1);
    }

    pub(crate) async fn block(&self) {
        self.permit.acquire().await.expect("the semaphore is open").forget();
    }

    pub(crate) fn ended(&self) -> usize {
        self.ended.load(Ordering::Relaxed)
    }

    pub(crate) fn client(
        &self,
    ) -> impl Service<Request<()>, Response = Response<()>, Error = Infallible, Future: Send> + Clone + Send + 'static
    {
        let blocker = self.clone();
        service_fn(move |_| {
            let blocker = blocker.clone();
            async move {
                let _permit = blocker.permit.acquire().await;
                blocker.ended.fetch_add(1, Ordering::Relaxed);
                Ok(Response::new(()))
            }
        })
    }
}

impl Subject for Executor<(), ()> {
    type Call = CallHandle<(), ()>;

    fn start(capacity: usize, blocker: &Blocker) -> Self {
        let executor = ExecutorBuilder::new()
            .queue_capacity(capacity)
            .concurrency_limit(1)
            .requests(Rate::per_second(UNREACHED))
            .tokens(Rate::per_second(UNREACHED))
            .build(blocker.client())
            .expect("the settings are valid");
        executor.start().expect("there is a runtime");
        executor
    }

    async fn submit(&mut self) -> Self::Call {
        Self::submit(self, request()).await.expect("the executor is running")
    }

    async fn response(call: Self::Call) {
        black_box(call.await.expect("the call succeeds"));
    }

    fn detach(call: Self::Call) {
        drop(call);
    }

    fn depth(&self) -> usize {
        self.monitor().queue_depth()
    }
}

impl Subject for Queue<Request<()>, Response<()>> {
    type Call = ResponseFuture<Request<()>, Response<()>>;

    fn start(capacity: usize, blocker: &Blocker) -> Self {
        ServiceBuilder::new()
            .layer(QueueLayer::new(capacity).expect("the capacity is valid"))
            .layer(ConcurrencyLimitLayer::new(1).expect("the limit is valid"))
            .service(blocker.client())
    }

    async fn submit(&mut self) -> Self::Call {
        self.ready().await.expect("the queue is open").call(request())
    }

    async fn response(call: Self::Call) {
        black_box(call.await.expect("the call succeeds"));
    }

    fn detach(call: Self::Call) {
        call.detach();
    }

    fn depth(&self) -> usize {
        Self::depth(self)
    }
}

pub(crate) fn request() -> Request<()> {
    Request::post(URL).body(()).expect("the request is valid")
}

/// Submits a call and waits until it is in flight, where the blocker blocks it. All later calls wait in the queue.
pub(crate) async fn submit_first<S: Subject>(subject: &mut S) -> S::Call {
    let first = subject.submit().await;
    while subject.depth() > 0 {
        yield_now().await;
    }
    first
}

/// Queues `n` calls, and returns their handles. If `keep` is false, only the last handle is returned, with which the
/// caller can wait for the end of all calls.
pub(crate) async fn fill<S: Subject>(subject: &mut S, n: usize, keep: bool) -> Vec<S::Call> {
    let mut calls = Vec::with_capacity(if keep { n } else { 1 });
    for _ in 0..n {
        if !keep {
            calls.pop().into_iter().for_each(S::detach);
        }
        calls.push(subject.submit().await);
    }
    calls
}
