//! The progress of a run, shown on standard error: as a live view on a terminal that can show one, otherwise as lines.

mod changes;
mod lines;
mod live;
#[cfg(test)]
mod picture;
mod state;
mod terminal;
pub(crate) mod text;

pub(crate) use state::{Cause, Snapshot};

use crate::{args::Args, attempts::Attempts, limits::Bounds, output::Finished, price::Money, recording::Recording};
use changes::Changes;
use lines::Schedule;
use state::{BudgetLevel, Ended, PauseView, Rest, TimeLeft, binding};
use std::{
    io::{IsTerminal, Stderr, Write, stderr, stdout},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};
use terminal::Screen;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tower_outbound::{
    RequestStatus,
    executor::Monitor,
    rate::{Budget, PauseSource},
};

/// The time between two frames of the live view, and between two looks for something that has changed.
const TICK: Duration = Duration::from_millis(100);

/// What a run has to do, as far as it is known before it starts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Work {
    /// The number of requests; `None` if the input can be read only once.
    pub(crate) requests: Option<u64>,
    /// The estimated tokens of these requests.
    pub(crate) tokens: u64,
    /// The shortest time that the further limits leave for these requests.
    pub(crate) further: Duration,
}

pub(crate) struct Progress {
    work: Work,
    bounds: Bounds,
    max_cost: Option<Money>,
    attempts: Arc<Attempts>,
    started: Instant,
    state: Mutex<State>,
    display: Mutex<Display>,
}

struct State {
    ended: Ended,
    recording: Recording,
    last_tick: Instant,
    changes: Changes,
    schedule: Schedule,
}

enum Display {
    Live(Screen<Stderr>),
    Lines,
    Nothing,
}

// === impl Progress ===

impl Progress {
    /// `bounds` are the limits of the run at its start, and `attempts` counts the attempts of its client.
    pub(crate) fn new(work: Work, bounds: Bounds, attempts: Arc<Attempts>, args: &Args) -> Self {
        // Results on the same terminal would be drawn over.
        let mixes_with_results = args.files.writes_to_stdout() && stdout().is_terminal();
        let args = &args.view;
        let display = if args.quiet {
            Display::Nothing
        } else if args.lines || mixes_with_results || !terminal::is_capable() {
            Display::Lines
        } else {
            Display::Live(Screen::new(stderr(), terminal::has_colors()))
        };
        let now = Instant::now();
        Self {
            work,
            bounds,
            max_cost: args.cost.max_cost,
            attempts,
            started: now,
            state: Mutex::new(State {
                ended: Ended {
                    cost: args.cost.price().map(|_| Money::default()),
                    ..Ended::default()
                },
                recording: Recording::new(SystemTime::now(), &bounds),
                last_tick: now,
                changes: Changes::default(),
                schedule: Schedule::default(),
            }),
            display: Mutex::new(display),
        }
    }

    /// Counts a request that has ended.
    pub(crate) fn finished(&self, finished: &Finished) {
        let mut state = self.state();
        let State { ended, recording, .. } = &mut *state;
        match finished.status() {
            RequestStatus::Completed => ended.completed += 1,
            RequestStatus::Cancelled => ended.cancelled += 1,
            _ => ended.failed += 1,
        }
        ended.estimated = ended.estimated.saturating_add(finished.tokens());
        if let (Some(sum), Some(cost)) = (&mut ended.cost, finished.cost()) {
            *sum += cost;
        }
        let Some(event) = finished.event() else { return };
        self.attempts.request_ended(&event.request_id);
        ended.retried += u64::from(event.attempts.len() > 1);
        let used = event.api_tokens_used.unwrap_or_else(|| {
            // A request without an answer has used nothing that is known.
            if finished.status() == RequestStatus::Completed {
                finished.tokens()
            } else {
                0
            }
        });
        ended.tokens = ended.tokens.saturating_add(used);
        for attempt in &event.attempts {
            let time = attempt
                .ended_at
                .and_then(|end| end.duration_since(attempt.started_at).ok());
            ended.calling += time.unwrap_or_default();
            ended.attempts += 1;
        }
        recording.add(event, finished.tokens());
    }

    /// Prints a message without disturbing the live view, also when progress is not shown.
    pub(crate) fn note(&self, text: &str) {
        if let Display::Live(screen) = &mut *self.display() {
            let _ = screen.print_above(text, terminal::size().0);
        } else {
            // Standard error may be closed, which is no reason to stop the run either.
            let _ = writeln!(stderr(), "{text}");
        }
    }

