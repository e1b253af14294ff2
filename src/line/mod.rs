//! The waiting line: one fair way to wait for something limited.
//!
//! Places in a queue, permits to be in flight and tokens in a bucket are handed out by the same rules:
//!
//! 1. **First come, first served.** Nobody who arrives later goes first.
//! 2. **Who waits holds nothing.** Whoever is next is *called* (woken); only when it answers (is polled) does it take
//!    what it came for. So a waiter that is dropped has nothing to give back.
//! 3. **One waiter is woken at a time**, and only when there is something for it.
//! 4. **Silence stalls nobody.** A waiter that is called and does not answer within [`GRACE`] is passed over. It keeps
//!    its number, and goes first as soon as it answers.
//!
//! What is limited, and when there is some of it, is the [`Gate`]'s to say; this file only knows about order.
//!
//! A task of our own, the line's [driver], keeps the time: it calls the first in line when the gate opens, and
//! passes over the silent. It lives only while somebody waits for a moment in time.

pub(crate) mod count;
mod driver;

use driver::Driver;
use std::{
    collections::BTreeMap,
    fmt, mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
    time::Duration,
};
use tokio::{
    runtime::{Handle, Id},
    sync::Notify,
    time::Instant,
};

/// How long a waiter that was called may take to answer before the next one is called.
pub(crate) const GRACE: Duration = Duration::from_millis(5);

/// What stands at the head of a line and lets one through after the other.
pub(crate) trait Gate: Send + 'static {
    /// What a waiter asks for.
    type Ask: Clone + Send + 'static;
    /// Why an ask can never be met.
    type Refusal: PartialEq;

    /// Whether `ask` can never be met.
    fn refuses(&self, ask: &Self::Ask) -> Option<Self::Refusal>;

    /// When `ask` can be met, if it is the next one.
    fn opens(&mut self, ask: &Self::Ask, clock: &mut Clock) -> Opens;

    /// Takes what was asked for, if it is still there. Only called when [`opens`](Gate::opens) just said `Now`; that
    /// can only have changed if the gate also lets others through while nobody is in line.
    fn pass(&mut self, ask: &Self::Ask, waited: bool, clock: &mut Clock) -> bool;

    /// Nobody was waiting until now.
    fn idle(&mut self, _clock: &mut Clock) {}

    /// Nobody is in line: takes what is asked for if it is there. The way of most, so a gate may know a shorter one.
    fn pass_at_once(&mut self, ask: &Self::Ask, clock: &mut Clock) -> Result<bool, Self::Refusal> {
        if let Some(refusal) = self.refuses(ask) {
            return Err(refusal);
        }
        self.idle(clock);
        Ok(self.opens(ask, clock) == Opens::Now && self.pass(ask, false, clock))
    }

    /// `ask` has joined the line.
    fn joined(&mut self, _ask: &Self::Ask) {}

    /// `ask` has left the line, whether it passed or not.
    fn left(&mut self, _ask: &Self::Ask) {}
}

/// When the gate lets somebody through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Opens {
    Now,
    At(Instant),
    /// When somebody gives something back.
    OnReturn,
}

/// Tokio's clock, read once at most and only by those who need it: a read costs more than the rest of a decision.
#[derive(Debug, Default)]
pub(crate) struct Clock {
    now: Option<Instant>,
    /// Since the gate's epoch.
    nanos: Option<u64>,
}

/// A line in front of a gate.
pub(crate) struct Line<G: Gate> {
    shared: Arc<Shared<G>>,
}

/// One waiter's hold on the line. It has no number until it has to wait.
pub(crate) struct Ticket<G: Gate> {
    shared: Arc<Shared<G>>,
    number: Option<u64>,
}

struct Shared<G: Gate> {
    state: Mutex<State<G>>,
    /// Tells the drivers that there is something earlier to do, or nothing at all.
    moved: Notify,
}

struct State<G: Gate> {
    gate: G,
    next_number: u64,
    waiting: BTreeMap<u64, Waiter<G::Ask>>,
    /// Passed over for not answering: they no longer hold up the line, and keep their number.
    silent: BTreeMap<u64, Waiter<G::Ask>>,
    /// The first in line, if it has been called, and since when.
    called: Option<(u64, Instant)>,
    /// When the driver should look again.
    deadline: Option<Instant>,
    /// When the drivers will look next.
    armed: Option<Instant>,
    /// One driver for each runtime that has waiters here.
    drivers: Vec<Id>,
    /// A waiter's runtime, for when a driver has to be started from outside any.
    runtime: Option<Handle>,
}

