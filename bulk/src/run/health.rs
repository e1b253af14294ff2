//! Whether the run is worth going on: what kind of failures attempts end with, and how many of a final kind in a row.
//!
//! The first failure of each kind is told at once. When the first requests all fail for a reason that no further request
//! can escape, such as a wrong key, the run stops, with the reason and with what to do.

use super::{
    failure::{Failure, Kind},
    stop::{StopReason, Stopper},
};
use crate::{
    args::{SendArgs, Target},
    attempts::clean,
    secrets::Secrets,
    view::Progress,
};
use http::Response;
use hyper::body::Bytes;
use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};
use tokio::time::Instant;
use tower::BoxError;
use tower_outbound::{RateLimiter, provider::Provider, retry::never_sent};

/// The number of attempts that fail for the same final reason, without a success before, after which the run stops.
const AT_START: u64 = 5;

/// The number of attempts in a row that fail for the same final reason after a success, after which the run stops.
const LATER: u64 = 20;

/// The longest text of a failure that is shown, in characters.
const MAX_TEXT: usize = 300;

/// A pause that is shorter than this is not told.
const SHORT_PAUSE: Duration = Duration::from_secs(2);

/// The number of attempts in a row without a connection, after which all requests wait. Without a common wait, an outage
/// uses up the retries of each request.
const UNREACHABLE: u32 = 3;

/// The longest wait between two attempts to connect.
const MAX_OUTAGE_PAUSE: Duration = Duration::from_secs(15);

/// Observes the result of each attempt. Clones observe the same run.
#[derive(Clone)]
pub(super) struct Health {
    shared: Arc<Shared>,
}

struct Shared {
    stopper: Stopper,
    progress: Arc<Progress>,
    limiter: RateLimiter,
    provider: Provider,
    host: String,
    /// What to do if the key is refused.
    key_advice: String,
    secrets: Secrets,
    max_wait: Duration,
    keeps_going: bool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    has_succeeded: bool,
    /// The last final kind, and the number of failures of this kind since the last success or failure of another final
    /// kind. Failures that are not final are not counted: the run cannot tell from them.
    row: Option<(Kind, u64)>,
    told: HashSet<Kind>,
    /// The attempts in a row that found no server, and when the next pause may begin.
    unreachable: u32,
    outage: Option<(Instant, Duration)>,
    /// The end of the last pause that was told.
    paused_until: Option<Instant>,
}

impl Health {
    pub(super) fn new(
        stopper: Stopper,
        progress: Arc<Progress>,
        limiter: RateLimiter,
        args: &SendArgs,
        target: &Target,
        secrets: Secrets,
    ) -> Self {
        Self {
            shared: Arc::new(Shared {
                stopper,
                progress,
                limiter,
                provider: args.provider(),
                host: target.host().to_owned(),
                key_advice: match &target.key_variable {
                    Some(variable) => format!("Is {variable} right?"),
                    None if target.has_key() => "Is the key in the header or the URL right?".into(),
                    None => "No key was sent: --api-key-env names the variable that holds it".into(),
                },
                secrets,
                max_wait: args.max_wait,
                keeps_going: args.keep_going,
                state: Mutex::default(),
            }),
        }
    }

    /// Takes the result of one attempt into account.
    pub(super) fn observe(&self, result: &Result<Response<Bytes>, BoxError>) {
        let shared = &*self.shared;
        if result.as_ref().is_ok_and(|response| response.status().is_success()) {
            let mut state = shared.state();
            state.has_succeeded = true;
            state.row = None;
            (state.unreachable, state.outage) = (0, None);
            return;
        }
        self.pause_in_outage(result);
        let failure = match result {
            Ok(response) => {
                let info = shared.provider.rate_limit_info(response.headers(), SystemTime::now());
                // A run that stops does not wait.
                if shared.keeps_going || info.retry_after.is_none_or(|delay| delay <= shared.max_wait) {
                    self.tell_pause(response, info.retry_after);
                }
                Failure::of_response(shared.provider, response, info.retry_after, shared.max_wait)
            }
            Err(error) => Failure::of_error(&**error),
        };
        let (is_first, row) = shared.state().count(failure.kind);
        if !is_first && row.is_none() {
            return;
        }
        let text = shared.describe(&failure);
        if is_first {
            shared.progress.note(&text);
        }
        if let (Some(row), false) = (row, shared.keeps_going) {
            let stops = shared.stopper.stop(StopReason::Hopeless(text.clone()));
            if stops {
                let failed = if row == 1 {
                    "an attempt".into()
                } else {
                    format!("{row} attempts in a row")
                };
                shared.progress.note(&format!(
                    "stopping: {}, and {failed} failed for this reason; the rest is left for --resume. --keep-going sends \
                     it all the same",
                    failure.kind
                ));
            }
        }
    }

