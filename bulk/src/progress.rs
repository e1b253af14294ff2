//! What is shown while the run lasts: a bar, or a line every second where there is no terminal.

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
    /// How long all of it takes at least.
    least: Duration,
    done: AtomicU64,
    failed: AtomicU64,
    started: Instant,
    shown: Shown,
}

enum Shown {
    Bar(ProgressBar),
    Lines,
    Nothing,
}

impl Progress {
    pub(crate) fn new(total: u64, least: Duration, quiet: bool) -> Self {
        let shown = match (quiet, stderr().is_terminal()) {
            (true, _) => Shown::Nothing,
            (false, false) => Shown::Lines,
            (false, true) => {
                let style = ProgressStyle::with_template("{wide_bar:.cyan/blue} {msg}").expect("the template is valid");
                let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
                Shown::Bar(bar.with_style(style))
            }
        };
        Self {
            total,
            least,
            done: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            started: Instant::now(),
            shown,
        }
    }

    /// A request is over.
    pub(crate) fn finished(&self, status: RequestStatus) {
        self.done.fetch_add(1, Ordering::Relaxed);
        if status == RequestStatus::Failed {
            self.failed.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Says something without tearing the bar. Problems are said even when the rest is quiet.
    pub(crate) fn note(&self, text: &str) {
        match &self.shown {
            Shown::Bar(bar) => bar.suspend(|| eprintln!("{text}")),
            Shown::Lines | Shown::Nothing => eprintln!("{text}"),
        }
    }

    /// Never ends.
    pub(crate) async fn show(&self, monitor: &Monitor) {
        let every = match self.shown {
            Shown::Bar(_) => Duration::from_millis(100),
            Shown::Lines => Duration::from_secs(1),
            Shown::Nothing => return std::future::pending().await,
        };
        let mut ticks = interval(every);
        ticks.tick().await;
        loop {
            ticks.tick().await;
            let line = self.line(monitor);
            match &self.shown {
                Shown::Bar(bar) => {
                    bar.set_position(self.done.load(Ordering::Relaxed));
                    bar.set_message(line);
                }
                Shown::Lines | Shown::Nothing => eprintln!("{line}"),
            }
        }
    }

    pub(crate) fn end(&self) {
        if let Shown::Bar(bar) = &self.shown {
            bar.finish_and_clear();
        }
    }

    fn line(&self, monitor: &Monitor) -> String {
        let (done, failed) = (self.done.load(Ordering::Relaxed), self.failed.load(Ordering::Relaxed));
        let in_flight = monitor.calling();
        // Those that hold a permit but wait for their rate are not in flight yet.
        let waiting = (monitor.queue_depth() + monitor.in_flight()).saturating_sub(in_flight);
        let elapsed = self.started.elapsed().as_secs_f64();
        let rate = done as f64 / elapsed;
        // The burst at the start makes the rate look better than it can be.
        let left = (self.total.saturating_sub(done) as f64 / rate).max(self.least.as_secs_f64() - elapsed);
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
