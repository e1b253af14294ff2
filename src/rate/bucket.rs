//! The arithmetic of one bucket, exact to the unit. It is told the time and holds no lock, clock or timer.
//!
//! A rate of `amount` per `period` is counted in units so small that everything is an integer. With
//! `g = gcd(amount, period in ns)`, one token is `period / g` units and each nanosecond brings `amount / g` of them. So
//! nothing is ever rounded: after a year at an odd rate the count is what it should be.
//!
//! # Settling estimates
//!
//! A call may be charged an estimate first and what it really used later. To give back the difference is less simple
//! than to add it: had the true cost been known from the start, the bucket might have been full in the meantime, and
//! would have spilled what is now to be given back. So the bucket keeps two sums: the estimates still out, and how much
//! of them would have been spilled by now in the worst case, which is *withheld* from refunds. What is given back never
//! lets more through than `burst + rate x T` of true usage.

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
    /// Deeper debts are not counted: they would take longer to pay off than an instant can tell.
    pub(super) most_debt: i128,
}

/// A bucket of tokens. Times are nanoseconds since an instant of the owner's choice.
#[derive(Clone, Debug)]
pub(super) struct Bucket {
    size: Size,
    burst: u64,
    balance: i128,
    /// Charged, but not yet settled.
    estimated: i128,
    /// The part of `estimated` that cannot be given back.
    withheld: i128,
    /// The number of the limits it came with. Earlier estimates were not charged here.
    since: u64,
}

impl Size {
    /// The most that can go at once.
    pub(super) fn burst(&self) -> u64 {
        whole(self.capacity, self.unit)
    }
}

impl Bucket {
    pub(super) fn new(size: Size) -> Self {
        Self {
            size,
            burst: size.burst(),
            balance: size.initial,
            estimated: 0,
            withheld: 0,
            since: 0,
        }
    }

    /// It is new with the limits of this number.
    pub(super) const fn came_with(&mut self, limits: u64) {
        self.since = limits;
    }

    /// The most that can go at once.
    pub(super) const fn burst(&self) -> u64 {
        self.burst
    }

    /// What could go now. A bucket in debt has nothing.
    pub(super) fn available(&self) -> u64 {
        whole(self.balance.max(0), self.size.unit)
    }

    /// Whether so many are there now.
    pub(super) fn has(&self, amount: u64) -> bool {
        // Up to the burst nothing overflows.
        amount == 0 || (amount <= self.burst && self.units_of(amount) <= self.balance)
    }

    /// Lets `elapsed` nanoseconds pass.
    pub(super) fn advance(&mut self, elapsed: u64) {
        let gained = u128::from(elapsed) * u128::from(self.size.fill);
        // The balance is never above the capacity.
        let room = self.size.capacity.abs_diff(self.balance);
        self.balance = if gained < room {
            self.balance + gained as i128
        } else {
            self.size.capacity
        };
        self.withhold();
    }

    /// Nanoseconds until `amount` is there. Who asks for nothing does not wait, not even for a debt to be paid.
    pub(super) fn wait(&self, amount: u128) -> u64 {
        if amount == 0 {
            return 0;
        }
        let needed = amount
            .checked_mul(self.size.unit)
            .map_or(i128::MAX, |units| units.min(i128::MAX as u128) as i128);
        if needed <= self.balance {
            return 0;
        }
        let missing = needed.saturating_sub(self.balance) as u128;
        u64::try_from(missing.div_ceil(u128::from(self.size.fill))).unwrap_or(u64::MAX)
    }

    /// Takes `amount`, which is there, for good or as an estimate.
    pub(super) fn take(&mut self, amount: u64, estimate: bool) {
        let units = self.units_of(amount);
        self.balance -= units;
        if estimate {
            self.estimated = self.estimated.saturating_add(units);
        }
    }

    /// There is no more than `amount` in it, says somebody who knows.
    pub(super) fn lower(&mut self, amount: u64) {
        self.balance = self.balance.min(self.units(amount));
        self.withhold();
    }

    /// An estimate, charged under the limits of this number, turns out to have been `used` in truth.
    pub(super) fn settle(&mut self, estimate: u64, used: u64, limits: u64) {
        if used > estimate {
            self.debit(used - estimate);
        }
        if limits < self.since {
            // Never charged here: what is out is others'.
            return;
        }
        if used < estimate {
            self.credit(estimate - used);
        }
        let out = self.estimated.saturating_sub(self.units(estimate));
        self.set_estimated(out.max(0));
    }

    /// So much more was used than was taken for it. It may have to be paid off.
    pub(super) fn debit(&mut self, amount: u64) {
        let units = self.units(amount);
        self.balance = self.balance.saturating_sub(units).max(-self.size.most_debt);
    }

