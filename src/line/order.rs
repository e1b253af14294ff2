//! The order of a line: who is in it, whose turn it is, and what has to be done when that changes.
//!
//! All of it happens under the line's lock and runs no code but ours; whom to wake and what to drop is left to be done
//! once the lock is released.

use super::gate::{Gate, Opens};
use crate::clock::Reading;
use std::{collections::BTreeMap, mem, task::Waker, time::Duration};
use tokio::{
    runtime::{Handle, Id},
    time::Instant,
};

/// How long a waiter that was called may take to answer before the next one is called.
pub(super) const GRACE: Duration = Duration::from_millis(5);

pub(super) struct State<G: Gate> {
    pub(super) gate: G,
    next_number: u64,
    pub(super) waiting: BTreeMap<u64, Waiter<G::Ask>>,
    /// Passed over for not answering: they no longer hold up the line, and keep their number.
    pub(super) silent: BTreeMap<u64, Waiter<G::Ask>>,
    /// The first in line, if it has been called, and since when.
    pub(super) called: Option<(u64, Instant)>,
    /// When the driver should look again.
    pub(super) deadline: Option<Instant>,
    /// When the drivers will look next.
    pub(super) armed: Option<Instant>,
    /// One driver for each runtime that has waiters here.
    drivers: Vec<Id>,
    /// A waiter's runtime, for when a driver has to be started from outside any.
    runtime: Option<Handle>,
}

pub(super) struct Waiter<A> {
    ask: A,
    pub(super) waker: Waker,
}

/// What is to be done once the lock is released.
#[must_use]
#[derive(Default)]
pub(super) struct After {
    pub(super) wake: Option<Waker>,
    /// Nobody's any more. To drop a waker can drop a task, and with it another ticket of this line.
    pub(super) discard: Option<Waker>,
    pub(super) move_drivers: bool,
    pub(super) start_driver: Option<Handle>,
    /// The first in line waits for a moment in time.
    pub(super) needs_timer: bool,
}

// === impl State ===

impl<G: Gate> State<G> {
    pub(super) const fn new(gate: G) -> Self {
        Self {
            gate,
            next_number: 0,
            waiting: BTreeMap::new(),
            silent: BTreeMap::new(),
            called: None,
            deadline: None,
            armed: None,
            drivers: Vec::new(),
            runtime: None,
        }
    }

    /// Whether it is this one's turn.
    pub(super) fn turn(&mut self, number: Option<u64>, ask: &G::Ask, clock: &mut Reading) -> Result<bool, G::Refusal> {
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

    pub(super) fn try_pass(
        &mut self,
        number: Option<u64>,
        ask: &G::Ask,
        clock: &mut Reading,
    ) -> Result<bool, G::Refusal> {
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

    pub(super) fn wait(&mut self, number: &mut Option<u64>, ask: &G::Ask, waker: &Waker, clock: &mut Reading) -> After {
        let discard = match number.and_then(|number| self.waiting.get_mut(&number)) {
            Some(waiter) if waiter.waker.will_wake(waker) => None,
            Some(waiter) => Some(mem::replace(&mut waiter.waker, waker.clone())),
            None => {
                // First, because others' code runs here.
                let (ask, waker) = (ask.clone(), waker.clone());
                let new = *number.insert(self.next_number);
                self.next_number += 1;
                self.gate.joined(&ask);
                if self.drivers.is_empty() {
                    self.runtime = Handle::try_current().ok();
                }
                self.waiting.insert(new, Waiter { ask, waker });
                None
            }
        };
        After {
            discard,
            ..self.advance(clock)
        }
    }

    pub(super) fn leave(&mut self, number: Option<u64>, clock: &mut Reading) -> After {
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

    pub(super) fn dismiss(&mut self, driver: Option<Id>) {
        self.drivers.retain(|id| Some(*id) != driver);
        // What the others are armed for may have been told to this one alone.
        self.armed = None;
    }

    /// Calls the first in line if the gate is open for it, and passes over whoever was called and kept silent.
    pub(super) fn advance(&mut self, clock: &mut Reading) -> After {
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
