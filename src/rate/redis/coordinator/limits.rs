//! [`SharedLimits`]: the limits of the quota as this member has last set or received them, and what it has yet to
//! report about them to the store.

use crate::{
    error::CostExceedsBurst,
    rate::{Bursts, budget::Budget, cost::Cost, redis::quota_config::QuotaConfig},
};
use std::{sync::Arc, time::Duration};

pub(super) struct SharedLimits {
    bursts: Arc<Bursts>,
    config: Arc<QuotaConfig>,
    /// The limits that this member was started with, as a text.
    configured_as: String,
    /// The version that the store has given to the limits in `config`; 0 before the store's first reply.
    version: i64,
    /// How often this member has set the limits.
    changes: u64,
    /// How many of the changes that this member has made to the limits have reached the store.
    reported_changes: u64,
    /// Reports of the provider that are not sent to the store yet: the position of a rate in the limits, and the amount
    /// that remains of it.
    lowered: Vec<(usize, u64)>,
}

impl SharedLimits {
    pub(super) fn new(config: QuotaConfig) -> Self {
        let bursts = Arc::new(Bursts::default());
        set_bursts(&bursts, &config);
        Self {
            bursts,
            configured_as: config.text().to_owned(),
            config: Arc::new(config),
            version: 0,
            changes: 0,
            reported_changes: 0,
            lowered: Vec::new(),
        }
    }

    pub(super) const fn bursts(&self) -> &Arc<Bursts> {
        &self.bursts
    }

    pub(super) fn check(&self, cost: Cost) -> Result<(), CostExceedsBurst> {
        self.bursts.check(&cost)
    }

    pub(super) const fn config(&self) -> &Arc<QuotaConfig> {
        &self.config
    }

    pub(super) fn configured_as(&self) -> &str {
        &self.configured_as
    }

    pub(super) const fn version(&self) -> i64 {
        self.version
    }

    /// Returns how much of `budget` new buckets admit at once; `None` if they have no limit.
    pub(super) fn initial(&self, budget: Budget) -> Option<u64> {
        let specs = self.config.specs().iter().filter(|(of, _)| *of == budget);
        specs.map(|(_, spec)| (spec.initial as u128 / spec.unit) as u64).min()
    }

    // --- changes

    /// Sets the limits for all members: the next request reports them to the store.
    pub(super) fn set(&mut self, config: QuotaConfig) {
        self.changes += 1;
        self.replace(config);
    }

    fn replace(&mut self, config: QuotaConfig) {
        set_bursts(&self.bursts, &config);
        self.config = Arc::new(config);
        // The reports of the provider are dropped: they name rates by their position in the former limits.
        self.lowered.clear();
    }

    /// Records a report of the provider that no more than `remaining` is available of a rate. The next request passes
    /// it on to the store.
    pub(super) fn lower(&mut self, budget: Budget, period: Option<Duration>, remaining: u64) {
        if let Some(position) = self.config.limits().index_of(budget, period) {
            self.lowered.push((position, remaining));
        }
    }

    /// Does what [`lower`](Self::lower) does, for a report of what the provider had left `elapsed` ago. The rate has
    /// brought more since. What was charged since is not known here, so it is not subtracted: the next report has it.
    #[cfg(feature = "http")]
    pub(super) fn lower_since(&mut self, budget: Budget, period: Option<Duration>, remaining: u64, elapsed: Duration) {
        if let Some(position) = self.config.limits().index_of(budget, period) {
            let (_, spec) = &self.config.specs()[position];
            let brought = elapsed.as_micros().saturating_mul(spec.fill.into()) / spec.unit;
            let brought = u64::try_from(brought).unwrap_or(u64::MAX);
            self.lowered.push((position, remaining.saturating_add(brought)));
        }
    }

    pub(super) const fn changes(&self) -> u64 {
        self.changes
    }

    /// Whether this member has set limits that have not reached the store yet.
    pub(super) const fn is_changed(&self) -> bool {
        self.changes != self.reported_changes
    }

    /// Whether there are limits or reports of the provider that have to be sent to the store.
    pub(super) fn has_news(&self) -> bool {
        self.is_changed() || !self.lowered.is_empty()
    }

    pub(super) fn take_lowered(&mut self) -> Vec<(usize, u64)> {
        std::mem::take(&mut self.lowered)
    }

    /// Takes over the version and the text of the limits from the store's reply to a request. When that request was
    /// sent, this member had changed the limits `changes` times. If it has changed them again since, the reply is
    /// ignored, and the next reply brings the version again. Returns whether this member has taken over other limits.
    pub(super) fn on_reply(&mut self, changes: u64, version: i64, text: Option<&str>) -> bool {
        if changes != self.changes {
            return false;
        }
        self.reported_changes = changes;
        self.version = version;
        let Some(text) = text.filter(|text| *text != self.config.text()) else {
            return false;
        };
        let Some(config) = QuotaConfig::read(text) else {
            tracing::warn!(
                limits = text,
                "Another member has set limits that this member cannot read: it keeps its own. Run the same version of \
                 the crate in all members"
            );
            return false;
        };
        tracing::info!(
            limits = text,
            "Another member has set the shared limits: they hold here too"
        );
        self.replace(config);
        true
    }

    /// Keeps the reports of the provider from a request that failed, to send them to the store again.
    pub(super) fn on_failure(&mut self, changes: u64, lowered: Vec<(usize, u64)>) {
        if changes == self.changes {
            // The order of the reports does not matter: for each rate the smallest amount counts.
            self.lowered.extend(lowered);
        }
    }
}

fn set_bursts(bursts: &Bursts, config: &QuotaConfig) {
    let specs = config.specs().iter();
    bursts.set(&specs.map(|(budget, spec)| (*budget, spec.burst())));
}
