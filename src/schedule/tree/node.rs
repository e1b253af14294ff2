//! [`Node`]: one node of the tree, as it stands.

use super::{
    super::{
        calls::List,
        fair::{Fair, Ready, Units},
        key_hash::KeyMap,
    },
    ROOT,
};
use crate::rate::{Demand, KeyLimits};
use std::num::{NonZeroU32, NonZeroUsize};
use tokio::time::Instant;

/// What the tree needs to know about a node when it is made.
pub(in crate::schedule) struct NewNode {
    /// The weight of the node beside its siblings. At a strict level, the number of its band: the lowest goes first.
    pub(in crate::schedule) weight: NonZeroU32,
    pub(in crate::schedule) limits: Option<Box<KeyLimits>>,
    /// How many calls below the node may be in flight at once.
    pub(in crate::schedule) max_running: Option<NonZeroUsize>,
    /// Until when no call below the node begins.
    pub(in crate::schedule) paused_until: Option<Instant>,
}

pub(super) struct Node<K> {
    pub(super) parent: usize,
    pub(super) key: Option<K>,
    pub(super) depth: usize,
    pub(super) weight: u32,
    /// How far the node has got with its share of its parent.
    pub(super) pass: Units,
    /// How many calls wait below this node.
    pub(super) waiting: usize,
    /// How many calls below this node have begun and are not settled.
    pub(super) open: usize,
    /// How many calls below this node are in flight, if the tree counts them.
    pub(super) running: usize,
    /// How many may be.
    pub(super) max_running: Option<NonZeroUsize>,
    pub(super) state: State,
    pub(super) limits: Option<Box<KeyLimits>>,
    pub(super) paused_until: Option<Instant>,
    /// Whether the call that is the first of this node was blocked by its limits.
    pub(super) has_waited: bool,
    pub(super) rest: Rest,
    pub(super) below: Below<K>,
}

/// What is below a node.
pub(super) enum Below<K> {
    Calls(Queue),
    Children(Box<Children<K>>),
}

/// The calls of a flow.
#[derive(Default)]
pub(super) struct Queue {
    /// The calls of the first class. Most flows have no others, and need no memory for more classes.
    first_class: ClassQueue,
    /// Those of each further class.
    other_classes: Vec<ClassQueue>,
}

/// The calls of one class of a flow.
#[derive(Default)]
pub(super) struct ClassQueue {
    pub(super) list: List,
    /// The sum of the costs of all calls.
    pub(super) demand: Demand,
    /// No call is due later. Most calls are due later than those before them, but not after the slack was made shorter.
    pub(super) latest_due: u64,
}

/// The children of a node.
pub(super) struct Children<K> {
    pub(super) order: Fair,
    pub(super) by_key: KeyMap<K, usize>,
}

/// Where a node stands at its parent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum State {
    /// No call below it could run.
    Idle,
    /// Its limits lack what its first call costs, or it is paused.
    Blocked {
        until: Option<Instant>,
        head: usize,
    },
    Ready {
        at: Ready,
        head: usize,
    },
}

/// Why a node is kept that no call belongs to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Rest {
    /// Calls wait below it, or have begun and are not settled.
    Busy,
    /// It has got further than its siblings, and is ordered by its pass in its parent.
    Owing,
    /// It has nothing to remember, but one of its children has.
    Parent,
    /// Its limits are not full, or it is paused, until this time.
    Until(Instant),
}

// === impl NewNode ===

impl NewNode {
    /// Returns a node of this weight without limits.
    #[cfg(test)]
    pub(in crate::schedule) const fn of_weight(weight: NonZeroU32) -> Self {
        Self {
            weight,
            limits: None,
            max_running: None,
            paused_until: None,
        }
    }
}

// === impl Node ===

impl<K> Node<K> {
    pub(super) fn root() -> Self {
        let new = NewNode {
            weight: NonZeroU32::MIN,
            limits: None,
            max_running: None,
            paused_until: None,
        };
        Self::new(ROOT, None, 0, new, Below::children())
    }

    pub(super) fn new(parent: usize, key: Option<K>, depth: usize, new: NewNode, below: Below<K>) -> Self {
        Self {
            parent,
            key,
            depth,
            weight: new.weight.get(),
            pass: 0,
            waiting: 0,
            open: 0,
            running: 0,
            max_running: new.max_running,
            state: State::Idle,
            limits: new.limits,
            paused_until: new.paused_until,
            has_waited: false,
            rest: Rest::Busy,
            below,
        }
    }

    pub(super) const fn is_ready(&self) -> bool {
        matches!(self.state, State::Ready { .. })
    }

    pub(super) const fn is_leaf(&self) -> bool {
        matches!(self.below, Below::Calls(_))
    }

    /// Whether no call waits below this node, and all that have begun are settled.
    pub(super) const fn is_idle(&self) -> bool {
        self.waiting == 0 && self.open == 0 && self.running == 0
    }

    /// Whether as many calls below this node are in flight as may be.
    pub(super) fn is_full(&self) -> bool {
        self.max_running.is_some_and(|max| self.running >= max.get())
    }

    pub(super) fn has_children(&self) -> bool {
        self.children().is_some_and(|children| !children.by_key.is_empty())
    }

    pub(super) fn children(&self) -> Option<&Children<K>> {
        match &self.below {
            Below::Children(children) => Some(children),
            Below::Calls(_) => None,
        }
    }

    pub(super) fn children_mut(&mut self) -> Option<&mut Children<K>> {
        match &mut self.below {
            Below::Children(children) => Some(children),
            Below::Calls(_) => None,
        }
    }

    pub(super) fn queue(&self) -> Option<&Queue> {
        match &self.below {
            Below::Calls(queue) => Some(queue),
            Below::Children(_) => None,
        }
    }

    pub(super) fn queue_mut(&mut self) -> Option<&mut Queue> {
        match &mut self.below {
            Below::Calls(queue) => Some(queue),
            Below::Children(_) => None,
        }
    }
}

// === impl Queue ===

impl Queue {
    /// Returns the calls of each class.
    pub(super) fn classes(&self) -> impl Iterator<Item = &ClassQueue> {
        std::iter::once(&self.first_class).chain(&self.other_classes)
    }

    /// Returns the calls of a class.
    pub(super) fn class_mut(&mut self, class: usize) -> &mut ClassQueue {
        let Some(other) = class.checked_sub(1) else {
            return &mut self.first_class;
        };
        if self.other_classes.len() <= other {
            self.other_classes.resize_with(other + 1, ClassQueue::default);
        }
        &mut self.other_classes[other]
    }
}

// === impl Below ===

impl<K> Below<K> {
    pub(super) fn calls() -> Self {
        Self::Calls(Queue::default())
    }

    pub(super) fn children() -> Self {
        Self::Children(Box::new(Children {
            order: Fair::default(),
            by_key: KeyMap::default(),
        }))
    }
}