    /// Lets all requests wait while no server can be reached, longer each time.
    fn pause_in_outage(&self, result: &Result<Response<Bytes>, BoxError>) {
        let shared = &*self.shared;
        let is_unreachable = result.as_ref().is_err_and(never_sent);
        let mut state = shared.state();
        if !is_unreachable {
            (state.unreachable, state.outage) = (0, None);
            return;
        }
        state.unreachable += 1;
        // Only a server that has answered before is worth the wait.
        if state.unreachable < UNREACHABLE || !state.has_succeeded {
            return;
        }
        let now = Instant::now();
        let pause = match state.outage {
            Some((until, _)) if now < until => return,
            Some((_, last)) => (last * 2).min(MAX_OUTAGE_PAUSE),
            None => Duration::from_secs(1),
        };
        state.outage = Some((now + pause, pause));
        drop(state);
        shared.limiter.pause_for(pause);
    }

    /// Tells that the limiter is paused, once for each pause that the provider asks for.
    fn tell_pause(&self, response: &Response<Bytes>, retry_after: Option<Duration>) {
        let shared = &*self.shared;
        let Some(pause) = shared.limiter.paused() else { return };
        let left = pause.until().saturating_duration_since(Instant::now());
        {
            let mut state = shared.state();
            let is_told = state
                .paused_until
                .is_some_and(|told| pause.until() < told + SHORT_PAUSE);
            if left < SHORT_PAUSE || is_told {
                return;
            }
            state.paused_until = Some(pause.until());
        }
        let asked = retry_after.map_or(String::new(), |delay| {
            format!(", Retry-After {} s", delay.as_millis().div_ceil(1_000))
        });
        let until = clock_time(SystemTime::now() + left);
        let status = response.status().as_u16();
        shared
            .progress
            .note(&format!("paused until {until} by {status}{asked}"));
    }
}

impl Shared {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The failure in a line: what, from whom, and what to do about it.
    fn describe(&self, failure: &Failure) -> String {
        let Failure { kind, status, message } = failure;
        let message = clean(&self.secrets.hide(message), MAX_TEXT);
        let message = message.trim_end_matches('.');
        let who = &self.host;
        let what = match status {
            Some(status) => format!("{status} from {who}: {message}."),
            None => format!("{who}: {message}."),
        };
        let advice = if *kind == Kind::Key {
            Some(&*self.key_advice)
        } else {
            kind.advice()
        };
        match advice {
            Some(advice) => format!("{what} {advice}"),
            None => what,
        }
    }
}

impl State {
    /// Counts a failure. Returns whether it is the first of its kind, and the number of failures in a row if they are
    /// enough to stop.
    fn count(&mut self, kind: Kind) -> (bool, Option<u64>) {
        let is_first = self.told.insert(kind);
        let Some(enough) = self.enough(kind) else {
            return (is_first, None);
        };
        let row = match self.row {
            Some((last, row)) if last == kind => row + 1,
            _ => 1,
        };
        self.row = Some((kind, row));
        (is_first, (row >= enough).then_some(row))
    }

    /// The number of failures of this kind in a row after which every further request would fail, too. `None` if the
    /// next request may succeed in any case.
    fn enough(&self, kind: Kind) -> Option<u64> {
        match kind {
            // A pause of all requests would be in vain: the provider says that it will go on refusing.
            Kind::WaitTooLong => Some(1),
            // A resolver that has answered before may answer again.
            Kind::UnknownHost if self.has_succeeded => None,
            _ if !kind.is_final() => None,
            _ if self.has_succeeded => Some(LATER),
            _ => Some(AT_START),
        }
    }
}

/// The time of day, in UTC.
fn clock_time(time: SystemTime) -> String {
    let text = humantime::format_rfc3339_seconds(time).to_string();
    format!("{} UTC", &text[11..19])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_five_of_the_same_final_kind_are_enough_to_stop() {
        let mut state = State::default();
        assert_eq!(state.count(Kind::Key), (true, None));
        for _ in 0..3 {
            assert_eq!(state.count(Kind::Key), (false, None));
            // Failures that may pass say nothing about the others.
            state.count(Kind::Overloaded);
        }
        assert_eq!(state.count(Kind::Key), (false, Some(5)));
    }

    #[test]
    fn after_a_success_it_takes_twenty_in_a_row() {
        let mut state = State {
            has_succeeded: true,
            ..State::default()
        };
        for row in 1..20 {
            assert_eq!(state.count(Kind::Quota), (row == 1, None));
        }
        assert_eq!(state.count(Kind::Quota), (false, Some(20)));
        assert_eq!(state.count(Kind::Key), (true, None));
        assert!((0..100).all(|_| state.count(Kind::UnknownHost).1.is_none()));
    }

    #[test]
    fn failures_that_may_pass_never_stop_the_run() {
        let mut state = State::default();
        for kind in [Kind::Overloaded, Kind::Throttled, Kind::Refused, Kind::BadRequest] {
            assert!((0..100).all(|_| state.count(kind).1.is_none()), "{kind}");
        }
    }

    #[test]
    fn the_time_of_day_is_in_utc() {
        let time = SystemTime::UNIX_EPOCH + Duration::from_secs(14 * 3_600 + 3 * 60 + 20);
        assert_eq!(clock_time(time), "14:03:20 UTC");
    }
}