    /// So much was taken elsewhere, as one of so many shares; but no more than what such a share brings in so many
    /// nanoseconds (or whatever is the unit of time), if that is given.
    #[cfg(feature = "redis")]
    pub(super) fn debit_share(&mut self, amount: u64, since: Option<u64>, shares: u64) {
        let brought = since.map_or(i128::MAX, |since| {
            let all = u128::from(since) * u128::from(self.size.fill);
            all.div_ceil(u128::from(shares.max(1))) as i128
        });
        let units = self.units(amount).min(brought);
        self.balance = self.balance.saturating_sub(units).max(-self.size.most_debt);
    }

    /// Gives back so much of what was estimated, but for what is withheld.
    pub(super) fn credit(&mut self, amount: u64) {
        let refund = self.units(amount).min(self.estimated);
        let kept = refund.min(self.withheld);
        self.withheld -= kept;
        self.balance = self.balance.saturating_add(refund - kept).min(self.size.capacity);
    }

    /// So much is estimated now.
    #[cfg(feature = "redis")]
    pub(super) fn estimate(&mut self, amount: u64) {
        self.set_estimated(self.units(amount).min(2 * self.size.most_debt));
    }

    /// What is there is gone; a debt stays.
    #[cfg(feature = "redis")]
    pub(super) fn empty(&mut self) {
        self.balance = self.balance.min(0);
    }

    /// How long until it is full, if nobody takes anything.
    #[cfg(feature = "redis")]
    pub(super) fn until_full(&self) -> u64 {
        let missing = self.size.capacity.abs_diff(self.balance);
        u64::try_from(missing.div_ceil(u128::from(self.size.fill))).unwrap_or(u64::MAX)
    }

    /// So many units are estimated now.
    fn set_estimated(&mut self, units: i128) {
        self.estimated = units;
        self.withheld = self.withheld.min(units);
        self.withhold();
    }

    /// Changes the rate. What is in the bucket stays, up to the new burst; so do debts.
    pub(super) fn resize(&mut self, old: &Self) {
        let convert = |units: i128| -> i128 {
            let (from, to) = (old.size.unit as i128, self.size.unit);
            let whole = units.div_euclid(from).saturating_mul(to as i128);
            // Both factors are below the unit's bound, so this fits where the units themselves do.
            let part = (units.rem_euclid(from) as u128).saturating_mul(to) / old.size.unit;
            whole.saturating_add(part as i128)
        };
        let balance = convert(old.balance);
        self.balance = balance.clamp(-self.size.most_debt, self.size.capacity);
        self.estimated = convert(old.estimated);
        // Rounded together with the balance: each for itself, the two would be a unit more than what was there.
        let without = convert(old.balance.saturating_sub(old.withheld));
        self.withheld = balance.saturating_sub(without).min(self.estimated);
        self.since = old.since;
        self.withhold();
    }

    /// What would have been spilled had all that is estimated never been taken.
    fn withhold(&mut self) {
        if self.estimated > 0 {
            let room = self.size.capacity.saturating_sub(self.balance);
            self.withheld = self.withheld.max(self.estimated.saturating_sub(room));
        }
    }

    /// Of an amount up to the burst.
    fn units_of(&self, amount: u64) -> i128 {
        (u128::from(amount) * self.size.unit) as i128
    }

    fn units(&self, amount: u64) -> i128 {
        u128::from(amount)
            .checked_mul(self.size.unit)
            .map_or(i128::MAX, |units| units.min(i128::MAX as u128) as i128)
    }
}

