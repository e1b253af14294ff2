//! [`Shard`]: a part of the keys of a limiter, under one lock. It decides, and is told the time.
//!
//! A key is in one of three states:
//!
//! - **Not held.** All its buckets are full, and nothing else is to be known about it.
//! - **At rest.** It has a [`Cell`] for each rate, and a call that need not wait is charged to these.
//! - **Pinned.** It has a [`LocalLimiter`], with the buckets and the wait queue of a limiter that has one key. A key is
//!   pinned by each call that waits, by each open estimate, and while it is paused. When its last user is gone and what
//!   its buckets hold is all that there is to know about them, it returns to cells, which hold the same to the unit.
//!
//! When the table of keys grows, and when limits are replaced, the keys at rest [migrate](Migration) to a new table: each
//! call moves the key that it is for, and some others.
//!
//! Keys that are full are dropped whenever as many calls have come as there is room for keys, and before a table grows.
//! So forgetting needs no task, and takes a constant time per call.

use super::{
    cell::{Cell, full_at},
    context::{Context, Lookup},
    migration::{Migration, Place, ReplacedLimits},
    rows::Rows,
    tier::{Tier, Tiers},
};
use crate::{
    error::AcquireError,
    rate::{buckets::Buckets, cost::Cost, local::LocalLimiter},
    wait_queue::WakeAll,
};
use slab::Slab;
use std::{
    borrow::Borrow,
    collections::BTreeSet,
    hash::Hash,
    mem,
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::time::Instant;

pub(super) struct Shard<K> {
    rows: Rows<K>,
    /// The keys that are not in `rows` yet. Pinned keys always are.
    migration: Migration<K>,
    pins: Slab<Pin>,
    /// The pins without users that cannot return to cells yet, by the time at which they may.
    unused: BTreeSet<(u64, usize)>,
    tiers: Arc<Tiers>,
    /// The latest time that this shard has seen.
    seen: u64,
    /// How far the clock was set back, in nanoseconds. Added to its readings, so that no time has passed then.
    set_back: u64,
    /// The calls since the full keys were dropped last.
    calls: usize,
    /// No key can be forgotten before this time.
    full_from: u64,
}

/// The buckets of a key that is not at rest.
struct Pin {
    limiter: LocalLimiter,
    hash: u64,
    tier: usize,
    /// How many waiting calls, open estimates and other handles keep the key from returning to cells.
    users: usize,
    /// When the pin is looked at again. `None` while it has users.
    look_at: Option<u64>,
}

/// What became of a call that does not wait.
pub(super) enum Taken {
    /// The key held the cost.
    Yes,
    /// It does not hold the cost, and the call must not wait.
    Refused(AcquireError),
    /// It holds the cost after this time.
    NotYet(Duration),
    /// The key is pinned or must be: its limiter knows.
    AskLimiter,
}

/// There is no room for one more key.
#[derive(Debug)]
pub(super) struct NoRoom;

/// How far behind the latest time the clock has to be, in nanoseconds, to count as set back.
const MIN_STEP_BACK_NANOS: u64 = 1_000_000_000;

/// Fewer keys than this are not worth a search for full ones or a smaller table.
const MIN_KEYS: usize = 8;

/// A table with fewer keys grows at once, which takes less than a tenth of a millisecond.
const MIN_MIGRATION: usize = 1_024;

/// How many places of a table that was put aside are moved by each call: enough that the memory of two tables is taken
/// during a hundredth of the calls that fill the new one. Takes 10 to 30 microseconds.
const PLACES_PER_CALL: usize = 128;

/// The largest number of tables that are put aside at once: a key is looked for in each of them.
const MAX_GENERATIONS: usize = 8;

impl<K: Hash + Eq + Clone> Shard<K> {
    pub(super) fn new(tiers: Arc<Tiers>) -> Self {
        Self {
            rows: Rows::new(tiers.width(), 0),
            migration: Migration::new(),
            pins: Slab::new(),
            unused: BTreeSet::new(),
            tiers,
            seen: 0,
            set_back: 0,
            calls: 0,
            full_from: u64::MAX,
        }
    }

    pub(super) fn is_pinned<Q>(&mut self, lookup: Lookup<'_, Q>) -> bool
    where
        K: Borrow<Q>,
        Q: ?Sized + Eq,
    {
        let found = self.rows.get_mut(lookup.hash, |key, _| key.borrow() == lookup.key);
        found.is_some_and(|(_, cells)| cells[0].pin().is_some())
    }

    pub(super) fn limiter(&self, pin: usize) -> &LocalLimiter {
        &self.pins[pin].limiter
    }

    /// Records that a key can be forgotten at `time`.
    fn lower_full_from(&mut self, context: &Context<K>, time: u64) {
        self.full_from = self.full_from.min(time);
        context.room.lower_full_from(time.saturating_sub(self.set_back));
    }

    /// Returns the time before which no key can be forgotten, by the clock of the limiter.
    pub(super) fn full_from(&self) -> u64 {
        match self.full_from {
            u64::MAX => u64::MAX,
            time => time.saturating_sub(self.set_back),
        }
    }

    /// Returns the time in nanoseconds since the epoch. It never goes back.
    #[inline]
    fn time(&mut self, context: &Context<K>, now: Instant) -> u64 {
        let time = context.nanos(now).saturating_add(self.set_back);
        if time < self.seen {
            // Another call has read the clock later and got the lock earlier, or the clock was set back.
            if self.seen - time >= MIN_STEP_BACK_NANOS {
                self.set_back += self.seen - time;
                context.room.lower_full_from(0);
            }
            return self.seen;
        }
        self.seen = time;
        time
    }

    /// Takes `cost` from the cells of a key if they hold it, or only says whether they do. `now` is the current time, or
    /// one shortly before.
    #[inline]
    pub(super) fn try_take<Q>(
        &mut self,
        context: &Context<K>,
        lookup: Lookup<'_, Q>,
        cost: &Cost,
        takes: bool,
        now: Instant,
    ) -> Result<Taken, NoRoom>
    where
        K: Borrow<Q>,
        Q: ?Sized + Eq + ToOwned<Owned = K>,
    {
        let time = self.time(context, now);
        if self.migration.is_empty() {
            self.tidy(context, time);
        } else {
            self.migrate(context, lookup);
        }
        let found = self.rows.get_mut(lookup.hash, |key, _| key.borrow() == lookup.key);
        let Some((key, cells)) = found else {
            return self.try_take_new(context, lookup, cost, takes, time);
        };
        if cells[0].pin().is_some() {
            return Ok(Taken::AskLimiter);
        }
        let tier = self.tiers.of(context.tier_of(key));
        let holds = if takes {
            tier.try_take(cells, cost, time)
        } else {
            tier.holds(cells, cost, time)
        };
        if !holds {
            return Ok(refusal(context, tier, cells, cost, time));
        }
        Ok(Taken::Yes)
    }

    /// Does what [`try_take`](Self::try_take) does for a key that is not held, so that its buckets are full.
    #[inline(never)]
    fn try_take_new<Q>(
        &mut self,
        context: &Context<K>,
        lookup: Lookup<'_, Q>,
        cost: &Cost,
        takes: bool,
        time: u64,
    ) -> Result<Taken, NoRoom>
    where
        Q: ?Sized + ToOwned<Owned = K>,
    {
        let key = lookup.key.to_owned();
        let tier = self.tiers.of(context.tier_of(&key));
        if !tier.has_cells() {
            return Ok(Taken::AskLimiter);
        }
        let (mut few, mut many) = ([Cell::default(); 4], Vec::new());
        let cells = full_cells(self.tiers.width(), &mut few, &mut many);
        if !tier.holds(cells, cost, time) {
            return Ok(refusal(context, tier, cells, cost, time));
        }
        if takes {
            tier.try_take(cells, cost, time);
            let full_at = full_at(cells);
            if full_at > time {
                self.insert(context, lookup.hash, key, cells, time)?;
                self.lower_full_from(context, full_at);
            }
        }
        Ok(Taken::Yes)
    }

    /// Adds a key that is not held.
    fn insert(&mut self, context: &Context<K>, hash: u64, key: K, cells: &[Cell], time: u64) -> Result<(), NoRoom> {
        if !context.room.try_take() {
            return Err(NoRoom);
        }
        if self.rows.len() >= self.rows.capacity().max(MIN_KEYS) && self.migration.is_empty() {
            if self.full_from <= time {
                self.forget_full(context, time);
            }
            if self.rows.len() >= self.rows.capacity().max(MIN_MIGRATION) {
                let rows = Rows::new(self.tiers.width(), 2 * self.rows.len());
                self.put_aside(context, rows, None);
            }
        }
        self.rows.insert(hash, key, cells, |key| context.hash(key));
        Ok(())
    }

    /// Pins a key for one more user, and returns the number of the pin.
    pub(super) fn pin<Q>(&mut self, context: &Context<K>, lookup: Lookup<'_, Q>) -> Result<usize, NoRoom>
    where
        K: Borrow<Q>,
        Q: ?Sized + Eq + ToOwned<Owned = K>,
    {
        // Read under the lock: the buckets must not begin before a time at which the cells were charged.
        let now = Instant::now();
        let time = self.time(context, now);
        if !self.migration.is_empty() {
            self.migrate(context, lookup);
        }
        let found = self.rows.get_mut(lookup.hash, |key, _| key.borrow() == lookup.key);
        let Some((key, cells)) = found else {
            let key = lookup.key.to_owned();
            let tier = context.tier_of(&key);
            let (mut few, mut many) = ([Cell::default(); 4], Vec::new());
            let cells = full_cells(self.tiers.width(), &mut few, &mut many);
            let pin = Pin::new(context, &self.tiers, tier, (now, time), &[], lookup.hash);
            let pin = self.pins.insert(pin);
            cells[0] = Cell::pinned(pin as u32);
            let inserted = self.insert(context, lookup.hash, key, cells, time);
            if inserted.is_err() {
                self.pins.remove(pin);
            }
            return inserted.map(|()| pin);
        };
        if let Some(pin) = cells[0].pin() {
            let pin = pin as usize;
            self.pins[pin].users += 1;
            if let Some(look_at) = self.pins[pin].look_at.take() {
                self.unused.remove(&(look_at, pin));
            }
            return Ok(pin);
        }
        let tier = context.tier_of(key);
        let missing = self.tiers.of(tier).missing(cells, time);
        let pin = Pin::new(context, &self.tiers, tier, (now, time), &missing, lookup.hash);
        let pin = self.pins.insert(pin);
        cells.fill(Cell::default());
        cells[0] = Cell::pinned(pin as u32);
        Ok(pin)
    }

    /// Ends the use of a pin by one user.
    pub(super) fn unpin(&mut self, context: &Context<K>, pin: usize) {
        self.pins[pin].users -= 1;
        if self.pins[pin].users == 0 {
            self.put_to_rest(context, pin, Instant::now());
        }
    }

    /// Returns the key of a pin that has no users to cells, or forgets it. If that would lose something, it is tried
    /// again later. `now` must have been read under the lock: what is not filled yet when the buckets are read would be
    /// filled twice.
    fn put_to_rest(&mut self, context: &Context<K>, index: usize, now: Instant) {
        let time = self.time(context, now);
        let pin = &mut self.pins[index];
        let tier = self.tiers.of(pin.tier);
        let (until_rest, until_full) = pin.limiter.inspect_at(now, |buckets, now| {
            (buckets.time_until_rest(now), buckets.time_until_full(now))
        });
        let wait = if tier.has_cells() {
            until_rest
        } else {
            until_rest.max(until_full)
        };
        if wait > 0 {
            let look_at = time.saturating_add(wait);
            pin.look_at = Some(look_at);
            self.unused.insert((look_at, index));
            self.lower_full_from(context, look_at);
            return;
        }
        let pin = self.pins.remove(index);
        let is_its = |_: &K, cells: &[Cell]| cells[0] == Cell::pinned(index as u32);
        if until_full == 0 {
            drop(self.rows.remove(pin.hash, is_its));
            context.room.give_back(1);
        } else if let Some((_, cells)) = self.rows.get_mut(pin.hash, is_its) {
            cells[0] = Cell::default();
            pin.limiter.inspect_at(now, |buckets, now| {
                tier.fill_cells(cells, buckets.missing(now), time);
            });
            let full_at = full_at(cells);
            self.lower_full_from(context, full_at);
        }
    }

    /// Reads what is known of a key: from its cells and its tier, or from its limiter if it is pinned.
    pub(super) fn read<Q, T>(
        &mut self,
        context: &Context<K>,
        lookup: Lookup<'_, Q>,
        of_cells: impl FnOnce(&Tier, &[Cell], u64) -> T,
        of_limiter: impl FnOnce(&LocalLimiter) -> T,
    ) -> T
    where
        K: Borrow<Q>,
        Q: ?Sized + Eq + ToOwned<Owned = K>,
    {
        let now = Instant::now();
        let time = self.time(context, now);
        if !self.migration.is_empty() {
            self.migrate(context, lookup);
        }
        let found = self.rows.get_mut(lookup.hash, |key, _| key.borrow() == lookup.key);
        if let Some((key, cells)) = found {
            return match cells[0].pin() {
                Some(pin) => of_limiter(&self.pins[pin as usize].limiter),
                None => of_cells(self.tiers.of(context.tier_of(key)), cells, time),
            };
        }
        let tier = context.tier_of(&lookup.key.to_owned());
        if self.tiers.of(tier).has_cells() {
            let (mut few, mut many) = ([Cell::default(); 4], Vec::new());
            let cells = full_cells(self.tiers.width(), &mut few, &mut many);
            return of_cells(self.tiers.of(tier), cells, time);
        }
        of_limiter(&Pin::new(context, &self.tiers, tier, (now, time), &[], lookup.hash).limiter)
    }

    /// Replaces the limits. A key that is full at this time has full buckets under the new limits, too: as if it had been
    /// forgotten before. Returns the waiting calls, to be woken when the lock is released.
    pub(super) fn set_tiers(&mut self, context: &Context<K>, tiers: &Arc<Tiers>) -> Vec<WakeAll<Buckets>> {
        let mut wakes = Vec::new();
        if self.tiers.version() >= tiers.version() {
            return wakes;
        }
        let now = Instant::now();
        let time = self.time(context, now);
        for (_, index) in mem::take(&mut self.unused) {
            self.pins[index].look_at = None;
            self.pins[index].limiter.inspect_at(now, Buckets::end_credit);
            self.put_to_rest(context, index, now);
        }
        if !tiers.have_cells() {
            self.pin_without_cells(context, tiers, (now, time));
        } else if self.migration.generations() >= MAX_GENERATIONS {
            self.migrate_all(context);
        }
        let old = mem::replace(&mut self.tiers, tiers.clone());
        let replaced = ReplacedLimits::new(old.clone(), tiers.clone(), time);
        self.put_aside(context, Rows::new(tiers.width(), 0), Some(replaced));
        // It is not known when the first key is full under the new limits.
        self.lower_full_from(context, 0);

        let pins: Vec<_> = self.pins.iter().map(|(index, _)| index).collect();
        for index in pins {
            let pin = &mut self.pins[index];
            let limits = tiers.of(pin.tier).limits();
            if limits == old.of(pin.tier).limits() {
                continue;
            }
            wakes.push(pin.limiter.set_limits_then_wake(limits.clone()));
            if pin.users == 0 {
                if let Some(look_at) = pin.look_at.take() {
                    self.unused.remove(&(look_at, index));
                }
                self.put_to_rest(context, index, Instant::now());
            }
        }
        wakes
    }

    /// Gives buckets to all keys at rest whose buckets cannot be at rest under the limits that come next. Takes time for
    /// each key.
    fn pin_without_cells(&mut self, context: &Context<K>, next: &Tiers, (now, time): (Instant, u64)) {
        self.forget_full(context, time);
        // User code comes first: if it panics, nothing has been changed.
        let mut of_keys = Vec::with_capacity(self.rows.len());
        self.rows
            .for_each(|key, _| of_keys.push((context.tier_of(key), context.hash(key))));
        let mut of_keys = of_keys.into_iter();
        self.rows.retain(|_, cells| {
            let Some((tier, hash)) = of_keys.next() else {
                return true;
            };
            if cells[0].pin().is_none() && !next.of(tier).has_cells() {
                let missing = self.tiers.of(tier).missing(cells, time);
                let mut pin = Pin::new(context, &self.tiers, tier, (now, time), &missing, hash);
                pin.users = 0;
                cells.fill(Cell::default());
                cells[0] = Cell::pinned(self.pins.insert(pin) as u32);
            }
            true
        });
    }

    /// Puts the table aside. Only the pinned keys are in the new one at once.
    fn put_aside(&mut self, context: &Context<K>, rows: Rows<K>, replaced: Option<ReplacedLimits>) {
        let mut old = mem::replace(&mut self.rows, rows);
        let mut cells = vec![Cell::default(); self.tiers.width()];
        for (index, pin) in &self.pins {
            cells[0] = Cell::pinned(index as u32);
            if let Some(key) = old.remove(pin.hash, |_, of_key| of_key[0] == cells[0]) {
                self.rows.insert(pin.hash, key, &cells, |key| context.hash(key));
            }
        }
        self.migration.push(old, replaced);
    }

    /// Moves a key to the present table, if it is not there, and some others.
    #[inline(never)]
    fn migrate<Q>(&mut self, context: &Context<K>, lookup: Lookup<'_, Q>)
    where
        K: Borrow<Q>,
        Q: ?Sized + Eq,
    {
        if let Some(place) = self.migration.find(lookup) {
            self.migrate_at(context, place);
        }
        for _ in 0..PLACES_PER_CALL {
            let Some(place) = self.migration.next() else { return };
            self.migrate_at(context, place);
        }
    }

    /// Moves all keys to the present table.
    fn migrate_all(&mut self, context: &Context<K>) {
        while let Some(place) = self.migration.next() {
            self.migrate_at(context, place);
        }
    }

    /// Moves the key at a place, if there is one, or forgets it if it is full.
    fn migrate_at(&mut self, context: &Context<K>, place: Place) {
        let Some(key) = self.migration.take(context, place) else {
            return;
        };
        if full_at(&key.cells) > self.seen {
            self.rows.insert(key.hash, key.key, &key.cells, |key| context.hash(key));
        } else {
            context.room.give_back(1);
        }
    }

    /// Forgets what can be forgotten, as often as it pays off.
    #[inline]
    fn tidy(&mut self, context: &Context<K>, time: u64) {
        self.calls += 1;
        if self.calls > self.rows.capacity().max(MIN_KEYS) && self.full_from <= time {
            self.forget_full(context, time);
        } else if self.unused.first().is_some_and(|(at, _)| *at <= time) {
            self.put_due_to_rest(context, time);
        }
    }

    /// Looks again at the pins without users for which it is time.
    #[inline(never)]
    fn put_due_to_rest(&mut self, context: &Context<K>, time: u64) {
        while let Some((at, index)) = self.unused.first().copied().filter(|(at, _)| *at <= time) {
            self.unused.remove(&(at, index));
            self.pins[index].look_at = None;
            self.put_to_rest(context, index, Instant::now());
        }
    }

    /// Forgets all keys that are full at the time `now`.
    pub(super) fn forget_full_at(&mut self, context: &Context<K>, now: Instant) {
        let time = self.time(context, now);
        self.forget_full(context, time);
    }

    #[inline(never)]
    fn forget_full(&mut self, context: &Context<K>, time: u64) {
        self.migrate_all(context);
        self.put_due_to_rest(context, time);
        self.calls = 0;
        let (before, mut full_from) = (self.rows.len(), u64::MAX);
        self.rows.retain(|_, cells| {
            if cells[0].pin().is_some() {
                return true;
            }
            let full_at = full_at(cells);
            if full_at > time {
                full_from = full_from.min(full_at);
            }
            full_at > time
        });
        self.full_from = self.unused.first().map_or(full_from, |(at, _)| full_from.min(*at));
        context.room.give_back(before - self.rows.len());
        if self.rows.capacity() > 8 * self.rows.len().max(MIN_KEYS) {
            self.rows.shrink(|key| context.hash(key));
        }
    }
}

impl Pin {
    /// Creates the pin of a key for one user. Its buckets lack so many units each at `now`, which is `time` nanoseconds
    /// after the epoch.
    fn new<K>(
        context: &Context<K>,
        tiers: &Tiers,
        tier: usize,
        (now, time): (Instant, u64),
        missing: &[u128],
        hash: u64,
    ) -> Self {
        let wall_clock = SystemTime::UNIX_EPOCH + Duration::from_nanos(context.wall_clock(time));
        let limits = tiers.of(tier).limits().clone();
        let limiter = LocalLimiter::with_missing(limits, missing, now, wall_clock);
        Self {
            limiter: limiter.expect("the limits were checked"),
            hash,
            tier,
            users: 1,
            look_at: None,
        }
    }
}

/// Returns why a call whose cost the cells do not hold is not admitted.
#[inline(never)]
fn refusal<K>(context: &Context<K>, tier: &Tier, cells: &[Cell], cost: &Cost, time: u64) -> Taken {
    match tier.rejection(cells, cost, time, context.wall_clock(time)) {
        Some(rejected) => Taken::Refused(rejected.into()),
        None => Taken::NotYet(tier.wait(cells, cost, time)),
    }
}

/// Returns `width` full cells, in one of the two places.
fn full_cells<'a>(width: usize, few: &'a mut [Cell; 4], many: &'a mut Vec<Cell>) -> &'a mut [Cell] {
    if width <= few.len() {
        &mut few[..width]
    } else {
        many.resize(width, Cell::default());
        many
    }
}
