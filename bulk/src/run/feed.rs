//! Submits the requests of the input to the executor, and sends the result of each to the writer.

use super::stop::{StopReason, Stopper};
use crate::{
    args::Target,
    input::{Admission, Malformed, Request, Requests},
    limits::{LOCAL_COST, OwnBudgets, TokenBurst, cost_of},
    output::{Done, Finished},
    price::{Expected, Spending},
    summary::Survey,
    view::Progress,
};
use http::{HeaderValue, Response};
use humantime::format_duration;
use hyper::body::Bytes;
use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};
use tokio::sync::mpsc;
use tower_outbound::{
    Call, CallHandle, Error, Executor, RequestStatus,
    error::{BadResponse, BodyTooLarge, CostExceedsBurst, RetryAfterTooLong},
};

/// Submits requests as fast as places in the queue of the executor become free.
pub(super) struct Feeder<'a> {
    pub(super) executor: &'a Executor<Bytes, Bytes>,
    pub(super) target: &'a Target,
    /// The burst of tokens, which grows when a request needs more.
    pub(super) burst: &'a mut TokenBurst,
    /// The budgets with names of the user's own, of which the local provider is told what each request takes.
    pub(super) own_budgets: OwnBudgets,
    pub(super) progress: &'a Progress,
    /// What requests cost, if prices are given.
    pub(super) spending: Option<Arc<Spending>>,
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
                Ok(Some(Err(mut malformed))) => {
                    fed.read.malformed += 1;
                    if !self.is_surveyed {
                        let Malformed { line, reason, .. } = &malformed;
                        self.progress.note(&format!("line {line} is malformed: {reason}"));
                    }
                    if self.fails_malformed {
                        tokio::select! {
                            biased;
                            () = &mut stopped => return fed,
                            () = self.admission.admit_malformed(&mut malformed) => {}
                        }
                        fed.read.requests += 1;
                        fed.submitted += 1;
                        let _ = self.results.send(Finished::malformed(malformed)).await;
                    }
                    continue;
                }
                Ok(None) => {
                    if !self.is_surveyed {
                        let notes = requests.repeated_ids().into_iter().chain(done.notes());
                        notes.for_each(|note| self.progress.note(&note));
                    }
                    return Fed { end: Ok(true), ..fed };
                }
                Err(error) => return Fed { end: Err(error), ..fed },
            };
            tokio::select! {
                biased;
                () = &mut stopped => return fed,
                // `submit` waits for a place in the queue, so the input is read only as fast as requests are sent, and
                // is never in memory as a whole.
                is_submitted = async {
                    self.admission.admit(&mut request).await;
                    self.submit(request).await
                } => fed.submitted += u64::from(is_submitted),
            }
        }
    }

    /// Submits a request. Returns whether it has a result or will have one: it has none if it could exceed `--max-cost`,
    /// and the run is stopped then.
    async fn submit(&mut self, request: Request) -> bool {
        let expected = match &self.spending {
            None => None,
            Some(spending) => {
                let Some(expected) = spending.reserve(&request).await else {
                    self.stopper.stop(StopReason::MaxCost(spending.stop_reason()));
                    return false;
                };
                Some(expected)
            }
        };
        self.burst.grow_for(request.tokens);
        let mut sent = http::Request::new(request.body.clone());
        *sent.method_mut() = request.method.clone();
        *sent.uri_mut() = self.target.url_of(request.url.as_ref());
        *sent.headers_mut() = request.headers.clone();
        if self.target.is_local() && !self.own_budgets.is_empty() {
            // Its characters are those of names and numbers.
            if let Ok(told) = HeaderValue::try_from(self.own_budgets.local_cost(&request.own_cost)) {
                sent.headers_mut().insert(LOCAL_COST, told);
            }
        }
        let call = Call::from(sent).tokens(request.tokens).cost(cost_of(&request));
        match self.executor.submit(call).await {
            Ok(call) => {
                let report = Report {
                    request,
                    expected,
                    results: self.results.clone(),
                    stopper: self.stopper.clone(),
                    left: self.left.clone(),
                };
                tokio::spawn(report.when_ended(call));
            }
            // A request that is too large for the limits does not stop the others.
            Err(error) => {
                let line = request.line;
                let message = self.too_many_tokens(&error).unwrap_or_else(|| error.to_string());
                self.progress.note(&format!("line {line} cannot be sent: {message}"));
                let _ = self.results.send(Finished::refused(request, &error, message)).await;
            }
        }
        true
    }

    fn too_many_tokens(&self, error: &Error) -> Option<String> {
        let error = error.find::<CostExceedsBurst>()?;
        (error.budget() == "tokens").then(|| self.burst.too_small_for(error.cost()))?
    }
}

