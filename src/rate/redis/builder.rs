//! [`Builder`]: the settings of a limiter that processes share, their defaults and their checks.

use super::{
    channels::OnPause,
    coordinator::{Coordinator, MemberSettings},
    driver::{Connect, SharedCoordinator},
    endpoint::{Endpoint, EndpointSettings},
    loss::OnStoreLoss,
    quota_config::QuotaConfig,
    round_trips::RoundTrips,
    shared::SharedLimiter,
    store::{Origin, Store},
    wire::pause_ends,
};
use crate::{
    error::InvalidConfig,
    rate::{RateLimiter, limits::Limits},
};
use ::redis::aio::ConnectionLike;
use std::{
    ops::RangeInclusive,
    sync::{Arc, OnceLock, Weak},
    time::Duration,
};
use tokio::time::Instant;

/// The largest number of members (processes that share the quota) that is accepted: more than any fleet has.
const MAX_MEMBERS: u64 = 1_000_000;

const MAX_AHEAD: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(60);

/// The settings of a [`RateLimiter`](crate::RateLimiter) whose limits processes share.
///
/// ```
/// use std::time::Duration;
/// use tower_outbound::{Limits, Rate, rate::redis::{Builder, OnStoreLoss}};
///
/// let limiter = Builder::new(Limits::new().requests(Rate::per_second(50)))
///     .on_store_loss(OnStoreLoss::Closed)
///     .patience(Duration::from_secs(30))
///     .connect("redis://127.0.0.1/", "billing-api")?;
/// # Ok::<_, tower_outbound::error::InvalidConfig>(())
/// ```
#[derive(Clone, Debug)]
#[must_use = "a builder does nothing until it connects"]
pub struct Builder {
    limits: Limits,
    prefix: String,
    on_loss: OnStoreLoss,
    max_ahead: Duration,
    members: u64,
    patience: Option<Duration>,
    timeout: Duration,
    endpoint: EndpointSettings,
}

/// Builds a limiter for `quota` on the server at `url`, with the defaults of all other settings: see
/// [`Builder::connect`].
///
/// # Errors
///
/// [`InvalidConfig`] names the invalid field: the URL, the name of the quota, or a number of the limits that is out of
/// range.
pub fn connect(url: &str, quota: &str, limits: Limits) -> Result<RateLimiter, InvalidConfig> {
    Builder::new(limits).connect(url, quota)
}

// === impl Builder ===

impl Builder {
    /// Creates a builder for a limiter with these limits.
    pub const fn new(limits: Limits) -> Self {
        Self {
            limits,
            prefix: String::new(),
            on_loss: OnStoreLoss::LocalShare,
            max_ahead: Duration::from_secs(1),
            members: 1,
            patience: None,
            timeout: Duration::from_millis(500),
            endpoint: EndpointSettings::new(),
        }
    }

