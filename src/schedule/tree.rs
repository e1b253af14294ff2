//! [`Tree`]: which of the waiting calls goes next.
//!
//! The tree has one rule: *a node is its limits and a fair order of its children*. The root stands for the limits of the
//! whole account, a leaf for one flow, and the levels between them for whatever shares a limit: a tenant, a model. The
//! limits of the root, and the permit that a call needs, are not kept here: the caller looks at the [head](Tree::head),
//! waits until both are there for it, and then [starts](Tree::start) the first call, which is charged to all nodes on its
//! path at once. So a call is chosen when it can run, and no call waits after it was chosen.
//!
//! A node is *ready* if the call that would be the first below it could be charged to all limits below and at the node;
//! *blocked until* a time if only the node's own limits lack something; otherwise it has nothing ready below it. Ready
//! children stand in the fair order of their parent, blocked ones among the timers. After any change, the node that has
//! changed and those above it are looked at again, up to the first where nothing changes.
//!
//! A node is made when its first call comes, and forgotten when forgetting it changes nothing: when no call waits or is
//! open, its share is not ahead of its siblings', its limits are full and no pause is in force.

mod forgetting;
#[cfg(test)]
mod invariants;
mod looking;
mod node;
mod running;
mod settings;
mod upcoming;
mod view;

#[cfg(test)]
pub(super) use forgetting::Forgetting;
pub(super) use node::NewNode;
#[allow(unused_imports, reason = "the handle shows them")]
pub(super) use running::Running;
pub(super) use view::FlowView;

use super::{
    calls::{Calls, QueuedCall},
    fair::{Charge, Fair, MAX_COST, Units},
};
use crate::{
    clock::LazyNow,
    error::Rejected,
    rate::{Cost, Demand},
};
use node::{Below, Node};
use slab::Slab;
use std::{collections::BTreeSet, hash::Hash};
use tokio::time::Instant;

/// The largest number of levels below the root.
pub(super) const MAX_LEVELS: usize = 3;

/// What [`Tree::push`] returns in place of the number of a call that the limits have refused at once.
pub(super) const REFUSED: usize = usize::MAX;

/// How many calls of a class are looked at for what goes before a new call of another class, so that submitting a call takes
/// about the same time with any number of calls.
const MAX_LOOKED_AT: usize = 1_000;

const ROOT: usize = 0;

/// The path of a flow: the keys of its nodes, from the one below the root to the leaf.
pub(super) type Path<K> = [K];

pub(super) struct Tree<K, T> {
    nodes: Slab<Node<K>>,
    /// The largest number of nodes below the root.
    max_nodes: usize,
    calls: Calls<T>,
    /// The calls that have begun and are not settled.
    open: Slab<OpenCall>,
    /// The nodes that are blocked, by when they stop to be.
    timers: BTreeSet<(Instant, usize)>,
    /// The nodes that are kept only until their limits are full and their pause is over, by when that is.
    filling: BTreeSet<(Instant, usize)>,
    /// For each level, whether its nodes go strictly in the order of their bands.
    strict: [bool; MAX_LEVELS],
    next_seq: u64,
    counts_running: bool,
    /// Calls that the limits refuse.
    refused: Vec<(T, Rejected)>,
    /// The leaves of calls that were refused while nodes were looked at, until it is known whether they are kept.
    left: Vec<usize>,
    #[cfg(test)]
    pub(super) forgetting: Forgetting,
    /// In tests, whether the timer of a node stays when the node is no longer blocked, to show what would be wrong.
    #[cfg(test)]
    pub(super) keeps_timers: bool,
}

/// What is known about a call that comes to wait.
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

/// A call that has begun, until it is [settled](Tree::settle).
#[derive(Debug)]
pub(super) struct Started {
    pub(super) seq: u64,
    /// Where the tree finds what it was charged.
    open: usize,
    #[cfg(test)]
    pub(super) id: usize,
    #[cfg(test)]
    charged: Cost,
}

