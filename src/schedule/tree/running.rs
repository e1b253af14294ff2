//! How many calls of a node are in flight at once, and the limits of that.
//!
//! A call can be settled long before its end, when its charge is no estimate, or after it. So the calls in flight are counted
//! apart from those that are open, and only if a level of the schedule limits them.

use super::{ROOT, Started, Tree};
use crate::clock::LazyNow;
use std::hash::Hash;

/// A call that is in flight. It is to be [finished](Tree::finish).
#[derive(Debug)]
pub(in crate::schedule) struct Running {
    leaf: usize,
}

impl<K: Clone + Eq + Hash, T> Tree<K, T> {
    /// Lets the tree count the calls in flight. Called before the first call.
    pub(in crate::schedule) fn count_running(&mut self) {
        self.counts_running = true;
    }

    /// Counts a call that begins.
    pub(super) fn run(&mut self, leaf: usize) {
        if self.counts_running {
            self.for_running(leaf, |running| *running += 1);
        }
    }

    /// Returns what is to be finished when a call that has just begun has ended.
    pub(in crate::schedule) fn running(&self, started: &Started) -> Option<Running> {
        let open = self.open.get(started.open).filter(|_| self.counts_running)?;
        Some(Running { leaf: open.leaf })
    }

    /// Stops counting a call that has ended.
    #[allow(clippy::needless_pass_by_value, reason = "a call is finished once")]
    pub(in crate::schedule) fn finish(&mut self, running: Running, now: &mut LazyNow) {
        let Running { leaf } = running;
        self.for_running(leaf, |running| *running -= 1);
        self.look_at_path(leaf, now);
        self.forget_path(leaf, now);
        self.forget_left(now);
    }

    fn for_running(&mut self, leaf: usize, change: impl Fn(&mut usize)) {
        let mut at = leaf;
        while at != ROOT {
            let node = &mut self.nodes[at];
            change(&mut node.running);
            at = node.parent;
        }
    }
}
