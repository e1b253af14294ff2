//! [`Shared`]: the state of a schedule, which its handles, its queue and the calls that run share.

use super::{
    attempt::Attempt,
    call::ScheduledCall,
    core::{CallKey, Core, Eligible, NodeSpec, Prices, PushError, Ticket},
    fair::Units,
    flow::FlowKey,
    level::Level,
    tree::{Running, Started},
};
use crate::{
    clock::{self, LazyNow},
    error::{AcquireError, Rejected},
    rate::{Cost, RateLimiter},
    semaphore::{Semaphore, granted::InFlight},
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};
use std::sync::{Arc, PoisonError, Weak};
use tokio::time::Instant;

pub(crate) struct Shared {
    levels: Vec<Level>,
    /// The path of all calls that name no flow.
    unnamed: Arc<[FlowKey]>,
    /// What the levels say about every key. Empty if that depends on the key.
    plain_specs: Vec<NodeSpec>,
    core: Mutex<Core>,
    /// When the schedule was made.
    epoch: Instant,
    /// How many calls wait. It is changed under the lock, and can be read without.
    waiting: AtomicUsize,
    /// Whether the queue wants to know of each call that comes.
    watches_arrivals: AtomicBool,
    root: Mutex<Root>,
    queue: Mutex<Weak<dyn Scheduled>>,
}

/// The limits of the root, which are not kept in the tree: other stacks may use them, too.
#[derive(Clone)]
pub(super) struct Root {
    pub(super) permits: Option<Semaphore>,
    pub(super) limiter: Option<RateLimiter>,
    /// What one unit of each budget counts in the fair order.
    pub(super) prices: Arc<Prices>,
}

/// The queue whose calls are scheduled.
pub(crate) trait Scheduled: Send + Sync {
    /// Another call may go next, or at another time.
    fn changed(self: Arc<Self>);

    /// The limits of a key refuse the call.
    fn refuse(self: Arc<Self>, call: CallKey, error: AcquireError);
}

/// What follows from a change of the core. It is [carried out](Shared::carry_out) without any lock.
#[must_use]
pub(crate) struct Effects {
    pub(crate) has_changed: bool,
    pub(crate) refused: Vec<(Ticket, Rejected)>,
}

/// A call that has a place in the tree.
pub(crate) struct Pushed {
    pub(crate) id: usize,
    /// The weight of its flow.
    pub(crate) weight: u32,
}

/// A call that has begun, and what was taken for it.
pub(super) struct StartedCall<G> {
    pub(super) started: Started,
    pub(super) in_flight: Option<InFlight>,
    pub(super) ticket: Ticket,
    pub(super) granted: G,
}

impl<G> StartedCall<G> {
    pub(super) fn map<T>(self, map: impl FnOnce(G) -> T) -> StartedCall<T> {
        StartedCall {
            started: self.started,
            in_flight: self.in_flight,
            ticket: self.ticket,
            granted: map(self.granted),
        }
    }
}

/// Counts a call in flight at its keys until it is dropped.
struct CountedCall {
    shared: Arc<Shared>,
    running: Option<Running>,
}

impl Drop for CountedCall {
    fn drop(&mut self) {
        if let Some(running) = self.running.take() {
            let ((), effects) = self.shared.change(|core, now| core.finish(running, now));
            self.shared.carry_out(effects);
        }
    }
}

/// A queue that no calls come from: that of a schedule that no queue uses yet.
struct NoQueue;

impl Scheduled for NoQueue {
    fn changed(self: Arc<Self>) {}

    fn refuse(self: Arc<Self>, _: CallKey, _: AcquireError) {}
}

impl Shared {
    pub(super) fn new(levels: Vec<Level>, core: Core, root: Root) -> Self {
        let is_plain = levels.iter().all(Level::is_plain);
        let plain_specs = levels.iter().filter(|_| is_plain).map(|_| NodeSpec::PLAIN);
        Self {
            unnamed: levels.iter().map(|_| FlowKey::from("")).collect(),
            plain_specs: plain_specs.collect(),
            levels,
            core: Mutex::new(core),
            epoch: clock::now(),
            waiting: AtomicUsize::new(0),
            watches_arrivals: AtomicBool::new(false),
            root: Mutex::new(root),
            queue: Mutex::new(Weak::<NoQueue>::new()),
        }
    }

