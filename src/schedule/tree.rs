//! [`Tree`]: which of the waiting calls goes next.
//!
//! The tree has one rule: *a node is its limits and a fair order of its children*. The root stands for the limits of the
//! whole account, a leaf for one flow, and the levels between them for whatever shares a limit: a tenant, a model. The
//! limits of the root, and the permit that a call needs, are not kept here: the caller looks at the [head](Tree::head),
//! waits until both are there for it, and then [starts](Tree::start) the first call, which is charged to all nodes on its
//! path at once. So a call is chosen when it can run, and nobody who was chosen waits.
//!
//! A node is *ready* if the call that would be the first below it could be charged to all limits below and at the node;
//! *blocked until* a time if only the node's own limits lack something; otherwise it has nothing ready below it. Ready
//! children stand in the fair order of their parent, blocked ones among the timers. After any change, the node that has
//! changed and those above it are looked at again, up to the first where nothing changes.

use super::{
    calls::{Calls, List, QueuedCall},
    fair::{self, Charge, Fair, MAX_COST, Ready, Units},
};
use crate::{
    clock::LazyNow,
    error::Rejected,
    rate::{Cost, KeyLimits},
    wait_queue::Availability,
};
use slab::Slab;
use std::{
    collections::{BTreeSet, HashMap},
    hash::Hash,
    num::NonZeroU32,
};
use tokio::time::Instant;

/// The largest number of levels below the root.
pub(super) const MAX_LEVELS: usize = 3;

const ROOT: usize = 0;

/// The path of a flow: the keys of its nodes, from the one below the root to the leaf.
pub(super) type Path<K> = [K];

pub(super) struct Tree<K, T> {
    nodes: Slab<Node<K>>,
    children: HashMap<(usize, K), usize>,
    calls: Calls<T>,
    /// The nodes that are blocked, by when they stop to be.
    timers: BTreeSet<(Instant, usize)>,
    /// For each level, whether its nodes go strictly in the order of their bands.
    strict: [bool; MAX_LEVELS],
    next_seq: u64,
    /// Calls that the limits refuse, which were the first of a node when that was found.
    refused: Vec<(T, Rejected)>,
}

struct Node<K> {
    parent: usize,
    key: Option<K>,
    depth: usize,
    weight: u32,
    /// How far the node has got with its share of its parent.
    pass: Units,
    /// How many calls wait below this node, and how many that have begun are not settled.
    waiting: usize,
    open: usize,
    state: State,
    limits: Option<Box<KeyLimits>>,
    /// Whether the call that is the first of this node was blocked by its limits.
    has_waited: bool,
    is_owing: bool,
    below: Below,
}

/// What is below a node.
enum Below {
    /// The calls of a flow, a list for each class.
    Calls(Vec<List>),
    Children(Fair),
}

/// Where a node stands at its parent.
#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    /// No call below it could run.
    Idle,
    /// Its limits lack what its first call costs.
    Blocked {
        until: Option<Instant>,
        head: usize,
    },
    Ready {
        at: Ready,
        head: usize,
    },
}

/// What is known about a call that waits or that has begun.
#[derive(Clone, Copy, Debug)]
pub(super) struct NewCall {
    pub(super) class: u8,
    /// When the call has arrived plus the slack of its class, in nanoseconds.
    pub(super) due: u64,
    pub(super) cost: Cost,
    pub(super) units: Units,
    /// The number that the call had, if it has waited before.
    pub(super) seq: Option<u64>,
}

/// A call that has begun, until it is settled.
#[derive(Debug)]
pub(super) struct Started {
    pub(super) id: usize,
    pub(super) seq: u64,
    leaf: usize,
    charged: Cost,
    /// What each node was charged, from the leaf upwards: its share, and the number of the charge of its limits.
    charges: [(Charge, u64); MAX_LEVELS],
}

impl<K: Clone + Eq + Hash, T> Tree<K, T> {
    pub(super) fn new(strict: [bool; MAX_LEVELS]) -> Self {
        let mut nodes = Slab::new();
        nodes.insert(Node::new(ROOT, None, 0, 1, Below::Children(Fair::default())));
        Self {
            nodes,
            children: HashMap::new(),
            calls: Calls::new(),
            timers: BTreeSet::new(),
            strict,
            next_seq: 0,
            refused: Vec::new(),
        }
    }

    pub(super) fn waiting(&self) -> usize {
        self.calls.len()
    }

