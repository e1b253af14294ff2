//! The waiting line: one fair way to wait for something limited.
//!
//! Places in a queue, permits to be in flight and tokens in a bucket are handed out by the same rules:
//!
//! 1. **First come, first served.** Nobody who arrives later goes first.
//! 2. **Who waits holds nothing.** Whoever is next is *called* (woken); only when it answers (is polled) does it take
//!    what it came for. So a waiter that is dropped has nothing to give back.
//! 3. **One waiter is woken at a time**, and only when there is something for it.
//! 4. **Silence stalls nobody.** A waiter that is called and does not answer within [`GRACE`](order::GRACE) is passed over. It keeps
//!    its number, and goes first as soon as it answers.
//!
//! What is limited, and when there is some of it, is the [`Gate`]'s to say; the line only knows about [order].
//!
//! A task of our own, the line's [driver], keeps the time: it calls the first in line when the gate opens, and
//! passes over the silent. It lives only while somebody waits for a moment in time.

pub(crate) mod count;
mod driver;
mod gate;
#[cfg(all(test, tower_outbound_loom))]
mod interleavings;
mod order;

pub(crate) use gate::{Gate, Opens};

use crate::{clock::Reading, guard};
use driver::Shared;
use std::{
    fmt,
    sync::Arc,
    task::{Context, Poll},
};
use tokio::time::Instant;

/// A line in front of a gate.
pub(crate) struct Line<G: Gate> {
    shared: Arc<Shared<G>>,
}

/// One waiter's hold on the line. It has no number until it has to wait.
pub(crate) struct Ticket<G: Gate> {
    shared: Arc<Shared<G>>,
    number: Option<u64>,
}

// === impl Line ===

impl<G: Gate> Line<G> {
    pub(crate) fn new(gate: G) -> Self {
        Self {
            shared: Arc::new(Shared::new(gate)),
        }
    }

    pub(crate) fn ticket(&self) -> Ticket<G> {
        Ticket {
            shared: self.shared.clone(),
            number: None,
        }
    }

    /// Passes if that is possible at once and without overtaking anybody.
    pub(crate) fn try_pass(&self, ask: &G::Ask, mut clock: Reading) -> Result<bool, G::Refusal> {
        // Nobody's turn has come by a newcomer's passing: there is nobody in line.
        self.shared.lock().try_pass(None, ask, &mut clock)
    }

    /// Looks at the gate.
    pub(crate) fn peek<T>(&self, look: impl FnOnce(&mut G, &mut Reading) -> T) -> T {
        look(&mut self.shared.lock().gate, &mut Reading::default())
    }

    /// Changes the gate in a way that matters to the first in line only, such as giving something back.
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut G, &mut Reading) -> T) -> T {
        let mut clock = Reading::default();
        let mut state = self.shared.lock();
        let done = change(&mut state.gate, &mut clock);
        if !state.waiting.is_empty() {
            let after = state.advance(&mut clock);
            drop(state);
            self.shared.finish(after);
        }
        done
    }

    /// Changes the gate in a way that matters to everybody: each waiter looks again.
    pub(crate) fn change_for_all<T>(&self, change: impl FnOnce(&mut G, &mut Reading) -> T) -> T {
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
        wakers.into_iter().for_each(guard::wake);
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
    pub(crate) fn line(&self) -> Line<G> {
        Line {
            shared: self.shared.clone(),
        }
    }

    /// Ready when it is this waiter's turn. Takes nothing; the turn lapses if it is not [used](Self::poll_pass) within
    /// [`GRACE`](order::GRACE).
    pub(crate) fn poll_turn(&mut self, ask: &G::Ask, cx: &mut Context<'_>) -> Poll<Result<(), G::Refusal>> {
        self.poll(ask, cx, false, Reading::default())
    }

    /// Ready when this waiter has taken what it asks for.
    pub(crate) fn poll_pass(&mut self, ask: &G::Ask, cx: &mut Context<'_>) -> Poll<Result<(), G::Refusal>> {
        self.poll(ask, cx, true, Reading::default())
    }

    /// The same, with a reading of the clock for who comes anew. Who waits is admitted by the clock as it is then.
    pub(crate) fn poll_pass_at(
        &mut self,
        ask: &G::Ask,
        cx: &mut Context<'_>,
        now: Instant,
    ) -> Poll<Result<(), G::Refusal>> {
        let clock = match self.number {
            Some(_) => Reading::default(),
            None => Reading::at(now),
        };
        self.poll(ask, cx, true, clock)
    }

    /// Passes if it is this one's turn; does not join the line otherwise.
    pub(crate) fn try_pass(&mut self, ask: &G::Ask) -> Result<bool, G::Refusal> {
        let mut clock = Reading::default();
        let mut state = self.shared.lock();
        let passed = state.try_pass(self.number, ask, &mut clock);
        if let Ok(false) = passed {
            return passed;
        }
        let after = state.leave(self.number.take(), &mut clock);
        drop(state);
        self.shared.finish(after);
        passed
    }

    fn poll(
        &mut self,
        ask: &G::Ask,
        cx: &mut Context<'_>,
        pass: bool,
        mut clock: Reading,
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
        self.shared.check_timer(&after);
        self.shared.finish(after);
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
            let after = self.shared.lock().leave(self.number, &mut Reading::default());
            self.shared.finish(after);
        }
    }
}

impl<G: Gate> fmt::Debug for Ticket<G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ticket").field("number", &self.number).finish()
    }
}
