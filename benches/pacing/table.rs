//! Prints the output: a table, and then for programs a line for each of its rows.

use crate::{
    Setting,
    figures::{Budget, Figures},
    limiters::Limiter,
};
use std::time::Duration;

/// tower-outbound makes up for a late timer by the amount that flows in during this time.
pub(crate) const CATCH_UP: Duration = Duration::from_millis(5);
/// The smallest acceptable value of `achieved`, in percent.
const MIN_ACHIEVED: f64 = 99.0;
/// The largest acceptable value of `p99/p50`.
const MAX_TAIL: f64 = 1.2;
/// The largest acceptable value of `cpu`, in percent of one core.
const MAX_CPU: f64 = 15.0;

/// The figures of one limiter for one setting.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    limiter: Limiter,
    setting: String,
    figures: Figures,
    /// The budgets besides requests that are measured.
    tokens: &'static [&'static str],
    /// The bounds that the figures are compared with; `None` for a peer of tower-outbound.
    bars: Option<Bars>,
}

/// The bounds that the figures of tower-outbound are compared with.
#[derive(Clone, Debug)]
struct Bars {
    /// The bound of the empirical burst of each budget.
    bursts: Vec<f64>,
    /// The columns whose bound is not kept.
    missed: Vec<&'static str>,
}

// === impl Row ===

impl Row {
    pub(crate) fn new(limiter: Limiter, setting: &Setting, figures: Figures) -> Self {
        Self {
            limiter,
            setting: setting.name.clone(),
            figures,
            tokens: match (setting.is_weighted(), setting.limits.output) {
                (false, _) => &[],
                (true, None) => &["tokens"],
                (true, Some(_)) => &["input tokens", "output tokens"],
            },
            bars: (limiter == Limiter::TowerOutbound).then(|| Bars::new(setting, &figures)),
        }
    }

    fn print(&self) {
        let Figures {
            achieved,
            bursts,
            waits,
            cpu,
            overtaken,
            ..
        } = self.figures;
        let bound = self.bars.as_ref().map(|bars| format!("<= {:.1}", bars.bursts[0]));
        let requests = bursts[0];
        let (limiter, bound, tail) = (self.limiter, bound.unwrap_or_default(), waits.tail());
        print!("  {limiter:<16} {achieved:>8.2} % {requests:>9.1} {bound:<9} ");
        print!("{:>8.1} {:>8.1} {:>8.1} {tail:>7.2} ", waits.p50, waits.p99, waits.max);
        print!("{cpu:>6.1} % {overtaken:>9.0}");
        if let Some(bars) = &self.bars {
            if bars.missed.is_empty() {
                print!("  ok");
            } else {
                print!("  not reached: {}", bars.missed.join(", "));
            }
            for ((name, burst), bound) in self.tokens.iter().zip(&bursts[1..]).zip(&bars.bursts[1..]) {
                print!("\n    {name:<24} {burst:>10.1} <= {bound:.1}");
            }
        }
        println!();
    }

    fn print_for_programs(&self) {
        let Figures {
            achieved,
            bursts,
            waits,
            cpu,
            overtaken,
        } = self.figures;
        print!(
            "pacing {} {}: achieved = {achieved:.2}, burst = {:.1}",
            self.limiter, self.setting, bursts[0]
        );
        for (name, burst) in self.tokens.iter().zip(&bursts[1..]) {
            print!(", {name} burst = {burst:.1}");
        }
        println!(
            ", p50 = {:.2}, p99 = {:.2}, max = {:.2}, cpu = {cpu:.1}, overtaken = {overtaken:.0}",
            waits.p50, waits.p99, waits.max,
        );
    }
}

// === impl Bars ===

impl Bars {
    fn new(setting: &Setting, figures: &Figures) -> Self {
        let bound = |budget: Budget| budget.burst as f64 + 1.0 + budget.inflow(CATCH_UP);
        let budgets = setting.limits.budgets();
        let bursts: Vec<_> = budgets.iter().map(|(budget, _)| bound(*budget)).collect();
        let Budget { rate, burst } = setting.limits.requests;
        let bars = [
            ("achieved", figures.achieved >= MIN_ACHIEVED),
            (
                "burst",
                figures.bursts.iter().zip(&bursts).all(|(burst, bound)| burst <= bound),
            ),
            // If calls differ in cost, even an exact limiter lets them wait for different times, so this bound does not
            // apply.
            (
                "p99/p50",
                setting.is_weighted() || rate > 1_000 || figures.waits.tail() <= MAX_TAIL,
            ),
            ("cpu", rate < 20_000 || burst > 1 || figures.cpu <= MAX_CPU),
        ];
        let missed = bars.into_iter().filter(|(_, met)| !met).map(|(name, _)| name);
        Self {
            bursts,
            missed: missed.collect(),
        }
    }
}

// === Printing ===

pub(crate) fn print_head() {
    for limiter in Limiter::ALL {
        println!("{:<16} {}", limiter, limiter.setup());
    }
    println!(
        "\n  {:<16} {:>10} {:>9}{:10} {:>8} {:>8} {:>8} {:>7} {:>8} {:>9}",
        "waits in ms", "achieved", "burst", "", "p50", "p99", "max", "p99/p50", "cpu", "overtaken"
    );
}

/// Prints the rows of one setting. The limiters that are `unable` to count its budgets have no figures.
pub(crate) fn print_setting(setting: &Setting, rows: &[Row], unable: &[&Limiter]) {
    if !rows.is_empty() || !unable.is_empty() {
        println!("{}", setting.name);
    }
    rows.iter().for_each(Row::print);
    for limiter in unable {
        println!("  {limiter:<16} {:>10}  limits one budget", "—");
    }
}

pub(crate) fn print_foot(rows: &[Row]) {
    println!();
    rows.iter().for_each(Row::print_for_programs);
}