    #[cfg(test)]
    pub(super) fn nodes(&self) -> usize {
        self.nodes.len()
    }

    /// Whether a call that waits belongs to the flow that `path` names.
    #[cfg(test)]
    pub(super) fn is_of(&self, id: usize, path: &Path<K>) -> bool {
        let mut at = ROOT;
        for key in path {
            match self.children.get(&(at, key.clone())) {
                Some(child) => at = *child,
                None => return false,
            }
        }
        self.calls.get(id).is_some_and(|call| call.leaf == at)
    }

    /// Returns the call that goes next, if one could be charged to all limits below the root at `now`.
    pub(super) fn head(&mut self, now: &mut LazyNow) -> Option<(usize, &QueuedCall<T>)> {
        while let Some((_, id)) = self.timers.first().copied().filter(|(at, _)| *at <= now.get()) {
            self.look(id, true, now);
        }
        let head = self.head_of(ROOT)?;
        self.calls.get(head).map(|call| (head, call))
    }

    /// Returns when the next node stops to be blocked.
    pub(super) fn next_at(&self) -> Option<Instant> {
        self.timers.first().map(|(at, _)| *at)
    }

    /// Takes the calls that the limits refuse, which wait no more.
    pub(super) fn take_refused(&mut self) -> Vec<(T, Rejected)> {
        std::mem::take(&mut self.refused)
    }

    /// Adds a call of the flow that `path` names. `create` returns the weight of a node that is not known yet, and its
    /// limits.
    pub(super) fn push(
        &mut self,
        path: &Path<K>,
        call: NewCall,
        payload: T,
        mut create: impl FnMut(usize) -> (NonZeroU32, Option<Box<KeyLimits>>),
        now: &mut LazyNow,
    ) -> usize {
        let mut leaf = ROOT;
        for (depth, key) in path.iter().enumerate() {
            leaf = self.child(leaf, key, depth + 1 == path.len(), || create(depth));
        }
        let seq = call.seq.unwrap_or_else(|| {
            self.next_seq += 1;
            self.next_seq
        });
        let units = call.units.clamp(1, MAX_COST);
        let queued = QueuedCall::new(leaf, call.class, call.due, seq, call.cost, units, payload);
        let class = usize::from(call.class);
        let Below::Calls(lists) = &mut self.nodes[leaf].below else {
            unreachable!("a path ends in a leaf");
        };
        if lists.len() <= class {
            lists.resize(class + 1, List::default());
        }
        let id = self.calls.insert(&mut lists[class], queued);
        let is_first = lists[class].first == Some(id);
        self.for_path(leaf, |node| {
            node.waiting += 1;
            if let Some(limits) = &mut node.limits {
                limits.set_waited_for(true, now);
            }
        });
        if is_first {
            self.look(leaf, false, now);
        }
        id
    }

    /// Removes a call that waits.
    pub(super) fn cancel(&mut self, id: usize, now: &mut LazyNow) -> Option<QueuedCall<T>> {
        let call = self.calls.get(id)?;
        let leaf = call.leaf;
        let call = self.unqueue(id, now);
        self.look(leaf, false, now);
        self.forget_path(leaf, now);
        Some(call)
    }

    /// Begins the [head](Self::head), and charges it to all nodes on its path.
    pub(super) fn start(&mut self, now: &mut LazyNow) -> Option<(Started, T)> {
        let id = self.head(now)?.0;
        let call = self.unqueue(id, now);
        let mut charges = [(Charge::default(), 0); MAX_LEVELS];
        let mut at = call.leaf;
        for (charge, number) in &mut charges {
            if at == ROOT {
                break;
            }
            let node = &mut self.nodes[at];
            node.open += 1;
            if let Some(limits) = &mut node.limits {
                *number = limits.charge(&call.cost, std::mem::take(&mut node.has_waited), now);
            }
            let (parent, weight, mut pass) = (node.parent, node.weight, node.pass);
            if let Some(fair) = self.fair_of(parent) {
                *charge = fair.charge(&mut pass, weight, call.units);
            }
            self.nodes[at].pass = pass;
            at = parent;
        }
        self.nodes[ROOT].open += 1;
        self.look_at_path(call.leaf, now);
        let started = Started {
            id,
            seq: call.seq,
            leaf: call.leaf,
            charged: call.cost,
            charges,
        };
        Some((started, call.payload))
    }