struct Waiter<A> {
    ask: A,
    waker: Waker,
}

/// What is to be done once the lock is released.
#[must_use]
#[derive(Default)]
struct After {
    wake: Option<Waker>,
    /// Nobody's any more. To drop a waker can drop a task, and with it another ticket of this line.
    discard: Option<Waker>,
    move_drivers: bool,
    start_driver: Option<Handle>,
    /// The first in line waits for a moment in time.
    needs_timer: bool,
}

// === impl Clock ===

impl Clock {
    /// A reading taken before, so that nobody else waits for the lock meanwhile.
    pub(crate) const fn read_at(now: Instant) -> Self {
        Self {
            now: Some(now),
            nanos: None,
        }
    }

    pub(crate) fn now(&mut self) -> Instant {
        *self.now.get_or_insert_with(Instant::now)
    }

    /// Now, in nanoseconds since an instant of the gate's own, always the same one.
    pub(crate) fn nanos_since(&mut self, epoch: Instant) -> u64 {
        let now = self.now();
        *self.nanos.get_or_insert_with(|| nanos_between(epoch, now))
    }
}

pub(crate) fn nanos_between(start: Instant, end: Instant) -> u64 {
    let between = end.saturating_duration_since(start);
    between
        .as_secs()
        .saturating_mul(1_000_000_000)
        .saturating_add(between.subsec_nanos().into())
}

// === impl Line ===

impl<G: Gate> Line<G> {
    pub(crate) fn new(gate: G) -> Self {
        let state = State {
            gate,
            next_number: 0,
            waiting: BTreeMap::new(),
            silent: BTreeMap::new(),
            called: None,
            deadline: None,
            armed: None,
            drivers: Vec::new(),
            runtime: None,
        };
        Self {
            shared: Arc::new(Shared {
                state: Mutex::new(state),
                moved: Notify::new(),
            }),
        }
    }

    pub(crate) fn ticket(&self) -> Ticket<G> {
        Ticket {
            shared: self.shared.clone(),
            number: None,
        }
    }

    /// Passes if that is possible at once and without overtaking anybody.
    pub(crate) fn try_pass(&self, ask: &G::Ask, mut clock: Clock) -> Result<bool, G::Refusal> {
        // Nobody's turn has come by a newcomer's passing: there is nobody in line.
        self.shared.lock().try_pass(None, ask, &mut clock)
    }

    /// Looks at the gate.
    pub(crate) fn peek<T>(&self, look: impl FnOnce(&mut G, &mut Clock) -> T) -> T {
        look(&mut self.shared.lock().gate, &mut Clock::default())
    }

    /// Changes the gate in a way that matters to the first in line only, such as giving something back.
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut G, &mut Clock) -> T) -> T {
        let mut clock = Clock::default();
        let mut state = self.shared.lock();
        let done = change(&mut state.gate, &mut clock);
        if !state.waiting.is_empty() {
            let after = state.advance(&mut clock);
            drop(state);
            after.run(&self.shared);
        }
        done
    }

    /// Changes the gate in a way that matters to everybody: each waiter looks again.
    pub(crate) fn change_for_all<T>(&self, change: impl FnOnce(&mut G, &mut Clock) -> T) -> T {
        let done = self.change(change);
        let wakers: Vec<_> = {
            let state = self.shared.lock();
            state
                .waiting
                .values()
                .chain(state.silent.values())
                .map(|waiter| waiter.waker.clone())
                .collect()
        };
        wakers.into_iter().for_each(Waker::wake);
        done
    }
}

impl<G: Gate> Clone for Line<G> {
    fn clone(&self) -> Self {
        Self {
            shared: self.shared.clone(),
        }
    }
}

impl<G: Gate> fmt::Debug for Line<G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Line")
            .field("waiting", &self.shared.lock().waiting.len())
            .finish()
    }
}

// === impl Ticket ===

impl<G: Gate> Ticket<G> {
    /// Ready when it is this waiter's turn. Takes nothing; the turn lapses if it is not [used](Self::poll_pass) within
    /// [`GRACE`].
    pub(crate) fn poll_turn(&mut self, ask: &G::Ask, cx: &mut Context<'_>) -> Poll<Result<(), G::Refusal>> {
        self.poll(ask, cx, false, Clock::default())
    }

