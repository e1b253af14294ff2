//! A counted thing behind a [line](super): permits to be in flight, places in a queue.
//!
//! While nobody waits, a unit is taken and given back by one atomic operation, without the line and its lock. The first
//! who has to wait bars that way, so that nobody can overtake; the last to leave the line opens it again.

use super::{Gate, Line, Opens, Ticket};
use crate::{
    alone::Alone,
    clock::Reading,
    error::Closed,
    sync::atomic::{AtomicUsize, Ordering},
};
use std::{
    fmt, mem,
    sync::Arc,
    task::{Context, Poll, ready},
};

/// So many of a thing, each of which one holder at a time can have.
#[derive(Clone)]
pub(crate) struct Count {
    shared: Arc<Shared>,
}

/// A stand in the line for one unit.
pub(crate) struct Turn {
    count: Count,
    /// Once it had to go to the line.
    ticket: Option<Ticket<Units>>,
}

/// One unit, given back when dropped.
pub(crate) struct Held {
    count: Count,
}

struct Shared {
    tally: Arc<Tally>,
    line: Line<Units>,
}

/// What can be told and changed without the line's lock.
struct Tally {
    total: AtomicUsize,
    /// How many units are held, doubled; and [`BARRED`], if units are to be had in line only.
    held: Alone<AtomicUsize>,
}

/// The gate of the line.
pub(crate) struct Units {
    tally: Arc<Tally>,
    waiting: usize,
    closed: bool,
}

const BARRED: usize = 1;
const UNIT: usize = 2;

// === impl Count ===

impl Count {
    pub(crate) fn new(total: usize) -> Self {
        let tally = Arc::new(Tally {
            total: AtomicUsize::new(total),
            held: Alone::default(),
        });
        let units = Units {
            tally: tally.clone(),
            waiting: 0,
            closed: false,
        };
        Self {
            shared: Arc::new(Shared {
                tally,
                line: Line::new(units),
            }),
        }
    }

    #[inline]
    pub(crate) fn turn(&self) -> Turn {
        Turn {
            count: self.clone(),
            ticket: None,
        }
    }

    pub(crate) fn total(&self) -> usize {
        self.tally().total.load(Ordering::Acquire)
    }

    pub(crate) fn held(&self) -> usize {
        self.tally().held.load(Ordering::Acquire) / UNIT
    }

    pub(crate) fn set_total(&self, total: usize) {
        self.shared
            .line
            .change(|units, _| units.tally.total.store(total, Ordering::Release));
    }

    /// Refuses everybody from now on, those who wait included.
    pub(crate) fn close(&self) {
        self.shared.line.change_for_all(|units, _| {
            units.closed = true;
            units.tally.bar();
        });
    }

    fn tally(&self) -> &Tally {
        &self.shared.tally
    }
}

impl fmt::Debug for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Count")
            .field("total", &self.total())
            .field("held", &self.held())
            .finish()
    }
}

// === impl Turn ===

impl Turn {
    /// Ready when there is a unit and it is this one's turn; takes nothing.
    #[inline]
    pub(crate) fn poll_turn(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Closed>> {
        if self.ticket.is_none() && self.count.tally().has_free() {
            return Poll::Ready(Ok(()));
        }
        self.go_to_line().poll_turn(&(), cx)
    }

    /// A unit, if there is one and it is this one's turn.
    #[inline]
    pub(crate) fn try_take(&mut self) -> Result<Option<Held>, Closed> {
        let taken = self.take_free() || self.go_to_line().try_pass(&())?;
        Ok(taken.then(|| self.held()))
    }

    /// Ready with a unit when it is this one's turn. The stand is used up by that.
    #[inline]
    pub(crate) fn poll_take(stand: &mut Option<Self>, cx: &mut Context<'_>) -> Poll<Result<Held, Closed>> {
        let turn = stand.as_mut().expect("a stand is not used twice");
        if !turn.take_free() {
            ready!(turn.go_to_line().poll_pass(&(), cx))?;
        }
        let turn = stand.take().expect("it was there just now");
        Poll::Ready(Ok(Held { count: turn.count }))
    }

    /// Leaves this stand to the caller, and a new one in its place.
    #[inline]
    pub(crate) fn replace(&mut self) -> Self {
        mem::replace(self, self.count.turn())
    }

    fn take_free(&self) -> bool {
        self.ticket.is_none() && self.count.tally().take_free()
    }

    fn go_to_line(&mut self) -> &mut Ticket<Units> {
        self.ticket.get_or_insert_with(|| self.count.shared.line.ticket())
    }

    fn held(&mut self) -> Held {
        // Whoever has taken a unit is not in line any more.
        self.ticket = None;
        Held {
            count: self.count.clone(),
        }
    }
}

/// Another waiter: a stand belongs to one waiter alone.
impl Clone for Turn {
    #[inline]
    fn clone(&self) -> Self {
        self.count.turn()
    }
}

impl fmt::Debug for Turn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Turn").field("ticket", &self.ticket).finish()
    }
}

// === impl Held ===

impl Drop for Held {
    #[inline]
    fn drop(&mut self) {
        if self.count.tally().give_back() {
            // Somebody may be waiting for it.
            self.count.shared.line.change(|_, _| ());
        }
    }
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Held")
    }
}

// === impl Tally ===

impl Tally {
    /// Whether there is a unit to be had without the line.
    fn has_free(&self) -> bool {
        let held = self.held.load(Ordering::Acquire);
        held & BARRED == 0 && held / UNIT < self.total.load(Ordering::Acquire)
    }

    /// Takes a unit without the line, if that is not barred.
    fn take_free(&self) -> bool {
        self.take(|held| held & BARRED == 0)
    }

    fn take(&self, may: impl Fn(usize) -> bool) -> bool {
        let total = self.total.load(Ordering::Acquire);
        let take = |held| (may(held) && held / UNIT < total).then_some(held + UNIT);
        self.held
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, take)
            .is_ok()
    }

    /// Returns whether the line has to be told.
    fn give_back(&self) -> bool {
        self.held.fetch_sub(UNIT, Ordering::AcqRel) & BARRED != 0
    }

    fn bar(&self) {
        self.held.fetch_or(BARRED, Ordering::AcqRel);
    }

    fn unbar(&self) {
        self.held.fetch_and(!BARRED, Ordering::AcqRel);
    }
}

// === impl Units ===

impl Gate for Units {
    type Ask = ();
    type Refusal = Closed;

    fn refuses(&self, (): &()) -> Option<Closed> {
        self.closed.then(Closed::new)
    }

    fn opens(&mut self, (): &(), _: &mut Reading) -> Opens {
        if self.tally.held.load(Ordering::Acquire) / UNIT < self.tally.total.load(Ordering::Acquire) {
            Opens::Now
        } else {
            Opens::OnReturn
        }
    }

    fn pass(&mut self, (): &(), _waited: bool, _: &mut Reading) -> bool {
        self.tally.take(|_| true)
    }

    fn joined(&mut self, (): &()) {
        self.waiting += 1;
        // The line looks at the gate once more after this: what was given back before is seen then, and who gives
        // something back from now on tells the line.
        self.tally.bar();
    }

    fn left(&mut self, (): &()) {
        self.waiting -= 1;
        if self.waiting == 0 && !self.closed {
            self.tally.unbar();
        }
    }
}
