//! [`StoreRequest`] and [`StoreReply`]: all that one round trip carries.

use super::quota_config::QuotaConfig;
use crate::rate::limits::{Budget, Cost};
use std::sync::Arc;

/// Who asks: a name that no other process has.
pub(super) type Member = [u8; 16];

/// All that a member has to say and to ask at one time. Amounts are requests and tokens; times are microseconds.
#[derive(Clone, Debug)]
pub(super) struct StoreRequest {
    pub(super) member: Member,
    /// It will not be back.
    pub(super) leaves: bool,
    /// It only wants to know whether there is anybody: what it has to correct comes next.
    pub(super) probes: bool,
    /// Nothing is reserved while the frontier is further in the future than this.
    pub(super) ahead: i64,
    /// The state it knows; 0: none.
    pub(super) birth: i64,
    /// How often that was asked when it last heard of it.
    pub(super) seq: i64,
    /// How far in the future its last reservation is.
    pub(super) horizon: i64,
    pub(super) config: Arc<QuotaConfig>,
    /// What it was configured with.
    pub(super) base: String,
    /// Which limits it knows; 0: only what it was configured with.
    pub(super) stamp: i64,
    /// It wants its limits to be everybody's.
    pub(super) changes: bool,
    /// The corrections have this number. Told twice, they count once.
    pub(super) batch: i64,
    /// Estimated and not used.
    pub(super) credit: [u64; 2],
    /// Used and not estimated.
    pub(super) debit: [u64; 2],
    /// Taken by its own share of the rates, while it could not ask.
    pub(super) spent: [u64; 2],
    /// How long ago it began with that.
    pub(super) alone: i64,
    /// Its share was one of so many.
    pub(super) shares: i64,
    /// What it has out in estimates, but for what is credited here.
    pub(super) estimated: [u64; 2],
    pub(super) pause: i64,
    /// No more is left of this rate.
    pub(super) lower: Vec<(usize, u64)>,
    pub(super) costs: Vec<Cost>,
}

/// What it is told.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct StoreReply {
    pub(super) seq: i64,
    pub(super) birth: i64,
    pub(super) stamp: i64,
    /// For how long nobody is to go, in microseconds.
    pub(super) pause: i64,
    pub(super) members: u64,
    /// Whether its estimates are known.
    pub(super) known: bool,
    /// For how long this is remembered, in milliseconds.
    pub(super) kept: i64,
    /// How far in the future the frontier is; in the past, if negative.
    pub(super) lead: i64,
    /// What is left at the frontier.
    pub(super) left: [Option<u64>; 2],
    /// When to ask again for what was not reserved.
    pub(super) again: i64,
    /// The server's clock, in microseconds.
    pub(super) now: i64,
    /// In how many microseconds each of the first costs may go. The others are not reserved.
    pub(super) goes: Vec<i64>,
    /// The limits as they are now, if they are others than it knows.
    pub(super) config: Option<String>,
}

/// The numbers of an [`StoreRequest`] that are always there.
const HEAD: usize = 23;

impl StoreRequest {
    /// Whether the limits may be left out, because they are known.
    pub(super) fn is_brief(&self) -> bool {
        self.stamp != 0 && !self.changes && self.lower.is_empty()
    }

    /// The limits, and what they were configured as.
    pub(super) fn text(&self) -> String {
        format!("{}\n{}", self.config.text(), self.base)
    }

    /// Its numbers as the script reads them: doubles, the least significant byte first.
    pub(super) fn packed(&self, is_brief: bool) -> Vec<u8> {
        let sizes = if is_brief { &[] } else { self.config.sizes() };
        let mut numbers = Numbers(Vec::with_capacity(8 * (HEAD + 6 * sizes.len() + 2 * self.costs.len())));
        numbers.put(self.ahead as f64);
        numbers.put(self.birth as f64);
        numbers.put(self.seq as f64);
        numbers.put(self.horizon as f64);
        numbers.put(self.stamp as f64);
        numbers.put(f64::from(u8::from(self.changes)));
        numbers.put(f64::from(u8::from(self.leaves)));
        numbers.put(f64::from(u8::from(self.probes)));
        numbers.put(self.pause as f64);
        numbers.put(self.batch as f64);
        numbers.put(self.alone as f64);
        numbers.put(self.shares as f64);
        for amounts in [self.credit, self.debit, self.spent, self.estimated] {
            numbers.put(exact(amounts[0]));
            numbers.put(exact(amounts[1]));
        }
        numbers.put(self.lower.len() as f64);
        numbers.put(sizes.len() as f64);
        numbers.put(self.costs.len() as f64);
        for (at, (budget, size)) in sizes.iter().enumerate() {
            numbers.put(match budget {
                Budget::Requests => 1.0,
                Budget::Tokens => 2.0,
            });
            numbers.put(size.fill as f64);
            numbers.put(size.unit as f64);
            numbers.put(size.capacity as f64);
            numbers.put(size.initial as f64);
            let left = self.lower.iter().filter(|(of, _)| *of == at).map(|(_, left)| *left);
            numbers.put(left.min().map_or(-1.0, exact));
        }
        for cost in &self.costs {
            numbers.put(exact(cost.requests));
            numbers.put(exact(cost.tokens));
        }
        numbers.0
    }
}

struct Numbers(Vec<u8>);

impl Numbers {
    fn put(&mut self, number: f64) {
        self.0.extend_from_slice(&number.to_le_bytes());
    }
}

/// No amount that means anything is larger.
fn exact(amount: u64) -> f64 {
    amount.min(1 << 52) as f64
}