    /// Shows the progress again and again. The future never completes, and has to be dropped to stop it.
    pub(crate) async fn show(&self, monitor: &Monitor) {
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            ticks.tick().await;
            let snapshot = self.snapshot(monitor);
            for line in self.tick(&snapshot) {
                self.note(&line);
            }
            if let Display::Live(screen) = &mut *self.display() {
                let size = terminal::size();
                // A terminal that cannot be written to is no reason to stop the run.
                let _ = screen.draw(live::lines(&snapshot, size.0), size);
            }
        }
    }

    /// Ends the view. The summary follows.
    pub(crate) fn end(&self) {
        let mut display = self.display();
        if let Display::Live(screen) = &mut *display {
            let _ = screen.clear(terminal::size().0);
            *display = Display::Lines;
        }
    }

    /// What was recorded of the run, for its report.
    pub(crate) fn recording(&self) -> Recording {
        self.state().recording.clone()
    }

    /// Records the state, and returns the lines that are to be told at once.
    fn tick(&self, snapshot: &Snapshot) -> Vec<String> {
        let is_shown = !matches!(*self.display(), Display::Nothing);
        let is_lines = matches!(*self.display(), Display::Lines);
        let mut state = self.state();
        let now = Instant::now();
        let since = now.duration_since(state.last_tick);
        state.last_tick = now;
        state.recording.sample(snapshot, since);
        let mut told = state.changes.find(snapshot);
        if is_lines && state.schedule.is_due(snapshot.elapsed) {
            told.push(lines::line(snapshot));
        }
        if is_shown { told } else { Vec::new() }
    }

    fn snapshot(&self, monitor: &Monitor) -> Snapshot {
        let ended = self.state().ended;
        let attempts = self.attempts.counts();
        let limiter = monitor.limiter();
        let bounds = self.bounds.with_rates_of(&limiter.limits());
        let available = limiter.available();
        let level = |cause, pace: Option<_>, available: Option<u64>| {
            pace.zip(available)
                .map(|(pace, available)| BudgetLevel { cause, pace, available })
        };
        let budgets: Vec<_> = [
            level(Cause::Requests, bounds.requests, available.requests),
            level(Cause::Tokens, bounds.tokens, available.tokens),
            level(
                Cause::InputTokens,
                bounds.pace_of(Budget::InputTokens),
                available.input_tokens,
            ),
            level(
                Cause::OutputTokens,
                bounds.pace_of(Budget::OutputTokens),
                available.output_tokens,
            ),
        ]
        .into_iter()
        .flatten()
        .collect();
        let own = bounds.further.rates().filter_map(|rate| match rate.budget {
            budget @ Budget::Named(_) => level(Cause::Budget, bounds.pace_of(budget), available.of(budget)),
            _ => None,
        });
        let all: Vec<_> = budgets.iter().copied().chain(own).collect();

        let now = SystemTime::now();
        let pause_left = limiter
            .paused()
            .map(|pause| (pause, pause.until().duration_since(Instant::now())));
        let pause = pause_left.map(|(pause, left)| PauseView {
            until: now + left,
            by: match (pause.source(), attempts.last_delay) {
                (PauseSource::User, _) => "the program".to_owned(),
                (_, Some(why)) => format!("the provider: {why}"),
                _ => "the provider".to_owned(),
            },
        });

        let in_flight = monitor.calling() as u64;
        let waiting_to_retry = attempts.waiting_to_retry as u64;
        let queued = monitor.totals().open().saturating_sub(in_flight + waiting_to_retry);
        let concurrency = monitor.concurrency().get() as u64;
        let mean_tokens = self.mean_tokens(&ended);
        let waits_for = match () {
            () if pause.is_some() => Cause::Pause,
            () if in_flight >= concurrency => Cause::Permits,
            () if queued > 0 => binding(&all, mean_tokens).unwrap_or(Cause::Answers),
            () if waiting_to_retry > 0 => Cause::Retries,
            () if in_flight > 0 => Cause::Answers,
            () => Cause::Input,
        };
        let time_left = self.work.requests.and_then(|total| {
            let sent = ended.requests() + in_flight;
            let estimated = ended.estimated + (in_flight as f64 * mean_tokens) as u64;
            let requests = total.saturating_sub(sent);
            let rest = Rest {
                requests,
                further: self.work.further.mul_f64(requests as f64 / total.max(1) as f64),
                tokens: ended.expected(self.work.tokens.saturating_sub(estimated)),
                calling: ended.mean_calling(),
                pause: pause_left.map_or(Duration::ZERO, |(_, left)| left),
            };
            TimeLeft::of(
                &rest,
                &Bounds {
                    concurrency: concurrency as usize,
                    ..bounds
                },
                &budgets,
            )
        });
        Snapshot {
            now,
            elapsed: self.started.elapsed(),
            total: self.work.requests,
            ended,
            status_429: attempts.status_429,
            queued,
            in_flight,
            concurrency,
            waiting_to_retry,
            budgets,
            pause,
            waits_for,
            time_left,
            max_cost: self.max_cost,
            last_failure: attempts.last_failure,
        }
    }

    /// The mean of the tokens of a request, by its estimate.
    fn mean_tokens(&self, ended: &Ended) -> f64 {
        match self.work.requests {
            Some(total) if total > 0 => self.work.tokens as f64 / total as f64,
            _ if ended.requests() > 0 => ended.estimated as f64 / ended.requests() as f64,
            _ => 1.0,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn display(&self) -> MutexGuard<'_, Display> {
        self.display.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The state of a run in the middle of its work, for tests and for the picture in the README.
#[cfg(test)]
pub(crate) fn sample() -> Snapshot {
    use crate::limits::Pace;

    let budget = |cause, per_minute, burst, available| BudgetLevel {
        cause,
        available,
        pace: Pace {
            per_minute,
            burst,
            initial: burst,
            follows: false,
        },
    };
    Snapshot {
        now: SystemTime::UNIX_EPOCH + Duration::from_secs(50_600),
        elapsed: Duration::from_secs(72),
        total: Some(5_000),
        ended: Ended {
            completed: 1_231,
            failed: 3,
            retried: 12,
            estimated: 400_000,
            tokens: 345_678,
            cost: Some("1.23456".parse().unwrap()),
            calling: Duration::from_secs(600),
            attempts: 1_246,
            ..Ended::default()
        },
        status_429: 12,
        queued: 100,
        in_flight: 7,
        concurrency: 32,
        waiting_to_retry: 2,
        budgets: vec![
            budget(Cause::Requests, 1_500, 25, 19),
            budget(Cause::Tokens, 240_000, 4_000, 310),
        ],
        pause: None,
        waits_for: Cause::Tokens,
        time_left: Some(TimeLeft {
            time: Duration::from_secs(220),
            by: Cause::Tokens,
        }),
        max_cost: Some("10".parse().unwrap()),
        last_failure: Some("503 Service Unavailable: {\"error\": {\"message\": \"overloaded\"}}".to_owned()),
    }
}
