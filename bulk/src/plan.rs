//! [`Plan`]: what a run would do, what it would cost, and how long it would take, without sending anything.

use crate::{
    args::Args,
    input::{Malformed, Requests},
    limits::{Bounds, OwnBudgets, cost_of},
    output::Done,
    price::{Money, Price},
    view::{
        Cause,
        text::{grouped, span},
    },
};
use std::{
    fmt,
    io::{self, Write as _},
    path::PathBuf,
    time::Duration,
};
use tower_outbound::{
    Cost, Limits,
    rate::{Binding, Budget},
};

/// What a run would do with the requests of a file.
#[derive(Debug)]
pub(crate) struct Plan {
    input: PathBuf,
    /// The form of the input, and what else is to be known about it, in a line each.
    notes: Vec<String>,
    bounds: Bounds,
    pub(crate) found: Found,
    /// What the requests would cost at most; `None` if no prices are given.
    cost: Option<Money>,
    /// When the last request would be sent.
    pub(crate) time: Duration,
    phases: Phases,
}

/// What was found in the input.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) requests: u64,
    pub(crate) malformed: u64,
    /// The requests that an earlier run has completed.
    pub(crate) skipped: u64,
    /// The requests that need more of a budget than the limits ever allow.
    pub(crate) too_large: u64,
    /// The requests to send that set no bound of their output, which is then in no estimate.
    pub(crate) unbounded: u64,
    pub(crate) tokens: u64,
    pub(crate) largest: u64,
}

/// Which limit the requests wait for, and when. The time is cut into a bounded number of slots, which become longer as
/// the plan does.
#[derive(Debug)]
struct Phases {
    length: Duration,
    /// For each slot, for how long requests wait for each of [`CAUSES`].
    slots: Vec<[Duration; CAUSES.len()]>,
}

/// What the requests cost, without the requests themselves: four bytes for each budget, besides requests, of each request.
/// No request takes more than four billion of a budget.
#[derive(Debug)]
struct Costs {
    budgets: Vec<Budget>,
    /// The amounts of all budgets of the first request, then those of the second one, and so on.
    amounts: Vec<u32>,
}

/// What requests can wait for in a plan.
const CAUSES: [Cause; 5] = [
    Cause::Requests,
    Cause::Tokens,
    Cause::InputTokens,
    Cause::OutputTokens,
    Cause::Budget,
];

const SLOTS: usize = 64;
const FIRST_LENGTH: Duration = Duration::from_millis(100);

/// The number of phases that are shown. A plan with more of them alternates between the limits.
const MAX_PHASES: usize = 8;

// === impl Plan ===

impl Plan {
    /// Reads the requests that a run with these arguments would send, and plans when each would be sent.
    pub(crate) async fn of(
        mut requests: Requests,
        mut done: Done,
        bounds: &Bounds,
        args: &Args,
    ) -> anyhow::Result<Self> {
        let price = args.view.cost.price();
        let mut found = Found::default();
        let mut cost = price.map(|_| Money::default());
        let mut costs = Costs::new(&OwnBudgets::of(&args.limits));
        while let Some(line) = requests.next().await? {
            let request = match line {
                Ok(request) => request,
                Err(Malformed { line, reason, .. }) => {
                    found.malformed += 1;
                    let _ = writeln!(io::stderr(), "line {line} is malformed: {reason}");
                    continue;
                }
            };
            found.requests += 1;
            if done.take(&request) {
                found.skipped += 1;
            } else if bounds.fits(request.tokens, &args.limits) && bounds.further.fits(&cost_of(&request)) {
                found.tokens = found.tokens.saturating_add(request.tokens);
                found.largest = found.largest.max(request.tokens);
                if let (Some(sum), Some(price)) = (&mut cost, &price) {
                    *sum += price.estimate(&request);
                    found.unbounded += u64::from(request.tokens > 0 && !Price::bounds_output(&request));
                }
                costs.push(&cost_of(&request));
            } else {
                found.too_large += 1;
            }
        }
        let notes = [requests.form().to_string()].into_iter();
        let notes = notes.chain(requests.repeated_ids()).chain(done.notes()).collect();
        let mut planned = *bounds;
        // The burst of tokens grows for a request that needs more, and what the bucket holds stays as it is.
        if let Some(pace) = &mut planned.tokens {
            pace.burst = pace.burst.max(found.largest);
        }
        let (time, phases) = simulate(&planned.limits(), &costs)?;
        Ok(Self {
            input: args.files.input().to_owned(),
            notes,
            bounds: *bounds,
            found,
            cost,
            time,
            phases,
        })
    }
}

