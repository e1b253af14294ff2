//! Prints a table: the rate of each worker, and the rate of all workers together.

use crate::{args::Args, provider::Provider};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::{Deserialize, Serialize};
use std::{collections::VecDeque, io::IsTerminal, time::Duration};
use tokio::time::Instant;

/// The report of a worker, which the worker prints as a line of JSON every 250 ms.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub(crate) struct Report {
    /// The number of requests with a 2xx response.
    pub(crate) sent: u64,
    /// The number of requests with any other response, such as 429.
    pub(crate) rejected: u64,
    /// Whether the worker can reach Redis.
    pub(crate) is_up: bool,
    /// The number of members of the fleet that the worker has learned of from Redis.
    pub(crate) members: u64,
    /// The number of calls that were admitted without Redis, on the worker's share of the quota.
    pub(crate) admitted_without_store: u64,
}

pub(crate) struct Table {
    rate: u64,
    burst: u64,
    rows: Vec<Row>,
    sum: ProgressBar,
    /// The total number of admitted requests at each time of the last second.
    sums: VecDeque<(Instant, u64)>,
    is_live: bool,
    printed: u64,
    _bars: MultiProgress,
}

struct Row {
    bar: ProgressBar,
    last: Report,
    /// The total number of requests that the worker had sent at each time of the last second.
    counts: VecDeque<(Instant, u64)>,
}

impl Table {
    pub(crate) fn new(args: &Args) -> Self {
        let bars = MultiProgress::with_draw_target(ProgressDrawTarget::stdout_with_hz(8));
        let style = |template: &str| ProgressStyle::with_template(template).expect("the template is valid");
        let bar = |most: u64| {
            let bar = bars.add(ProgressBar::new(most));
            bar.set_style(style("{prefix:>9} {bar:32} {msg}"));
            bar
        };
        let share = (args.requests_per_second / u64::from(args.workers)).max(1);
        let rows = (0..args.workers).map(|number| {
            // The middle of the bar is an even share of the quota.
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

    /// Shows the report of a worker.
    pub(crate) fn update(&mut self, number: u32, report: Report) {
        let Some(row) = self.rows.get_mut(number as usize) else {
            return;
        };
        row.last = report;
        let rate = per_second(&mut row.counts, report.sent);
        row.bar.set_position(rate);
        let redis = if report.is_up {
            "with Redis"
        } else {
            "without Redis, on a share of the quota"
        };
        row.bar
            .set_message(format!("{rate:>5}/s  {:>7} sent  {redis}", report.sent));
    }

    /// Shows the sum of all workers, as the provider counts it.
    pub(crate) fn draw(&mut self, provider: &Provider, elapsed: Duration, is_killed: bool) {
        let admitted = provider.admitted();
        let rate = per_second(&mut self.sums, admitted);
        let redis = if is_killed { "  Redis is killed" } else { "" };
        let rejected = provider.rejected();
        self.sum.set_position(rate.min(self.rate));
        self.sum
            .set_message(format!("{rate:>5}/s of {}  429s: {rejected}{redis}", self.rate));
        // If the output is not a terminal, a line is printed each second.
        if !self.is_live && elapsed.as_secs() > self.printed {
            self.printed = elapsed.as_secs();
            let each: Vec<_> = self.rows.iter().map(|row| row.bar.position().to_string()).collect();
            println!(
                "{:>3} s  workers {:>24}  all {rate:>5}/s of {}  429s: {rejected}{redis}",
                self.printed,
                each.join(" "),
                self.rate
            );
        }
    }

    /// Ends the live table, and returns the summary.
    pub(crate) fn finish(self, provider: &Provider, killed: Option<Duration>) -> String {
        self.rows.iter().for_each(|row| row.bar.finish());
        self.sum.finish();
        let sent: Vec<u64> = self.rows.iter().map(|row| row.last.sent).collect();
        let (most, least) = (sent.iter().max().unwrap_or(&0), sent.iter().min().unwrap_or(&0));
        let without_store: u64 = self.rows.iter().map(|row| row.last.admitted_without_store).sum();
        let mut text = format!(
            "\n{} requests admitted, {} answered with 429. Limit: {} per second, burst {}. \
             Requests per worker: {least} to {most}.",
            provider.admitted(),
            provider.rejected(),
            self.rate,
            self.burst,
        );
        if let Some(at) = killed {
            text += &format!(
                "\nRedis was killed after {} s and was back, empty, 2 s later. Meanwhile {without_store} calls were \
                 admitted by the workers' shares of the quota.",
                at.as_secs()
            );
        }
        text
    }
}

/// Adds a count, and returns by how many per second the count grew during the last second.
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
