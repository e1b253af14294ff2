//! The live table: what the schedule knows of each flow. Where the output is not a terminal, a line per second.

use crate::{
    load::{MODELS, TENANTS, Tenant},
    run::Order,
};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::{io::IsTerminal, time::Duration};
use tokio::time::Instant;
use tower_outbound::schedule::FlowStatus;

pub(crate) struct Table {
    rows: Vec<Row>,
    is_live: bool,
    printed: u64,
    _bars: MultiProgress,
}

/// A flow: what its calls name, the outermost key first.
struct Row {
    keys: Vec<&'static str>,
    bar: ProgressBar,
}

impl Table {
    pub(crate) fn new(order: Order) -> Self {
        let bars = MultiProgress::with_draw_target(ProgressDrawTarget::stdout_with_hz(10));
        let style = ProgressStyle::with_template("{prefix:>16} {bar:24} {msg}").expect("the template is valid");
        let row = |keys: Vec<&'static str>| {
            let calls = |tenant: &Tenant| (0..tenant.calls).filter(|call| Tenant::model(*call) == keys[0]).count();
            let most: usize = match keys.get(1) {
                Some(name) => TENANTS.iter().filter(|tenant| tenant.name == *name).map(calls).sum(),
                None => TENANTS.iter().map(calls).sum(),
            };
            let bar = bars.add(ProgressBar::new(most as u64));
            bar.set_style(style.clone());
            bar.set_prefix(keys.join(" "));
            Row { keys, bar }
        };
        let rows = MODELS.iter().flat_map(|model| match order {
            Order::FirstComeFirstServed => vec![vec![*model]],
            Order::Fair => TENANTS.iter().map(|tenant| vec![*model, tenant.name]).collect(),
        });
        Self {
            rows: rows.map(row).collect(),
            is_live: std::io::stdout().is_terminal(),
            printed: 0,
            _bars: bars,
        }
    }

    pub(crate) fn draw(&mut self, flows: &[FlowStatus], elapsed: Duration) {
        let is_printed = !self.is_live && elapsed.as_secs() >= self.printed;
        for row in &self.rows {
            let is_row = |flow: &&FlowStatus| flow.keys.iter().map(ToString::to_string).eq(row.keys.iter().copied());
            let flow = flows.iter().find(is_row);
            let text = flow.map_or_else(|| "no calls".to_owned(), describe);
            if is_printed {
                println!("{:>3} s {:>16}  {text}", self.printed, row.keys.join(" "));
            }
            row.bar.set_position(flow.map_or(0, |flow| flow.waiting as u64));
            row.bar.set_message(text);
        }
        self.printed += u64::from(is_printed);
    }

    /// Ends the live table.
    pub(crate) fn finish(self) {
        self.rows.iter().for_each(|row| row.bar.finish());
    }
}

fn describe(flow: &FlowStatus) -> String {
    let mut text = format!(
        "{:>4} waiting {:>3} open {:>+8.3} s ahead",
        flow.waiting, flow.open, flow.lag
    );
    if let Some(until) = flow.blocked_until {
        let ms = until.saturating_duration_since(Instant::now()).as_millis();
        let level = flow.blocked_by.as_deref().unwrap_or("schedule");
        text += &format!("  blocked by its {level} for {ms} ms");
    }
    text
}