    pub(super) const fn unnamed(&self) -> &Arc<[FlowKey]> {
        &self.unnamed
    }

    pub(super) fn root(&self) -> Root {
        self.root.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Makes `queue` the one whose calls are scheduled, and `root` the limits that they need. Does nothing and returns `false`
    /// if there is another one.
    pub(super) fn set_queue(&self, queue: Weak<dyn Scheduled>, root: Root) -> bool {
        let mut current = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let is_free = current.strong_count() == 0;
        if is_free {
            *current = queue;
            *self.root.lock().unwrap_or_else(PoisonError::into_inner) = root;
        }
        is_free
    }

    /// Returns what a cost counts in the fair order. It may run user code.
    pub(super) fn units(&self, cost: &Cost) -> Units {
        let prices = self.root().prices;
        prices.units(cost)
    }

    pub(super) fn is_used(&self) -> bool {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).strong_count() > 0
    }

    /// Ends the use of the schedule by its queue, which has ended.
    pub(crate) fn release_queue(&self) {
        *self.queue.lock().unwrap_or_else(PoisonError::into_inner) = Weak::<NoQueue>::new();
    }

    fn queue(&self) -> Option<Arc<dyn Scheduled>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).upgrade()
    }

    /// Returns how many calls wait.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Acquire)
    }

    pub(crate) fn next_at(&self) -> Option<Instant> {
        self.lock().next_at()
    }

    /// Returns the nanoseconds from when the schedule was made to `now`.
    pub(super) fn nanos(&self, now: Instant) -> u64 {
        clock::nanos_between(self.epoch, now)
    }

    /// Returns the weight of a flow.
    pub(crate) fn weight_of(&self, path: &[FlowKey]) -> u32 {
        self.lock().weight_of(path)
    }

    pub(super) fn inspect<T>(&self, read: impl FnOnce(&mut Core, &mut LazyNow) -> T) -> T {
        read(&mut self.lock(), &mut LazyNow::default())
    }

    /// Changes the core, and returns what follows.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut Core, &mut LazyNow) -> T) -> (T, Effects) {
        let mut now = LazyNow::default();
        let mut core = self.lock();
        let waited = core.waiting();
        let output = change(&mut core, &mut now);
        let waiting = core.waiting();
        let has_come = waiting > waited && self.watches_arrivals.load(Ordering::Relaxed);
        let effects = Effects {
            has_changed: core.has_changed() || has_come,
            refused: core.take_refused(),
        };
        self.waiting.store(waiting, Ordering::Release);
        (output, effects)
    }

    #[inline]
    pub(crate) fn carry_out(&self, effects: Effects) {
        if effects.has_changed || !effects.refused.is_empty() {
            self.carry_out_now(effects);
        }
    }

    fn carry_out_now(&self, effects: Effects) {
        let queue = self.queue();
        for (ticket, rejected) in effects.refused {
            Self::refuse(queue.as_ref(), ticket, rejected.into());
        }
        if let Some(queue) = queue.filter(|_| effects.has_changed) {
            queue.changed();
        }
    }

    fn refuse(queue: Option<&Arc<dyn Scheduled>>, ticket: Ticket, error: AcquireError) {
        match ticket {
            Ticket::Call(call) => {
                if let Some(queue) = queue {
                    queue.clone().refuse(call, error);
                }
            }
            Ticket::Attempt(attempt) => attempt.refuse(error),
        }
    }

    /// Returns what the levels say about the nodes on the path that are not known. It runs user code.
    pub(crate) fn specs(&self, path: &[FlowKey]) -> Vec<NodeSpec> {
        let known = self.lock().known(path);
        let missing = path.iter().zip(&self.levels).skip(known);
        missing
            .map(|(key, level)| NodeSpec {
                weight: level.weight_of(key),
                limits: level.limits_of(key),
                concurrency: level.concurrency_of(key),
            })
            .collect()
    }

    /// Gives a call a place in the tree. Returns `None` if a node on its path is not known, and not in `specs`: then
    /// [`specs`](Self::specs) are needed. At first there need be none.
    pub(crate) fn try_push(
        &self,
        call: &ScheduledCall,
        seq: Option<u64>,
        ticket: Ticket,
        specs: &[NodeSpec],
    ) -> (Option<Result<Pushed, PushError>>, Effects) {
        let specs = if specs.is_empty() { &self.plain_specs } else { specs };
        self.change(|core, now| {
            let pushed = core.push(call, seq, ticket, specs, now)?;
            Some(pushed.map(|(id, weight)| Pushed { id, weight }))
        })
    }

    /// Gives a further attempt of a call a place in the tree, and carries out what follows.
    pub(super) fn push_attempt(&self, attempt: &Arc<Attempt>) -> Result<usize, PushError> {
        let call = attempt.call();
        let mut specs = Vec::new();
        loop {
            let (pushed, effects) = self.try_push(call, Some(call.seq()), Ticket::Attempt(attempt.clone()), &specs);
            // An attempt may be eligible though it is not the first.
            self.carry_out(Effects {
                has_changed: true,
                ..effects
            });
            match pushed {
                Some(pushed) => return Ok(pushed?.id),
                None => specs = self.specs(&call.path),
            }
        }
    }

    /// Removes a call that waits, if it still does.
    pub(crate) fn cancel(&self, id: usize, ticket: &Ticket) {
        let ((), effects) = self.change(|core, now| core.cancel(id, ticket, now));
        self.carry_out(effects);
    }

    /// Returns what the eligible calls cost that go next, at most `most`, as far as it is known.
    pub(super) fn upcoming(&self, most: usize, eligible: Eligible) -> Vec<Cost> {
        let (costs, effects) = self.change(|core, now| core.upcoming(most, eligible, now));
        self.carry_out(Effects {
            has_changed: false,
            ..effects
        });
        costs
    }

    /// Sets whether the queue is to be told of each call that comes, and not only of one that goes first.
    pub(super) fn watch_arrivals(&self, watches: bool) {
        self.watches_arrivals.store(watches, Ordering::Relaxed);
    }

    /// Returns the cost of the eligible call that goes next.
    pub(super) fn head(&self, eligible: Eligible) -> Option<Cost> {
        let (head, effects) = self.change(|core, now| core.head(eligible, now));
        // Whoever asks is about to act on it.
        self.carry_out(Effects {
            has_changed: false,
            ..effects
        });
        head
    }

    /// Returns when the first of the attempts that wait could go.
    pub(super) fn next_attempt_at(&self) -> Option<Instant> {
        self.inspect(Core::next_attempt_at)
    }

    /// Begins the eligible call that goes next, if `take` takes what its cost needs, and otherwise one of
    /// [the calls behind it](Core::start). `take` is called under the lock.
    pub(super) fn start<G>(
        self: &Arc<Self>,
        among: usize,
        eligible: Eligible,
        take: impl FnMut(&Cost, &mut LazyNow) -> Option<G>,
    ) -> Option<StartedCall<G>> {
        let (started, effects) = self.change(|core, now| core.start(among, eligible, take, now));
        self.carry_out(Effects {
            has_changed: false,
            ..effects
        });
        let (started, running, ticket, granted) = started?;
        let in_flight = running.map(|running| CountedCall {
            shared: self.clone(),
            running: Some(running),
        });
        Some(StartedCall {
            started,
            in_flight: in_flight.map(|call| Box::new(call) as InFlight),
            ticket,
            granted,
        })
    }

    pub(super) fn settle(&self, started: Started, used: Cost, units: Units) {
        let ((), effects) = self.change(|core, now| core.settle(started, used, units, now));
        self.carry_out(effects);
    }

    /// Settles a call that was not made.
    pub(super) fn give_back(&self, started: Started) {
        self.settle(started, Cost::none(), 0);
    }

    fn lock(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
