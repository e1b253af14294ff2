//! [`Fair`]: the fair order of the children of one node.
//!
//! # The order
//!
//! Each child has a *pass*: how far it has got with its share. A child of weight `w` whose call costs `c` gets on by
//! `c / w` when the call begins. The child whose call would *end* first goes next: the one with the least `pass + c / w`
//! (weighted fair queueing; Kubernetes' priority and fairness orders in the same way). So a child that has used less of
//! its share goes before one that has used more, and a small call need not wait behind a large one.
//!
//! A child that has had nothing to do must not save up for it: it would stop all others when it comes back. So there is a
//! *virtual now*, the pass that the children have got to on the whole, and a child that becomes ready begins there, if it
//! was behind. The virtual now gets on with each call by the call's cost divided by the weights of all that were ready.
//! (A virtual now that is the pass of the child that went last, as in start-time fair queueing, starves: newcomers would
//! enter there for ever, before a child whose calls are larger.)
//!
//! # Estimates
//!
//! A call that is charged an estimate is corrected when its true cost is known: the pass of its child by the difference,
//! while the virtual now gets on by the true cost only then. But it does not get beyond the last of the ready children by
//! more than this call, so that calls that take long do not push it ahead of everybody who waits.

use std::{collections::BTreeSet, num::NonZeroU32};

/// What a child's pass, and the cost of a call, are counted in: 2^-20 ns of the whole time of the limits.
pub(super) type Units = i128;

/// The largest cost of one call. A sum of 2^27 of them fits into [`Units`].
pub(super) const MAX_COST: Units = 1 << 100;

/// A child that is ready, as it stands in the order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ready {
    /// Where the child would be after its next call.
    pub(super) end: Units,
    /// The sequence number of that call, which decides between children that would end at the same time.
    pub(super) seq: u64,
    pub(super) child: usize,
}

/// What one call was charged at one level of the tree.
#[derive(Clone, Copy, Debug)]
pub(super) struct Charge {
    /// By how much the pass of the child has got on.
    pass: Units,
    weight: NonZeroU32,
    /// The sum of the weights of the children that were ready.
    weights: u64,
}

/// The children of one node that are ready, and those that are remembered because they have got ahead.
#[derive(Debug, Default)]
pub(super) struct Fair {
    now: Units,
    /// The first of the ready children. It is kept outside the set, so that a single child never touches the set.
    first: Option<Ready>,
    others: BTreeSet<Ready>,
    weights: u64,
    /// The idle children that have got further than the virtual now, by their pass.
    owing: BTreeSet<(Units, usize)>,
    /// In tests, whether the virtual now is the pass of the last call, to show what would be wrong.
    #[cfg(test)]
    pub(super) is_last_served: bool,
}

impl Fair {
    pub(super) const fn first(&self) -> Option<Ready> {
        self.first
    }

    /// Returns the children that are ready, in their order.
    pub(super) fn ready(&self) -> impl Iterator<Item = Ready> + '_ {
        self.first.into_iter().chain(self.others.iter().copied())
    }

    pub(super) const fn is_any_ready(&self) -> bool {
        self.first.is_some()
    }

    /// Returns where a child begins that becomes ready, and had got to `pass` before.
    pub(super) fn enter(&self, pass: Units) -> Units {
        pass.max(self.now)
    }

    pub(super) fn insert(&mut self, child: Ready, weight: u32) {
        self.weights += u64::from(weight);
        match self.first {
            None => self.first = Some(child),
            Some(first) if child < first => {
                self.others.insert(first);
                self.first = Some(child);
            }
            Some(_) => {
                self.others.insert(child);
            }
        }
    }

    pub(super) fn remove(&mut self, child: Ready, weight: u32) {
        self.weights -= u64::from(weight);
        if self.first == Some(child) {
            self.first = self.others.pop_first();
        } else {
            self.others.remove(&child);
        }
    }

    /// Charges a call that is estimated to cost `cost` to the ready child, whose pass is `pass`. Returns its new pass.
    pub(super) fn charge(&mut self, pass: &mut Units, weight: u32, cost: Units) -> Charge {
        self.now = self.now.max(*pass);
        let charge = Charge {
            pass: share(cost, weight),
            weight: NonZeroU32::new(weight).unwrap_or(NonZeroU32::MIN),
            weights: self.weights.max(u64::from(weight)),
        };
        *pass = pass.saturating_add(charge.pass);
        charge
    }

    /// Corrects a charge: the call has cost `used`. Returns whether that changes the pass.
    pub(super) fn settle(&mut self, pass: &mut Units, charge: Charge, used: Units) -> bool {
        let own = share(used, charge.weight.get());
        *pass = pass.saturating_add(own - charge.pass);
        let has_changed = own != charge.pass;
        #[cfg(test)]
        if self.is_last_served {
            return has_changed;
        }
        let last = self
            .others
            .last()
            .copied()
            .or(self.first)
            .map_or(*pass, |last| last.end);
        let reached = self.now.saturating_add(used / Units::from(charge.weights));
        self.now = self.now.max(reached.min(last.saturating_add(own)));
        has_changed
    }

    /// Corrects the sum of the weights: a ready child whose weight was `old` has `new`. The child must be put back at its
    /// new place.
    pub(super) fn change_weight(&mut self, old: u32, new: u32) {
        self.weights = self.weights + u64::from(new) - u64::from(old);
    }

    /// Returns how far a child has got ahead of the virtual now; negative if it is behind.
    pub(super) fn lag(&self, pass: Units) -> Units {
        pass.saturating_sub(self.now)
    }

    /// Remembers an idle child that has got further than the virtual now. Returns whether it has: otherwise it can be
    /// forgotten, since it would begin where a new one does.
    pub(super) fn owe(&mut self, child: usize, pass: Units) -> bool {
        let is_ahead = pass > self.now;
        if is_ahead {
            self.owing.insert((pass, child));
        }
        is_ahead
    }

    /// Forgets that an idle child has got ahead, because it is no longer idle.
    pub(super) fn return_from_owing(&mut self, child: usize, pass: Units) {
        self.owing.remove(&(pass, child));
    }

    /// Returns a child that was remembered, and need not be any more.
    pub(super) fn pop_repaid(&mut self) -> Option<usize> {
        let (pass, _) = *self.owing.first()?;
        if pass > self.now {
            return None;
        }
        self.owing.pop_first().map(|(_, child)| child)
    }

    /// Called when no child is ready, and no call is out that may still be corrected: nobody has a claim against
    /// another any more, so all that was remembered is repaid.
    pub(super) fn end_busy_period(&mut self) {
        if let Some((greatest, _)) = self.owing.last() {
            self.now = self.now.max(*greatest);
        }
    }
}

#[cfg(test)]
impl Fair {
    /// Returns the ready children in their order, the sum of their weights as it is kept, and the children that owe.
    pub(super) fn members(&self) -> (Vec<Ready>, u64, Vec<(Units, usize)>) {
        (
            self.ready().collect(),
            self.weights,
            self.owing.iter().copied().collect(),
        )
    }
}

/// Returns `cost / weight`, rounded up.
fn share(cost: Units, weight: u32) -> Units {
    // Division is much faster with 64 bits, which most costs have.
    match u64::try_from(cost) {
        Ok(cost) => Units::from(cost.div_ceil(u64::from(weight))),
        Err(_) => {
            let weight = Units::from(weight);
            cost / weight + Units::from(cost % weight != 0)
        }
    }
}

/// Returns where a child stands in the order whose next call costs `cost`.
pub(super) fn end(pass: Units, weight: u32, cost: Units) -> Units {
    pass.saturating_add(share(cost, weight))
}
