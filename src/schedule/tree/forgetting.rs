//! Forgetting nodes, when that changes nothing.

use super::{super::fair::Fair, ROOT, Tree, node::Rest};
use crate::clock::LazyNow;
use std::hash::Hash;

/// The most nodes that one look at those which may be full by now forgets. More than one path has, so that they get fewer
/// even if each call makes a path of its own.
const MAX_FORGOTTEN: usize = 8;

/// Which nodes a tree forgets, in tests: the other two show what would be wrong.
#[cfg(test)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::schedule) enum Forgetting {
    #[default]
    WhenNothingChanges,
    Never,
    /// At once when nothing waits or is open.
    TooEarly,
}

impl<K: Clone + Eq + Hash, T> Tree<K, T> {
    /// Takes a node out of those that are kept only to be remembered, because a call comes.
    pub(super) fn wake(&mut self, id: usize) {
        let node = &mut self.nodes[id];
        match std::mem::replace(&mut node.rest, Rest::Busy) {
            Rest::Busy | Rest::Parent => {}
            Rest::Owing => {
                let (parent, pass) = (node.parent, node.pass);
                if let Some(order) = self.order_of(parent) {
                    order.return_from_owing(id, pass);
                }
            }
            Rest::Until(until) => {
                self.filling.remove(&(until, id));
            }
        }
    }

    /// Forgets the nodes from `leaf` upwards that have nothing to do any more, and their siblings that have repaid what
    /// they owed.
    pub(super) fn forget_path(&mut self, leaf: usize, now: &mut LazyNow) {
        let mut at = leaf;
        while let Some(node) = self.nodes.get(at).filter(|_| at != ROOT) {
            let (parent, pass) = (node.parent, node.pass);
            if node.is_idle() && node.rest == Rest::Busy {
                if self.forgets_too_early() {
                    self.retire(at, now);
                } else if self.order_of(parent).is_some_and(|order| order.owe(at, pass)) {
                    self.nodes[at].rest = Rest::Owing;
                } else {
                    self.retire(at, now);
                }
            }
            let is_open = self.nodes.get(parent).is_some_and(|parent| parent.open > 0);
            if let Some(order) = self.order_of(parent).filter(|order| !is_open && !order.is_any_ready()) {
                order.end_busy_period();
            }
            while let Some(repaid) = self.order_of(parent).and_then(Fair::pop_repaid) {
                self.retire(repaid, now);
            }
            at = parent;
        }
    }

    /// Forgets the leaves of calls that were refused, and what is above them, as [`forget_path`](Self::forget_path) does.
    pub(super) fn forget_left(&mut self, now: &mut LazyNow) {
        while let Some(leaf) = self.left.pop() {
            if self.nodes.contains(leaf) {
                self.forget_path(leaf, now);
            }
        }
    }

    /// Forgets a few of the nodes that were kept until their limits are full.
    pub(super) fn forget_full(&mut self, now: &mut LazyNow) {
        for _ in 0..MAX_FORGOTTEN {
            if !self.forget_next_full(now) {
                break;
            }
        }
    }

    /// Forgets as many nodes as are needed for `missing` new ones, if there are so many that are full by now.
    pub(super) fn make_room(&mut self, missing: usize, now: &mut LazyNow) {
        while self.nodes() + missing > self.max_nodes && self.forget_next_full(now) {}
    }

    /// Looks at the node that may be full first. Returns whether that was due.
    fn forget_next_full(&mut self, now: &mut LazyNow) -> bool {
        let Some((until, id)) = self.filling.first().copied().filter(|(until, _)| *until <= now.get()) else {
            return false;
        };
        self.filling.remove(&(until, id));
        self.retire(id, now);
        true
    }

    /// Looks again until when a node must be kept whose limits or pause have changed.
    pub(super) fn refresh_rest(&mut self, id: usize, now: &mut LazyNow) {
        if let Rest::Until(until) = self.nodes[id].rest {
            self.filling.remove(&(until, id));
            self.retire(id, now);
        }
    }

    /// Forgets a node that has nothing to do and owes nothing, and those above it that were kept for it, unless there is
    /// something else to remember.
    fn retire(&mut self, id: usize, now: &mut LazyNow) {
        let is_too_early = self.forgets_too_early();
        let mut at = id;
        loop {
            let node = &mut self.nodes[at];
            if node.has_children() {
                node.rest = Rest::Parent;
                return;
            }
            let paused_until = node.paused_until.filter(|until| *until > now.get());
            let full_at = node.limits.as_mut().and_then(|limits| limits.full_at(now));
            if let Some(until) = paused_until.max(full_at).filter(|_| !is_too_early) {
                node.rest = Rest::Until(until);
                self.filling.insert((until, at));
                return;
            }
            let parent = node.parent;
            self.forget(at);
            if parent == ROOT || self.nodes[parent].rest != Rest::Parent {
                return;
            }
            at = parent;
        }
    }

    fn forget(&mut self, id: usize) {
        #[cfg(test)]
        if self.forgetting == Forgetting::Never {
            self.nodes[id].rest = Rest::Parent;
            return;
        }
        let node = self.nodes.remove(id);
        if let Some((children, key)) = self.nodes[node.parent].children_mut().zip(node.key) {
            children.by_key.remove(&key);
        }
    }

    #[cfg(test)]
    fn forgets_too_early(&self) -> bool {
        self.forgetting == Forgetting::TooEarly
    }

    #[cfg(not(test))]
    const fn forgets_too_early(&self) -> bool {
        false
    }
}
