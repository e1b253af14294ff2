//! Looking at nodes: which call is the first below a node, and whether the node's limits have what it costs.

use super::{
    super::fair::{self, Ready, Units},
    ROOT, Tree,
    node::{Below, State},
};
use crate::{clock::LazyNow, wait_queue::Availability};
use std::hash::Hash;

/// What came of looking at a node.
enum Looked {
    Unchanged,
    Changed,
    /// The call that was the first is refused and waits no more. It was in this leaf.
    Refused(usize),
}

impl<K: Clone + Eq + Hash, T> Tree<K, T> {
    /// Returns the call that would be the first of a node.
    pub(super) fn head_of(&self, node: usize) -> Option<usize> {
        match &self.nodes[node].below {
            Below::Calls(queue) => {
                let firsts = queue.classes().filter_map(|class| class.list.first);
                firsts.min_by_key(|id| self.calls.get(*id).map(|call| (call.due, call.seq)))
            }
            Below::Children(children) => match self.nodes[children.order.first()?.child].state {
                State::Ready { head, .. } => Some(head),
                _ => None,
            },
        }
    }

    /// Looks at a node again, and at those above it up to the first where nothing has changed.
    pub(super) fn look(&mut self, from: usize, now: &mut LazyNow) {
        let mut at = from;
        while at != ROOT {
            at = match self.look_at(at, now) {
                Looked::Unchanged => break,
                Looked::Changed => self.nodes[at].parent,
                // The node from which that call came has another first call now.
                Looked::Refused(leaf) => leaf,
            };
        }
    }

    /// Looks at all nodes from `leaf` to the root, because their charges have changed.
    pub(super) fn look_at_path(&mut self, leaf: usize, now: &mut LazyNow) {
        let mut at = leaf;
        while at != ROOT {
            if let Looked::Refused(leaf) = self.look_at(at, now) {
                self.look(leaf, now);
                // What was refused may have been below another child of this node.
                continue;
            }
            at = self.nodes[at].parent;
        }
    }

    /// Returns whether a call that waits could be charged to all limits below the root now, wherever it stands, or when it
    /// could, as far as that is known.
    pub(in crate::schedule) fn availability_of(&mut self, id: usize, now: &mut LazyNow) -> Availability {
        let Some((mut at, cost)) = self.calls.get(id).map(|call| (call.leaf, call.cost)) else {
            return Availability::Blocked;
        };
        let mut until = None;
        while at != ROOT {
            let node = &mut self.nodes[at];
            if node.is_full() {
                return Availability::Blocked;
            }
            until = until.max(node.paused_until.filter(|until| *until > now.get()));
            let limits = node.limits.as_mut();
            match limits.map_or(Ok(Availability::Now), |limits| limits.availability(&cost, now)) {
                Ok(Availability::Now) => {}
                Ok(Availability::At(at) | Availability::BlockedUntil(at)) => until = until.max(Some(at)),
                // A call that its limits refuse is refused when it is the first of its node.
                Ok(Availability::Blocked) | Err(_) => return Availability::Blocked,
            }
            at = node.parent;
        }
        until.map_or(Availability::Now, Availability::At)
    }

    /// Computes the state of a node.
    fn look_at(&mut self, id: usize, now: &mut LazyNow) -> Looked {
        let head = self.head_of(id);
        let call = head.and_then(|head| self.calls.get(head));
        let Some((head, call)) = head.zip(call) else {
            return self.set_state(id, State::Idle);
        };
        let (cost, units, seq, leaf) = (call.cost, call.units, call.seq, call.leaf);
        let node = &mut self.nodes[id];
        let availability = match &mut node.limits {
            Some(limits) => limits.availability(&cost, now),
            None => Ok(Availability::Now),
        };
        let availability = match availability {
            Ok(availability) => availability,
            Err(rejection) => {
                if let Some(refused) = self.unqueue(head, now) {
                    self.refused.push((refused.payload, rejection));
                }
                self.left.push(leaf);
                return Looked::Refused(leaf);
            }
        };
        let node = &mut self.nodes[id];
        let paused_until = node.paused_until.filter(|until| *until > now.get());
        let until = match (availability, paused_until) {
            // It is looked at again when one of its calls ends.
            (Availability::Now, None) if node.is_full() => None,
            (Availability::Now, None) => {
                let at = self.place_of(id, units, seq);
                return self.set_state(id, State::Ready { at, head });
            }
            (Availability::Now, paused_until) => paused_until,
            (Availability::At(until) | Availability::BlockedUntil(until), paused_until) => {
                node.has_waited = true;
                Some(paused_until.map_or(until, |paused_until| paused_until.max(until)))
            }
            (Availability::Blocked, _) => None,
        };
        self.set_state(id, State::Blocked { until, head })
    }

    /// Returns where a node stands at its parent that is ready, and whose first call costs `units`.
    fn place_of(&mut self, id: usize, units: Units, seq: u64) -> Ready {
        let is_strict = self.is_strict(id);
        let node = &self.nodes[id];
        let (parent, weight, pass, was_ready) = (node.parent, node.weight, node.pass, node.is_ready());
        if is_strict {
            let end = Units::from(weight);
            return Ready { end, seq, child: id };
        }
        let pass = match self.order_of(parent) {
            Some(order) if !was_ready => order.enter(pass),
            _ => pass,
        };
        self.nodes[id].pass = pass;
        let end = fair::end(pass, weight, units);
        Ready { end, seq, child: id }
    }

    fn set_state(&mut self, id: usize, state: State) -> Looked {
        let node = &mut self.nodes[id];
        let (before, parent, weight) = (std::mem::replace(&mut node.state, state), node.parent, node.weight);
        if before == state {
            return Looked::Unchanged;
        }
        if let State::Blocked { until: Some(until), .. } = before {
            if !self.keeps_timers() {
                self.timers.remove(&(until, id));
            }
        }
        if let State::Blocked { until: Some(until), .. } = state {
            self.timers.insert((until, id));
        }
        if let Some(order) = self.order_of(parent) {
            if let State::Ready { at, .. } = before {
                order.remove(at, weight);
            }
            if let State::Ready { at, .. } = state {
                order.insert(at, weight);
            }
        }
        Looked::Changed
    }

    #[cfg(test)]
    const fn keeps_timers(&self) -> bool {
        self.keeps_timers
    }

    #[cfg(not(test))]
    const fn keeps_timers(&self) -> bool {
        false
    }
}