    /// Ready when this waiter has taken what it asks for.
    pub(crate) fn poll_pass(&mut self, ask: &G::Ask, cx: &mut Context<'_>) -> Poll<Result<(), G::Refusal>> {
        self.poll(ask, cx, true, Clock::default())
    }

    /// The same, with a reading of the clock for who comes anew. Who waits is admitted by the clock as it is then.
    pub(crate) fn poll_pass_at(
        &mut self,
        ask: &G::Ask,
        cx: &mut Context<'_>,
        now: Instant,
    ) -> Poll<Result<(), G::Refusal>> {
        let clock = match self.number {
            Some(_) => Clock::default(),
            None => Clock::read_at(now),
        };
        self.poll(ask, cx, true, clock)
    }

    /// Passes if it is this one's turn; does not join the line otherwise.
    pub(crate) fn try_pass(&mut self, ask: &G::Ask) -> Result<bool, G::Refusal> {
        let mut clock = Clock::default();
        let mut state = self.shared.lock();
        let passed = state.try_pass(self.number, ask, &mut clock);
        if let Ok(false) = passed {
            return passed;
        }
        let after = state.leave(self.number.take(), &mut clock);
        drop(state);
        after.run(&self.shared);
        passed
    }

    fn poll(
        &mut self,
        ask: &G::Ask,
        cx: &mut Context<'_>,
        pass: bool,
        mut clock: Clock,
    ) -> Poll<Result<(), G::Refusal>> {
        let mut state = self.shared.lock();
        let done = if pass {
            state.try_pass(self.number, ask, &mut clock)
        } else {
            state.turn(self.number, ask, &mut clock)
        };
        if self.number.is_none() && done != Ok(false) {
            // Who need not wait was never in line.
            return Poll::Ready(done.map(drop));
        }
        let after = match done {
            Ok(false) => state.wait(&mut self.number, ask, cx.waker(), &mut clock),
            Ok(true) if !pass => {
                // It keeps its number. The turn it has not used counts from now, if it does not count yet.
                if let Some(number) = self.number {
                    if state.called.is_none_or(|(called, _)| called != number) {
                        state.called = Some((number, clock.now()));
                    }
                }
                state.advance(&mut clock)
            }
            Ok(true) | Err(_) => state.leave(self.number.take(), &mut clock),
        };
        drop(state);
        after.check_timer(&self.shared);
        after.run(&self.shared);
        match done {
            Ok(true) => Poll::Ready(Ok(())),
            Ok(false) => Poll::Pending,
            Err(refusal) => Poll::Ready(Err(refusal)),
        }
    }
}

/// Another waiter: a number belongs to one waiter alone.
impl<G: Gate> Clone for Ticket<G> {
    fn clone(&self) -> Self {
        Self {
            shared: self.shared.clone(),
            number: None,
        }
    }
}

impl<G: Gate> Drop for Ticket<G> {
    fn drop(&mut self) {
        if self.number.is_some() {
            let after = self.shared.lock().leave(self.number, &mut Clock::default());
            after.run(&self.shared);
        }
    }
}

impl<G: Gate> fmt::Debug for Ticket<G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ticket").field("number", &self.number).finish()
    }
}

// === impl Shared ===

impl<G: Gate> Shared<G> {
    /// No code but ours runs under this lock, so a poisoned one is as good as any.
    fn lock(&self) -> MutexGuard<'_, State<G>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl State ===

impl<G: Gate> State<G> {
    /// Whether it is this one's turn.
    fn turn(&mut self, number: Option<u64>, ask: &G::Ask, clock: &mut Clock) -> Result<bool, G::Refusal> {
        if let Some(refusal) = self.gate.refuses(ask) {
            return Err(refusal);
        }
        if !self.is_first(number) {
            return Ok(false);
        }
        if number.is_none() {
            self.gate.idle(clock);
        }
        Ok(self.gate.opens(ask, clock) == Opens::Now)
    }

    fn try_pass(&mut self, number: Option<u64>, ask: &G::Ask, clock: &mut Clock) -> Result<bool, G::Refusal> {
        if number.is_none() && self.waiting.is_empty() {
            return self.gate.pass_at_once(ask, clock);
        }
        Ok(self.turn(number, ask, clock)? && self.gate.pass(ask, true, clock))
    }

    /// Whether nobody stands before this number, or before a newcomer without one.
    fn is_first(&mut self, number: Option<u64>) -> bool {
        let Some(number) = number else {
            return self.waiting.is_empty();
        };
        if let Some(back) = self.silent.remove(&number) {
            self.waiting.insert(number, back);
        }
        self.waiting
            .first_key_value()
            .is_some_and(|(first, _)| *first == number)
    }

