//! What holds of a tree after each call of its methods.

use super::{
    Forgetting, ROOT, Tree,
    node::{Below, Rest, State},
};
use crate::rate::{Budget, Demand};
use std::hash::Hash;

impl<K: Clone + Eq + Hash, T> Tree<K, T> {
    /// Checks that what is kept of each node is what is computed from the nodes and calls below it.
    pub(in crate::schedule) fn check(&self) {
        assert!(self.left.is_empty());
        let (mut blocked, mut filling) = (0, 0);
        for (id, node) in &self.nodes {
            let (waiting, open) = match &node.below {
                Below::Calls(queue) => {
                    let mut waiting = 0;
                    for class in queue.classes() {
                        let mut demand = Demand::default();
                        let mut last = 0;
                        for call in self.calls.of(class.list) {
                            assert!(
                                call.seq > last,
                                "the calls of a class are in the order of their numbers"
                            );
                            assert_eq!(call.leaf, id);
                            last = call.seq;
                            assert!(call.due <= class.latest_due);
                            demand += &call.cost;
                            waiting += 1;
                        }
                        for budget in [Budget::Requests, Budget::Tokens] {
                            assert_eq!(demand.of(budget), class.demand.of(budget));
                        }
                    }
                    (waiting, node.open)
                }
                Below::Children(children) => {
                    let nodes = || children.by_key.values().map(|child| &self.nodes[*child]);
                    assert!(nodes().all(|child| child.parent == id));
                    let (ready, weights, owing) = children.order.members();
                    assert!(ready.is_sorted());
                    assert_eq!(ready.len(), nodes().filter(|child| child.is_ready()).count());
                    let of_ready = nodes().filter(|child| child.is_ready());
                    assert_eq!(weights, of_ready.map(|child| u64::from(child.weight)).sum::<u64>());
                    assert_eq!(owing.len(), nodes().filter(|child| child.rest == Rest::Owing).count());
                    for (pass, child) in owing {
                        assert_eq!((self.nodes[child].rest, self.nodes[child].pass), (Rest::Owing, pass));
                    }
                    for at in ready {
                        assert!(matches!(self.nodes[at.child].state, State::Ready { at: known, .. } if known == at));
                    }
                    (
                        nodes().map(|child| child.waiting).sum(),
                        nodes().map(|child| child.open).sum(),
                    )
                }
            };
            assert_eq!((node.waiting, node.open), (waiting, open));
            if id == ROOT {
                continue;
            }
            let head = match node.state {
                State::Idle => None,
                State::Blocked { until, head } => {
                    blocked += usize::from(until.is_some());
                    assert!(until.is_none_or(|until| self.timers.contains(&(until, id))));
                    Some(head)
                }
                State::Ready { head, .. } => Some(head),
            };
            assert_eq!(head, self.head_of(id), "the first call is known");
            match node.rest {
                // A node is remembered only while nothing is to do.
                Rest::Busy => assert!(!node.is_idle()),
                Rest::Owing => assert!(node.is_idle()),
                Rest::Parent => {
                    let is_kept = node.has_children() || self.forgetting == Forgetting::Never;
                    assert!(node.is_idle() && is_kept);
                }
                Rest::Until(until) => {
                    filling += 1;
                    assert!(node.is_idle() && !node.has_children() && self.filling.contains(&(until, id)));
                }
            }
        }
        assert_eq!(
            (blocked, filling),
            (self.timers.len(), self.filling.len()),
            "timers of blocked nodes, and nodes that fill"
        );
        assert_eq!(self.calls.len(), self.nodes[ROOT].waiting);
        assert_eq!(self.open.len(), self.nodes[ROOT].open);
    }
}
