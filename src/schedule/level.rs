//! [`Level`]: one level of a schedule, at which calls are told apart by a key.

use super::flow::FlowKey;
use crate::rate::Limits;
use std::{
    fmt,
    num::{NonZeroU32, NonZeroUsize},
    sync::Arc,
};

/// One level of a [`Schedule`](super::Schedule): the calls are told apart by one key of their [`Flow`](super::Flow), and
/// the capacity is shared fairly between the keys.
///
/// ```
/// use tower_outbound::{Limits, Rate, schedule::Level};
///
/// // Tenants share in the ratio of their weights, and each of them has limits of its own.
/// let level = Level::by("tenant")
///     .weight(|tenant| if tenant == "gold" { 4 } else { 1 })
///     .limits(|_tenant| Some(Limits::new().requests(Rate::per_second(20))));
/// ```
#[derive(Clone)]
pub struct Level {
    name: Arc<str>,
    weight: Option<ByKey<u32>>,
    limits: Option<ByKey<Option<Limits>>>,
    concurrency: Option<ByKey<Option<usize>>>,
    is_strict: bool,
}

/// Something that each key has, by the key as text.
type ByKey<T> = Arc<dyn Fn(&str) -> T + Send + Sync>;

impl Level {
    /// Creates a level at which all keys have the weight 1 and no limits. `name` says what the keys stand for, such as
    /// `"tenant"` or `"model"`. It names the level in errors.
    #[must_use]
    pub fn by(name: impl Into<Arc<str>>) -> Self {
        Self {
            name: name.into(),
            weight: None,
            limits: None,
            concurrency: None,
            is_strict: false,
        }
    }

    /// Sets the weight of each key, by the key as text: a key of weight 3 gets three times as much as one of weight 1
    /// while both have calls that wait. A weight of 0 counts as 1. Default: 1.
    ///
    /// The function is called when a call with a key arrives that is not known, or no longer. It can be overridden at run
    /// time with [`Schedule::set_weight`](super::Schedule::set_weight).
    #[must_use]
    pub fn weight(mut self, weight: impl Fn(&str) -> u32 + Send + Sync + 'static) -> Self {
        self.weight = Some(Arc::new(weight));
        self
    }

    /// Sets the limits of each key, by the key as text; `None` for a key without limits. Default: no limits.
    ///
    /// A call is charged to them at the same instant as to the limits of the whole executor: to all or to none. Calls whose
    /// key has used up its limits wait, and delay no others. The function is called as that of [`weight`](Self::weight) is.
    /// Limits that are [invalid](crate::InvalidConfig), or whose buckets begin with less than their burst, fail the calls of
    /// the key.
    #[must_use]
    pub fn limits(mut self, limits: impl Fn(&str) -> Option<Limits> + Send + Sync + 'static) -> Self {
        self.limits = Some(Arc::new(limits));
        self
    }

    /// Sets how many calls of each key may be in flight at once, by the key as text; `None` for any number. A limit of 0 counts
    /// as 1. Default: any number.
    ///
    /// A call is in flight while it holds its permit of the [concurrency limit](crate::concurrency) that the schedule
    /// [names](super::Schedule::concurrency). Without one, while it is below the rate limit of the
    /// [limiter](super::Schedule::limiter) that the schedule names, and without either, from its begin to its end. The function is called as that of [`weight`](Self::weight) is.
    #[must_use]
    pub fn concurrency(mut self, limit: impl Fn(&str) -> Option<usize> + Send + Sync + 'static) -> Self {
        self.concurrency = Some(Arc::new(limit));
        self
    }

    /// Makes the keys of this level strict bands: the calls of a key with a lower [weight](Self::weight), here its band,
    /// always go first. Default: keys share fairly.
    ///
    /// A band that always has calls waiting starves all behind it. Weights at a fair level do nearly the same and starve
    /// nobody.
    #[must_use]
    pub const fn strict(mut self) -> Self {
        self.is_strict = true;
        self
    }

    pub(super) const fn name(&self) -> &Arc<str> {
        &self.name
    }

    pub(super) const fn is_strict(&self) -> bool {
        self.is_strict
    }

    pub(super) fn weight_of(&self, key: &FlowKey) -> NonZeroU32 {
        let weight = self.weight.as_ref().map_or(1, |weight| weight(&key.to_string()));
        NonZeroU32::new(weight).unwrap_or(NonZeroU32::MIN)
    }

    /// Whether the level says the same about each key.
    pub(super) const fn is_plain(&self) -> bool {
        self.weight.is_none() && self.limits.is_none() && self.concurrency.is_none()
    }

    pub(super) const fn limits_concurrency(&self) -> bool {
        self.concurrency.is_some()
    }

    pub(super) fn concurrency_of(&self, key: &FlowKey) -> Option<NonZeroUsize> {
        let limit = self.concurrency.as_ref().and_then(|limit| limit(&key.to_string()))?;
        Some(NonZeroUsize::new(limit).unwrap_or(NonZeroUsize::MIN))
    }

    pub(super) fn limits_of(&self, key: &FlowKey) -> Option<Limits> {
        self.limits.as_ref().and_then(|limits| limits(&key.to_string()))
    }
}

impl fmt::Debug for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Level")
            .field("name", &self.name)
            .field("is_strict", &self.is_strict)
            .finish_non_exhaustive()
    }
}
