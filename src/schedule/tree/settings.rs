//! Changing the settings of a node that lives.

#[cfg(test)]
use super::node::State;
use super::{Path, Tree};
use crate::{
    clock::LazyNow,
    error::InvalidConfig,
    rate::{KeyLimits, Limits},
};
use std::{hash::Hash, num::NonZeroU32, time::SystemTime};
use tokio::time::Instant;

impl<K: Clone + Eq + Hash, T> Tree<K, T> {
    /// Changes the weight of the node that `path` names, for all that it is charged from now on. Does nothing if the node
    /// does not live.
    pub(in crate::schedule) fn set_weight(&mut self, path: &Path<K>, weight: NonZeroU32, now: &mut LazyNow) {
        let Some(id) = self.find(path).filter(|_| !path.is_empty()) else {
            return;
        };
        let node = &mut self.nodes[id];
        let (parent, is_ready) = (node.parent, node.is_ready());
        let old = std::mem::replace(&mut node.weight, weight.get());
        if let Some(order) = self.order_of(parent).filter(|_| is_ready) {
            order.change_weight(old, weight.get());
        }
        self.look(id, now);
        self.forget_left(now);
    }

    /// Replaces the limits of the node that `path` names. Does nothing but check the limits if the node does not live.
    ///
    /// # Errors
    ///
    /// If a rate is invalid, or begins with less than its burst. Nothing changes then.
    pub(in crate::schedule) fn set_limits(
        &mut self,
        path: &Path<K>,
        limits: Limits,
        now: &mut LazyNow,
    ) -> Result<(), InvalidConfig> {
        let Some(id) = self.find(path).filter(|_| !path.is_empty()) else {
            return limits.check_for_keys();
        };
        let node = &mut self.nodes[id];
        match &mut node.limits {
            Some(known) => known.set_limits(limits, now)?,
            None => {
                // The calls that have begun were not charged to these limits, and are not settled with them.
                let mut new = KeyLimits::new(limits, SystemTime::now(), now.get())?;
                new.set_waited_for(node.waiting > 0, now);
                node.limits = Some(Box::new(new));
            }
        }
        self.look(id, now);
        self.forget_left(now);
        self.refresh_rest(id, now);
        Ok(())
    }

    /// Blocks all calls below the node that `path` names until then, or no longer with `None`. Does nothing if the node
    /// does not live.
    pub(in crate::schedule) fn pause(&mut self, path: &Path<K>, until: Option<Instant>, now: &mut LazyNow) {
        let Some(id) = self.find(path).filter(|_| !path.is_empty()) else {
            return;
        };
        self.nodes[id].paused_until = until;
        self.look(id, now);
        self.forget_left(now);
        self.refresh_rest(id, now);
    }

    /// Whether the first call of the node that `path` names is blocked by that node.
    #[cfg(test)]
    pub(in crate::schedule) fn is_blocked(&self, path: &Path<K>) -> bool {
        let node = self.find(path).map(|id| &self.nodes[id]);
        node.is_some_and(|node| matches!(node.state, State::Blocked { .. }))
    }

    /// See [`Fair::is_last_served`](super::super::fair::Fair).
    #[cfg(test)]
    pub(in crate::schedule) fn set_last_served(&mut self, is_last_served: bool) {
        if let Some(order) = self.order_of(super::ROOT) {
            order.is_last_served = is_last_served;
        }
    }

    #[cfg(test)]
    pub(in crate::schedule) fn is_waiting(&self, id: usize) -> bool {
        self.calls.get(id).is_some()
    }
}
