//! [`FlowView`]: how a flow stands, for a person to look at.

use super::{
    super::fair::Units,
    ROOT, Tree,
    node::{Node, State},
};
use std::{cmp::Reverse, collections::BinaryHeap, hash::Hash};
use tokio::time::Instant;

/// How one flow stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::schedule) struct FlowView<K> {
    /// The keys of the flow, from the outermost level.
    pub(in crate::schedule) path: Vec<K>,
    /// How many calls of the flow wait.
    pub(in crate::schedule) waiting: usize,
    /// How many calls of the flow have begun and are not settled.
    pub(in crate::schedule) open: usize,
    pub(in crate::schedule) weight: u32,
    /// How far the flow has got ahead of its siblings, in [`Units`]: negative if it is behind. 0 at a strict level.
    pub(in crate::schedule) lag: Units,
    /// When the limits or pauses of the flow and of the nodes above it let its next call begin, by what is known now.
    /// `None` if none of them blocks it.
    pub(in crate::schedule) blocked_until: Option<Instant>,
    /// The position in the path of the node that blocks the flow longest.
    pub(in crate::schedule) blocked_at: Option<usize>,
    /// Whether the flow or a node above it is paused.
    pub(in crate::schedule) is_paused: bool,
}

impl<K: Clone + Eq + Hash, T> Tree<K, T> {
    /// Returns how the flows stand that live, but at most `most` of them: those with the most calls that wait come first,
    /// of these the ones with the most calls that have begun. Takes `O(n log most)` time for `n` nodes.
    pub(in crate::schedule) fn view(&self, most: usize, now: Instant) -> Vec<FlowView<K>> {
        // The flow that comes last of those found is on top.
        let mut found = BinaryHeap::new();
        for (id, node) in self.nodes.iter().filter(|(_, node)| node.is_leaf()) {
            found.push(Reverse((node.waiting, node.open, Reverse(id))));
            if found.len() > most {
                found.pop();
            }
        }
        let ids = found.into_sorted_vec().into_iter();
        ids.map(|Reverse((_, _, Reverse(id)))| self.view_of(id, now)).collect()
    }

    fn view_of(&self, leaf: usize, now: Instant) -> FlowView<K> {
        let node = &self.nodes[leaf];
        let siblings = self.nodes[node.parent].children().filter(|_| !self.is_strict(leaf));
        let mut view = FlowView {
            path: Vec::with_capacity(node.depth),
            waiting: node.waiting,
            open: node.open,
            weight: node.weight,
            lag: siblings.map_or(0, |siblings| siblings.order.lag(node.pass)),
            blocked_until: None,
            blocked_at: None,
            is_paused: false,
        };
        let mut at = leaf;
        while at != ROOT {
            let node = &self.nodes[at];
            view.path.extend(node.key.clone());
            let paused_until = node.paused_until.filter(|until| *until > now);
            view.is_paused |= paused_until.is_some();
            if let Some(until) = node.blocked_until().max(paused_until) {
                if view.blocked_until.is_none_or(|known| known < until) {
                    view.blocked_until = Some(until);
                    view.blocked_at = Some(node.depth - 1);
                }
            }
            at = node.parent;
        }
        view.path.reverse();
        view
    }
}

impl<K> Node<K> {
    fn blocked_until(&self) -> Option<Instant> {
        match self.state {
            State::Blocked { until, .. } => until,
            _ => None,
        }
    }
}
