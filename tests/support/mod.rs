//! What several tests build on. It builds; it never asserts.

#![allow(dead_code, unreachable_pub)]

pub mod model;
#[cfg(feature = "redis")]
pub mod redis;

use http::{Request, Response};
use std::{
    convert::Infallible,
    future::Future,
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};
use tokio::time::{Instant, sleep};
use tower::{Service, util::BoxCloneSyncService};

pub type Client = BoxCloneSyncService<Request<&'static str>, Response<&'static str>, Infallible>;

/// When each call reached the client, as time since the start.
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

    pub fn note(&self, name: &'static str) {
        self.times.lock().unwrap().push((self.start.elapsed(), name));
    }

    pub fn times(&self) -> Vec<Duration> {
        self.times.lock().unwrap().iter().map(|(at, _)| *at).collect()
    }

    pub fn names(&self) -> Vec<&'static str> {
        self.times.lock().unwrap().iter().map(|(_, name)| *name).collect()
    }

    /// The largest number that arrived within any window of this length.
    pub fn most_within(&self, window: Duration) -> usize {
        let times = self.times();
        times
            .iter()
            .map(|from| times.iter().filter(|at| *at >= from && **at < *from + window).count())
            .max()
            .unwrap_or(0)
    }
}

/// A client that answers after this time, and notes when it was called.
pub fn client(takes: Duration) -> (Client, Arrivals) {
    let arrivals = Arrivals::new();
    let notes = arrivals.clone();
    let service = tower::service_fn(move |req: Request<&'static str>| {
        let notes = notes.clone();
        async move {
            notes.note(req.body());
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

pub fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// Lets every task run that can, without any time passing.
pub async fn settle() {
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
}

/// Lets time pass, and every task run that this wakes.
pub async fn pass(time: Duration) {
    sleep(time).await;
    settle().await;
}

/// A service whose readiness is for the test to give.
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
    type Future = std::pin::Pin<Box<dyn Future<Output = Result<&'static str, T>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), T>> {
        (self.ready)(cx)
    }

    fn call(&mut self, req: &'static str) -> Self::Future {
        Box::pin(async move { Ok(req) })
    }
}
