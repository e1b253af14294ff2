//! [`Core`]: the tree of a schedule, and what was set for its keys.
//!
//! A core is used only under the lock of its schedule, and runs no user code there.

use super::{
    attempt::Attempt,
    call::ScheduledCall,
    fair::Units,
    flow::FlowKey,
    tree::{FlowView, NewCall, NewNode, Running, Started, Tree},
};
use crate::{
    clock::LazyNow,
    error::{InvalidConfig, Rejected},
    rate::{Budget, Cost, Demand, KeyLimits, Limits},
    wait_queue::Availability,
};
use std::{
    collections::{BTreeSet, HashMap},
    num::{NonZeroU32, NonZeroUsize},
    sync::Arc,
    time::SystemTime,
};
use tokio::time::Instant;

/// Who waits in a schedule.
pub(crate) enum Ticket {
    /// A call of the queue.
    Call(CallKey),
    /// A further attempt of a call that runs.
    Attempt(Arc<Attempt>),
}

/// Names a call of the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CallKey {
    /// Where the queue finds the call. Another call may have the same index later.
    pub(crate) index: u32,
    /// Tells the call from all others.
    pub(crate) order: u64,
}

pub(super) struct Core {
    tree: Tree<FlowKey, Ticket>,
    /// What was set at run time for a node, by its path.
    settings: HashMap<Box<[FlowKey]>, KeySettings>,
    /// The attempts that wait, by the numbers of their calls and their places in the tree.
    attempts: BTreeSet<(u64, usize)>,
    wall_clock: SystemTime,
    max_nodes: usize,
    /// What the queue has to act on, as it was after the last change.
    seen: Seen,
}

/// What the queue has to act on: the first call, when the next key is no longer blocked, and whether any call waits.
type Seen = (Option<usize>, Option<Instant>, bool);

/// Which calls may go.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Eligible {
    All,
    /// Only further attempts of calls that run, because the service is not ready for another call.
    Attempts,
}

impl Ticket {
    fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Call(call), Self::Call(other)) => call == other,
            (Self::Attempt(attempt), Self::Attempt(other)) => Arc::ptr_eq(attempt, other),
            _ => false,
        }
    }
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

impl NodeSpec {
    /// What a level says about each key if it says the same about all.
    pub(super) const PLAIN: Self = Self {
        weight: NonZeroU32::MIN,
        limits: None,
        concurrency: None,
    };
}

/// A function from the cost of a call to what it counts.
pub(crate) type Price = Arc<dyn Fn(&Cost) -> u64 + Send + Sync>;

/// What a call counts in the fair order: the time in which the limits bring what it costs, so that requests and tokens
/// can be added up.
#[derive(Clone)]
pub(super) enum Prices {
    /// What one unit of each budget counts.
    PerUnit(Vec<(Budget, u128)>),
    Function(Price),
}

/// The most nodes that a schedule has by default: those of flows that wait, and of keys whose limits are not full.
pub(super) const DEFAULT_MAX_NODES: usize = 1_000_000;

// === impl Core ===

impl Core {
    pub(super) fn new(strict: [bool; super::tree::MAX_LEVELS], max_nodes: usize) -> Self {
        Self {
            tree: Tree::new(strict, max_nodes),
            settings: HashMap::new(),
            attempts: BTreeSet::new(),
            wall_clock: SystemTime::now(),
            max_nodes,
            seen: (None, None, false),
        }
    }

    /// Called after each change. Returns whether the queue has to act on it.
    pub(super) fn has_changed(&mut self) -> bool {
        let seen = (self.tree.peek(), self.tree.next_at(), self.tree.waiting() > 0);
        std::mem::replace(&mut self.seen, seen) != seen
    }

    /// Returns how many of the nodes on the path are known, from the outermost on.
    pub(super) fn known(&self, path: &[FlowKey]) -> usize {
        self.tree.known(path)
    }

    /// Adds a call. `specs` has an entry for each node of the path that is not known; `None` is returned if more of them are
    /// not. An attempt that is made again has the number `seq` that it had.
    pub(super) fn push(
        &mut self,
        call: &ScheduledCall,
        seq: Option<u64>,
        ticket: Ticket,
        specs: &[NodeSpec],
        now: &mut LazyNow,
    ) -> Option<Result<(usize, u32), PushError>> {
        let Self {
            tree,
            settings,
            attempts,
            wall_clock,
            max_nodes,
            ..
        } = self;
        let missing_from = call.path.len() - specs.len();
        let new = NewCall {
            class: call.class,
            due: call.due,
            cost: call.cost,
            units: call.units,
            seq,
        };
        let (mut is_complete, mut invalid) = (true, None);
        let created_at = (!specs.is_empty()).then(|| now.get());
        let create = |path: &[FlowKey]| {
            let at = (path.len() - 1).checked_sub(missing_from);
            is_complete &= at.is_some();
            let (spec, set, created_at) = (&specs[at?], settings.get(path), created_at?);
            let limits = set.and_then(|set| set.limits.as_ref()).or(spec.limits.as_ref());
            let limits = limits.map(|limits| KeyLimits::new(limits.clone(), *wall_clock, created_at));
            Some(NewNode {
                weight: set.and_then(|set| set.weight).unwrap_or(spec.weight),
                limits: limits
                    .transpose()
                    .map_err(|error| invalid = Some(error))
                    .ok()?
                    .map(Box::new),
                max_running: spec.concurrency,
                paused_until: set.and_then(|set| set.paused_until),
            })
        };
        let is_attempt = matches!(ticket, Ticket::Attempt(_));
        let pushed = tree.try_push(&call.path, new, ticket, create, now);
        if !is_complete {
            return None;
        }
        if let Some(error) = invalid {
            return Some(Err(PushError::Limits(error)));
        }
        Some(match pushed {
            Ok(id) => {
                if is_attempt {
                    attempts.insert((seq.unwrap_or_default(), id));
                }
                Ok((id, tree.weight_of_call(id)))
            }
            Err(_) => Err(PushError::TooManyKeys(*max_nodes)),
        })
    }

