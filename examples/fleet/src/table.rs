//! The table: what each worker does, and what they do together.

use crate::{args::Args, provider::Provider};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::{Deserialize, Serialize};
use std::{collections::VecDeque, io::IsTerminal, time::Duration};
use tokio::time::Instant;

/// What a worker says of itself, a line each quarter of a second.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub(crate) struct Report {
    /// Requests that were answered.
    pub(crate) sent: u64,
    /// Those that were answered 429.
    pub(crate) refused: u64,
    /// Whether it has Redis.
    pub(crate) is_up: bool,
    pub(crate) members: u64,
    /// Calls that were admitted without Redis.
    pub(crate) degraded: u64,
}

pub(crate) struct Table {
    rate: u64,
    burst: u64,
    rows: Vec<Row>,
    sum: ProgressBar,
    /// The sum, as it was during the last second.
    sums: VecDeque<(Instant, u64)>,
    is_live: bool,
    printed: u64,
    _bars: MultiProgress,
}

struct Row {
    bar: ProgressBar,
    last: Report,
    /// During the last second.
    counts: VecDeque<(Instant, u64)>,
}

impl Table {
    pub(crate) fn new(args: &Args) -> Self {
        let bars = MultiProgress::with_draw_target(ProgressDrawTarget::stdout_with_hz(8));
        let style = |template: &str| ProgressStyle::with_template(template).expect("it is a template");
        let bar = |most: u64| {
            let bar = bars.add(ProgressBar::new(most));
            bar.set_style(style("{prefix:>9} {bar:32} {msg}"));
            bar
        };
        let share = (args.requests_per_second / u64::from(args.workers)).max(1);
        let rows = (0..args.workers).map(|number| {
            // Half-way is an even share.
            let bar = bar(2 * share);
            bar.set_prefix(format!("worker {number}"));
            Row {
                bar,
                last: Report::default(),
                counts: VecDeque::new(),
            }
        });
        let rows = rows.collect();
        let sum = bar(args.requests_per_second);
        sum.set_prefix("all");
        Self {
            rate: args.requests_per_second,
            burst: args.burst,
            rows,
            sum,
            sums: VecDeque::new(),
            is_live: std::io::stdout().is_terminal(),
            printed: 0,
            _bars: bars,
        }
    }

    pub(crate) fn hear(&mut self, number: u32, report: Report) {
        let Some(row) = self.rows.get_mut(number as usize) else {
            return;
        };
        row.last = report;
        let rate = per_second(&mut row.counts, report.sent);
        row.bar.set_position(rate);
        let redis = if report.is_up { "with Redis" } else { "on its own share" };
        row.bar
            .set_message(format!("{rate:>5}/s  {:>7} sent  {redis}", report.sent));
    }

    pub(crate) fn draw(&mut self, provider: &Provider, elapsed: Duration, is_killed: bool) {
        let admitted = provider.admitted();
        let rate = per_second(&mut self.sums, admitted);
        let redis = if is_killed { "  Redis is killed" } else { "" };
        let refused = provider.refused();
        self.sum.set_position(rate.min(self.rate));
        self.sum
            .set_message(format!("{rate:>5}/s of {}  429s: {refused}{redis}", self.rate));
        // Where nobody watches, a line a second.
        if !self.is_live && elapsed.as_secs() > self.printed {
            self.printed = elapsed.as_secs();
            let each: Vec<_> = self.rows.iter().map(|row| row.bar.position().to_string()).collect();
            println!(
                "{:>3} s  workers {:>24}  all {rate:>5}/s of {}  429s: {refused}{redis}",
                self.printed,
                each.join(" "),
                self.rate
            );
        }
    }

    /// What there is to say in the end.
    pub(crate) fn finish(self, provider: &Provider, killed: Option<Duration>) -> String {
        self.rows.iter().for_each(|row| row.bar.finish());
        self.sum.finish();
        let sent: Vec<u64> = self.rows.iter().map(|row| row.last.sent).collect();
        let (most, least) = (sent.iter().max().unwrap_or(&0), sent.iter().min().unwrap_or(&0));
        let degraded: u64 = self.rows.iter().map(|row| row.last.degraded).sum();
        let mut text = format!(
            "\n{} requests answered, {} answered 429. Limit: {} a second, {} at once. Shares: {least} to {most} requests.",
            provider.admitted(),
            provider.refused(),
            self.rate,
            self.burst,
        );
        if let Some(at) = killed {
            text += &format!(
                "\nRedis was killed after {} s and was back, empty, 2 s later: {degraded} calls went on the workers' own shares.",
                at.as_secs()
            );
        }
        text
    }
}

/// How many more there were in the last second.
fn per_second(counts: &mut VecDeque<(Instant, u64)>, count: u64) -> u64 {
    let now = Instant::now();
    counts.push_back((now, count));
    while counts.len() > 2 && now - counts[1].0 >= Duration::from_secs(1) {
        counts.pop_front();
    }
    let (since, before) = counts[0];
    let span = (now - since).as_secs_f64();
    if span < 0.1 {
        return 0;
    }
    ((count - before) as f64 / span).round() as u64
}
