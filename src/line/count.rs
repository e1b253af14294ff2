//! A counted thing behind a [line](super): permits to be in flight, places in a queue.

use super::{Clock, Gate, Line, Opens, Ticket};
use crate::error::Closed;
use std::{
    fmt,
    task::{Context, Poll},
};

/// So many of a thing, each of which one holder at a time can have.
#[derive(Clone, Debug)]
pub(crate) struct Count {
    line: Line<Units>,
}

/// A stand in the line for one unit.
#[derive(Clone, Debug)]
pub(crate) struct Turn {
    ticket: Ticket<Units>,
}

/// One unit, given back when dropped.
pub(crate) struct Held {
    count: Count,
}

pub(crate) struct Units {
    total: usize,
    held: usize,
    closed: bool,
}

// === impl Count ===

impl Count {
    pub(crate) fn new(total: usize) -> Self {
        Self {
            line: Line::new(Units {
                total,
                held: 0,
                closed: false,
            }),
        }
    }

    pub(crate) fn turn(&self) -> Turn {
        Turn {
            ticket: self.line.ticket(),
        }
    }

    pub(crate) fn total(&self) -> usize {
        self.line.peek(|units, _| units.total)
    }

    pub(crate) fn held(&self) -> usize {
        self.line.peek(|units, _| units.held)
    }

    pub(crate) fn set_total(&self, total: usize) {
        self.line.change(|units, _| units.total = total);
    }

    /// Refuses everybody from now on, those who wait included.
    pub(crate) fn close(&self) {
        self.line.change_for_all(|units, _| units.closed = true);
    }
}

// === impl Turn ===

impl Turn {
    /// Ready when there is a unit and it is this one's turn; takes nothing.
    pub(crate) fn poll_turn(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Closed>> {
        self.ticket.poll_turn(&(), cx)
    }

    /// A unit, if there is one and it is this one's turn.
    pub(crate) fn try_take(&mut self) -> Result<Option<Held>, Closed> {
        let taken = self.ticket.try_pass(&())?;
        Ok(taken.then(|| Held { count: self.count() }))
    }

    fn count(&self) -> Count {
        Count {
            line: self.ticket.line(),
        }
    }

    pub(crate) fn poll_take(&mut self, cx: &mut Context<'_>) -> Poll<Result<Held, Closed>> {
        self.ticket.poll_pass(&(), cx).map_ok(|()| Held { count: self.count() })
    }
}

// === impl Held ===

impl Drop for Held {
    fn drop(&mut self) {
        self.count.line.change(|units, _| units.held -= 1);
    }
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Held")
    }
}

// === impl Units ===

impl Gate for Units {
    type Ask = ();
    type Refusal = Closed;

    fn refuses(&self, (): &()) -> Option<Closed> {
        self.closed.then(Closed::new)
    }

    fn opens(&mut self, (): &(), _: &mut Clock) -> Opens {
        if self.held < self.total {
            Opens::Now
        } else {
            Opens::OnReturn
        }
    }

    fn pass(&mut self, (): &(), _waited: bool, _: &mut Clock) {
        self.held += 1;
    }
}