    fn wait(&mut self, number: &mut Option<u64>, ask: &G::Ask, waker: &Waker, clock: &mut Clock) -> After {
        let discard = match number.and_then(|number| self.waiting.get_mut(&number)) {
            Some(waiter) if waiter.waker.will_wake(waker) => None,
            Some(waiter) => Some(mem::replace(&mut waiter.waker, waker.clone())),
            None => {
                let new = *number.insert(self.next_number);
                self.next_number += 1;
                self.gate.joined(ask);
                if self.drivers.is_empty() {
                    self.runtime = Handle::try_current().ok();
                }
                let (ask, waker) = (ask.clone(), waker.clone());
                self.waiting.insert(new, Waiter { ask, waker });
                None
            }
        };
        After {
            discard,
            ..self.advance(clock)
        }
    }

    fn leave(&mut self, number: Option<u64>, clock: &mut Clock) -> After {
        let Some(number) = number else {
            return After::default();
        };
        let waiter = self.waiting.remove(&number).or_else(|| self.silent.remove(&number));
        let discard = waiter.map(|waiter| {
            self.gate.left(&waiter.ask);
            waiter.waker
        });
        After {
            discard,
            ..self.advance(clock)
        }
    }

    fn dismiss(&mut self, driver: Option<Id>) {
        self.drivers.retain(|id| Some(*id) != driver);
        // What the others are armed for may have been told to this one alone.
        self.armed = None;
    }

    /// Calls the first in line if the gate is open for it, and passes over whoever was called and kept silent.
    fn advance(&mut self, clock: &mut Clock) -> After {
        let mut after = After::default();
        self.deadline = loop {
            let Some((&first, waiter)) = self.waiting.first_key_value() else {
                self.called = None;
                break None;
            };
            match self.gate.opens(&waiter.ask, clock) {
                Opens::Now => match self.called {
                    Some((called, since)) if called == first => {
                        let answer_by = since + GRACE;
                        if clock.now() < answer_by {
                            break Some(answer_by);
                        }
                        self.silent.extend(self.waiting.pop_first());
                        self.called = None;
                    }
                    _ => {
                        let now = clock.now();
                        self.called = Some((first, now));
                        after.wake = Some(waiter.waker.clone());
                        break Some(now + GRACE);
                    }
                },
                Opens::At(instant) => {
                    self.called = None;
                    after.needs_timer = true;
                    break Some(instant);
                }
                Opens::OnReturn => {
                    self.called = None;
                    break None;
                }
            }
        };
        match (self.deadline, self.armed) {
            (Some(deadline), Some(armed)) => after.move_drivers = deadline < armed,
            (Some(_), None) => after.move_drivers = true,
            // A driver that will look soon finds out by itself that it is no longer needed.
            (None, Some(armed)) => {
                after.move_drivers = self.waiting.is_empty() && armed > clock.now() + GRACE;
            }
            (None, None) => after.move_drivers = self.waiting.is_empty() && !self.drivers.is_empty(),
        }
        if self.deadline.is_some() {
            let runtime = Handle::try_current().ok().or_else(|| self.runtime.clone());
            if let Some(runtime) = runtime.filter(|runtime| !self.drivers.contains(&runtime.id())) {
                self.drivers.push(runtime.id());
                after.start_driver = Some(runtime);
            }
        }
        if self.waiting.is_empty() {
            self.runtime = None;
        }
        after
    }
}

// === impl After ===

impl After {
    /// Panics here, in the waiter, where it is seen, if there is no timer that could end the waiting.
    fn check_timer<G: Gate>(&self, shared: &Arc<Shared<G>>) {
        if self.needs_timer && (self.start_driver.is_some() || Handle::try_current().is_err()) {
            let registered = self
                .start_driver
                .as_ref()
                .map(|runtime| Driver::new(shared.clone(), runtime));
            drop(tokio::time::sleep(Duration::ZERO));
            if let Some(driver) = registered {
                driver.forget();
            }
        }
    }

    fn run<G: Gate>(self, shared: &Arc<Shared<G>>) {
        if let Some(runtime) = self.start_driver {
            Driver::new(shared.clone(), &runtime).start(&runtime);
        }
        if self.move_drivers {
            shared.moved.notify_waiters();
        }
        if let Some(waker) = self.wake {
            waker.wake();
        }
        drop(self.discard);
    }
}