/// What a call was charged that has begun.
struct OpenCall {
    leaf: usize,
    charged: Cost,
    /// What each node was charged, from the leaf upwards.
    charges: [Charged; MAX_LEVELS],
}

/// What a call was charged at one node.
#[derive(Clone, Copy, Debug, Default)]
struct Charged {
    /// Its share of the parent. `None` at a strict level.
    share: Option<Charge>,
    /// The number of the charge of the node's limits. `None` if it had no limits then.
    number: Option<u64>,
}

#[cfg(test)]
impl Started {
    /// Returns what the call was charged.
    pub(super) const fn cost(&self) -> Cost {
        self.charged
    }
}

impl<K: Clone + Eq + Hash, T> Tree<K, T> {
    /// Creates a tree with at most `max_nodes` nodes below its root. `strict` tells for each level whether its nodes go
    /// strictly in the order of their weights, which are the numbers of their bands.
    pub(super) fn new(strict: [bool; MAX_LEVELS], max_nodes: usize) -> Self {
        let mut nodes = Slab::new();
        nodes.insert(Node::root());
        Self {
            nodes,
            max_nodes,
            calls: Calls::new(),
            open: Slab::new(),
            timers: BTreeSet::new(),
            filling: BTreeSet::new(),
            strict,
            next_seq: 0,
            counts_running: false,
            refused: Vec::new(),
            left: Vec::new(),
            #[cfg(test)]
            forgetting: Forgetting::default(),
            #[cfg(test)]
            keeps_timers: false,
        }
    }

    pub(super) fn waiting(&self) -> usize {
        self.calls.len()
    }

    /// Returns how many calls wait below the node that `path` names.
    pub(super) fn waiting_of(&self, path: &Path<K>) -> usize {
        self.find(path).map_or(0, |id| self.nodes[id].waiting)
    }

    /// Returns the sum of the costs of the calls that wait in the flow that `path` names and that a new call of this class
    /// goes behind, which is `due` then: all of its class, and those of other classes that are due before it. Of each other
    /// class that is due partly later, at most [`MAX_LOOKED_AT`] calls are counted.
    pub(super) fn demand_ahead(&self, path: &Path<K>, class: u8, due: u64) -> Demand {
        let mut ahead = Demand::default();
        let queue = self.find(path).and_then(|id| self.nodes[id].queue());
        for (of, queue) in queue.iter().flat_map(|queue| queue.classes().enumerate()) {
            if of == usize::from(class) || queue.latest_due <= due {
                ahead.add(&queue.demand);
                continue;
            }
            let earlier = self.calls.of(queue.list).take_while(|call| call.due <= due);
            earlier.take(MAX_LOOKED_AT).for_each(|call| ahead += &call.cost);
        }
        ahead
    }

    /// Returns how many of the nodes on `path` are known, from the outermost on.
    pub(super) fn known(&self, path: &Path<K>) -> usize {
        (1..=path.len())
            .take_while(|depth| self.find(&path[..*depth]).is_some())
            .count()
    }

    /// Returns the weight of the node that `path` names, which is 1 if it is not known.
    pub(super) fn weight_of(&self, path: &Path<K>) -> u32 {
        self.find(path).map_or(1, |id| self.nodes[id].weight)
    }

    /// Returns the weight of the flow of a call that waits, which is 1 if it does not.
    pub(super) fn weight_of_call(&self, id: usize) -> u32 {
        self.calls.get(id).map_or(1, |call| self.nodes[call.leaf].weight)
    }

    /// Returns the call that was the first when the tree was last looked at.
    pub(super) fn peek(&self) -> Option<usize> {
        self.head_of(ROOT)
    }

    /// Returns a call that waits.
    pub(super) fn call(&self, id: usize) -> Option<&QueuedCall<T>> {
        self.calls.get(id)
    }

