//! [`Grant`]: what a call was given when it was chosen, until its layers take it.

use super::call::ScheduledCall;
use crate::{
    error::AcquireError,
    rate::{self, GrantedCharge},
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
    permit: Option<GrantedPermit>,
    charge: Option<GrantedCharge>,
    /// The call, if its schedule has no limiter: it counts as charged when it begins.
    uncharged: Option<Arc<ScheduledCall>>,
    /// Counts the call at its keys until its end, if neither its permit nor its charge does.
    #[allow(dead_code, reason = "its drop is what matters")]
    in_flight: Option<InFlight>,
}

/// The guard of an entered [`Grant`].
#[must_use = "the grant is left when this is dropped"]
pub(crate) struct EnteredGrant<'a>(&'a mut Grant);

impl Grant {
    /// Puts together what a chosen call was given.
    pub(super) fn new(
        call: Arc<ScheduledCall>,
        permit: Option<Permit>,
        in_flight: Option<InFlight>,
        mut charge: Option<GrantedCharge>,
    ) -> Self {
        let uncharged = match &mut charge {
            Some(charge) => {
                charge.tell(call.clone());
                None
            }
            None => Some(call.clone()),
        };
        let semaphore = permit.as_ref().and_then(Permit::of);
        let (permit, in_flight) = match permit.zip(semaphore) {
            Some((permit, semaphore)) => (Some(GrantedPermit::new(semaphore, permit, in_flight, call)), None),
            None => match &mut charge {
                Some(charge) => {
                    charge.without_permit(in_flight, call);
                    (None, None)
                }
                None => (None, in_flight),
            },
        };
        Self {
            permit,
            charge,
            uncharged,
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
        if let Some(call) = self.uncharged.take() {
            call.settle_as_charged();
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
