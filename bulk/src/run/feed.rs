//! Submits the requests of the input to the executor, and sends the result of each to the writer.

use super::stop::Stopper;
use crate::{
    args::Target,
    input::{Admission, Malformed, Request, Requests},
    limits::TokenBurst,
    output::{Done, Finished},
    summary::Survey,
    view::Progress,
};
use http::Response;
use hyper::body::Bytes;
use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};
use tokio::sync::mpsc;
use tower_outbound::{
    Call, CallHandle, Error, Executor, RequestStatus,
    error::{BadResponse, RetryAfterTooLong},
};

/// Submits requests as fast as places in the queue of the executor become free.
pub(super) struct Feeder<'a> {
    pub(super) executor: &'a Executor<Bytes, Bytes>,
    pub(super) target: &'a Target,
    /// The burst of tokens, which grows when a request needs more.
    pub(super) burst: &'a mut TokenBurst,
    pub(super) progress: &'a Progress,
    pub(super) results: mpsc::Sender<Finished>,
    pub(super) stopper: Stopper,
    pub(super) left: Left,
    /// Whether the whole input was read before, and its malformed lines were reported.
    pub(super) is_surveyed: bool,
    /// Whether a malformed line has a result, which is FAILED.
    pub(super) fails_malformed: bool,
    pub(super) admission: Admission,
}

/// How far the input was read and submitted.
pub(super) struct Fed {
    /// What the part of the input that was read holds.
    pub(super) read: Survey,
    pub(super) submitted: u64,
    /// Whether the input was read to its end, or why it could not be.
    pub(super) end: anyhow::Result<bool>,
}

/// The number of submitted requests that are left for `--resume`: they were cancelled before they were sent, and have no
/// result.
#[derive(Clone, Default)]
pub(super) struct Left(Arc<AtomicU64>);

impl Left {
    pub(super) fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    fn add(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

impl Feeder<'_> {
    /// Submits all requests that an earlier run has not completed. Drops the sender of results, so that the writer ends
    /// after the last call.
    pub(super) async fn feed(mut self, mut requests: Requests, mut done: Done) -> Fed {
        let mut fed = Fed {
            read: Survey::default(),
            submitted: 0,
            end: Ok(false),
        };
        let stopped = self.stopper.stopped();
        tokio::pin!(stopped);
        loop {
            // The input may be a pipe into which nothing is written for hours, so the stop ends also the reading.
            let next = tokio::select! {
                biased;
                () = &mut stopped => return fed,
                next = requests.next() => next,
            };
            let mut request = match next {
                Ok(Some(Ok(request))) => {
                    fed.read.requests += 1;
                    if done.take(&request) {
                        fed.read.skipped += 1;
                        continue;
                    }
                    fed.read.tokens = fed.read.tokens.saturating_add(request.tokens);
                    request
                }
                Ok(Some(Err(malformed))) => {
                    fed.read.malformed += 1;
                    if !self.is_surveyed {
                        let Malformed { line, reason, .. } = &malformed;
                        self.progress.note(&format!("line {line} is malformed: {reason}"));
                    }
                    if self.fails_malformed {
                        fed.read.requests += 1;
                        fed.submitted += 1;
                        let _ = self.results.send(Finished::malformed(malformed)).await;
                    }
                    continue;
                }
                Ok(None) => return Fed { end: Ok(true), ..fed },
                Err(error) => return Fed { end: Err(error), ..fed },
            };
            tokio::select! {
                biased;
                () = &mut stopped => return fed,
                // `submit` waits for a place in the queue, so the input is read only as fast as requests are sent, and
                // is never in memory as a whole.
                () = async {
                    self.admission.admit(&mut request).await;
                    self.submit(request).await;
                } => fed.submitted += 1,
            }
        }
    }

    async fn submit(&mut self, request: Request) {
        self.burst.grow_for(request.tokens);
        let mut sent = http::Request::new(request.body.clone());
        *sent.method_mut() = request.method.clone();
        *sent.uri_mut() = self.target.url_of(request.url.as_ref());
        *sent.headers_mut() = request.headers.clone();
        let call = Call::from(sent).tokens(request.tokens);
        match self.executor.submit(call).await {
            Ok(call) => {
                let report = Report {
                    request,
                    results: self.results.clone(),
                    left: self.left.clone(),
                };
                tokio::spawn(report.when_ended(call));
            }
            // A request that is too large for the limits does not stop the others.
            Err(error) => {
                let line = request.line;
                self.progress.note(&format!("line {line} cannot be sent: {error}"));
                let _ = self.results.send(Finished::refused(request, &error)).await;
            }
        }
    }
}

/// Sends the result of one call to the writer when the call has ended.
struct Report {
    request: Request,
    results: mpsc::Sender<Finished>,
    left: Left,
}

impl Report {
    async fn when_ended(self, call: CallHandle<Bytes, Bytes>) {
        let event = call.event().clone();
        let result = call.await;
        let event = event.finished().await;
        if event.status == RequestStatus::Cancelled && !event.attempts.iter().any(was_cut) {
            // Nothing of the request is lost or paid for in vain, and --resume sends it: it needs no result.
            self.left.add();
            return;
        }
        // The error of a failed call is in its event.
        let response = result.map_or_else(|error| failed_response(&error), Some);
        // Sending fails after the writer has ended with an error, which the writer reports.
        let _ = self
            .results
            .send(Finished::with_event(self.request, event, response))
            .await;
    }
}

/// Returns whether the attempt was cancelled while it was on the wire, so that it may have been paid for.
fn was_cut(attempt: &tower_outbound::event::Attempt) -> bool {
    attempt.status_code.is_none() && attempt.error_type.as_deref() == Some("Cancelled")
}

/// Returns the response that an error holds.
fn failed_response(error: &Error) -> Option<Response<Bytes>> {
    let too_long = error.find::<RetryAfterTooLong>().map(RetryAfterTooLong::response);
    too_long
        .or_else(|| error.find::<BadResponse>().map(BadResponse::response))
        .cloned()
}
