//! [`StoreRequest`] and [`StoreReply`]: what a member and the store send each other in one round trip.
//!
//! Requests and replies are sent as lists of numbers. [`RequestNumbers`] and [`ReplyNumbers`] are the only places that
//! fix the order of these numbers: Rust reads and writes the fields of the two structs, and the names in the
//! [script](super::script) are resolved by the same lists.

use super::{
    amounts::Amounts,
    quota_config::{LATENESS, QuotaConfig},
};
use crate::rate::{
    bucket::{BucketKind, BucketSpec},
    budget::Budget,
    calendar::Calendar,
    cost::{Cost, PerBudget},
    pause::{PauseSource, Pauses},
};
use std::{sync::Arc, time::SystemTime};
use tokio::time::{Duration, Instant};

/// The longest time in a request to the store, in microseconds: 143 years. Requests consist of doubles, which hold this
/// number exactly.
pub(super) const MAX_MICROS: i64 = 1 << 52;

/// The largest amount of requests or tokens in a request to the store. Requests consist of doubles, which hold this
/// number exactly, and no real limit comes near it.
const MAX_AMOUNT: u64 = 1 << 52;

const MICROS_PER_SECOND: f64 = 1_000_000.0;

/// The name of a member of the quota: random, so that no other process has the same.
pub(super) type Member = [u8; 16];

/// What a member reports to the store and requests from it in one round trip. Times are in microseconds.
#[derive(Clone, Debug)]
pub(super) struct StoreRequest {
    pub(super) member: Member,
    /// Whether the member's limiter was dropped, so that the store deletes the member's entry.
    pub(super) is_leaving: bool,
    /// Whether the request only finds out if a lost store is back. Such a probe carries no corrections and no costs.
    pub(super) is_probe: bool,
    /// The store makes no reservation that is further in the future than this many microseconds.
    pub(super) max_ahead: i64,
    /// While the schedule reaches no further than this many microseconds into the future, the store makes reservations for
    /// whatever member asks first. Beyond that, members with more demand get equal parts.
    pub(super) ahead: i64,
    /// How long the reply takes to arrive, in microseconds: no reservation is made for an earlier time, because it could
    /// not be used then.
    pub(super) lead: i64,
    /// Identifies the stored state that the member's last reply came from; 0 if there was no reply, or if that state
    /// has expired.
    pub(super) incarnation: i64,
    /// How many requests the stored state had served when it sent its last reply to the member.
    pub(super) sequence: i64,
    /// How far in the future the member's last reservation is, in microseconds; 0 if there is none in the future.
    pub(super) last_reservation: i64,
    /// What the member's last reply has left of each rate that refuses calls or counts by the calendar, in the order of the
    /// limits. If the stored state is lost, a new one begins with it. Empty if it is not known.
    pub(super) left: Vec<u64>,
    pub(super) config: Arc<QuotaConfig>,
    /// The limits that the member was started with, as a text. Other limits may have replaced them since.
    pub(super) configured_as: String,
    /// The version of the limits in `config`; 0 before the store's first reply.
    pub(super) config_version: i64,
    /// Whether the member sets `config` as the limits of all members.
    pub(super) is_change: bool,
    /// The number of the batch of corrections in this request. If a reply was lost, the batch is sent again with the
    /// same number, and the store counts it only once.
    pub(super) batch: i64,
    /// What was estimated and not used, which the store refunds.
    pub(super) credit: Amounts,
    /// What was used on top of estimates, which the store charges.
    pub(super) debit: Amounts,
    /// What the member's local fallback reserved while the store was lost to it, which the store charges.
    pub(super) fallback_usage: Amounts,
    /// How long ago the local fallback made its first reservation in `fallback_usage`, in microseconds; 0 if there is
    /// none.
    pub(super) fallback_age: i64,
    /// The number of members by which the local fallback divides the rates.
    pub(super) member_count: i64,
    /// The member's unsettled estimates, without those that this request settles.
    pub(super) estimated: Amounts,
    /// In how many microseconds the pause of each source ends, for all members; -1 for a source of which this member has
    /// nothing to report. An end of 0 ends the pause. The pause of the provider is only extended otherwise.
    pub(super) pauses: Pauses<i64>,
    /// Whether the store raises the buckets that are in debt to 0, after it has counted the corrections in this request.
    pub(super) is_forgiving: bool,
    /// What the provider reports as remaining of some rates: the position of a rate in the limits, and the amount. The
    /// store lowers the bucket of that rate to the amount if it holds more.
    pub(super) lowered: Vec<(usize, u64)>,
    /// The costs of the waiting calls that the store has to reserve, in this order.
    pub(super) costs: Vec<Cost>,
    /// Whether more calls wait than those whose costs are in this request.
    pub(super) is_backlogged: bool,
}

