//! Helpers that several test files share: they build clients and runtimes, and run futures. Assertions about the crate
//! belong in the tests.

#![allow(dead_code, unreachable_pub)]

#[cfg(all(unix, feature = "redis"))]
pub mod admissions;
pub mod model;
#[cfg(feature = "redis")]
pub mod proxy;
#[cfg(feature = "redis")]
pub mod redis;
pub mod refilling_provider;
pub mod steps;

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

/// A time limit far above what any test needs: a test that reaches it fails instead of hanging.
pub const HANG: Duration = Duration::from_secs(60);

pub type Client = BoxCloneSyncService<Request<&'static str>, Response<&'static str>, Infallible>;

/// The names of the calls that reached a client. The time of each arrival is counted from the creation of this record.
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

    /// Returns the largest number of calls that reached the client within any time of length `window`.
    pub fn most_within(&self, window: Duration) -> usize {
        let times = self.times();
        times
            .iter()
            .map(|from| times.iter().filter(|at| *at >= from && **at < *from + window).count())
            .max()
            .unwrap_or(0)
    }
}

/// Returns a client that responds to each call after the time `takes`, and the record of the calls that reach the
/// client.
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

/// Lets the other tasks of a current-thread runtime run until all of them wait. No time passes on a paused clock.
pub async fn settle() {
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
}

/// Sleeps for `time`, and then lets the tasks that this has woken run until all of them wait.
pub async fn pass(time: Duration) {
    sleep(time).await;
    settle().await;
}

/// Returns a Tokio runtime that runs on the current thread and has a paused clock.
pub fn paused_runtime() -> Runtime {
    Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime")
}

/// Returns a Tokio runtime with one worker thread and a clock that is not paused.
pub fn threaded_runtime() -> Runtime {
    Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("a runtime")
}

/// Runs `work` on a new thread, and panics if `work` takes longer than [`HANG`] of real time.
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

/// Runs a future to completion on the current thread, without a Tokio runtime.
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

/// A service whose `poll_ready` calls the function `ready` of a test. The response to a call is the request itself.
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
