//! The arithmetic of one bucket, exact to the unit. It is told the time and holds no lock, clock or timer.
//!
//! A rate of `amount` per `period` is counted in units so small that everything is an integer. With
//! `g = gcd(amount, period in ns)`, one token is `period / g` units and each nanosecond brings `amount / g` of them. So
//! nothing is ever rounded: after a year at an odd rate the count is what it should be.
//!
//! # Settling estimates
//!
//! A call may be charged an estimate first and what it really used later. To give back the difference is less simple than
//! to add it: had the true cost been known from the start, the bucket might have been full in the meantime, and would have
//! spilled what is now to be given back. So the bucket keeps two sums: the estimates still out, and how much of them would
//! have been spilled by now in the worst case, which is *withheld* from refunds. What is given back never lets more
//! through than `burst + rate x T` of true usage.

/// A rate in units.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Size {
    /// Units a nanosecond brings.
    pub(super) fill: u64,
    /// Units in one request or token.
    pub(super) unit: u128,
    /// Units in a full bucket.
    pub(super) capacity: i128,
    /// Units in the beginning.
    pub(super) initial: i128,
}

/// A bucket of tokens. Times are nanoseconds since an instant of the owner's choice.
#[derive(Clone, Debug)]
pub(super) struct Bucket {
    size: Size,
    balance: i128,
    /// Charged, but not yet settled.
    estimated: i128,
    /// The part of `estimated` that cannot be given back.
    withheld: i128,
}

impl Bucket {
    pub(super) const fn new(size: Size) -> Self {
        Self { size, balance: size.initial, estimated: 0, withheld: 0 }
    }

    /// The most that can go at once.
    pub(super) fn burst(&self) -> u64 {
        whole(self.size.capacity, self.size.unit)
    }

    /// What could go now. A bucket in debt has nothing.
    pub(super) fn available(&self) -> u64 {
        whole(self.balance.max(0), self.size.unit)
    }

    /// Whether so many could ever go at once.
    pub(super) fn can_hold(&self, amount: u64) -> bool {
        self.units(amount) <= self.size.capacity
    }

    /// Lets `elapsed` nanoseconds pass.
    pub(super) fn advance(&mut self, elapsed: u64) {
        let room = self.size.capacity.saturating_sub(self.balance).max(0).cast_unsigned();
        let gained = u128::from(elapsed) * u128::from(self.size.fill);
        self.balance += gained.min(room).cast_signed();
        self.withhold();
    }

    /// Nanoseconds until `amount` is there. Who asks for nothing does not wait, not even for a debt to be paid.
    pub(super) fn wait(&self, amount: u128) -> u64 {
        if amount == 0 {
            return 0;
        }
        let needed = amount.checked_mul(self.size.unit).map_or(i128::MAX, |units| units.min(i128::MAX as u128).cast_signed());
        if needed <= self.balance {
            return 0;
        }
        let missing = needed.saturating_sub(self.balance).cast_unsigned();
        u64::try_from(missing.div_ceil(u128::from(self.size.fill))).unwrap_or(u64::MAX)
    }

    /// Takes `amount`, for good or as an estimate.
    pub(super) fn take(&mut self, amount: u64, estimate: bool) {
        let units = self.units(amount);
        self.balance = self.balance.saturating_sub(units);
        if estimate {
            self.estimated = self.estimated.saturating_add(units);
        }
    }

    /// An estimate turns out to have been `used` in truth.
    pub(super) fn settle(&mut self, estimate: u64, used: u64) {
        let (estimate, used) = (self.units(estimate), self.units(used));
        if used >= estimate {
            self.balance = self.balance.saturating_sub(used - estimate);
        } else {
            let refund = estimate - used;
            let kept = refund.min(self.withheld);
            self.withheld -= kept;
            self.balance = self.balance.saturating_add(refund - kept).min(self.size.capacity);
        }
        self.estimated = self.estimated.saturating_sub(estimate).max(0);
        self.withheld = self.withheld.min(self.estimated);
        self.withhold();
    }

    /// Changes the rate. What is in the bucket stays, up to the new burst; so do debts.
    pub(super) fn resize(&mut self, old: &Self) {
        let convert = |units: i128| -> i128 {
            let (from, to) = (old.size.unit.cast_signed(), self.size.unit);
            let whole = units.div_euclid(from).saturating_mul(to.cast_signed());
            // Both factors are below the unit's bound, so this fits where the units themselves do.
            let part = units.rem_euclid(from).cast_unsigned().saturating_mul(to) / old.size.unit;
            whole.saturating_add(part.cast_signed())
        };
        self.balance = convert(old.balance).min(self.size.capacity);
        self.estimated = convert(old.estimated);
        self.withheld = convert(old.withheld);
        self.withhold();
    }

    /// What would have been spilled had all that is estimated never been taken.
    fn withhold(&mut self) {
        if self.estimated > 0 {
            let room = self.size.capacity.saturating_sub(self.balance);
            self.withheld = self.withheld.max(self.estimated.saturating_sub(room));
        }
    }

    fn units(&self, amount: u64) -> i128 {
        u128::from(amount)
            .checked_mul(self.size.unit)
            .map_or(i128::MAX, |units| units.min(i128::MAX.cast_unsigned()).cast_signed())
    }
}

fn whole(units: i128, unit: u128) -> u64 {
    u64::try_from(units.cast_unsigned() / unit).unwrap_or(u64::MAX)
}