/// Returns when the last of the requests is admitted, and what they wait for until then.
fn simulate(limits: &Limits, costs: &Costs) -> anyhow::Result<(Duration, Phases)> {
    let mut plan = limits.plan()?;
    let mut phases = Phases::new();
    let mut last = Duration::ZERO;
    for cost in costs.iter() {
        let admitted = plan.admit(cost)?;
        if let Some(binding) = plan.binding() {
            let cause = cause_of(&binding);
            let at = CAUSES.iter().position(|known| *known == cause);
            phases.add(last, admitted, at.unwrap_or_default());
        }
        last = admitted;
    }
    Ok((last, phases))
}

/// Returns what a request waits for whose time the plan says is given by `binding`.
fn cause_of(binding: &Binding) -> Cause {
    match binding {
        Binding::Rate { period, .. } if period.as_secs() != 60 => Cause::Budget,
        Binding::Rate { budget, .. } => match budget {
            Budget::Tokens => Cause::Tokens,
            Budget::InputTokens => Cause::InputTokens,
            Budget::OutputTokens => Cause::OutputTokens,
            Budget::Named(_) => Cause::Budget,
            _ => Cause::Requests,
        },
        _ => Cause::Requests,
    }
}

// === impl Costs ===

impl Costs {
    fn new(own: &OwnBudgets) -> Self {
        let tokens = [Budget::InputTokens, Budget::OutputTokens];
        Self {
            budgets: tokens.into_iter().chain(own.budgets()).collect(),
            amounts: Vec::new(),
        }
    }

    fn push(&mut self, cost: &Cost) {
        let amount = |budget: &Budget| u32::try_from(cost.of(*budget)).unwrap_or(u32::MAX);
        self.amounts.extend(self.budgets.iter().map(amount));
    }

    fn iter(&self) -> impl Iterator<Item = Cost> + '_ {
        self.amounts.chunks(self.budgets.len()).map(|amounts| {
            let tokens = Cost::input_output_tokens(amounts[0].into(), amounts[1].into());
            let own = self.budgets.iter().zip(amounts).skip(2);
            own.fold(tokens, |cost, (budget, amount)| cost.with(*budget, (*amount).into()))
        })
    }
}

// === impl Phases ===

impl Phases {
    const fn new() -> Self {
        Self {
            length: FIRST_LENGTH,
            slots: Vec::new(),
        }
    }

    /// Adds a wait from `start` to `end` for the limit of this index.
    fn add(&mut self, start: Duration, end: Duration, limit: usize) {
        while end >= self.length * SLOTS as u32 {
            self.length *= 2;
            let pairs = self.slots.chunks(2);
            self.slots = pairs
                .map(|pair| std::array::from_fn(|limit| pair.iter().map(|slot| slot[limit]).sum()))
                .collect();
        }
        let slot = |time: Duration| (time.as_nanos() / self.length.as_nanos()) as usize;
        let (first, last) = (slot(start), slot(end));
        self.slots
            .resize(self.slots.len().max(last + 1), [Duration::ZERO; CAUSES.len()]);
        for index in first..=last {
            let (from, to) = (self.length * index as u32, self.length * (index as u32 + 1));
            self.slots[index][limit] += end.min(to).saturating_sub(start.max(from));
        }
    }

    /// The phases with their ends: in each, most of the time goes to waiting for one limit.
    fn list(&self, end: Duration) -> Vec<(Duration, Option<Cause>)> {
        let causes = self.slots.iter().map(|slot| {
            let waits = CAUSES.into_iter().zip(slot).filter(|(_, time)| !time.is_zero());
            waits.max_by_key(|(_, time)| **time).map(|(cause, _)| cause)
        });
        let mut phases: Vec<(Duration, Option<Cause>)> = Vec::new();
        for (number, cause) in (1..).zip(causes) {
            let until = (self.length * number).min(end);
            match phases.last_mut() {
                Some((last, same)) if *same == cause => *last = until,
                _ => phases.push((until, cause)),
            }
        }
        phases
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            found,
            bounds,
            phases,
            notes,
            ..
        } = self;
        writeln!(f, "dry run of {}: nothing was sent", self.input.display())?;
        for note in notes {
            writeln!(f, "{note}")?;
        }
        for (name, count, meaning) in [
            ("requests", found.requests, ""),
            ("malformed", found.malformed, "lines that are not requests"),
            ("skipped", found.skipped, "completed by an earlier run"),
            (
                "too large",
                found.too_large,
                "requests that need more than the limits ever allow",
            ),
            ("tokens", found.tokens, "estimated, of the requests to send"),
            ("largest", found.largest, "tokens of the largest request"),
        ] {
            writeln!(
                f,
                "{}",
                format!("  {name:<10} {:>15}  {meaning}", grouped(count)).trim_end()
            )?;
        }
        if let Some(cost) = self.cost {
            writeln!(f, "  {:<10} {cost:>15}  at most, if the estimates are right", "cost")?;
            if found.unbounded > 0 {
                let unbounded = grouped(found.unbounded);
                writeln!(
                    f,
                    "  {:26}  and the output of {unbounded} requests that set no max_tokens",
                    ""
                )?;
            }
        }
        writeln!(f, "\nlimits: {bounds}")?;
        write!(f, "the last request is sent after {}", exact(self.time))?;
        let list = phases.list(self.time);
        if list.len() > MAX_PHASES {
            let sums = (0..CAUSES.len()).map(|limit| phases.slots.iter().map(|slot| slot[limit]).sum::<Duration>());
            let waits: Vec<_> = CAUSES
                .into_iter()
                .zip(sums)
                .filter(|(cause, time)| matches!(cause, Cause::Requests | Cause::Tokens) || !time.is_zero())
                .map(|(cause, time)| format!("by {} for {}", cause.name(), exact(time)))
                .collect();
            return write!(f, "\n  limited {}", waits.join(", "));
        }
        let mut start = Duration::ZERO;
        for (end, cause) in list {
            let cause = cause.map_or("not limited", Cause::name);
            let limited = if cause == "not limited" { "" } else { "limited by " };
            write!(f, "\n  {} to {}: {limited}{cause}", exact(start), exact(end))?;
            start = end;
        }
        Ok(())
    }
}

