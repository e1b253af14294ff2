//! [`Grant`]: what a call was given when it was chosen, until its layers take it.

use super::{attempt::Again, fair::Units, shared::Shared, tree::Started};
use crate::{
    panic::catch_unwind,
    rate::{self, Cost, Estimate, GrantedCharge, OnSettled, RateLimiter, Unused},
    semaphore::{
        Permit,
        granted::{self, GrantedPermit},
    },
};
use std::sync::Arc;

/// The permit and the charge of a chosen call. What its layers have not taken when it is dropped is given back.
pub(crate) struct Grant {
    permit: Option<Box<GrantedPermit>>,
    charge: Option<Box<GrantedCharge>>,
    /// The place in the fair order of a call whose schedule has no limiter: it counts as charged when the call begins.
    receipt: Option<Box<Receipt>>,
}

/// The guard of an entered [`Grant`].
#[must_use = "the grant is left when this is dropped"]
pub(crate) struct EnteredGrant<'a>(&'a mut Grant);

/// What a call was charged in the tree, settled when it is known what the call has used.
pub(super) struct Receipt {
    shared: Arc<Shared>,
    /// `None` once it is settled.
    started: Option<Started>,
    cost: Cost,
    /// What the cost counts in the fair order.
    units: Units,
}

impl Grant {
    /// Puts together what a chosen call was given.
    pub(super) fn new(
        permit: Option<Permit>,
        charge: Option<(RateLimiter, Estimate)>,
        receipt: Box<Receipt>,
        again: Again,
    ) -> Self {
        let semaphore = permit.as_ref().and_then(Permit::of);
        let permit = permit
            .zip(semaphore)
            .map(|(permit, semaphore)| Box::new(GrantedPermit::new(semaphore, permit, Arc::new(again))));
        let (charge, receipt) = match charge {
            Some((limiter, estimate)) => {
                let unused = Unused::new(estimate.with_receipt(receipt));
                (Some(Box::new(GrantedCharge::new(limiter, Ok(unused)))), None)
            }
            None => (None, Some(receipt)),
        };
        Self {
            permit,
            charge,
            receipt,
        }
    }

    /// Called when the call is made. Until then, dropping the grant counts as if the call had used nothing.
    pub(crate) fn begin(&mut self) {
        if let Some(mut receipt) = self.receipt.take() {
            receipt.settle_as_charged();
        }
    }

    /// Lets the layers that are called or polled on this thread find the grant, until the returned guard is dropped.
    pub(crate) fn enter(&mut self) -> EnteredGrant<'_> {
        self.swap();
        EnteredGrant(self)
    }

    fn swap(&mut self) {
        granted::swap(&mut self.permit);
        rate::swap_granted_charge(&mut self.charge);
    }
}

impl Drop for EnteredGrant<'_> {
    fn drop(&mut self) {
        self.0.swap();
    }
}

impl Receipt {
    pub(super) const fn new(shared: Arc<Shared>, started: Started, cost: Cost, units: Units) -> Self {
        Self {
            shared,
            started: Some(started),
            cost,
            units,
        }
    }

    pub(super) fn settle_as_charged(&mut self) {
        if let Some(started) = self.started.take() {
            self.shared.settle(started, self.cost, self.units);
        }
    }
}

impl OnSettled for Receipt {
    fn settled(&mut self, used: &Cost) {
        let Some(started) = self.started.take() else { return };
        // The price may be a function of the user. If it panics, the call counts what it was charged.
        let units = if *used == self.cost {
            self.units
        } else {
            catch_unwind(|| self.shared.units(used)).unwrap_or(self.units)
        };
        self.shared.settle(started, *used, units);
    }
}

/// A receipt that was not settled is that of a call that was not made.
impl Drop for Receipt {
    fn drop(&mut self) {
        if let Some(started) = self.started.take() {
            self.shared.give_back(started);
        }
    }
}
