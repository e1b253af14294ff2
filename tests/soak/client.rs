//! The client of the soak test, the innermost service, below the limits. It records when calls are admitted, and
//! misbehaves according to the fault of the call.

use crate::{budgets::least, fault::Fault};
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
use tower_outbound::Cost;

/// The beginning of the message of every panic that the test causes on purpose.
pub(crate) const INTENDED: &str = "intended:";

#[derive(Clone)]
pub(crate) struct Client {
    pub(crate) hyper: Hyper<HttpConnector, Empty<Bytes>>,
    pub(crate) server: SocketAddr,
    pub(crate) admissions: Arc<Admissions>,
}

/// The calls that the limits have admitted, that is, that have reached the client.
#[derive(Default)]
pub(crate) struct Admissions {
    pub(crate) calls: AtomicU64,
    /// How many times `poll_ready` of the client was called.
    readiness: AtomicU64,
    /// When calls were admitted since the limits were last changed, and the least that each was charged.
    pub(crate) charges: Mutex<Vec<(Instant, Cost)>>,
}

/// The body of a response. Dropping the body may panic.
#[derive(Debug)]
pub(crate) struct ResponseBody {
    body: Incoming,
    panics: bool,
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
}

impl Drop for ResponseBody {
    fn drop(&mut self) {
        assert!(
            !self.panics || std::thread::panicking(),
            "{INTENDED} in drop of a response"
        );
    }
}

impl Client {
    pub(crate) fn new(server: SocketAddr, admissions: Arc<Admissions>) -> Self {
        Self {
            hyper: Hyper::builder(TokioExecutor::new()).build_http(),
            server,
            admissions,
        }
    }
}

impl Service<Request<Fault>> for Client {
    type Response = Response<ResponseBody>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Response<ResponseBody>, BoxError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        // Panics and fails by the number of `poll_ready` calls, because it is not determined yet which call will use
        // the readiness.
        match self.admissions.readiness.fetch_add(1, Ordering::Relaxed) % 1_000 {
            333 => panic!("{INTENDED} in poll_ready"),
            666 => Poll::Ready(Err("not ready".into())),
            _ => Poll::Ready(Ok(())),
        }
    }

    fn call(&mut self, req: Request<Fault>) -> Self::Future {
        self.admissions.calls.fetch_add(1, Ordering::Relaxed);
        let (mut head, fault) = req.into_parts();
        let charge = head.extensions.get::<Cost>().map(|estimate| least(estimate, fault));
        self.admissions
            .charges
            .lock()
            .unwrap()
            .push((Instant::now(), charge.expect("each request has its estimate")));

        assert!(fault != Fault::PanicInCall, "{INTENDED} in call");
        let url = format!("http://{}{}", self.server, fault.path());
        head.uri = url.parse().unwrap();
        let sent = self.hyper.request(Request::from_parts(head, Empty::new()));
        Box::pin(async move {
            let (head, body) = sent.await?.into_parts();
            assert!(fault != Fault::PanicInFuture, "{INTENDED} in the future");
            let panics = fault == Fault::PanicInDrop;
            Ok(Response::from_parts(head, ResponseBody { body, panics }))
        })
    }
}
