//! The progress of a run, shown on standard error: as a bar on a terminal, otherwise as a line each second.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::{
    io::{IsTerminal, stderr},
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};
use tokio::time::{Instant, interval};
use tower_outbound::{RequestStatus, executor::Monitor};

pub(crate) struct Progress {
    total: u64,
    /// The shortest time that the limits allow for all requests.
    min_time: Duration,
    done: AtomicU64,
    failed: AtomicU64,
    started: Instant,
    display: Display,
}

enum Display {
    Bar(ProgressBar),
    Lines,
    Nothing,
}

impl Progress {
    pub(crate) fn new(total: u64, min_time: Duration, quiet: bool) -> Self {
        let display = match (quiet, stderr().is_terminal()) {
            (true, _) => Display::Nothing,
            (false, false) => Display::Lines,
            (false, true) => {
                let style = ProgressStyle::with_template("{wide_bar:.cyan/blue} {msg}").expect("the template is valid");
                let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
                Display::Bar(bar.with_style(style))
            }
        };
        Self {
            total,
            min_time,
            done: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            started: Instant::now(),
            display,
        }
    }

    /// Counts a request that has ended.
    pub(crate) fn finished(&self, status: RequestStatus) {
        self.done.fetch_add(1, Ordering::Relaxed);
        if status == RequestStatus::Failed {
            self.failed.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Prints a message without disturbing the progress bar, also when progress is not shown.
    pub(crate) fn note(&self, text: &str) {
        match &self.display {
            Display::Bar(bar) => bar.suspend(|| eprintln!("{text}")),
            Display::Lines | Display::Nothing => eprintln!("{text}"),
        }
    }

    /// Shows the progress again and again. The future never completes, and has to be dropped to stop it.
    pub(crate) async fn show(&self, monitor: &Monitor) {
        let every = match self.display {
            Display::Bar(_) => Duration::from_millis(100),
            Display::Lines => Duration::from_secs(1),
            Display::Nothing => return std::future::pending().await,
        };
        let mut ticks = interval(every);
        ticks.tick().await;
        loop {
            ticks.tick().await;
            let line = self.line(monitor);
            match &self.display {
                Display::Bar(bar) => {
                    bar.set_position(self.done.load(Ordering::Relaxed));
                    bar.set_message(line);
                }
                Display::Lines | Display::Nothing => eprintln!("{line}"),
            }
        }
    }

    pub(crate) fn end(&self) {
        if let Display::Bar(bar) = &self.display {
            bar.finish_and_clear();
        }
    }

    fn line(&self, monitor: &Monitor) -> String {
        let (done, failed) = (self.done.load(Ordering::Relaxed), self.failed.load(Ordering::Relaxed));
        let in_flight = monitor.calling();
        // Calls that hold a permit but still wait for the rate limit count as waiting.
        let waiting = (monitor.queue_depth() + monitor.in_flight()).saturating_sub(in_flight);
        let elapsed = self.started.elapsed().as_secs_f64();
        let rate = done as f64 / elapsed;
        // At the start, the burst makes the rate higher than it can stay, so the remaining time is never estimated
        // below the shortest possible time.
        let left = (self.total.saturating_sub(done) as f64 / rate).max(self.min_time.as_secs_f64() - elapsed);
        let left = if left.is_finite() {
            format!("{left:.0} s")
        } else {
            "?".into()
        };
        let failed = if failed > 0 {
            format!(" ({failed} failed)")
        } else {
            String::new()
        };
        let total = self.total;
        format!("{done}/{total}{failed}, {rate:.1}/s, {in_flight} in flight, {waiting} waiting, {left} left")
    }
}
