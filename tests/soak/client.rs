//! The client below the limits: it notes who was admitted, and misbehaves as it is told.

use super::Fault;
use http::{Request, Response};
use http_body::{Body, Frame};
use http_body_util::Empty;
use hyper::body::{Bytes, Incoming};
use hyper_util::{
    client::legacy::{Client as Hyper, connect::HttpConnector},
    rt::TokioExecutor,
};
use std::{
    future::Future,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
};
use tokio::time::Instant;
use tower::{BoxError, Service};

/// All panics that are meant begin with this.
pub(crate) const MEANT: &str = "meant:";

#[derive(Clone)]
pub(crate) struct Client {
    pub(crate) hyper: Hyper<HttpConnector, Empty<Bytes>>,
    pub(crate) server: SocketAddr,
    pub(crate) ledger: Arc<Ledger>,
}

/// What got through the limits.
#[derive(Default)]
pub(crate) struct Ledger {
    pub(crate) calls: AtomicU64,
    /// Times the service was asked to be ready.
    readiness: AtomicU64,
    /// Since the limits were last changed.
    pub(crate) admitted: Mutex<Vec<Instant>>,
}

/// The body of a response, as it comes. To drop it may panic.
#[derive(Debug)]
pub(crate) struct Answer {
    body: Incoming,
    panics: bool,
}

impl Body for Answer {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        assert!(
            !self.panics || std::thread::panicking(),
            "{MEANT} in drop of a response"
        );
    }
}

impl Client {
    pub(crate) fn new(server: SocketAddr, ledger: Arc<Ledger>) -> Self {
        Self {
            hyper: Hyper::builder(TokioExecutor::new()).build_http(),
            server,
            ledger,
        }
    }
}

impl Service<Request<Fault>> for Client {
    type Response = Response<Answer>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Answer>, BoxError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        // Whose readiness it is cannot be told here.
        match self.ledger.readiness.fetch_add(1, Ordering::Relaxed) % 1_000 {
            333 => panic!("{MEANT} in poll_ready"),
            666 => Poll::Ready(Err("not ready, and never will be for this one".into())),
            _ => Poll::Ready(Ok(())),
        }
    }

    fn call(&mut self, req: Request<Fault>) -> Self::Future {
        self.ledger.calls.fetch_add(1, Ordering::Relaxed);
        self.ledger.admitted.lock().unwrap().push(Instant::now());

        let fault = *req.body();
        assert!(fault != Fault::PanicInCall, "{MEANT} in call");
        let url = format!("http://{}{}", self.server, fault.path());
        let sent = self.hyper.request(Request::get(url).body(Empty::new()).unwrap());
        Box::pin(async move {
            let (head, body) = sent.await?.into_parts();
            assert!(fault != Fault::PanicInFuture, "{MEANT} in the future");
            let panics = fault == Fault::PanicInDrop;
            Ok(Response::from_parts(head, Answer { body, panics }))
        })
    }
}