    /// Returns the cost of the eligible call that goes next, if one could be charged to all limits below the root now.
    pub(super) fn head(&mut self, eligible: Eligible, now: &mut LazyNow) -> Option<Cost> {
        let id = self.next(eligible, now)?;
        self.tree.call(id).map(|call| call.cost)
    }

    /// Returns what the eligible calls cost that go next, at most `most`, as far as it is known.
    pub(super) fn upcoming(&mut self, most: usize, eligible: Eligible, now: &mut LazyNow) -> Vec<Cost> {
        if eligible == Eligible::Attempts {
            return self.head(eligible, now).into_iter().collect();
        }
        let ids = self.tree.upcoming(most, now);
        let costs = ids.iter().filter_map(|id| self.tree.call(*id));
        costs.map(|call| call.cost).collect()
    }

    /// Begins the eligible call that goes next, if `take` takes what its cost needs. If it does not, begins the first call
    /// for which `take` does, among so many that go next and are the first of their flows.
    pub(super) fn start<G>(
        &mut self,
        among: usize,
        eligible: Eligible,
        mut take: impl FnMut(&Cost, &mut LazyNow) -> Option<G>,
        now: &mut LazyNow,
    ) -> Option<(Started, Option<Running>, Ticket, G)> {
        let mut id = self.next(eligible, now)?;
        let mut granted = take(&self.tree.call(id)?.cost, now);
        if granted.is_none() && among > 1 && eligible == Eligible::All {
            for next in self.tree.upcoming(among, now) {
                let call = self.tree.call(next).filter(|_| self.tree.is_first_of_flow(next));
                granted = call.and_then(|call| take(&call.cost, now));
                if granted.is_some() {
                    id = next;
                    break;
                }
            }
        }
        let granted = granted?;
        let (started, ticket) = self.tree.start_call(id, now)?;
        if matches!(ticket, Ticket::Attempt(_)) {
            self.attempts.remove(&(started.seq, id));
        }
        let running = self.tree.running(&started);
        Some((started, running, ticket, granted))
    }

    pub(super) fn count_running(&mut self) {
        self.tree.count_running();
    }

    pub(super) fn finish(&mut self, running: Running, now: &mut LazyNow) {
        self.tree.finish(running, now);
    }

    fn next(&mut self, eligible: Eligible, now: &mut LazyNow) -> Option<usize> {
        let head = self.tree.head(now).map(|(id, _)| id);
        if eligible == Eligible::All {
            return head;
        }
        let Self { tree, attempts, .. } = self;
        let mut ids = attempts.iter().map(|(_, id)| *id);
        ids.find(|id| tree.availability_of(*id, now) == Availability::Now)
    }

    /// Returns when the first of the attempts that wait could be charged to all limits below the root, as far as that is
    /// known.
    pub(super) fn next_attempt_at(&mut self, now: &mut LazyNow) -> Option<Instant> {
        let Self { tree, attempts, .. } = self;
        let at = attempts
            .iter()
            .filter_map(|(_, id)| match tree.availability_of(*id, now) {
                Availability::At(at) => Some(at),
                _ => None,
            });
        at.min()
    }

    pub(super) fn settle(&mut self, started: Started, used: Cost, units: Units, now: &mut LazyNow) {
        self.tree.settle(started, used, units, now);
    }

    /// Removes a call that waits, if it still does: its number in the tree is given to another one as soon as it has gone.
    pub(super) fn cancel(&mut self, id: usize, ticket: &Ticket, now: &mut LazyNow) {
        if self.tree.call(id).is_some_and(|call| call.payload.is_same(ticket)) {
            if let Some(call) = self.tree.cancel(id, now) {
                self.attempts.remove(&(call.seq, id));
            }
        }
    }

    pub(super) fn weight_of(&self, path: &[FlowKey]) -> u32 {
        self.tree.weight_of(path)
    }

    pub(super) fn next_at(&self) -> Option<Instant> {
        self.tree.next_at()
    }

    pub(super) fn waiting(&self) -> usize {
        self.tree.waiting()
    }

    #[inline]
    pub(super) fn take_refused(&mut self) -> Vec<(Ticket, Rejected)> {
        if self.tree.has_refused() {
            self.take_all_refused()
        } else {
            Vec::new()
        }
    }

    fn take_all_refused(&mut self) -> Vec<(Ticket, Rejected)> {
        let refused = self.tree.take_refused();
        if refused.iter().any(|(ticket, _)| matches!(ticket, Ticket::Attempt(_))) {
            let Self { tree, attempts, .. } = self;
            attempts.retain(|(seq, id)| tree.call(*id).is_some_and(|call| call.seq == *seq));
        }
        refused
    }

    pub(super) fn waiting_of(&self, path: &[FlowKey]) -> usize {
        self.tree.waiting_of(path)
    }

    pub(super) fn demand_ahead(&self, call: &ScheduledCall) -> Demand {
        self.tree.demand_ahead(&call.path, call.class, call.due)
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

    /// Returns what a cost counts. It may run user code.
    pub(super) fn units(&self, cost: &Cost) -> Units {
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
