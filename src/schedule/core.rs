//! [`Core`]: the tree of a schedule, and what was set for its keys.
//!
//! A core is used only under the lock of its schedule, and runs no user code there.

use super::{
    attempt::Attempt,
    fair::Units,
    flow::FlowKey,
    tree::{FlowView, NewCall, NewNode, Running, Started, Tree},
};
use crate::{
    clock::{self, LazyNow},
    error::{InvalidConfig, Rejected},
    rate::{Budget, Cost, Demand, KeyLimits, Limits},
};
use std::{
    collections::HashMap,
    num::{NonZeroU32, NonZeroUsize},
    sync::Arc,
    time::SystemTime,
};
use tokio::time::Instant;

/// Who waits in a schedule.
pub(crate) enum Ticket {
    /// A call of the queue, by its key there.
    Call(u32),
    /// A further attempt of a call that runs.
    Attempt(Arc<Attempt>),
}

impl Ticket {
    fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Call(key), Self::Call(other)) => key == other,
            (Self::Attempt(attempt), Self::Attempt(other)) => Arc::ptr_eq(attempt, other),
            (Self::Call(_), Self::Attempt(_)) | (Self::Attempt(_), Self::Call(_)) => false,
        }
    }
}

/// What a schedule has to know about a call.
#[derive(Clone, Debug)]
pub(crate) struct ScheduledCall {
    /// One key for each level.
    pub(super) path: Arc<[FlowKey]>,
    pub(super) class: u8,
    pub(super) cost: Cost,
    /// When the call has arrived, plus the slack of its class.
    pub(super) due: u64,
}

impl ScheduledCall {
    pub(crate) const fn path(&self) -> &Arc<[FlowKey]> {
        &self.path
    }
}

/// The call that goes next.
pub(super) struct Head {
    pub(super) id: usize,
    pub(super) cost: Cost,
}

pub(super) struct Core {
    tree: Tree<FlowKey, Ticket>,
    /// What was set at run time for a node, by its path.
    settings: HashMap<Box<[FlowKey]>, KeySettings>,
    /// What one unit of each budget counts in the fair order.
    prices: Prices,
    epoch: Instant,
    wall_clock: SystemTime,
    max_nodes: usize,
}

/// What was set at run time for one key. It is kept while the key has no calls.
#[derive(Clone, Default)]
struct KeySettings {
    weight: Option<NonZeroU32>,
    limits: Option<Limits>,
    paused_until: Option<Instant>,
}

/// What [`Level`](super::Level) says about a new node.
pub(crate) struct NodeSpec {
    pub(super) weight: NonZeroU32,
    pub(super) limits: Option<Limits>,
    pub(super) concurrency: Option<NonZeroUsize>,
}

/// What a call counts in the fair order: the time in which the limits bring what it costs, so that requests and tokens
/// can be added up.
#[derive(Clone)]
pub(super) enum Prices {
    /// What one unit of each budget counts.
    PerUnit(Vec<(Budget, u128)>),
    Function(Arc<dyn Fn(&Cost) -> u64 + Send + Sync>),
}

/// The most nodes that a schedule has by default: those of flows that wait, and of keys whose limits are not full.
pub(super) const DEFAULT_MAX_NODES: usize = 1_000_000;

// === impl Core ===

impl Core {
    pub(super) fn new(strict: [bool; super::tree::MAX_LEVELS], max_nodes: usize, prices: Prices) -> Self {
        Self {
            tree: Tree::new(strict, max_nodes),
            settings: HashMap::new(),
            prices,
            epoch: clock::now(),
            wall_clock: SystemTime::now(),
            max_nodes,
        }
    }

    pub(super) fn set_prices(&mut self, prices: Prices) {
        self.prices = prices;
    }

    /// Returns the nanoseconds since the schedule was made.
    pub(super) fn nanos(&self, now: &mut LazyNow) -> u64 {
        clock::nanos_between(self.epoch, now.get())
    }

    /// Returns how many of the nodes on the path are known, from the outermost on.
    pub(super) fn known(&self, path: &[FlowKey]) -> usize {
        self.tree.known(path)
    }

    /// Adds a call. `specs` has an entry for each node of the path that is not known. An attempt that is made again has the
    /// number `seq` that it had.
    pub(super) fn push(
        &mut self,
        call: &ScheduledCall,
        seq: Option<u64>,
        ticket: Ticket,
        specs: &[NodeSpec],
        now: &mut LazyNow,
    ) -> Result<(usize, u32), PushError> {
        let Self {
            tree,
            settings,
            prices,
            wall_clock,
            max_nodes,
            ..
        } = self;
        let missing_from = call.path.len() - specs.len();
        let mut limits = Vec::new();
        for (at, spec) in specs.iter().enumerate() {
            let set = settings
                .get(&call.path[..=missing_from + at])
                .and_then(|set| set.limits.as_ref());
            let of_key = set.or(spec.limits.as_ref());
            limits.push(
                match of_key.map(|limits| KeyLimits::new(limits.clone(), *wall_clock, now.get())) {
                    Some(Ok(limits)) => Some(Box::new(limits)),
                    Some(Err(error)) => return Err(PushError::Limits(error)),
                    None => None,
                },
            );
        }
        let new = NewCall {
            class: call.class,
            due: call.due,
            cost: call.cost,
            units: prices.units(&call.cost),
            seq,
        };
        let create = |path: &[FlowKey]| {
            let at = path.len() - 1 - missing_from;
            let set = settings.get(path);
            NewNode {
                weight: set.and_then(|set| set.weight).unwrap_or(specs[at].weight),
                limits: limits.get_mut(at).and_then(Option::take),
                max_running: specs[at].concurrency,
                paused_until: set.and_then(|set| set.paused_until),
            }
        };
        let pushed = tree.push(&call.path, new, ticket, create, now);
        match pushed {
            Ok(id) => Ok((id, tree.weight_of(&call.path))),
            Err(_) => Err(PushError::TooManyKeys(*max_nodes)),
        }
    }

