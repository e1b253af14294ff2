//! [`KeyedRateLimiter`], as its users see it.

use super::{pinned::KeyedAdmission, shards::Shards, tier::Tiers};
use crate::{
    coop,
    error::{AcquireError, CostExceedsBurst, InvalidConfig, TooManyKeys},
    rate::{available::Available, cost::Cost, demand::Demand, estimate::Estimate, limits::Limits, pause::Pause},
};
use std::{
    borrow::Borrow,
    fmt,
    future::{Future, poll_fn},
    hash::Hash,
    sync::Arc,
    task::{Poll, ready},
    time::Duration,
};
use tokio::time::Instant;

/// A rate limiter by key: each key, such as a tenant, a host or a model, has the same limits for itself. Clones share
/// the keys and the limits.
///
/// Keys need not be announced. A key that the limiter does not hold has full buckets; it is held from its first call on
/// until its buckets are full again, and is forgotten then. So a limiter over millions of keys takes memory only for
/// those that owe something, and no decision depends on what was forgotten: each key gets what a
/// [`RateLimiter`](crate::RateLimiter) of its own would give it.
///
/// The keys are independent: calls of one key never wait for those of another. For each key, the promises of the
/// [`RateLimiter`](crate::RateLimiter) hold:
///
/// - In any time window of length T, at most `burst + rate x T` is admitted, plus at most `rate x 5 ms` for calls that
///   have waited, by [catching up](crate::RateLimiter#catching-up).
/// - A call gets its whole cost at one instant, or waits and takes nothing. Calls of a key are admitted in the order in
///   which they began to wait.
///
/// Methods take a key by reference, also in a borrowed form: `&str` for a limiter whose keys are of type `String`. The
/// key is cloned only when it is not held yet.
///
/// # Memory and time
///
/// A key that no call waits for takes 12 bytes for each rate, and its own size, in a table with some free places: about
/// 55 to 75 bytes for a key of 8 bytes with two rates. A call that need not wait locks one of 256 parts of the table, and
/// allocates nothing if its key is held. While a part grows, each call of the part moves some of its keys, which takes some
/// 10 microseconds, and a key takes up to half as much again. While a call of a key waits, an estimate of it is open or it
/// is paused, the key takes about a kilobyte. Keys with a rate [by the calendar](crate::Rate::utc_day), or with one that
/// adds more than 4 billion units in a nanosecond, take a kilobyte until they are full.
///
/// Full keys are dropped by the calls that come later, as often as the table has been used for as many calls as it has
/// room for keys. There is no task and no timer for it. A limit for the number of keys can be set:
/// [`max_keys`](Self::max_keys).
///
/// The hashes of the keys depend on a random number, so keys that collide cannot be prepared. They are not cryptographic:
/// an attacker who chooses keys and measures the time of very many calls might find such, which makes calls slower, never
/// wrong. Hashing, comparing and cloning a key, and the function that returns
/// its tier, run under the lock of a part of the table: they must not use the limiter.
///
/// # Examples
///
/// ```
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use std::time::Duration;
/// use tower_outbound::{Cost, KeyedRateLimiter, Limits, Rate};
///
/// // Each host: 5 requests a second.
/// let hosts = KeyedRateLimiter::<String>::new(Limits::new().requests(Rate::per_second(5).burst(1)))?;
///
/// hosts.acquire("example.com", Cost::request()).await?;       // at once
/// hosts.acquire("example.org", Cost::request()).await?;       // at once: another key
/// hosts.acquire("example.com", Cost::request()).await?;       // 200 ms later
///
/// let later = hosts.try_acquire("example.com", Cost::request()).unwrap_err();
/// assert_eq!(later.retry_after(), Some(Duration::from_millis(200)));
///
/// tokio::time::sleep(Duration::from_millis(200)).await;
/// assert_eq!(hosts.len(), 0);                                 // all hosts may be called again, so none is held
/// # Ok(())
/// # }
/// ```
pub struct KeyedRateLimiter<K: Hash + Eq + Clone> {
    shards: Arc<Shards<K>>,
}

// === impl KeyedRateLimiter ===

