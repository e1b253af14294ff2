//! Which calls would go next, if nothing changed until then.
//!
//! The calls are found one after the other, as they would begin, without changing the tree: for each node on the path of a
//! call that was found, an [`Ahead`] keeps how the node would stand then. What the limits of a node add while the calls are
//! found is not counted, so that the calls are those that could all go now.

use super::{
    super::fair::{self, Ready, Units},
    ROOT, Tree,
};
use crate::{clock::LazyNow, rate::Demand, wait_queue::Availability};
use std::{
    collections::{BTreeSet, HashMap},
    hash::Hash,
};

/// A node, as it would stand after the calls that were found.
#[derive(Default)]
struct Ahead {
    pass: Units,
    /// What the calls that were found cost together, and how many they are.
    demand: Demand,
    found: usize,
    /// Of a leaf: the first call of each class that was not found.
    firsts: Vec<Option<usize>>,
    /// Of any other node: the children below which calls were found and others could go, in their order, each with its
    /// next call.
    ready: BTreeSet<(Ready, usize)>,
    /// Where the node stands among those of its parent, if it does.
    at: Option<(Ready, usize)>,
}

impl<K: Clone + Eq + Hash, T> Tree<K, T> {
    /// Returns the calls that would go next, at most `most`, as far as the limits below the root would let them go now. The
    /// first is the [head](Self::head).
    pub(in crate::schedule) fn upcoming(&mut self, most: usize, now: &mut LazyNow) -> Vec<usize> {
        let mut found = Vec::new();
        if self.head(now).is_none() {
            return found;
        }
        let mut ahead = HashMap::from([(ROOT, Ahead::default())]);
        while found.len() < most {
            let Some(call) = self.next_below(ROOT, &ahead) else {
                break;
            };
            found.push(call);
            self.go_ahead(call, &mut ahead, now);
        }
        found
    }

    /// Whether a call that waits is the first of its flow.
    pub(in crate::schedule) fn is_first_of_flow(&self, id: usize) -> bool {
        let leaf = self.calls.get(id).map(|call| call.leaf);
        leaf.is_some_and(|leaf| self.head_of(leaf) == Some(id))
    }

    /// Returns the call that would be the next below a node in `ahead`.
    fn next_below(&self, node: usize, ahead: &HashMap<usize, Ahead>) -> Option<usize> {
        let of_node = ahead.get(&node)?;
        let Some(children) = self.nodes[node].children() else {
            let firsts = of_node.firsts.iter().flatten();
            return firsts
                .copied()
                .min_by_key(|id| self.calls.get(*id).map(|call| (call.due, call.seq)));
        };
        // The children below which no call was found stand where they do in the tree.
        let as_now = children.order.ready().find(|ready| !ahead.contains_key(&ready.child));
        match (of_node.ready.first(), as_now) {
            (Some((ready, call)), as_now) if as_now.is_none_or(|as_now| *ready < as_now) => Some(*call),
            (_, as_now) => self.head_of(as_now?.child),
        }
    }

    /// Lets the nodes on the path of `call` stand as if it had begun.
    fn go_ahead(&mut self, call: usize, ahead: &mut HashMap<usize, Ahead>, now: &mut LazyNow) {
        let Some(queued) = self.calls.get(call) else { return };
        let (leaf, class, cost, units) = (queued.leaf, usize::from(queued.class), queued.cost, queued.units);
        let after = self.calls.after(call);
        let mut at = leaf;
        while at != ROOT {
            let is_strict = self.is_strict(at);
            let node = &self.nodes[at];
            let (parent, weight) = (node.parent, node.weight);
            let of_node = ahead.entry(at).or_insert_with(|| Ahead {
                pass: node.pass,
                firsts: node.queue().map_or_else(Vec::new, |queue| {
                    queue.classes().map(|class| class.list.first).collect()
                }),
                ..Ahead::default()
            });
            if let Some(first) = of_node.firsts.get_mut(class).filter(|_| at == leaf) {
                *first = after;
            }
            of_node.demand += &cost;
            of_node.found += 1;
            if !is_strict {
                of_node.pass = fair::end(of_node.pass, weight, units);
            }
            let (pass, before) = (of_node.pass, of_node.at.take());
            let next = self
                .next_below(at, ahead)
                .filter(|next| self.could_go(at, *next, ahead, now));
            let next = next.and_then(|id| self.calls.get(id).map(|call| (id, call)));
            let place = next.map(|(id, next)| {
                let end = if is_strict {
                    Units::from(weight)
                } else {
                    fair::end(pass, weight, next.units)
                };
                let (seq, child) = (next.seq, at);
                (Ready { end, seq, child }, id)
            });
            if let Some(of_node) = ahead.get_mut(&at) {
                of_node.at = place;
            }
            let of_parent = ahead.entry(parent).or_insert_with(|| Ahead {
                pass: self.nodes[parent].pass,
                ..Ahead::default()
            });
            if let Some(before) = before {
                of_parent.ready.remove(&before);
            }
            of_parent.ready.extend(place);
            at = parent;
        }
    }

    /// Whether the limits of a node would let a call go now, besides those that were found.
    fn could_go(&mut self, node: usize, call: usize, ahead: &HashMap<usize, Ahead>, now: &mut LazyNow) -> bool {
        let (Some(of_node), Some(call)) = (ahead.get(&node), self.calls.get(call)) else {
            return false;
        };
        let cost = call.cost;
        let counts_running = self.counts_running;
        let node = &mut self.nodes[node];
        let max_running = node.max_running.filter(|_| counts_running);
        if max_running.is_some_and(|max| node.running + of_node.found >= max.get()) {
            return false;
        }
        let Some(limits) = &mut node.limits else { return true };
        let mut demand = of_node.demand.clone();
        demand += &cost;
        limits.availability(&demand.mean(1), now) == Ok(Availability::Now)
    }
}
