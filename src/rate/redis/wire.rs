//! [`StoreRequest`] and [`StoreReply`]: everything that one round trip to the store carries; [`StoreError`]: why one
//! failed.
//!
//! Both travel as lists of numbers. [`RequestNumbers`] and [`ReplyNumbers`] are the only places that fix the order of
//! these numbers: Rust reads and writes the fields, and the [script](super::script) gets its names from the same lists.

use super::{amounts::Amounts, amounts::PerBudget, quota_config::QuotaConfig};
use crate::rate::limits::{Budget, Cost};
use std::{borrow::Cow, sync::Arc};
use tokio::time::{Duration, Instant};

/// The longest time that is sent, in microseconds: 143 years. Doubles hold it exactly.
pub(super) const MAX_MICROS: i64 = 1 << 52;

/// The largest amount that is sent. Doubles hold it exactly, and no limit comes near it.
const MAX_AMOUNT: u64 = 1 << 52;

/// The name of a member: random, so that no other process has the same.
pub(super) type Member = [u8; 16];

/// What a member reports and requests in one round trip. Times are in microseconds.
#[derive(Clone, Debug)]
pub(super) struct StoreRequest {
    pub(super) member: Member,
    /// The member is about to end: the store deletes its entry.
    pub(super) is_leaving: bool,
    /// The request only finds out whether the store is back. It carries no corrections and no costs.
    pub(super) is_probe: bool,
    /// The store reserves nothing while its schedule reaches further into the future than this.
    pub(super) max_ahead: i64,
    /// The state that the member got its last reply from; 0 if it knows none.
    pub(super) incarnation: i64,
    /// How many requests that state had served when it sent that reply.
    pub(super) sequence: i64,
    /// How far in the future the member's last reservation is.
    pub(super) last_reservation: i64,
    pub(super) config: Arc<QuotaConfig>,
    /// The limits that the member was configured with, as a text.
    pub(super) configured_as: String,
    /// The version of the limits in `config`; 0 if these are the ones that the member was configured with.
    pub(super) config_version: i64,
    /// The member sets `config` for all members.
    pub(super) is_change: bool,
    /// The number of the corrections in this request. A store that receives a number twice in a row counts it once.
    pub(super) batch: i64,
    /// What was estimated and not used.
    pub(super) credit: Amounts,
    /// What was used on top of estimates.
    pub(super) debit: Amounts,
    /// What the member admitted by itself while the store was lost to it.
    pub(super) fallback_usage: Amounts,
    /// How long ago the first of that was admitted; 0 if there is none.
    pub(super) fallback_age: i64,
    /// The number of members that the member divided the rates by.
    pub(super) member_count: i64,
    /// The member's estimates that are not settled yet, without those that this request settles.
    pub(super) estimated: Amounts,
    /// How much longer all members are to pause.
    pub(super) pause: i64,
    /// The most that is left of a rate: its position in the limits, and the amount.
    pub(super) lowered: Vec<(usize, u64)>,
    /// What to reserve, in this order.
    pub(super) costs: Vec<Cost>,
}

/// What the store replies. Times are in microseconds, from the store's clock at the reply.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct StoreReply {
    /// How many requests the state has served.
    pub(super) sequence: i64,
    /// Distinguishes the state from earlier ones of the same quota.
    pub(super) incarnation: i64,
    pub(super) config_version: i64,
    /// How much longer no member may be admitted.
    pub(super) pause: i64,
    pub(super) members: u64,
    /// Whether the store still had the member's estimates.
    pub(super) is_known: bool,
    /// How much longer the state is kept if there are no further requests, in milliseconds.
    pub(super) retention: i64,
    /// How far in the future the schedule ends; negative if it has ended.
    pub(super) offset: i64,
    /// What is left at the end of the schedule; `None` for a budget without a limit.
    pub(super) left: PerBudget<Option<u64>>,
    /// When to request again what was not reserved; 0 if all of it was.
    pub(super) retry_in: i64,
    /// The store's clock, in microseconds since 1970.
    pub(super) now: i64,
    /// When each of the first costs is admitted. The other costs are not reserved.
    pub(super) delays: Vec<i64>,
    /// The current limits, if their version is another than the request's.
    pub(super) config: Option<String>,
}