    /// Settles a call that has begun: it has cost `used`, which are `units` in the fair order.
    pub(super) fn settle(&mut self, started: Started, used: Cost, units: Units, now: &mut LazyNow) {
        let units = units.clamp(0, MAX_COST);
        let mut at = started.leaf;
        for (charge, number) in started.charges {
            if at == ROOT {
                break;
            }
            let node = &mut self.nodes[at];
            node.open -= 1;
            if let Some(limits) = &mut node.limits {
                limits.settle(&started.charged, number, &used, now);
            }
            let (parent, mut pass) = (node.parent, node.pass);
            let was_owing = std::mem::take(&mut node.is_owing).then_some(pass);
            if let Some(fair) = self.fair_of(parent) {
                if let Some(before) = was_owing {
                    fair.return_from_owing(at, before);
                }
                fair.settle(&mut pass, charge, units);
            }
            self.nodes[at].pass = pass;
            at = parent;
        }
        self.nodes[ROOT].open -= 1;
        self.look_at_path(started.leaf, now);
        self.forget_path(started.leaf, now);
    }
}

// Below: the parts of these.

impl<K: Clone + Eq + Hash, T> Tree<K, T> {
    /// Returns the child of `parent` with this key, or makes one.
    fn child(
        &mut self,
        parent: usize,
        key: &K,
        is_leaf: bool,
        create: impl FnOnce() -> (NonZeroU32, Option<Box<KeyLimits>>),
    ) -> usize {
        if let Some(known) = self.children.get(&(parent, key.clone())) {
            return *known;
        }
        let (weight, limits) = create();
        let below = if is_leaf {
            Below::Calls(Vec::new())
        } else {
            Below::Children(Fair::default())
        };
        let depth = self.nodes[parent].depth + 1;
        let node = Node {
            limits,
            ..Node::new(parent, Some(key.clone()), depth, weight.get(), below)
        };
        let id = self.nodes.insert(node);
        self.children.insert((parent, key.clone()), id);
        id
    }

    fn for_path(&mut self, from: usize, mut visit: impl FnMut(&mut Node<K>)) {
        let mut at = from;
        loop {
            let node = &mut self.nodes[at];
            visit(node);
            if at == ROOT {
                break;
            }
            at = node.parent;
        }
    }

    fn fair_of(&mut self, node: usize) -> Option<&mut Fair> {
        match &mut self.nodes[node].below {
            Below::Children(fair) => Some(fair),
            Below::Calls(_) => None,
        }
    }

    fn unqueue(&mut self, id: usize, now: &mut LazyNow) -> QueuedCall<T> {
        let (leaf, class) = {
            let call = self.calls.get(id).expect("the call waits");
            (call.leaf, usize::from(call.class))
        };
        let Below::Calls(lists) = &mut self.nodes[leaf].below else {
            unreachable!("calls are in leaves");
        };
        let call = self.calls.remove(&mut lists[class], id);
        self.for_path(leaf, |node| {
            node.waiting -= 1;
            if let Some(limits) = node.limits.as_mut().filter(|_| node.waiting == 0) {
                limits.set_waited_for(false, now);
            }
        });
        call
    }

    /// Returns the call that would be the first of a node.
    fn head_of(&self, node: usize) -> Option<usize> {
        match &self.nodes[node].below {
            Below::Calls(lists) => {
                let firsts = lists.iter().filter_map(|list| list.first);
                firsts.min_by_key(|id| self.calls.get(*id).map(|call| (call.due, call.seq)))
            }
            Below::Children(fair) => match self.nodes[fair.first()?.child].state {
                State::Ready { head, .. } => Some(head),
                _ => None,
            },
        }
    }

    /// Looks at a node again, and at those above it up to the first where nothing has changed.
    fn look(&mut self, from: usize, is_due: bool, now: &mut LazyNow) {
        let (mut at, mut is_due) = (from, is_due);
        while at != ROOT && (self.look_at(at, now) || std::mem::take(&mut is_due)) {
            at = self.nodes[at].parent;
        }
    }

    /// Looks at all nodes from `leaf` to the root, because their charges have changed.
    fn look_at_path(&mut self, leaf: usize, now: &mut LazyNow) {
        let mut at = leaf;
        while at != ROOT {
            self.look_at(at, now);
            at = self.nodes[at].parent;
        }
    }

