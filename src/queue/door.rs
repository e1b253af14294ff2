//! [`Door`]: which of the calls that wait for a place in a scheduled queue gets the next one.
//!
//! A place goes to the flow that has the fewest places for its weight. If places were had in order of arrival, a flow that
//! submits a thousand calls would have them all, and the calls of others would wait in front of the queue.

use crate::schedule::{FlowKey, KeyMap};
use slab::Slab;
use std::{collections::BTreeMap, sync::Arc};

/// The path of a flow.
type Path = Arc<[FlowKey]>;

/// The flows that have places, or whose calls wait for one.
#[derive(Default)]
pub(super) struct Door {
    flows: Slab<DoorFlow>,
    by_path: KeyMap<Path, usize>,
    /// The flows whose calls wait for a place, by [their turn](DoorFlow::turn).
    waiting: BTreeMap<Turn, usize>,
}

struct DoorFlow {
    path: Path,
    weight: u32,
    places: u64,
    /// The calls that wait for a place, by the order in which they came.
    waiting: BTreeMap<u64, u32>,
}

/// The number of places of a flow for its weight, and the order of its first call, which decides between flows that have
/// equally many.
type Turn = (u64, u64);

/// What the number of places is multiplied with before it is divided by a weight, so that little is cut off.
const SCALE: u64 = 1 << 16;

impl Door {
    /// Counts a call that has a place, or adds one that waits for it. `order` is higher for each call. Returns the number of
    /// the flow, which it has until its last call has [left](Self::leave).
    pub(super) fn enter(&mut self, path: &Path, weight: u32, order: u64, call: u32, has_place: bool) -> usize {
        let Self { flows, by_path, .. } = self;
        let flow = *by_path.entry(path.clone()).or_insert_with_key(|path| {
            flows.insert(DoorFlow {
                path: path.clone(),
                weight,
                places: 0,
                waiting: BTreeMap::new(),
            })
        });
        self.change(flow, |flow| {
            flow.weight = weight.max(1);
            if has_place {
                flow.places += 1;
            } else {
                flow.waiting.insert(order, call);
            }
        });
        flow
    }

    /// Removes a call of this flow that has a place, or waits for it.
    pub(super) fn leave(&mut self, flow: usize, order: u64, had_place: bool) {
        self.change(flow, |flow| {
            if had_place {
                flow.places = flow.places.saturating_sub(1);
            } else {
                flow.waiting.remove(&order);
            }
        });
    }

    /// Returns the call that gets the next place, which counts as having it from now on. `None` if none waits.
    pub(super) fn next(&mut self) -> Option<u32> {
        let (_, flow) = self.waiting.first_key_value()?;
        let mut next = None;
        self.change(*flow, |flow| {
            next = flow.waiting.pop_first().map(|(_, call)| call);
            flow.places += 1;
        });
        next
    }

    /// Returns how many places others get before a new call of this flow gets one.
    pub(super) fn ahead_of(&self, path: &Path, weight: u32) -> u64 {
        let id = self.by_path.get(path);
        let own = id.and_then(|id| self.flows.get(*id));
        let places = own.map_or(0, |flow| flow.places.saturating_add(flow.waiting.len() as u64));
        let ahead = |flow: &DoorFlow| {
            // Until it has as many places for its weight as the flow has, or none of its calls waits.
            let until = u128::from(places) * u128::from(flow.weight) / u128::from(weight.max(1)) + 1;
            let lacking = u64::try_from(until).unwrap_or(u64::MAX).saturating_sub(flow.places);
            lacking.min(flow.waiting.len() as u64)
        };
        let others = self.waiting.values().filter(|other| id != Some(other));
        let others = others
            .filter_map(|other| self.flows.get(*other))
            .map(ahead)
            .sum::<u64>();
        others + own.map_or(0, |flow| flow.waiting.len() as u64)
    }

    pub(super) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Returns the calls that wait for a place.
    pub(super) fn waiting(&self) -> Vec<u32> {
        let flows = self.flows.iter();
        flows.flat_map(|(_, flow)| flow.waiting.values().copied()).collect()
    }

    fn change(&mut self, id: usize, change: impl FnOnce(&mut DoorFlow)) {
        let Some(flow) = self.flows.get_mut(id) else { return };
        let before = flow.turn();
        change(flow);
        let after = flow.turn();
        if flow.places == 0 && after.is_none() {
            let DoorFlow { path, .. } = self.flows.remove(id);
            self.by_path.remove(&path);
        }
        if before != after {
            if let Some(before) = before {
                self.waiting.remove(&before);
            }
            if let Some(after) = after {
                self.waiting.insert(after, id);
            }
        }
    }
}

impl DoorFlow {
    /// Returns the turn of the flow. `None` if none of its calls waits for a place.
    fn turn(&self) -> Option<Turn> {
        let (first, _) = self.waiting.first_key_value()?;
        Some((self.places.saturating_mul(SCALE) / u64::from(self.weight), *first))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(key: u64) -> Path {
        [FlowKey::from(key)].into()
    }

    #[test]
    fn a_place_goes_to_the_flow_that_has_the_fewest_for_its_weight() {
        let mut door = Door::default();
        let mut order = 0;
        let mut enter = |door: &mut Door, flow: u64, weight, has_place| {
            order += 1;
            let id = door.enter(&path(flow), weight, order, flow as u32, has_place);
            (id, order)
        };
        for _ in 0..10 {
            enter(&mut door, 1, 1, true);
        }
        for _ in 0..20 {
            enter(&mut door, 1, 1, false);
        }
        for _ in 0..6 {
            enter(&mut door, 2, 1, false);
        }
        let (third, last) = enter(&mut door, 3, 3, false);
        for _ in 0..6 {
            enter(&mut door, 3, 3, false);
        }
        door.leave(third, last, false);
        // The second flow and the third, whose weight is three, catch up with the first one.
        let given: Vec<_> = (0..8).filter_map(|_| door.next()).collect();
        assert_eq!(given, [2, 3, 3, 3, 2, 3, 3, 3]);
        // The first flow has ten places, the second two: a new flow is before both, and a call of the second flow behind the
        // four of its own that wait.
        assert_eq!(door.ahead_of(&path(4), 1), 0);
        assert_eq!(door.ahead_of(&path(2), 1), 4);
        let given: Vec<_> = (0..5).filter_map(|_| door.next()).collect();
        assert_eq!(given, [2, 2, 2, 2, 1]);
    }

    #[test]
    fn a_flow_that_has_left_is_forgotten() {
        let mut door = Door::default();
        let flow = door.enter(&path(1), 1, 1, 7, true);
        assert_eq!(door.enter(&path(1), 1, 2, 8, false), flow);
        door.leave(flow, 1, true);
        assert_eq!(door.next(), Some(8));
        door.leave(flow, 2, true);
        assert!(door.flows.is_empty() && door.by_path.is_empty() && !door.is_waiting());
    }
}