/// Why a round trip failed. The text names neither the server nor a password.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StoreError {
    pub(super) problem: Cow<'static, str>,
    /// The connection is of no further use; a new one may work.
    pub(super) reconnect: bool,
}

/// Declares a struct of numbers of one type that travel in the order of the fields.
macro_rules! numbers {
    ($(#[$attribute:meta])* struct $name:ident of $number:ty { $($(#[$doc:meta])* $field:ident,)* }) => {
        $(#[$attribute])*
        #[derive(Debug, Default)]
        pub(super) struct $name {
            $($(#[$doc])* pub(super) $field: $number,)*
        }

        impl $name {
            /// The names of the numbers, in the order in which they travel.
            pub(super) const NAMES: &[&str] = &[$(stringify!($field)),*];

            /// Visits the numbers in the order in which they travel.
            pub(super) fn for_each(&mut self, mut visit: impl FnMut(&mut $number)) {
                $(visit(&mut self.$field);)*
            }
        }
    };
}

numbers! {
    /// The numbers that every [`StoreRequest`] begins with. The script has a local variable of the same name for each.
    struct RequestNumbers of f64 {
        max_ahead,
        incarnation,
        sequence,
        last_reservation,
        config_version,
        is_change,
        is_leaving,
        is_probe,
        pause,
        batch,
        fallback_age,
        member_count,
        credit_requests,
        credit_tokens,
        debit_requests,
        debit_tokens,
        fallback_requests,
        fallback_tokens,
        estimated_requests,
        estimated_tokens,
        /// The number of rates that are lowered.
        lowered,
        /// The number of rates that follow, [`RATE_NUMBERS`] numbers each.
        rates,
        /// The number of costs that follow the rates, two numbers each.
        costs,
    }
}

/// Numbers of a rate in a request: budget (1 requests, 2 tokens), fill, unit, capacity, initial balance, and the amount
/// that it is lowered to (-1 if it is not).
const RATE_NUMBERS: usize = 6;

numbers! {
    /// The numbers that every [`StoreReply`] begins with. The script writes them as `reply.name`.
    struct ReplyNumbers of i64 {
        sequence,
        incarnation,
        config_version,
        pause,
        members,
        is_known,
        retention,
        offset,
        /// -1 if requests are not limited.
        left_requests,
        /// -1 if tokens are not limited.
        left_tokens,
        retry_in,
        now,
        /// The number of delays that follow.
        reserved,
    }
}

// === impl StoreRequest ===

impl StoreRequest {
    /// A request of a member that knows no state and reports nothing.
    pub(super) fn new(member: Member, config: Arc<QuotaConfig>) -> Self {
        Self {
            member,
            is_leaving: false,
            is_probe: false,
            max_ahead: 0,
            incarnation: 0,
            sequence: 0,
            last_reservation: 0,
            config,
            configured_as: String::new(),
            config_version: 0,
            is_change: false,
            batch: 0,
            credit: Amounts::ZERO,
            debit: Amounts::ZERO,
            fallback_usage: Amounts::ZERO,
            fallback_age: 0,
            member_count: 1,
            estimated: Amounts::ZERO,
            pause: 0,
            lowered: Vec::new(),
            costs: Vec::new(),
        }
    }

    /// Whether the request may be sent without the limits, because the store is likely to have the same version of
    /// them.
    pub(super) fn can_omit_limits(&self) -> bool {
        self.config_version != 0 && !self.is_change && self.lowered.is_empty()
    }

    /// The limits in the first line, and in the second the limits that the member was configured with.
    pub(super) fn limits_text(&self) -> String {
        format!("{}\n{}", self.config.text(), self.configured_as)
    }

    /// The numbers as the script reads them: little-endian doubles.
    pub(super) fn packed(&self, with_limits: bool) -> Vec<u8> {
        let sizes = if with_limits { self.config.sizes() } else { &[] };
        let mut head = self.numbers(sizes.len());
        let count = RequestNumbers::NAMES.len() + RATE_NUMBERS * sizes.len() + 2 * self.costs.len();
        let mut packed = Vec::with_capacity(count * size_of::<f64>());
        let mut put = |number: f64| packed.extend_from_slice(&number.to_le_bytes());
        head.for_each(|number| put(*number));
        for (at, (budget, size)) in sizes.iter().enumerate() {
            put(match budget {
                Budget::Requests => 1.0,
                Budget::Tokens => 2.0,
            });
            put(size.fill as f64);
            put(size.unit as f64);
            put(size.capacity as f64);
            put(size.initial as f64);
            let lowered = self.lowered.iter().filter(|(of, _)| *of == at);
            put(lowered.map(|(_, left)| *left).min().map_or(-1.0, amount));
        }
        for cost in &self.costs {
            put(amount(cost.requests));
            put(amount(cost.tokens));
        }
        packed
    }

    fn numbers(&self, rates: usize) -> RequestNumbers {
        RequestNumbers {
            max_ahead: self.max_ahead as f64,
            incarnation: self.incarnation as f64,
            sequence: self.sequence as f64,
            last_reservation: self.last_reservation as f64,
            config_version: self.config_version as f64,
            is_change: flag(self.is_change),
            is_leaving: flag(self.is_leaving),
            is_probe: flag(self.is_probe),
            pause: self.pause as f64,
            batch: self.batch as f64,
            fallback_age: self.fallback_age as f64,
            member_count: self.member_count as f64,
            credit_requests: amount(self.credit.requests),
            credit_tokens: amount(self.credit.tokens),
            debit_requests: amount(self.debit.requests),
            debit_tokens: amount(self.debit.tokens),
            fallback_requests: amount(self.fallback_usage.requests),
            fallback_tokens: amount(self.fallback_usage.tokens),
            estimated_requests: amount(self.estimated.requests),
            estimated_tokens: amount(self.estimated.tokens),
            lowered: self.lowered.len() as f64,
            rates: rates as f64,
            costs: self.costs.len() as f64,
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
    /// Returns `None` if the numbers cannot be those of a reply.
    pub(super) fn new(numbers: &ReplyNumbers, delays: Vec<i64>, config: Option<String>) -> Option<Self> {
        Some(Self {
            sequence: numbers.sequence,
            incarnation: numbers.incarnation,
            config_version: numbers.config_version,
            pause: numbers.pause,
            members: u64::try_from(numbers.members).ok()?,
            is_known: numbers.is_known == 1,
            retention: numbers.retention,
            offset: numbers.offset,
            left: PerBudget {
                requests: u64::try_from(numbers.left_requests).ok(),
                tokens: u64::try_from(numbers.left_tokens).ok(),
            },
            retry_in: numbers.retry_in,
            now: numbers.now,
            delays,
            config,
        })
    }
}

// === impl StoreError ===

impl StoreError {
    pub(super) fn new(problem: impl Into<Cow<'static, str>>) -> Self {
        Self {
            problem: problem.into(),
            reconnect: false,
        }
    }
}

// === times ===

/// `span` in microseconds, at most [`MAX_MICROS`].
pub(super) fn micros(span: Duration) -> i64 {
    i64::try_from(span.as_micros()).unwrap_or(MAX_MICROS).min(MAX_MICROS)
}

/// The instant that is `micros` after `now`, or before it if that is negative; `now` if there is no such instant.
pub(super) fn instant_after(micros: i64, now: Instant) -> Instant {
    let distance = Duration::from_micros(micros.unsigned_abs());
    let instant = if micros < 0 {
        now.checked_sub(distance)
    } else {
        now.checked_add(distance)
    };
    instant.unwrap_or(now)
}