/// What the store replies to a request. Times are in microseconds; all of them but `now` count from the reply.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct StoreReply {
    /// How many requests of members the stored state has served.
    pub(super) sequence: i64,
    /// Distinguishes the stored state from earlier states of the same quota that have been lost.
    pub(super) incarnation: i64,
    pub(super) config_version: i64,
    /// In how many microseconds the pause of each source ends; 0 without a pause. Until then no member may admit a call.
    pub(super) pauses: Pauses<i64>,
    pub(super) members: u64,
    /// Whether the store still had the member's estimates, so that it could refund what was not used of them.
    pub(super) is_known: bool,
    /// Whether the first cost that was not reserved has to wait for longer than `max_ahead`, and has claimed the next
    /// reservation. If its call is dropped, the store has to be told with the next request.
    pub(super) is_claiming: bool,
    /// For how many milliseconds the store keeps the state if no further request arrives. The state may expire up to
    /// 30 s earlier, because its time to live is not renewed with every request.
    pub(super) retention: i64,
    /// How far in the future the last reservation of any member is, in microseconds; 0 if there is none in the future.
    pub(super) offset: i64,
    /// What remains of each budget of the request after the last reservation; `None` if the budget has no limit.
    pub(super) remaining: PerBudget<Option<u64>>,
    /// In how many microseconds to request the costs again that were not reserved because of `max_ahead`; 0 if there
    /// are none.
    pub(super) retry_in: i64,
    /// The store's clock when it replied, in microseconds since 1970.
    pub(super) now: i64,
    /// In how many microseconds each reserved cost is admitted. These are the first costs of the request that were not
    /// refused; the others were not reserved.
    pub(super) delays: Vec<i64>,
    /// The costs that a rate which [refuses](crate::Rate::refuse) calls does not hold, in their order in the request.
    pub(super) refused: Vec<RefusedCost>,
    /// What is left after the last reservation of each rate that refuses calls or counts by the calendar, in the order of
    /// the limits that the store has.
    pub(super) left: Vec<u64>,
    /// The limits in force, as a text, if the request named another version of them.
    pub(super) config: Option<String>,
}

/// A cost that the store has refused.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct RefusedCost {
    /// The position of the cost in the request.
    pub(super) position: usize,
    /// What the rate counts that does not hold the cost.
    pub(super) budget: Budget,
    /// How much of the budget is left.
    pub(super) left: u64,
    /// In how many microseconds the rate holds the cost, if nothing else is charged before.
    pub(super) held_in: i64,
}