    /// Returns the call that goes next, if one could be charged to all limits below the root now.
    pub(super) fn head(&mut self, now: &mut LazyNow) -> Option<Head> {
        let (id, call) = self.tree.head(now)?;
        Some(Head { id, cost: call.cost })
    }

    /// Begins the call that goes next, if it is `head`.
    pub(super) fn start(&mut self, head: &Head, now: &mut LazyNow) -> Option<(Started, Option<Running>, Ticket)> {
        let current = self.head(now)?;
        // Another call of the same cost may have come in between, which may go as well.
        if current.id != head.id && current.cost != head.cost {
            return None;
        }
        let (started, ticket) = self.tree.start(now)?;
        let running = self.tree.running(&started);
        Some((started, running, ticket))
    }

    pub(super) fn count_running(&mut self) {
        self.tree.count_running();
    }

    pub(super) fn finish(&mut self, running: Running, now: &mut LazyNow) {
        self.tree.finish(running, now);
    }

    pub(super) fn settle(&mut self, started: Started, used: Cost, now: &mut LazyNow) {
        let units = self.prices.units(&used);
        self.tree.settle(started, used, units, now);
    }

    /// Removes the call at `id`, if it is that of the ticket. It may have begun, and another one have its place.
    pub(super) fn cancel(&mut self, id: usize, ticket: &Ticket, now: &mut LazyNow) {
        if self.tree.payload(id).is_some_and(|found| found.is_same(ticket)) {
            self.tree.cancel(id, now);
        }
    }

    /// Returns the call that was found to be the first.
    pub(super) fn peek(&self) -> Option<usize> {
        self.tree.peek()
    }

    pub(super) fn next_at(&self) -> Option<Instant> {
        self.tree.next_at()
    }

    pub(super) fn waiting(&self) -> usize {
        self.tree.waiting()
    }

    pub(super) fn take_refused(&mut self) -> Vec<(Ticket, Rejected)> {
        self.tree.take_refused()
    }

    pub(super) fn demand_of(&self, path: &[FlowKey]) -> Demand {
        self.tree.demand_of(path)
    }

    pub(super) fn view(&mut self, most: usize, now: &mut LazyNow) -> Vec<FlowView<FlowKey>> {
        self.tree.view(most, now.get())
    }

    pub(super) fn set_weight(&mut self, path: &[FlowKey], weight: NonZeroU32, now: &mut LazyNow) {
        self.settings.entry(path.into()).or_default().weight = Some(weight);
        self.tree.set_weight(path, weight, now);
    }

    pub(super) fn set_limits(
        &mut self,
        path: &[FlowKey],
        limits: &Limits,
        now: &mut LazyNow,
    ) -> Result<(), InvalidConfig> {
        // Checked also if the key has no calls now.
        KeyLimits::new(limits.clone(), self.wall_clock, now.get())?;
        self.tree.set_limits(path, limits.clone(), now)?;
        self.settings.entry(path.into()).or_default().limits = Some(limits.clone());
        Ok(())
    }

    pub(super) fn pause(&mut self, path: &[FlowKey], until: Option<Instant>, now: &mut LazyNow) {
        let set = self.settings.entry(path.into()).or_default();
        set.paused_until = until;
        if set.weight.is_none() && set.limits.is_none() && until.is_none() {
            self.settings.remove(path);
        }
        self.tree.pause(path, until, now);
    }
}

/// Why a call cannot wait in the schedule.
pub(crate) enum PushError {
    /// The limits of a key are invalid.
    Limits(InvalidConfig),
    /// The schedule knows this many keys, the most that it may.
    TooManyKeys(usize),
}

// === impl Prices ===

/// How many bits of a [unit](Units) are a fraction of a nanosecond.
const FRACTION_BITS: u32 = 20;

/// Returns units as seconds.
pub(super) fn seconds(units: Units) -> f64 {
    units as f64 / f64::from(1 << FRACTION_BITS) / 1e9
}

impl Prices {
    /// Returns the prices by which a call counts as the time in which the limits bring what it costs. Of several rates of a
    /// budget, the one counts that takes the longest. Without limits, all calls count the same.
    pub(super) fn of_limits(limits: &Limits) -> Self {
        let mut prices: Vec<(Budget, u128)> = Vec::new();
        for (budget, rate) in limits.rates() {
            let units = rate.period().as_secs_f64() * 1e9 / rate.amount() * f64::from(1 << FRACTION_BITS);
            // The cast cuts off at the bounds.
            let price = (units as u128).max(1);
            match prices.iter_mut().find(|(of, _)| *of == budget) {
                Some((_, known)) => *known = price.max(*known),
                None => prices.push((budget, price)),
            }
        }
        if prices.is_empty() {
            prices.push((Budget::Requests, 1 << FRACTION_BITS));
        }
        Self::PerUnit(prices)
    }

    fn units(&self, cost: &Cost) -> Units {
        let units = match self {
            Self::PerUnit(prices) => prices.iter().fold(0_u128, |units, (budget, price)| {
                units.saturating_add(price.saturating_mul(cost.of(*budget).into()))
            }),
            Self::Function(price) => u128::from(price(cost)) << FRACTION_BITS,
        };
        // A call that counts nothing counts as the least there is, so that a flow of such calls gets on, too.
        Units::try_from(units).unwrap_or(Units::MAX).max(1)
    }
}
