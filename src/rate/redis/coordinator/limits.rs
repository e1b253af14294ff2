//! [`SharedLimits`]: the limits as this member knows them, and what it has yet to report about them.

use crate::{
    error::CostExceedsBurst,
    rate::{
        Bursts,
        limits::{Budget, Cost},
        redis::quota_config::QuotaConfig,
    },
};
use std::{sync::Arc, time::Duration};

pub(super) struct SharedLimits {
    bursts: Arc<Bursts>,
    config: Arc<QuotaConfig>,
    /// What this member was configured with, as a text.
    configured_as: String,
    /// The version of `config` at the store; 0 before the first reply.
    version: i64,
    /// How often this member has set the limits.
    changes: u64,
    /// How many of these changes the store has.
    reported_changes: u64,
    /// Reports of a provider that are not sent yet: the position of a rate in the limits, and the amount left of it.
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
        self.bursts.check(cost)
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

    pub(super) fn has_limit(&self, budget: Budget) -> bool {
        self.config.sizes().iter().any(|(of, _)| *of == budget)
    }

    /// What a full set of new buckets holds of `budget`; `None` without a limit.
    pub(super) fn initial(&self, budget: Budget) -> Option<u64> {
        let sizes = self.config.sizes().iter().filter(|(of, _)| *of == budget);
        sizes.map(|(_, size)| (size.initial as u128 / size.unit) as u64).min()
    }

    // --- changes

    /// Sets the limits for all members.
    pub(super) fn set(&mut self, config: QuotaConfig) {
        self.changes += 1;
        self.replace(config);
    }

    fn replace(&mut self, config: QuotaConfig) {
        set_bursts(&self.bursts, &config);
        self.config = Arc::new(config);
        // The positions are those of rates of the former limits.
        self.lowered.clear();
    }

    /// Records a provider's report that no more than `left` is left of a rate.
    pub(super) fn lower(&mut self, budget: Budget, period: Option<Duration>, left: u64) {
        if let Some(position) = self.config.limits().index_of(budget, period) {
            self.lowered.push((position, left));
        }
    }

    pub(super) const fn changes(&self) -> u64 {
        self.changes
    }

    /// Whether this member has set the limits and the store does not have them yet.
    pub(super) const fn is_changed(&self) -> bool {
        self.changes != self.reported_changes
    }

    /// Whether there is anything to report.
    pub(super) fn has_news(&self) -> bool {
        self.is_changed() || !self.lowered.is_empty()
    }

    pub(super) fn take_lowered(&mut self) -> Vec<(usize, u64)> {
        std::mem::take(&mut self.lowered)
    }

    /// Takes over what the store replied to a request that was sent after `changes` changes. Returns whether other
    /// limits are in force now. A reply to an outdated request is ignored: the next one brings the version again.
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

    /// Keeps what a failed request has not reported, to send it again.
    pub(super) fn on_failure(&mut self, changes: u64, lowered: Vec<(usize, u64)>) {
        if changes == self.changes {
            // In any order: the smallest amount for each rate counts.
            self.lowered.extend(lowered);
        }
    }
}

fn set_bursts(bursts: &Bursts, config: &QuotaConfig) {
    let sizes = config.sizes().iter();
    bursts.set(&sizes.map(|(budget, size)| (*budget, size.burst())));
}