/// Declares a struct whose fields are numbers of one type, which are sent in the order of the fields.
macro_rules! numbers {
    ($(#[$attribute:meta])* struct $name:ident of $number:ty { $($(#[$doc:meta])* $field:ident,)* }) => {
        $(#[$attribute])*
        #[derive(Debug, Default)]
        pub(super) struct $name {
            $($(#[$doc])* pub(super) $field: $number,)*
        }

        impl $name {
            /// The names of the fields, in the order in which their numbers are sent.
            pub(super) const NAMES: &[&str] = &[$(stringify!($field)),*];

            /// Calls `visit` with each number, in the order in which they are sent.
            pub(super) fn for_each(&mut self, mut visit: impl FnMut(&mut $number)) {
                $(visit(&mut self.$field);)*
            }
        }
    };
}

numbers! {
    /// The numbers that every [`StoreRequest`] begins with. The script has a local variable of the same name for each
    /// field.
    struct RequestNumbers of f64 {
        max_ahead,
        ahead,
        lead,
        incarnation,
        sequence,
        last_reservation,
        config_version,
        is_change,
        is_leaving,
        is_probe,
        user_pause,
        provider_pause,
        is_forgiving,
        batch,
        fallback_age,
        member_count,
        /// How many reports of the provider about what remains of a rate this request contains.
        lowered,
        /// How many rates follow, with [`RATE_NUMBERS`] numbers each; 0 if the request is sent without the limits.
        rates,
        /// How many budgets the member's limits count. After the rates and the special kinds, each of [`AMOUNT_LISTS`]
        /// lists of amounts follows with a number for each of these budgets, and then each cost.
        budgets,
        /// How many special kinds follow the rates, with [`KIND_NUMBERS`] numbers each.
        kinds,
        costs,
        is_backlogged,
    }
}

/// How many numbers a rate has in a request: position of its budget, period in nanoseconds (less than 0 if it is a window
/// of the calendar), units that a
/// microsecond brings, units in one request or token, units in a full bucket, units in the largest debt, initial balance
/// in units, and the amount that the provider reports as remaining of the rate (-1 without such a report). A unit is a
/// fraction of a request or token.
const RATE_NUMBERS: usize = 8;

/// How many numbers a special kind has in a request: position of its rate, and then those that a
/// [kind](super::script) has in the stored state.
const KIND_NUMBERS: usize = 8;

/// How many lists of amounts a request has: what the store refunds, what it charges, what the local fallback reserved,
/// and the unsettled estimates.
pub(super) const AMOUNT_LISTS: usize = 4;

numbers! {
    /// The numbers that every [`StoreReply`] begins with. The script writes the field `name` as `reply.name`.
    struct ReplyNumbers of i64 {
        /// The version of the layout of the stored state. A reply that has no other number rejects the request, because
        /// the stored state has this version, and not the one of this release; 0 if it is no state of a quota.
        version,
        sequence,
        incarnation,
        config_version,
        user_pause,
        provider_pause,
        members,
        is_known,
        /// 1 if the first cost that was not reserved has claimed the next reservation of all members.
        is_claiming,
        retention,
        offset,
        retry_in,
        now,
        /// How many costs were reserved. What remains of each budget of the request follows, after the last reservation,
        /// or -1 if the budget is not limited; and then as many delays as this number says.
        /// If the limits have rates of special kinds, the number of refused costs follows the delays, and then
        /// [`REFUSED_NUMBERS`] numbers for each of these, and what is left of each rate that refuses calls or counts by the
        /// calendar.
        reserved,
    }
}

/// How many numbers a reply has for a refused cost: its position in the request, from 1 on, the position of the budget in
/// the member's list, from 1 on, how much of it is left, and in how many microseconds the cost is there.
pub(super) const REFUSED_NUMBERS: usize = 4;

// === impl StoreRequest ===

impl StoreRequest {
    /// Creates a request of a member that has seen no stored state, and has nothing to report and no costs to reserve.
    #[cfg(test)]
    pub(super) fn new(member: Member, config: Arc<QuotaConfig>) -> Self {
        Self {
            member,
            is_leaving: false,
            is_probe: false,
            max_ahead: 0,
            ahead: 0,
            lead: 0,
            incarnation: 0,
            sequence: 0,
            last_reservation: 0,
            left: Vec::new(),
            config,
            configured_as: String::new(),
            config_version: 0,
            is_change: false,
            batch: 0,
            credit: Amounts::default(),
            debit: Amounts::default(),
            fallback_usage: Amounts::default(),
            fallback_age: 0,
            member_count: 1,
            estimated: Amounts::default(),
            pauses: Pauses::new(-1, -1),
            is_forgiving: false,
            lowered: Vec::new(),
            costs: Vec::new(),
            is_backlogged: false,
        }
    }

    /// Whether the request may be sent to the store without the limits, because the store is likely to have the same
    /// version of them.
    pub(super) fn can_omit_limits(&self) -> bool {
        self.config_version != 0 && !self.is_change && self.lowered.is_empty()
    }

    /// Returns a text of two lines: the current limits of the member, and the limits that it was started with.
    pub(super) fn limits_text(&self) -> String {
        format!("{}\n{}", self.config.text(), self.configured_as)
    }

    /// Writes the numbers of the request as the script reads them: little-endian doubles.
    pub(super) fn packed(&self, with_limits: bool) -> Vec<u8> {
        let specs = if with_limits {
            self.config.specs_with(&self.left)
        } else {
            Vec::new()
        };
        let is_special = |spec: &BucketSpec| spec.kind != BucketKind::default();
        let kinds = specs.iter().enumerate().filter(|(_, (_, spec))| is_special(spec));
        let kinds_count = kinds.clone().count();
        let mut head = self.numbers(specs.len(), kinds_count);
        let budgets = self.config.budgets();
        let lists = [self.credit, self.debit, self.fallback_usage, self.estimated];
        let count = RequestNumbers::NAMES.len()
            + RATE_NUMBERS * specs.len()
            + KIND_NUMBERS * kinds_count
            + budgets.len() * (AMOUNT_LISTS + self.costs.len());
        let mut packed = Vec::with_capacity(count * size_of::<f64>());
        let mut put = |number: f64| packed.extend_from_slice(&number.to_le_bytes());
        head.for_each(|number| put(*number));
        let periods = self.config.limits().rates().map(|(_, rate)| rate.period());
        for (at, ((budget, spec), period)) in specs.iter().zip(periods).enumerate() {
            let position = budgets.iter().position(|of| of == budget);
            put(position.map_or(0, |position| position + 1) as f64);
            let sign = if spec.kind.calendar.is_some() { -1.0 } else { 1.0 };
            put(sign * period.as_nanos() as f64);
            put(spec.fill as f64);
            put(spec.unit as f64);
            put(spec.capacity as f64);
            put(spec.max_debt as f64);
            put(spec.initial as f64);
            let lowered = self.lowered.iter().filter(|(of, _)| *of == at);
            put(lowered.map(|(_, remaining)| *remaining).min().map_or(-1.0, amount));
        }
        for (at, (_, spec)) in kinds {
            put(at as f64);
            put(flag(spec.kind.refuses));
            put(if spec.kind.is_strict {
                (u128::from(spec.fill) * LATENESS) as f64
            } else {
                0.0
            });
            let calendar = spec.kind.calendar;
            put(flag(calendar.is_some_and(|calendar| !calendar.is_month())));
            put(flag(calendar.is_some_and(Calendar::is_month)));
            put(calendar.map_or(0.0, |calendar| f64::from(calendar.start()) * MICROS_PER_SECOND));
            // The script finds out when the window ends, and what it begins with.
            put(0.0);
            put(0.0);
        }
        let amounts = lists
            .iter()
            .flat_map(|list| budgets.iter().map(|budget| list.of(*budget)));
        let costs = self.costs.iter();
        let costs = costs.flat_map(|cost| budgets.iter().map(|budget| cost.of(*budget)));
        amounts.chain(costs).for_each(|number| put(amount(number)));
        packed
    }

    fn numbers(&self, rates: usize, kinds: usize) -> RequestNumbers {
        RequestNumbers {
            max_ahead: self.max_ahead as f64,
            ahead: self.ahead as f64,
            lead: self.lead as f64,
            incarnation: self.incarnation as f64,
            sequence: self.sequence as f64,
            last_reservation: self.last_reservation as f64,
            config_version: self.config_version as f64,
            is_change: flag(self.is_change),
            is_leaving: flag(self.is_leaving),
            is_probe: flag(self.is_probe),
            user_pause: self.pauses.of(PauseSource::User) as f64,
            provider_pause: self.pauses.of(PauseSource::Provider) as f64,
            is_forgiving: flag(self.is_forgiving),
            batch: self.batch as f64,
            fallback_age: self.fallback_age as f64,
            member_count: self.member_count as f64,
            lowered: self.lowered.len() as f64,
            rates: rates as f64,
            budgets: self.config.budgets().len() as f64,
            kinds: kinds as f64,
            costs: self.costs.len() as f64,
            is_backlogged: flag(self.is_backlogged),
        }
    }
}

fn flag(flag: bool) -> f64 {
    f64::from(u8::from(flag))
}

fn amount(amount: u64) -> f64 {
    amount.min(MAX_AMOUNT) as f64
}

// === impl StoreReply ===

impl StoreReply {
    /// Creates a reply from its numbers. Returns `None` if these cannot be the numbers of a reply.
    ///
    /// `remaining` has what remains of each budget of `request`; -1 for a budget without a limit.
    pub(super) fn new(
        request: &StoreRequest,
        numbers: &ReplyNumbers,
        remaining: &[i64],
        delays: Vec<i64>,
        refused: Vec<RefusedCost>,
        left: Vec<u64>,
        config: Option<String>,
    ) -> Option<Self> {
        let mut remaining_of = PerBudget::default();
        for (budget, remaining) in request.config.budgets().iter().zip(remaining) {
            *remaining_of.entry(*budget)? = u64::try_from(*remaining).ok();
        }
        Some(Self {
            sequence: numbers.sequence,
            incarnation: numbers.incarnation,
            config_version: numbers.config_version,
            pauses: Pauses::new(numbers.user_pause, numbers.provider_pause),
            members: u64::try_from(numbers.members).ok()?,
            is_known: numbers.is_known == 1,
            is_claiming: numbers.is_claiming == 1,
            retention: numbers.retention,
            offset: numbers.offset,
            remaining: remaining_of,
            retry_in: numbers.retry_in,
            now: numbers.now,
            delays,
            refused,
            left,
            config,
        })
    }
}

// === impl RefusedCost ===

impl RefusedCost {
    /// Creates a refused cost of `request` from its numbers. Returns `None` if these cannot be the numbers of one.
    pub(super) fn new(request: &StoreRequest, numbers: &[i64]) -> Option<Self> {
        let [position, budget, left, held_in] = *numbers else {
            return None;
        };
        let index = |position: i64| usize::try_from(position).ok()?.checked_sub(1);
        Some(Self {
            position: index(position)?,
            budget: *request.config.budgets().get(index(budget)?)?,
            left: u64::try_from(left).ok()?,
            held_in,
        })
    }
}

// === times ===

/// Returns `span` in microseconds, or [`MAX_MICROS`] if it is longer.
pub(super) fn micros(span: Duration) -> i64 {
    i64::try_from(span.as_micros()).unwrap_or(MAX_MICROS).min(MAX_MICROS)
}

/// Returns the instant `micros` microseconds after `now`, or before `now` if `micros` is negative. Returns `now` if an
/// `Instant` cannot represent that time.
pub(super) fn instant_after(micros: i64, now: Instant) -> Instant {
    let distance = Duration::from_micros(micros.unsigned_abs());
    let instant = if micros < 0 {
        now.checked_sub(distance)
    } else {
        now.checked_add(distance)
    };
    instant.unwrap_or(now)
}

/// Returns the wall-clock time that is given in microseconds since 1970.
pub(super) fn system_time(micros: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_micros(u64::try_from(micros).unwrap_or(0))
}

/// Returns the microseconds since 1970 that the clock of this process shows.
pub(super) fn system_clock() -> i64 {
    micros(
        SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default(),
    )
}

/// Returns when the pause of each source ends, for pauses that end in so many microseconds; `None` for 0.
pub(super) fn pause_ends(micros: Pauses<i64>, now: Instant) -> Pauses<Option<Instant>> {
    micros.map(|micros| (micros > 0).then(|| instant_after(micros, now)))
}