fn whole(units: i128, unit: u128) -> u64 {
    u64::try_from(units as u128 / unit).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 3 tokens in 7 ns; a unit is a seventh of a token.
    fn odd(burst: i128) -> Bucket {
        Bucket::new(Size {
            fill: 3,
            unit: 7,
            capacity: burst * 7,
            initial: burst * 7,
            most_debt: 1 << 126,
        })
    }

    /// Small, seeded, and good enough to shake a bucket.
    struct Dice(u64);

    impl Dice {
        fn roll(&mut self, sides: u64) -> u64 {
            self.0 = self
                .0
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 33) % sides
        }
    }

    #[test]
    fn a_bucket_waits_exactly_as_long_as_it_takes() {
        // (nanoseconds later, amount, wait before it can be taken)
        let story = [
            (0, 5, 0),  // the burst
            (0, 1, 3),  // 7 units at 3 a nanosecond, rounded up
            (3, 1, 0),  // 9 units: one token, 2 left
            (0, 1, 2),  // 5 missing
            (2, 1, 0),  // 1 left
            (0, 5, 12), // 34 missing
            (12, 5, 0), // 2 left
            (1_000, 5, 0),
            (0, 1, 3), // never more than the burst
        ];
        let mut bucket = odd(5);
        for (step, (later, amount, wait)) in story.into_iter().enumerate() {
            bucket.advance(later);
            assert_eq!(bucket.wait(amount.into()), wait, "step {step}");
            if wait == 0 {
                bucket.take(amount, false);
            }
        }
    }

    #[test]
    fn nothing_is_asked_for_nothing_even_of_a_debtor() {
        let mut bucket = odd(5);
        bucket.take(5, true);
        bucket.settle(5, 10, 0);
        assert_eq!((bucket.available(), bucket.wait(0)), (0, 0));
        // 35 units of debt and 7 for the token.
        assert_eq!(bucket.wait(1), 14);
    }

    const ROUNDS: usize = if cfg!(miri) { 20 } else { 2_000 };

    #[test]
    fn no_window_sees_more_than_the_burst_and_what_came_in() {
        let mut dice = Dice(1);
        for _ in 0..ROUNDS {
            let burst = 1 + dice.roll(20);
            let mut bucket = odd(burst.into());
            let mut now = 0_u64;
            let mut taken: Vec<(u64, u64)> = Vec::new();
            for _ in 0..60 {
                let step = dice.roll(30);
                now += step;
                bucket.advance(step);
                let amount = 1 + dice.roll(burst);
                if bucket.wait(amount.into()) == 0 {
                    bucket.take(amount, false);
                    taken.push((now, amount));
                }
            }
            for first in 0..taken.len() {
                let mut sum = 0;
                for (at, amount) in &taken[first..] {
                    sum += amount;
                    let came_in = (at - taken[first].0) * 3;
                    assert!(sum * 7 <= burst * 7 + came_in, "{taken:?}");
                }
            }
        }
    }

    #[test]
    fn what_is_given_back_never_lets_more_true_usage_through_than_the_promise() {
        let mut dice = Dice(2);
        let mut given_back = 0;
        for _ in 0..ROUNDS {
            let burst = 5 + dice.roll(20);
            let mut bucket = odd(burst.into());
            // Knows the true cost from the start. Its balance must never be below that of the other.
            let mut ideal = odd(burst.into());
            let mut open: Vec<(u64, u64)> = Vec::new();
            for _ in 0..80 {
                let step = dice.roll(12);
                bucket.advance(step);
                ideal.advance(step);
                let estimate = 1 + dice.roll(burst);
                if bucket.wait(estimate.into()) == 0 {
                    let used = dice.roll(estimate + 1);
                    bucket.take(estimate, true);
                    ideal.take(used, false);
                    open.push((estimate, used));
                }
                if !open.is_empty() && dice.roll(2) == 0 {
                    let (estimate, used) = open.swap_remove(usize::try_from(dice.roll(open.len() as u64)).unwrap());
                    let before = bucket.balance;
                    bucket.settle(estimate, used, 0);
                    given_back += bucket.balance - before;
                }
                assert!(bucket.balance <= ideal.balance, "{bucket:?} {ideal:?}");
            }
        }
        assert!(given_back > 0);
    }

    #[test]
    fn a_new_size_keeps_tokens_fractions_and_debts() {
        let mut old = odd(5);
        old.take(3, false);
        old.advance(1);
        // 2 tokens and 3 sevenths are there.
        let mut new = Bucket::new(Size {
            fill: 1,
            unit: 14,
            capacity: 140,
            initial: 140,
            most_debt: 1 << 126,
        });
        new.resize(&old);
        assert_eq!(new.balance, 2 * 14 + 6);
        old.take(5, true);
        old.settle(5, 6, 0);
        let mut new = Bucket::new(Size {
            fill: 1,
            unit: 14,
            capacity: 140,
            initial: 140,
            most_debt: 1 << 126,
        });
        new.resize(&old);
        assert_eq!(new.balance, 2 * (2 * 7 + 3 - 6 * 7));
    }

    #[test]
    fn a_new_size_never_makes_a_refund_larger() {
        // Three were estimated and nothing was used. Had that been known, 31 units would be there.
        let mut old = odd(5);
        old.take(3, true);
        old.advance(3);
        old.take(1, false);
        old.advance(1);
        let mut new = Bucket::new(Size {
            fill: 1,
            unit: 2,
            capacity: 20,
            initial: 20,
            most_debt: 1 << 126,
        });
        new.resize(&old);
        new.settle(3, 0, 0);
        assert_eq!(new.balance, 31 * 2 / 7);
    }
}