    /// Returns how many nodes there are below the root.
    pub(super) fn nodes(&self) -> usize {
        self.nodes.len() - 1
    }

    /// Returns the call that goes next, if one could be charged to all limits below the root at `now`. Charges nothing.
    pub(super) fn head(&mut self, now: &mut LazyNow) -> Option<(usize, &QueuedCall<T>)> {
        self.forget_full(now);
        // Each node that is due is looked at once: one that is still blocked stays until its new time.
        for _ in 0..self.timers.len() {
            match self.timers.first() {
                Some((at, id)) if *at <= now.get() => self.look(*id, now),
                _ => break,
            }
        }
        self.forget_left(now);
        let head = self.head_of(ROOT)?;
        self.calls.get(head).map(|call| (head, call))
    }

    /// Returns when the next node stops to be blocked.
    pub(super) fn next_at(&self) -> Option<Instant> {
        self.timers.first().map(|(at, _)| *at)
    }

    /// Whether there are calls that the limits refuse, and that were not [taken](Self::take_refused).
    pub(super) fn has_refused(&self) -> bool {
        !self.refused.is_empty()
    }

    /// Takes the calls that the limits refuse, which wait no more. To be looked at after each change of the tree: the number
    /// of a call that has gone is given to another one.
    pub(super) fn take_refused(&mut self) -> Vec<(T, Rejected)> {
        std::mem::take(&mut self.refused)
    }

    /// Adds a call of the flow that `path` names, and returns its number. `create` is given the path of each node that is
    /// not known yet. A call that the limits refuse is among those of [`take_refused`](Self::take_refused) instead, and
    /// its number is [`REFUSED`].
    ///
    /// # Errors
    ///
    /// Gives the payload back if the tree would have more nodes than it may: it forgets no node for another one. Also if
    /// `path` is empty, has more than [`MAX_LEVELS`] keys, or ends where the path of another flow goes on.
    #[cfg(test)]
    pub(super) fn push(
        &mut self,
        path: &Path<K>,
        call: NewCall,
        payload: T,
        mut create: impl FnMut(&Path<K>) -> NewNode,
        now: &mut LazyNow,
    ) -> Result<usize, T> {
        self.try_push(path, call, payload, |path| Some(create(path)), now)
    }

    /// Does what [`push`](Self::push) does, and also gives the payload back, without changing anything, if `create` returns
    /// `None`: a node was forgotten that the caller took to be known.
    pub(super) fn try_push(
        &mut self,
        path: &Path<K>,
        call: NewCall,
        payload: T,
        create: impl FnMut(&Path<K>) -> Option<NewNode>,
        now: &mut LazyNow,
    ) -> Result<usize, T> {
        self.forget_full(now);
        let Some(leaf) = self.find_or_create(path, create, now) else {
            return Err(payload);
        };
        if let Some(rejection) = self.rejection(leaf, &call.cost, now) {
            self.refused.push((payload, rejection));
            self.forget_path(leaf, now);
            return Ok(REFUSED);
        }
        let seq = call.seq.unwrap_or_else(|| {
            self.next_seq += 1;
            self.next_seq
        });
        let units = call.units.clamp(1, MAX_COST);
        let queued = QueuedCall::new(leaf, call.class, call.due, seq, call.cost, units, payload);
        let class = usize::from(call.class);
        let Some(queue) = self.nodes[leaf].queue_mut() else {
            return Err(queued.payload);
        };
        let queue = queue.class_mut(class);
        queue.demand += &call.cost;
        let is_empty = queue.list.first.is_none();
        queue.latest_due = if is_empty {
            call.due
        } else {
            call.due.max(queue.latest_due)
        };
        let id = self.calls.insert(&mut queue.list, queued);
        let is_first = queue.list.first == Some(id);
        let mut at = Some(leaf);
        while let Some(id) = at {
            self.wake(id);
            let node = &mut self.nodes[id];
            node.waiting += 1;
            if let Some(limits) = &mut node.limits {
                limits.set_waited_for(true, now);
            }
            at = (id != ROOT).then_some(node.parent);
        }
        if is_first {
            self.look(leaf, now);
            self.forget_left(now);
        }
        Ok(id)
    }