/// A time with its tenths of a second, as long as they matter.
fn exact(time: Duration) -> String {
    if time < Duration::from_secs(100) {
        format!("{:.1} s", time.as_secs_f64())
    } else {
        span(time)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::Pace;

    fn limits(rpm: u64, tpm: u64) -> Limits {
        let pace = |per_minute, burst| {
            Some(Pace {
                per_minute,
                burst,
                initial: 0,
                follows: false,
            })
        };
        let bounds = Bounds {
            requests: pace(rpm, 1),
            tokens: pace(tpm, 1_000),
            further: crate::limits::Further::NONE,
            concurrency: 1,
        };
        bounds.limits()
    }

    fn costs(tokens: &[[u64; 2]]) -> Costs {
        let mut costs = Costs::new(&OwnBudgets::default());
        let all = tokens.iter();
        all.for_each(|[input, output]| costs.push(&Cost::input_output_tokens(*input, *output)));
        costs
    }

    #[test]
    fn the_limit_that_holds_up_each_part_of_the_job_is_told() {
        // A request a second, and a hundred tokens a second: first many small requests, then large ones.
        let tokens = [[[10, 0]; 300].as_slice(), &[[600, 400]; 30]].concat();
        let (time, phases) = simulate(&limits(60, 6_000), &costs(&tokens)).unwrap();
        // The bucket of tokens is full when the large requests begin.
        assert_eq!(time, Duration::from_secs(300 + 1 + 29 * 10));
        let list = phases.list(time);
        let causes: Vec<_> = list.iter().map(|(_, cause)| cause.unwrap()).collect();
        assert_eq!(causes, [Cause::Requests, Cause::Tokens]);
        let change = list[0].0.as_secs();
        assert!((295..=315).contains(&change), "{change}");
    }

    #[test]
    fn a_limit_of_a_budget_of_ones_own_is_told_by_its_option() {
        use clap::Parser;
        let args = Args::parse_from(["bulk", "--rpm", "off", "--tpm", "off", "--budget", "images=60/min"]);
        let own = OwnBudgets::of(&args.limits);
        let mut costs = Costs::new(&own);
        for _ in 0..30 {
            costs.push(&Cost::input_output_tokens(10, 0).with("images", 3));
        }
        let bounds = Bounds::new(&args).unwrap();
        let (time, phases) = simulate(&bounds.limits(), &costs).unwrap();
        // The limit begins with 57, and adds one a second.
        assert_eq!(time, Duration::from_secs(33));
        let causes: Vec<_> = phases.list(time).iter().map(|(_, cause)| *cause).collect();
        assert_eq!(causes, [Some(Cause::Budget)]);
    }

    #[test]
    fn without_limits_everything_is_sent_at_once() {
        let (time, phases) = simulate(&Limits::new(), &costs(&[[500, 0]; 1_000])).unwrap();
        assert_eq!(time, Duration::ZERO);
        assert!(phases.list(time).is_empty());
    }

    #[test]
    fn a_plan_of_a_million_requests_takes_seconds_at_most() {
        let started = tokio::time::Instant::now();
        let (time, phases) = simulate(&limits(600, 60_000), &costs(&vec![[60, 40]; 1_000_000])).unwrap();
        assert_eq!(time, Duration::from_secs(100_000));
        assert_eq!(phases.list(time).len(), 1);
        assert!(phases.slots.len() <= SLOTS);
        assert!(started.elapsed() < Duration::from_secs(30));
    }
}
