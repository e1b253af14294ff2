//! [`Grant`]: what a call was given when it was chosen, until its layers take it.

use super::{attempt::Again, fair::Units, shared::Shared, tree::Started};
use crate::{
    error::AcquireError,
    panic::catch_unwind,
    rate::{self, ChargeAgain, Charged, Cost, Estimate, GrantedCharge, OnSettled, RateLimiter, Unused},
    semaphore::{
        Permit,
        granted::{self, GrantedPermit, InFlight},
    },
};
use std::{
    sync::Arc,
    task::{Context, Poll},
};

/// The permit and the charge of a chosen call. What its layers have not taken when it is dropped is given back.
pub(crate) struct Grant {
    permit: Option<Box<GrantedPermit>>,
    charge: Option<Box<GrantedCharge>>,
    /// The place in the fair order of a call whose schedule has no limiter: it counts as charged when the call begins.
    receipt: Option<Box<Receipt>>,
    /// Counts the call at its keys until its end, if neither its permit nor its charge does.
    #[allow(dead_code, reason = "its drop is what matters")]
    in_flight: Option<InFlight>,
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
        in_flight: Option<InFlight>,
        charge: Option<(RateLimiter, Estimate)>,
        receipt: Box<Receipt>,
        again: Again,
    ) -> Self {
        let semaphore = permit.as_ref().and_then(Permit::of);
        let again = Arc::new(again);
        let mut of_charge = None;
        let (permit, mut in_flight) = match permit.zip(semaphore) {
            Some((permit, semaphore)) => {
                let granted = GrantedPermit::new(semaphore, permit, in_flight, again);
                (Some(Box::new(granted)), None)
            }
            None => {
                let again: Arc<dyn ChargeAgain> = again;
                of_charge = Some(again);
                (None, in_flight)
            }
        };
        let (charge, receipt) = match charge {
            Some((limiter, estimate)) => {
                let unused = Unused::new(estimate.with_receipt(receipt));
                let charged = Charged::new(Ok(unused), in_flight.take());
                (Some(Box::new(GrantedCharge::new(limiter, charged, of_charge))), None)
            }
            None => (None, Some(receipt)),
        };
        Self {
            permit,
            charge,
            receipt,
            in_flight,
        }
    }

    /// Ready with the reason if the call has to fail, because a further attempt was refused and no layer can fail with that.
    pub(crate) fn poll_refused(&self, cx: &mut Context<'_>) -> Poll<AcquireError> {
        let permit = self.permit.as_ref();
        permit.map_or(Poll::Pending, |permit| permit.poll_refused(cx))
    }

    /// Called when the call is made. Until then, dropping the grant counts as if the call had used nothing.
    pub(crate) fn begin(&mut self) {
        if let Some(mut receipt) = self.receipt.take() {
            receipt.settle_as_charged();
        }
    }

    /// Gives back what no layer has taken when the call's future was polled once. A layer that has not reached the limits by
    /// then waits for something else, and must hold up no other call: its call asks for its turn again when it gets there.
    pub(crate) fn end_start(&mut self) {
        if let Some(permit) = &mut self.permit {
            permit.give_back();
        }
        if let Some(charge) = &mut self.charge {
            charge.give_back();
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
    pub(super) const fn new(shared: Arc<Shared>, started: Started, cost: Cost) -> Self {
        Self {
            shared,
            units: started.units,
            started: Some(started),
            cost,
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
