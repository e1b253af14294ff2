//! [`Builder`]: the settings of a [`SharedRateLimiter`], their defaults and their checks.

use super::{
    coordinator::{Coordinator, Settings},
    driver::{Backend, SharedCoordinator},
    loss::OnStoreLoss,
    quota_config::QuotaConfig,
    shared::SharedRateLimiter,
    store::{OnPause, Origin, Store, StoreError},
    wire::{StoreReply, StoreRequest},
};
use crate::{error::InvalidConfig, rate::limits::Limits};
use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, OnceLock, Weak},
    time::Duration,
};
use tokio::time::Instant;

/// Settings of a [`SharedRateLimiter`].
///
/// ```
/// use std::time::Duration;
/// use tower_outbound::{Limits, Rate, rate::redis::{OnStoreLoss, SharedRateLimiter}};
///
/// let limiter = SharedRateLimiter::builder(Limits::new().requests(Rate::per_second(50)))
///     .on_store_loss(OnStoreLoss::Closed)
///     .patience(Duration::from_secs(30))
///     .connect("redis://127.0.0.1/", "billing-api")?;
/// # Ok::<_, tower_outbound::error::InvalidConfig>(())
/// ```
#[derive(Clone, Debug)]
#[must_use = "it is not connected yet"]
pub struct Builder {
    limits: Limits,
    prefix: String,
    on_loss: OnStoreLoss,
    ahead: Duration,
    members: u64,
    patience: Option<Duration>,
    timeout: Duration,
}

impl Builder {
    pub(super) const fn new(limits: Limits) -> Self {
        Self {
            limits,
            prefix: String::new(),
            on_loss: OnStoreLoss::LocalShare,
            ahead: Duration::from_secs(1),
            members: 1,
            patience: None,
            timeout: Duration::from_millis(500),
        }
    }

    /// What keys begin with. Default: `tower-outbound`.
    pub fn prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefix = prefix.into();
        self
    }

    /// What to do while the store is lost. Default: [`OnStoreLoss::LocalShare`].
    pub const fn on_store_loss(mut self, on_loss: OnStoreLoss) -> Self {
        self.on_loss = on_loss;
        self
    }

    /// How far ahead all members together reserve at most. Default: 1 s. From 100 ms to 60 s.
    ///
    /// It is what is lost at most when a process is killed, and what is waited after the store was lost, or has lost its
    /// state. It has to be the same for all members, and many times a round trip. With more than 25 members it may be
    /// more: 40 ms for each.
    pub const fn max_ahead(mut self, ahead: Duration) -> Self {
        self.ahead = ahead;
        self
    }

    /// How many members there are at least: what a [local share](OnStoreLoss::LocalShare) is counted by while the store
    /// was never reached, or knows of fewer. Default: one.
    pub const fn members(mut self, members: u64) -> Self {
        self.members = members;
        self
    }

    /// How long a call waits for a lost store, where nobody is admitted without it ([`OnStoreLoss::Closed`]), before it
    /// fails with [`StoreUnavailable`](crate::error::StoreUnavailable). Default: until its
    /// [deadline](crate::deadline), or for ever.
    pub const fn patience(mut self, patience: Duration) -> Self {
        self.patience = Some(patience);
        self
    }

    /// How long a round trip may take, connecting included. Default: 500 ms. After three that fail the store is lost.
    pub const fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// The limits of `quota`, kept by the server at `url`: see [`SharedRateLimiter::connect`].
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`] names the field.
    pub fn connect(self, url: &str, quota: &str) -> Result<SharedRateLimiter, InvalidConfig> {
        let origin = Origin::url(url)?;
        self.build(origin, quota)
    }

    /// The same over a connection that is made already: a `ConnectionManager`, or a `ClusterConnection`, of the crate
    /// `redis`, version 1. It must live in a runtime that outlives this one's use of it.
    ///
    /// Pauses that others begin are heard of with the next answer, not at once.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`] names the field.
    pub fn connection<C>(self, connection: C, quota: &str) -> Result<SharedRateLimiter, InvalidConfig>
    where
        C: ::redis::aio::ConnectionLike + Clone + Send + Sync + 'static,
    {
        self.build(Origin::Given(Arc::new(move || Box::new(connection.clone()))), quota)
    }

    fn build(self, origin: Origin, quota: &str) -> Result<SharedRateLimiter, InvalidConfig> {
        let prefix = if self.prefix.is_empty() {
            "tower-outbound"
        } else {
            &self.prefix
        };
        for (field, name) in [("prefix", prefix), ("quota", quota)] {
            // Braces would take the keys of one quota apart.
            if name.is_empty() || name.contains(['{', '}']) {
                return Err(InvalidConfig::new(
                    field,
                    format!("must be a name without braces, is {name:?}"),
                ));
            }
        }
        let timeout = self.timeout;
        let heard: Arc<OnceLock<Weak<SharedCoordinator>>> = Arc::default();
        let on_pause: OnPause = {
            let heard = heard.clone();
            Arc::new(move |pause| {
                let office = heard.get().and_then(Weak::upgrade);
                if let (Some(office), Some(until)) = (office, Instant::now().checked_add(pause)) {
                    office.look(|coordinator| coordinator.is_paused(until));
                }
            })
        };
        let (prefix, quota) = (prefix.to_owned(), quota.to_owned());
        let connect = move || -> Box<dyn Backend> {
            Box::new(Store::new(origin.clone(), &prefix, &quota, timeout, on_pause.clone()))
        };
        let limiter = self.office(Box::new(connect)).map(SharedRateLimiter::new)?;
        let _ = heard.set(limiter.office());
        Ok(limiter)
    }

    pub(super) fn office(self, connect: super::driver::Connect) -> Result<SharedCoordinator, InvalidConfig> {
        let ahead = Duration::from_millis(100)..=Duration::from_secs(60);
        if !ahead.contains(&self.ahead) {
            return Err(InvalidConfig::new(
                "max_ahead",
                format!("must be from 100 ms to 60 s, is {:?}", self.ahead),
            ));
        }
        if self.timeout.is_zero() {
            return Err(InvalidConfig::new("timeout", "must be above zero, is 0"));
        }
        if self.members == 0 || self.members > MOST_MEMBERS {
            return Err(InvalidConfig::new(
                "members",
                format!("must be from 1 to {MOST_MEMBERS}, is {}", self.members),
            ));
        }
        let settings = Settings {
            member: *uuid::Uuid::new_v4().as_bytes(),
            on_loss: self.on_loss,
            ahead: self.ahead,
            members: self.members,
            patience: self.patience,
        };
        let coordinator = Coordinator::new(settings, QuotaConfig::new(self.limits)?);
        Ok(SharedCoordinator::new(coordinator, connect, self.timeout))
    }
}

/// More than any fleet has.
const MOST_MEMBERS: u64 = 1_000_000;

impl Backend for Store {
    fn call<'a>(
        &'a mut self,
        ask: &'a StoreRequest,
    ) -> Pin<Box<dyn Future<Output = Result<StoreReply, StoreError>> + Send + 'a>> {
        Box::pin(Self::call(self, ask))
    }
}