    /// Removes a call that waits.
    pub(super) fn cancel(&mut self, id: usize, now: &mut LazyNow) -> Option<QueuedCall<T>> {
        let call = self.unqueue(id, now)?;
        self.look(call.leaf, now);
        self.forget_path(call.leaf, now);
        self.forget_left(now);
        Some(call)
    }

    /// Begins the [head](Self::head), and charges it to all nodes on its path.
    #[cfg(test)]
    pub(super) fn start(&mut self, now: &mut LazyNow) -> Option<(Started, T)> {
        let id = self.head(now)?.0;
        self.start_call(id, now)
    }

    /// Begins a call that waits and [could be charged](Self::availability_of) now, and charges it to all nodes on its path.
    pub(super) fn start_call(&mut self, id: usize, now: &mut LazyNow) -> Option<(Started, T)> {
        let call = self.unqueue(id, now)?;
        let mut charges = [Charged::default(); MAX_LEVELS];
        let mut at = call.leaf;
        for charged in &mut charges {
            if at == ROOT {
                break;
            }
            let is_strict = self.is_strict(at);
            let node = &mut self.nodes[at];
            node.open += 1;
            if let Some(limits) = &mut node.limits {
                charged.number = Some(limits.charge(&call.cost, std::mem::take(&mut node.has_waited), now));
            }
            let (parent, weight, mut pass) = (node.parent, node.weight, node.pass);
            if let Some(order) = self.order_of(parent).filter(|_| !is_strict) {
                charged.share = Some(order.charge(&mut pass, weight, call.units));
            }
            self.nodes[at].pass = pass;
            at = parent;
        }
        self.nodes[ROOT].open += 1;
        self.run(call.leaf);
        self.look_at_path(call.leaf, now);
        self.forget_left(now);
        let open = self.open.insert(OpenCall {
            leaf: call.leaf,
            charged: call.cost,
            charges,
        });
        let started = Started {
            seq: call.seq,
            open,
            #[cfg(test)]
            id,
            #[cfg(test)]
            charged: call.cost,
        };
        Some((started, call.payload))
    }

    /// Settles a call that has begun: it has cost `used`, which are `units` in the fair order.
    #[expect(clippy::needless_pass_by_value, reason = "a call is settled once")]
    pub(super) fn settle(&mut self, started: Started, used: Cost, units: Units, now: &mut LazyNow) {
        let OpenCall {
            leaf,
            charged: cost,
            charges,
        } = self.open.remove(started.open);
        let units = units.clamp(0, MAX_COST);
        // A call that has cost what it was charged, to nodes without limits, changes no node's state.
        let mut has_changed = false;
        let mut at = leaf;
        for charged in charges {
            if at == ROOT {
                break;
            }
            let node = &mut self.nodes[at];
            node.open -= 1;
            if let Some((limits, number)) = node.limits.as_mut().zip(charged.number) {
                limits.settle(&cost, number, &used, now);
                has_changed = true;
            }
            let (parent, mut pass) = (node.parent, node.pass);
            if let Some((order, share)) = self.order_of(parent).zip(charged.share) {
                has_changed |= order.settle(&mut pass, share, units);
            }
            self.nodes[at].pass = pass;
            at = parent;
        }
        self.nodes[ROOT].open -= 1;
        if has_changed {
            self.look_at_path(leaf, now);
        }
        self.forget_path(leaf, now);
        self.forget_left(now);
    }
}

// Below: the parts of these.

impl<K: Clone + Eq + Hash, T> Tree<K, T> {
    /// Returns the node that `path` names, if it lives.
    fn find(&self, path: &Path<K>) -> Option<usize> {
        path.iter().try_fold(ROOT, |at, key| self.child(at, key))
    }