    /// Computes the state of a node. Returns whether it has changed.
    fn look_at(&mut self, id: usize, now: &mut LazyNow) -> bool {
        let head = self.head_of(id);
        let call = head.and_then(|head| self.calls.get(head));
        let Some((head, call)) = head.zip(call) else {
            return self.set_state(id, State::Idle);
        };
        let (cost, units, seq) = (call.cost, call.units, call.seq);
        let node = &mut self.nodes[id];
        let availability = match &mut node.limits {
            Some(limits) => limits.availability(&cost, now),
            None => Ok(Availability::Now),
        };
        let until = match availability {
            Ok(Availability::Now) => {
                let (parent, weight, pass, was_ready) = (node.parent, node.weight, node.pass, node.is_ready());
                let band = self.strict.get(node.depth - 1).copied().unwrap_or(false);
                let end = if band {
                    Units::from(weight)
                } else {
                    let entered = match self.fair_of(parent) {
                        Some(fair) if !was_ready => fair.enter(pass),
                        _ => pass,
                    };
                    self.return_from_owing(id);
                    self.nodes[id].pass = entered;
                    fair::end(entered, weight, units)
                };
                let at = Ready { end, seq, child: id };
                return self.set_state(id, State::Ready { at, head });
            }
            Ok(Availability::At(until) | Availability::BlockedUntil(until)) => Some(until),
            Ok(Availability::Blocked) => None,
            Err(rejection) => {
                let refused = self.unqueue(head, now);
                self.refused.push((refused.payload, rejection));
                self.look_at(id, now);
                return true;
            }
        };
        node.has_waited = true;
        self.set_state(id, State::Blocked { until, head })
    }

    fn set_state(&mut self, id: usize, state: State) -> bool {
        let node = &mut self.nodes[id];
        let (before, parent, weight) = (std::mem::replace(&mut node.state, state), node.parent, node.weight);
        if before == state {
            return false;
        }
        if let State::Blocked { until: Some(until), .. } = before {
            self.timers.remove(&(until, id));
        }
        if let State::Blocked { until: Some(until), .. } = state {
            self.timers.insert((until, id));
        }
        if let Some(fair) = self.fair_of(parent) {
            if let State::Ready { at, .. } = before {
                fair.remove(at, weight);
            }
            if let State::Ready { at, .. } = state {
                fair.insert(at, weight);
            }
        }
        true
    }

    fn return_from_owing(&mut self, id: usize) {
        let node = &mut self.nodes[id];
        if std::mem::take(&mut node.is_owing) {
            let (parent, pass) = (node.parent, node.pass);
            if let Some(fair) = self.fair_of(parent) {
                fair.return_from_owing(id, pass);
            }
        }
    }

    /// Forgets the nodes from `leaf` upwards that have nothing to do any more, and their siblings that have repaid what
    /// they owed.
    fn forget_path(&mut self, leaf: usize, now: &mut LazyNow) {
        let mut at = leaf;
        while at != ROOT {
            let (parent, pass) = (self.nodes[at].parent, self.nodes[at].pass);
            if self.nodes[at].is_done() {
                let is_remembered = self.fair_of(parent).is_some_and(|fair| fair.owe(at, pass));
                if is_remembered {
                    self.nodes[at].is_owing = true;
                } else {
                    self.forget(at, now);
                }
            }
            let is_open = self.nodes[parent].open > 0;
            if let Some(fair) = self.fair_of(parent) {
                if !is_open && !fair.is_any_ready() {
                    fair.end_busy_period();
                }
            }
            while let Some(repaid) = self.fair_of(parent).and_then(Fair::pop_repaid) {
                self.nodes[repaid].is_owing = false;
                self.forget(repaid, now);
            }
            at = parent;
        }
    }

    fn forget(&mut self, id: usize, _now: &mut LazyNow) {
        let node = self.nodes.remove(id);
        if let Some(key) = node.key {
            self.children.remove(&(node.parent, key));
        }
    }
}

impl<K> Node<K> {
    fn new(parent: usize, key: Option<K>, depth: usize, weight: u32, below: Below) -> Self {
        Self {
            parent,
            key,
            depth,
            weight,
            pass: 0,
            waiting: 0,
            open: 0,
            state: State::Idle,
            limits: None,
            has_waited: false,
            is_owing: false,
            below,
        }
    }

    const fn is_ready(&self) -> bool {
        matches!(self.state, State::Ready { .. })
    }

    /// Whether no call waits below this node, and all that have begun are settled.
    const fn is_done(&self) -> bool {
        self.waiting == 0 && self.open == 0
    }
}
