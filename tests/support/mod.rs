//! Helpers that several test files share. They build and run things; assertions belong into the tests.

#![allow(dead_code, unreachable_pub)]

pub mod model;
#[cfg(feature = "redis")]
pub mod proxy;
#[cfg(feature = "redis")]
pub mod redis;

use http::{Request, Response};
use std::{
    convert::Infallible,
    future::Future,
    pin::{Pin, pin},
    sync::{Arc, Mutex, mpsc},
    task::{Context, Poll, Wake, Waker},
    thread,
    time::Duration,
};
use tokio::{
    runtime::{Builder, Runtime},
    time::{Instant, sleep},
};
use tower::{Service, util::BoxCloneSyncService};

/// A limit on real time, far above what any test needs: a test that hangs fails after it.
pub const HANG: Duration = Duration::from_secs(60);

pub type Client = BoxCloneSyncService<Request<&'static str>, Response<&'static str>, Infallible>;

/// The name of each call that reached the client, and when, as the time since the start.
#[derive(Clone)]
pub struct Arrivals {
    start: Instant,
    times: Arc<Mutex<Vec<(Duration, &'static str)>>>,
}

impl Arrivals {
    pub fn new() -> Self {
        Self {
            start: Instant::now(),
            times: Arc::default(),
        }
    }

    pub fn record(&self, name: &'static str) {
        self.times.lock().unwrap().push((self.start.elapsed(), name));
    }

    pub fn times(&self) -> Vec<Duration> {
        self.times.lock().unwrap().iter().map(|(at, _)| *at).collect()
    }

    pub fn names(&self) -> Vec<&'static str> {
        self.times.lock().unwrap().iter().map(|(_, name)| *name).collect()
    }

    /// Returns the largest number of calls that arrived within any window of this length.
    pub fn most_within(&self, window: Duration) -> usize {
        let times = self.times();
        times
            .iter()
            .map(|from| times.iter().filter(|at| *at >= from && **at < *from + window).count())
            .max()
            .unwrap_or(0)
    }
}

/// Returns a client that responds after this time, and records when it was called.
pub fn client(takes: Duration) -> (Client, Arrivals) {
    let arrivals = Arrivals::new();
    let recorded = arrivals.clone();
    let service = tower::service_fn(move |req: Request<&'static str>| {
        let recorded = recorded.clone();
        async move {
            recorded.record(req.body());
            if !takes.is_zero() {
                sleep(takes).await;
            }
            Ok(Response::new("done"))
        }
    });
    (BoxCloneSyncService::new(service), arrivals)
}

pub fn request(body: &'static str) -> Request<&'static str> {
    Request::get("http://localhost/").body(body).unwrap()
}

pub const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// Lets the tasks of a current-thread runtime run until all of them wait, without any time passing.
pub async fn settle() {
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
}

/// Lets time pass, and the tasks that this wakes run until all of them wait.
pub async fn pass(time: Duration) {
    sleep(time).await;
    settle().await;
}

/// A runtime on this thread whose clock is paused.
pub fn paused_runtime() -> Runtime {
    Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime")
}

/// A runtime with one worker thread and a running clock.
pub fn threaded_runtime() -> Runtime {
    Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("a runtime")
}

/// Runs `work` on a new thread, and fails if it takes longer than [`HANG`].
pub fn within_a_minute<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, is_done) = mpsc::channel();
    let worker = thread::spawn(move || {
        let result = work();
        let _ = done.send(());
        result
    });
    if is_done.recv_timeout(HANG) == Err(mpsc::RecvTimeoutError::Timeout) {
        panic!("the test hangs");
    }
    worker.join().unwrap()
}

/// Polls a future to its end without any runtime.
pub fn block_on<F: Future>(future: F) -> F::Output {
    struct Unpark(thread::Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return output;
        }
        thread::park();
    }
}

/// A service whose readiness is what a function of the test returns. It responds with the request.
#[derive(Clone)]
pub struct Scripted<F> {
    pub ready: F,
}

impl<F, T> Service<&'static str> for Scripted<F>
where
    F: FnMut(&mut Context<'_>) -> Poll<Result<(), T>>,
    T: Send + 'static,
{
    type Response = &'static str;
    type Error = T;
    type Future = Pin<Box<dyn Future<Output = Result<&'static str, T>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), T>> {
        (self.ready)(cx)
    }

    fn call(&mut self, req: &'static str) -> Self::Future {
        Box::pin(async move { Ok(req) })
    }
}