    fn child(&self, parent: usize, key: &K) -> Option<usize> {
        self.nodes[parent].children()?.by_key.get(key).copied()
    }

    /// Returns the leaf that `path` names. Makes the nodes that do not live, all or none.
    fn find_or_create(
        &mut self,
        path: &Path<K>,
        mut create: impl FnMut(&Path<K>) -> Option<NewNode>,
        now: &mut LazyNow,
    ) -> Option<usize> {
        if path.is_empty() || path.len() > MAX_LEVELS {
            return None;
        }
        let (mut at, mut known) = self.find_longest(path);
        if known < path.len() && self.nodes[at].is_leaf() {
            return None;
        }
        if self.nodes() + path.len() - known > self.max_nodes {
            self.make_room(path.len() - known, now);
            // A node of this path may have been among those that were forgotten.
            (at, known) = self.find_longest(path);
            if self.nodes() + path.len() - known > self.max_nodes {
                return None;
            }
        }
        let mut new: [Option<NewNode>; MAX_LEVELS] = Default::default();
        for (depth, new) in (known..path.len()).zip(&mut new) {
            *new = Some(create(&path[..=depth])?);
        }
        for (depth, new) in (known..).zip(new.into_iter().flatten()) {
            let below = if depth + 1 == path.len() {
                Below::calls()
            } else {
                Below::children()
            };
            let key = path[depth].clone();
            let node = Node::new(at, Some(key.clone()), depth + 1, new, below);
            let id = self.nodes.insert(node);
            if let Some(children) = self.nodes[at].children_mut() {
                children.by_key.insert(key, id);
            }
            at = id;
        }
        self.nodes[at].is_leaf().then_some(at)
    }

    /// Returns the last node on `path` that lives, and how many keys of the path lead to it.
    fn find_longest(&self, path: &Path<K>) -> (usize, usize) {
        let mut at = ROOT;
        for (known, key) in path.iter().enumerate() {
            match self.child(at, key) {
                Some(child) => at = child,
                None => return (at, known),
            }
        }
        (at, path.len())
    }

    fn order_of(&mut self, node: usize) -> Option<&mut Fair> {
        Some(&mut self.nodes.get_mut(node)?.children_mut()?.order)
    }

    fn is_strict(&self, node: usize) -> bool {
        let level = self.nodes[node].depth.checked_sub(1);
        level.and_then(|level| self.strict.get(level)).copied().unwrap_or(false)
    }

    /// Returns why the limits on the path to `leaf` do not let a call of this cost wait.
    fn rejection(&mut self, leaf: usize, cost: &Cost, now: &mut LazyNow) -> Option<Rejected> {
        let mut at = leaf;
        while at != ROOT {
            let node = &mut self.nodes[at];
            let rejection = node.limits.as_mut().and_then(|limits| limits.rejection(cost, now));
            if rejection.is_some() {
                return rejection;
            }
            at = node.parent;
        }
        None
    }

    /// Takes a call out of its flow. The nodes on its path must then be looked at.
    fn unqueue(&mut self, id: usize, now: &mut LazyNow) -> Option<QueuedCall<T>> {
        let call = self.calls.get(id)?;
        let (leaf, class) = (call.leaf, usize::from(call.class));
        let queue = self.nodes[leaf].queue_mut()?.class_mut(class);
        let call = self.calls.remove(&mut queue.list, id);
        queue.demand -= &call.cost;
        let mut at = Some(leaf);
        while let Some(id) = at {
            let node = &mut self.nodes[id];
            node.waiting -= 1;
            if let Some(limits) = node.limits.as_mut().filter(|_| node.waiting == 0) {
                limits.set_waited_for(false, now);
            }
            at = (id != ROOT).then_some(node.parent);
        }
        Some(call)
    }
}