/// Sends the result of one call to the writer when the call has ended.
struct Report {
    request: Request,
    /// The estimate of what the request costs, if prices are given.
    expected: Option<Expected>,
    results: mpsc::Sender<Finished>,
    stopper: Stopper,
    left: Left,
}

impl Report {
    async fn when_ended(mut self, call: CallHandle<Bytes, Bytes>) {
        let event = call.event().clone();
        let result = call.await;
        let mut event = event.finished().await;
        if event.status == RequestStatus::Cancelled && !event.attempts.iter().any(was_cut) {
            // Nothing of the request is lost or paid for in vain, and --resume sends it: it needs no result.
            self.left.add();
            return;
        }
        if let Some(message) = result.as_ref().err().and_then(with_option) {
            event.error_message = Some(message);
        }
        // The error of a failed call is in its event.
        let response = result.map_or_else(|error| failed_response(&error), Some);
        if let (Some(admitted), Some(response)) = (&mut self.request.admitted, &response) {
            admitted.hold(response.body().len());
        }
        // Sending fails after the writer has ended with an error, which the writer reports.
        let mut finished = Finished::with_event(self.request, event, response);
        if let Some(expected) = self.expected {
            finished = finished.priced(expected.price());
            let was_answered = finished.status() == RequestStatus::Completed;
            if let Some(reason) = expected.settle(finished.cost(), was_answered) {
                self.stopper.stop(StopReason::MaxCost(reason));
            }
        }
        let _ = self.results.send(finished).await;
    }
}

/// Returns whether the attempt was cancelled while it was on the wire, before its response or in the middle of it, so
/// that it may have been paid for.
fn was_cut(attempt: &tower_outbound::event::Attempt) -> bool {
    attempt.error_type.as_deref() == Some("Cancelled")
}

/// Returns the message of an error that names the option of this program, where that of the library names a method.
fn with_option(error: &Error) -> Option<String> {
    if let Some(error) = error.find::<RetryAfterTooLong>() {
        let (status, delay) = (error.status(), error.delay().as_secs());
        let (asked, longest) = (format_duration(error.delay()), format_duration(error.max_delay()));
        return Some(format!(
            "{status}: the provider asks to wait {asked}, and the longest wait is {longest}: --max-wait {} would wait for \
             it",
            delay + 1
        ));
    }
    // The limits had room for the request when it was submitted, so the provider has reported less since.
    if let Some(error) = error.find::<CostExceedsBurst>() {
        let (cost, budget, burst) = (error.cost(), error.budget(), error.burst());
        return Some(format!(
            "it needs {cost} {budget}, and the provider allows at most {burst}: shorten the request"
        ));
    }
    let too_large = error.find::<BodyTooLarge>()?;
    let limit = too_large.limit();
    Some(format!(
        "the response is larger than {limit} bytes: --max-response sets that limit"
    ))
}

/// Returns the response that an error holds.
fn failed_response(error: &Error) -> Option<Response<Bytes>> {
    let too_long = error.find::<RetryAfterTooLong>().map(RetryAfterTooLong::response);
    too_long
        .or_else(|| error.find::<BadResponse>().map(BadResponse::response))
        .cloned()
}