    /// Sets the first part of the names of keys and channels on the server, without braces. Default: `tower-outbound`.
    pub fn prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefix = prefix.into();
        self
    }

    /// Sets what this process does while it cannot reach the store (the server that holds the buckets). Default:
    /// [`OnStoreLoss::LocalShare`].
    pub const fn on_store_loss(mut self, on_loss: OnStoreLoss) -> Self {
        self.on_loss = on_loss;
        self
    }

    /// Sets how far into the future the store may reserve the capacity of the limits for waiting calls of all members
    /// (processes that share the quota), from 100 ms to 60 s. Default: 1 s.
    ///
    /// If a process is killed, its reservations are wasted: at most what the limits allow in this time. When the store
    /// has lost its state, and before members admit calls at their [local shares](OnStoreLoss::LocalShare), members
    /// admit no call without a reservation for this long, because earlier reservations may be used until then. The
    /// value has to be the same for all members, and many times as long as a round trip.
    pub const fn max_ahead(mut self, ahead: Duration) -> Self {
        self.max_ahead = ahead;
        self
    }

    /// Sets how many members (processes that share the quota) this process assumes at least, also if the store has
    /// counted fewer: from 1 to 1,000,000. Default: 1.
    ///
    /// While the store is lost, a [local share](OnStoreLoss::LocalShare) is each rate divided by this number, or by the
    /// number of members that the store has counted, whichever is larger. Set this number to the size of the fleet, so
    /// that the shares are right even if the store cannot be reached from the start.
    pub const fn members(mut self, members: u64) -> Self {
        self.members = members;
        self
    }

    /// Sets how long a call waits for a lost store under [`OnStoreLoss::Closed`] before it fails with
    /// [`StoreUnavailable`](crate::error::StoreUnavailable). Default: until its [deadline](crate::deadline), or for
    /// ever if it has none. The other variants of [`OnStoreLoss`] do not use this setting.
    pub const fn patience(mut self, patience: Duration) -> Self {
        self.patience = Some(patience);
        self
    }

    /// Sets how long a round trip to the store may take, including the time to connect. Default: 500 ms.
    ///
    /// After three round trips in a row that failed or took longer than this timeout, the store counts as lost. Once the
    /// limiter is connected, a round trip may take at least twice as long as is usual for this server, up to 10 s. A
    /// connection that is not made within the timeout is made all the same, for a later request.
    pub const fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Names the sentinels that know the address of the server, by their URLs. Default: none.
    ///
    /// The host in the URL of the server is then the name of the primary that the sentinels watch, as in
    /// `redis://user:password@mymaster/0`; its port is not used. Whenever the limiter connects, it asks the sentinels for
    /// the address, one after the other. After a failover it finds the new primary in this way, as soon as the sentinels
    /// know it.
    ///
    /// ```
    /// # use tower_outbound::{Limits, Rate, rate::redis::Builder};
    /// let limiter = Builder::new(Limits::new().requests(Rate::per_second(50)))
    ///     .sentinels(["redis://10.0.0.1:26379", "redis://10.0.0.2:26379", "redis://10.0.0.3:26379"])
    ///     .connect("redis://mymaster/", "billing-api")?;
    /// # Ok::<_, tower_outbound::error::InvalidConfig>(())
    /// ```
    pub fn sentinels<T: Into<String>>(mut self, urls: impl IntoIterator<Item = T>) -> Self {
        self.endpoint.sentinels = urls.into_iter().map(Into::into).collect();
        self
    }

    /// Sets the certificates of the authorities that may sign the server's certificate, in the PEM format. Default: those
    /// of the operating system.
    #[cfg(feature = "redis-tls")]
    #[cfg_attr(docsrs, doc(cfg(feature = "redis-tls")))]
    pub fn tls_root_certificates(mut self, pem: impl Into<Vec<u8>>) -> Self {
        self.endpoint.tls.root_certificates = Some(pem.into());
        self
    }

    /// Sets the certificate of this client, with those that it is signed by, and its private key, both in the PEM format:
    /// for a server that asks for one (mutual TLS). Default: none.
    #[cfg(feature = "redis-tls")]
    #[cfg_attr(docsrs, doc(cfg(feature = "redis-tls")))]
    pub fn tls_client_certificate(mut self, certificate: impl Into<Vec<u8>>, key: impl Into<Vec<u8>>) -> Self {
        self.endpoint.tls.client_certificate = Some((certificate.into(), key.into()));
        self
    }

    /// Builds a limiter for `quota` on the server at `url`.
    ///
    /// The URL is `redis://[user:password@]host[:port][/db]`, or `rediss://` for TLS (feature `redis-tls`). The limiter
    /// does not connect in this function, but when its first call waits for admission, or in
    /// [`check_store`](RateLimiter::check_store).
    ///
    /// The limiters of a runtime that have the same URL, sentinels and certificates share one connection. It is closed
    /// when the last of them is dropped.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`] names the invalid setting or limit.
    pub fn connect(self, url: &str, quota: &str) -> Result<RateLimiter, InvalidConfig> {
        let mut settings = self.endpoint.clone();
        url.clone_into(&mut settings.url);
        let origin = Origin::Endpoint(Box::new(Endpoint::new(settings)?));
        self.build(origin, quota).map(RateLimiter::shared)
    }

    /// Builds a limiter for `quota` over an existing connection: a `ConnectionManager` or a `ClusterConnection` of the
    /// crate `redis`, version 1. The runtime that the connection was made in has to outlive the limiter, and the
    /// connection has to replace itself when it is lost.
    ///
    /// A limiter over such a connection does not receive the server's announcements of pauses. So a pause that another
    /// process begins takes effect in this process with the store's next reply, not at once.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`] names the invalid setting or limit.
    pub fn connection<C>(self, connection: C, quota: &str) -> Result<RateLimiter, InvalidConfig>
    where
        C: ConnectionLike + Clone + Send + Sync + 'static,
    {
        let origin = Origin::Given(Arc::new(move || Box::new(connection.clone())));
        self.build(origin, quota).map(RateLimiter::shared)
    }

    fn build(self, origin: Origin, quota: &str) -> Result<SharedLimiter, InvalidConfig> {
        let prefix = if self.prefix.is_empty() {
            "tower-outbound"
        } else {
            &self.prefix
        };
        for (field, name) in [("prefix", prefix), ("quota", quota)] {
            // The prefix and the name of the quota must not contain braces. The names of keys put both in braces
            // already, and a cluster chooses the node of a key by the part in braces: further braces could place the
            // keys of one quota on different nodes.
            if name.is_empty() || name.contains(['{', '}']) {
                return Err(InvalidConfig::new(
                    field,
                    format!("must be a name without braces, is {name:?}"),
                ));
            }
        }
        // `target` is the coordinator that receives the pauses that the server announces. It is set after the
        // limiter is built, because the coordinator and its connections refer to each other.
        let target: Arc<OnceLock<Weak<SharedCoordinator>>> = Arc::default();
        let on_pause: OnPause = {
            let target = target.clone();
            Arc::new(move |pauses| {
                if let Some(shared) = target.get().and_then(Weak::upgrade) {
                    let ends = pause_ends(pauses, Instant::now());
                    shared.with_coordinator(|coordinator| coordinator.on_pauses(ends));
                    shared.notify_driver();
                }
            })
        };
        let (prefix, quota) = (prefix.to_owned(), quota.to_owned());
        let round_trips = Arc::<RoundTrips>::default();
        let of_store = round_trips.clone();
        let connect: Connect = Box::new(move || {
            let (on_pause, round_trips) = (on_pause.clone(), of_store.clone());
            Arc::new(Store::new(&origin, &prefix, &quota, on_pause, round_trips))
        });
        let limiter = self.build_with(connect, round_trips)?;
        let _ = target.set(limiter.downgrade());
        Ok(limiter)
    }

    /// Checks the settings, and builds a limiter whose connections to the store are made by `connect`.
    pub(super) fn build_with(
        self,
        connect: Connect,
        round_trips: Arc<RoundTrips>,
    ) -> Result<SharedLimiter, InvalidConfig> {
        if !MAX_AHEAD.contains(&self.max_ahead) {
            return Err(InvalidConfig::new(
                "max_ahead",
                format!("must be from 100 ms to 60 s, is {:?}", self.max_ahead),
            ));
        }
        if self.timeout.is_zero() {
            return Err(InvalidConfig::new("timeout", "must be above zero, is 0"));
        }
        if self.members == 0 || self.members > MAX_MEMBERS {
            return Err(InvalidConfig::new(
                "members",
                format!("must be from 1 to {MAX_MEMBERS}, is {}", self.members),
            ));
        }
        let settings = MemberSettings {
            member: *uuid::Uuid::new_v4().as_bytes(),
            on_loss: self.on_loss,
            max_ahead: self.max_ahead,
            min_members: self.members,
            patience: self.patience,
        };
        let coordinator = Coordinator::new(settings, QuotaConfig::new(self.limits)?);
        let shared = SharedCoordinator::new(coordinator, connect, self.timeout, round_trips);
        Ok(SharedLimiter::new(shared))
    }
}