impl<K: Hash + Eq + Clone + Send + Sync + 'static> KeyedRateLimiter<K> {
    /// Creates a rate limiter that gives each key these limits.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`] in the same cases as [`RateLimiter::new`](crate::RateLimiter::new), and for a rate with an [initial
    /// fill](crate::Rate::initial), such as `requests.initial`: a key that was forgotten comes back with full buckets, so it
    /// could not begin with less.
    pub fn new(limits: Limits) -> Result<Self, InvalidConfig> {
        Ok(Self {
            shards: Arc::new(Shards::new(Tiers::new([limits])?, None)),
        })
    }

    /// Creates a rate limiter that gives each key the limits of its tier: those in `limits` at the index that `tier_of`
    /// returns for the key. An index that is too large is that of the last tier.
    ///
    /// `tier_of` is called with each call of a key and must always return the same for it, since the tier is not stored.
    /// It must be quick, and must not use the limiter.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`] in the same cases as [`new`](Self::new), and if there is no tier.
    ///
    /// # Examples
    ///
    /// ```
    /// use tower_outbound::{Cost, KeyedRateLimiter, Limits, Rate};
    ///
    /// let free = Limits::new().requests(Rate::per_minute(10));
    /// let paid = Limits::new().requests(Rate::per_minute(1_000)).tokens(Rate::per_minute(100_000));
    /// let tenants = KeyedRateLimiter::with_tiers([free, paid], |tenant: &(bool, u64)| usize::from(tenant.0))?;
    ///
    /// assert!(tenants.try_acquire(&(false, 7), Cost::request().with("requests", 11)).is_err());
    /// assert!(tenants.try_acquire(&(true, 8), Cost::request().with("requests", 11)).is_ok());
    /// # Ok::<_, tower_outbound::error::InvalidConfig>(())
    /// ```
    pub fn with_tiers(
        limits: impl IntoIterator<Item = Limits>,
        tier_of: impl Fn(&K) -> usize + Send + Sync + 'static,
    ) -> Result<Self, InvalidConfig> {
        Ok(Self {
            shards: Arc::new(Shards::new(Tiers::new(limits)?, Some(Box::new(tier_of)))),
        })
    }

    /// Sets the largest number of keys that the limiter and its clones hold. Default: no limit.
    ///
    /// A call whose key is not held is refused with [`TooManyKeys`] then, at once, unless a key can be forgotten because
    /// its buckets are full. A key that owes something is never forgotten for another. Calls of the keys that are held are
    /// not affected. A limit below the present number of keys applies to new ones.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`] for 0 keys.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use std::time::Duration;
    /// use tower_outbound::{Cost, KeyedRateLimiter, Limits, Rate, error::AcquireError};
    ///
    /// let limiter = KeyedRateLimiter::<u64>::new(Limits::new().requests(Rate::per_second(1)))?.max_keys(2)?;
    /// limiter.try_acquire(&1, Cost::request())?;
    /// limiter.try_acquire(&2, Cost::request())?;
    /// let refused = limiter.try_acquire(&3, Cost::request()).unwrap_err();
    /// assert!(matches!(refused, AcquireError::TooManyKeys(full) if full.max() == 2));
    ///
    /// tokio::time::sleep(refused.retry_after().unwrap()).await;
    /// limiter.try_acquire(&3, Cost::request())?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn max_keys(self, max: usize) -> Result<Self, InvalidConfig> {
        self.shards
            .context
            .room
            .set_max(InvalidConfig::positive("max_keys", max)?);
        Ok(self)
    }

    /// Waits until every bucket of `key` holds `cost`, and takes it from all of them at one instant.
    ///
    /// # Errors
    ///
    /// - [`AcquireError::CostExceedsBurst`], at once, if a bucket can never hold as much as the cost. A call that waits
    ///   already gets this error when [`set_limits`](Self::set_limits) lowers a burst below its cost.
    /// - [`AcquireError::Exhausted`], at once or when the call's turn has come, if a rate that
    ///   [refuses](crate::Rate::refuse) calls does not hold the cost.
    /// - [`AcquireError::TooManyKeys`], at once, if the key is not held and there is [no room](Self::max_keys) for it.
    ///
    /// # Panics
    ///
    /// If the call has to wait outside a Tokio runtime with its timer enabled.
    ///
    /// # Cancel safety
    ///
    /// A future that is dropped while it waits loses its place in the queue of its key and has taken nothing. The future
    /// enters the queue at its first poll.
    #[inline]
    pub fn acquire<'a, Q>(&'a self, key: &'a Q, cost: Cost) -> impl Future<Output = Result<(), AcquireError>> + Send
    where
        K: Borrow<Q>,
        Q: ?Sized + Hash + Eq + ToOwned<Owned = K> + Sync,
    {
        let mut admission = KeyedAdmission::new(&self.shards, key, cost, false);
        poll_fn(move |cx| {
            ready!(coop::poll_counted(cx, |cx| admission.poll(cx)))?;
            Poll::Ready(Ok(()))
        })
    }

    /// Like [`acquire`](Self::acquire), for a cost that is an estimate. [`Estimate::settle`] corrects the charge later.
    ///
    /// # Errors
    ///
    /// Returns an error in the same cases as [`acquire`](Self::acquire).
    ///
    /// # Panics
    ///
    /// Panics in the same cases as [`acquire`](Self::acquire).
    ///
    /// # Cancel safety
    ///
    /// Dropping the future has the same effect as for [`acquire`](Self::acquire).
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use tower_outbound::{Cost, KeyedRateLimiter, Limits, Rate};
    ///
    /// let models = KeyedRateLimiter::<String>::new(Limits::new().tokens(Rate::per_minute(1_000)))?;
    /// let estimate = models.acquire_estimate("small", Cost::tokens(800)).await?;
    /// // The response reports that 300 tokens were used.
    /// estimate.settle(Cost::tokens(300));
    /// assert_eq!(models.available("small").tokens, Some(700));
    /// # Ok(())
    /// # }
    /// ```
    pub fn acquire_estimate<'a, Q>(
        &'a self,
        key: &'a Q,
        cost: Cost,
    ) -> impl Future<Output = Result<Estimate, AcquireError>> + Send
    where
        K: Borrow<Q>,
        Q: ?Sized + Hash + Eq + ToOwned<Owned = K> + Sync,
    {
        let mut admission = KeyedAdmission::new(&self.shards, key, cost, true);
        poll_fn(move |cx| {
            let estimate = ready!(coop::poll_counted(cx, |cx| admission.poll(cx)))?;
            Poll::Ready(Ok(estimate.expect("the admission is of an estimate")))
        })
    }

    /// Takes `cost` if `key` holds it now and no other call of the key waits.
    ///
    /// # Errors
    ///
    /// - [`AcquireError::NotYet`] with the time to retry after.
    /// - [`AcquireError::CostExceedsBurst`] if a retry cannot succeed under the current limits.
    /// - [`AcquireError::Exhausted`] if a rate that [refuses](crate::Rate::refuse) calls does not hold the cost.
    /// - [`AcquireError::TooManyKeys`] if the key is not held and there is [no room](Self::max_keys) for it.
    ///
    /// Nothing is taken in any of these cases.
    #[inline]
    pub fn try_acquire<Q>(&self, key: &Q, cost: Cost) -> Result<(), AcquireError>
    where
        K: Borrow<Q>,
        Q: ?Sized + Hash + Eq + ToOwned<Owned = K>,
    {
        self.shards.try_acquire(self.shards.lookup(key), &cost)
    }

    /// Like [`try_acquire`](Self::try_acquire), for a cost that is an estimate. [`Estimate::settle`] corrects the charge
    /// later.
    ///
    /// # Errors
    ///
    /// Returns an error in the same cases as [`try_acquire`](Self::try_acquire).
    pub fn try_acquire_estimate<Q>(&self, key: &Q, cost: Cost) -> Result<Estimate, AcquireError>
    where
        K: Borrow<Q>,
        Q: ?Sized + Hash + Eq + ToOwned<Owned = K>,
    {
        let key = self.shards.try_pin(self.shards.lookup(key), &cost)?;
        let charge = key.limiter().try_acquire_estimate(cost)?;
        Ok(key.estimate(cost, charge))
    }

    /// Returns an error if `cost` exceeds the burst of a rate of `key`. Takes nothing.
    ///
    /// # Errors
    ///
    /// [`CostExceedsBurst`] if a bucket can never hold as much as the cost.
    pub fn check<Q>(&self, key: &Q, cost: Cost) -> Result<(), CostExceedsBurst>
    where
        K: Borrow<Q>,
        Q: ?Sized + Hash + Eq + ToOwned<Owned = K>,
    {
        self.shards.read(
            self.shards.lookup(key),
            |tier, _, _| tier.check(&cost),
            |limiter| limiter.bursts().check(&cost),
        )
    }

    /// Returns how long a call of this key and cost that comes now would probably wait, behind all calls of the key that
    /// wait already. Zero if it would be admitted at once. For a cost that no bucket can hold, the time until the buckets
    /// would have added as much.
    ///
    /// The open estimates of the key, and those that wait, are expected to be used as
    /// [`RateLimiter::wait_for`](crate::RateLimiter::wait_for) says; what is known of that is forgotten when none is left.
    #[must_use]
    pub fn wait_for<Q>(&self, key: &Q, cost: Cost) -> Duration
    where
        K: Borrow<Q>,
        Q: ?Sized + Hash + Eq + ToOwned<Owned = K>,
    {
        self.shards.read(
            self.shards.lookup(key),
            |tier, cells, now| tier.wait(cells, &cost, now),
            |limiter| limiter.wait(&cost, &Demand::default()),
        )
    }

    /// Returns what the buckets of `key` hold now. A new call gets it only after the calls of the key that wait already.
    #[must_use]
    pub fn available<Q>(&self, key: &Q) -> Available
    where
        K: Borrow<Q>,
        Q: ?Sized + Hash + Eq + ToOwned<Owned = K>,
    {
        self.shards.read(
            self.shards.lookup(key),
            |tier, cells, now| tier.available(cells, now),
            |limiter| limiter.available(),
        )
    }

    /// Admits no call of `key` until `until`. Replaces an earlier pause of the key, so an earlier instant shortens it, and
    /// one that has passed ends it. Other keys are not affected. The key is held until the pause is over.
    ///
    /// # Errors
    ///
    /// [`TooManyKeys`] if the key is not held and there is [no room](Self::max_keys) for it. It is not paused then.
    pub fn pause<Q>(&self, key: &Q, until: Instant) -> Result<(), TooManyKeys>
    where
        K: Borrow<Q>,
        Q: ?Sized + Hash + Eq + ToOwned<Owned = K>,
    {
        if until > Instant::now() {
            self.shards.pin(self.shards.lookup(key))?.limiter().pause_until(until);
        } else {
            self.resume(key);
        }
        Ok(())
    }

    /// Ends the pause of `key` now. Its waiting calls go on at once, as far as the limits allow.
    pub fn resume<Q>(&self, key: &Q)
    where
        K: Borrow<Q>,
        Q: ?Sized + Hash + Eq + ToOwned<Owned = K>,
    {
        // A key that is not pinned is not paused.
        if let Some(key) = self.shards.pin_again(self.shards.lookup(key)) {
            key.limiter().resume();
        }
    }

    /// Returns the current pause of `key`, with its end. `None` if the key is not paused.
    #[must_use]
    pub fn paused<Q>(&self, key: &Q) -> Option<Pause>
    where
        K: Borrow<Q>,
        Q: ?Sized + Hash + Eq + ToOwned<Owned = K>,
    {
        self.shards
            .read(self.shards.lookup(key), |_, _, _| None, |limiter| limiter.paused())
    }

    /// Replaces the limits of all keys of a limiter that has no tiers. The new limits apply at once, also to the calls that
    /// wait already. A key keeps its debt and what it holds, up to the new burst, as
    /// [`RateLimiter::set_limits`](crate::RateLimiter::set_limits) says. One whose buckets are full has full buckets under
    /// the new limits, too.
    ///
    /// Takes time for each key that is waited for, paused, or has an open estimate, and about a tenth of a millisecond
    /// besides. Other keys change to the new limits, as of the time of this call, when a call meets them: until all keys of
    /// a part of the table have changed, each call of the part takes some 10 microseconds more, and the part up to twice
    /// its memory. All keys change at once, at about 0.3 microseconds each, if a new rate is one of those whose keys
    /// [take a kilobyte](crate::KeyedRateLimiter#memory-and-time), and once in eight replacements if no calls come between them.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`] in the same cases as [`new`](Self::new), and for a limiter that has several tiers: see
    /// [`set_tier_limits`](Self::set_tier_limits). The limits are unchanged then.
    pub fn set_limits(&self, limits: Limits) -> Result<(), InvalidConfig> {
        let tiers = self.shards.tiers().len();
        if tiers > 1 {
            let problem = format!("must be named, the limiter has {tiers}: use `set_tier_limits`");
            return Err(InvalidConfig::new("tier", problem));
        }
        self.set_tier_limits(0, limits)
    }

    /// Replaces the limits of all keys of the tier with this index, as [`set_limits`](Self::set_limits) does.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`] in the same cases as [`new`](Self::new), and if there is no such tier. The limits are unchanged
    /// then.
    pub fn set_tier_limits(&self, tier: usize, limits: Limits) -> Result<(), InvalidConfig> {
        self.shards.set_tier(tier, limits)
    }

    /// Forgets all keys whose buckets are full, and returns how many keys are left: those that owe something, or are
    /// waited for or paused, or have an open estimate. Looks at each key, which takes about 25 ns.
    #[must_use]
    pub fn len(&self) -> usize {
        self.shards.count()
    }

    /// Whether no key is held, as [`len`](Self::len) counts them.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<K: Hash + Eq + Clone> Clone for KeyedRateLimiter<K> {
    fn clone(&self) -> Self {
        Self {
            shards: self.shards.clone(),
        }
    }
}

/// Shows the limits and the number of keys, also of such as can be forgotten. Never shows a key, which may be a secret.
impl<K: Hash + Eq + Clone> fmt::Debug for KeyedRateLimiter<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let room = &self.shards.context.room;
        let max_keys = Some(room.max()).filter(|max| *max < usize::MAX);
        f.debug_struct("KeyedRateLimiter")
            .field("keys", &room.held())
            .field("max_keys", &max_keys)
            .field("tiers", &self.shards.tiers().len())
            .finish_non_exhaustive()
    }
}
