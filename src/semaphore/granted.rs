//! A permit that a call was granted before it reached the concurrency limit: see [`GrantedPermit`].
//!
//! A schedule chooses a call when a permit and the budgets are there for it, outside all layers. So it takes the permit for
//! the call, and the concurrency limit that the call reaches finds it here. As with the current event, no request has to
//! carry it, so layers between the two need not know of it.

use super::{Permit, Semaphore};
use crate::error::AcquireError;
use std::{
    cell::Cell,
    sync::Arc,
    task::{Context, Poll},
};

/// The permit that was granted to the call which is made or polled on this thread.
pub(crate) struct GrantedPermit {
    semaphore: Semaphore,
    /// `None` once the first attempt has taken it.
    permit: Option<(Permit, Option<InFlight>)>,
    again: Arc<dyn AskAgain>,
}

/// Counts a call as in flight until it is dropped, for the schedule that has granted the permit. It lives as long as the
/// permit.
pub(crate) type InFlight = Box<dyn Send + Sync>;

/// Lets a call that makes a further attempt wait for its turn again.
pub(crate) trait AskAgain: Send + Sync {
    fn ask_again(self: Arc<Self>) -> Box<dyn PollPermit>;

    /// Called before another task may [ask](Self::ask_again), so that a refusal there wakes the call.
    fn expect_attempts(&self);

    /// Ready with the reason if a further attempt was refused that has no layer which could fail with it: a concurrency limit
    /// has no errors of its own. The waker is woken when one is.
    fn poll_refused(&self, cx: &mut Context<'_>) -> Poll<AcquireError>;
}

/// A further attempt that waits for its turn. Dropping it gives up the turn.
pub(crate) trait PollPermit: Send + Sync {
    /// Ready when the attempt has its turn, and what comes with it. Without a permit, the attempt has to wait for one like
    /// any call.
    fn poll_permit(&mut self, cx: &mut Context<'_>) -> Poll<Option<(Permit, Option<InFlight>)>>;
}

/// What a concurrency limit finds for a call.
pub(crate) enum Found {
    /// The call was granted this permit.
    Permit(Permit),
    /// The call is a further attempt, and waits for its turn again.
    Again(Box<dyn PollPermit>),
}

thread_local! {
    static CURRENT: Cell<Option<GrantedPermit>> = const { Cell::new(None) };
    /// Whether there is a current one. Without a schedule there never is, and this is much quicker to read: it has no
    /// destructor.
    static IS_ANY: Cell<bool> = const { Cell::new(false) };
    /// The address of the semaphore of which a call is granted a permit later, while the service is asked to be ready for
    /// that call; otherwise 0. An address, because it is only compared.
    static TO_COME: Cell<usize> = const { Cell::new(0) };
}

/// The guard of a permit that is [to come](expect).
#[must_use = "no permit is to come when this is dropped"]
pub(crate) struct Expected {
    before: usize,
}

impl Drop for Expected {
    #[inline]
    fn drop(&mut self) {
        TO_COME.set(self.before);
    }
}

impl GrantedPermit {
    pub(crate) fn new(
        semaphore: Semaphore,
        permit: Permit,
        in_flight: Option<InFlight>,
        again: Arc<dyn AskAgain>,
    ) -> Self {
        Self {
            semaphore,
            permit: Some((permit, in_flight)),
            again,
        }
    }

    /// Returns what is current while a call makes attempts outside the task that runs it, which all ask for their turn.
    pub(crate) const fn of_attempts(semaphore: Semaphore, again: Arc<dyn AskAgain>) -> Self {
        Self {
            semaphore,
            permit: None,
            again,
        }
    }

    /// See [`AskAgain::poll_refused`].
    pub(crate) fn poll_refused(&self, cx: &mut Context<'_>) -> Poll<AcquireError> {
        self.again.poll_refused(cx)
    }

    /// Releases the permit if no layer has taken it.
    pub(crate) fn give_back(&mut self) {
        self.permit = None;
    }
}

/// Exchanges the granted permit of this thread with `slot`. It is called before and after a call is made or polled.
#[cold]
pub(crate) fn swap(slot: &mut Option<GrantedPermit>) {
    IS_ANY.set(slot.is_some());
    *slot = CURRENT.replace(slot.take());
}

/// Returns what was granted to the current call, if it was a permit of this semaphore.
#[inline]
pub(crate) fn take(semaphore: &Semaphore) -> Option<Found> {
    if !IS_ANY.get() {
        return None;
    }
    take_current(semaphore)
}

#[cold]
fn take_current(semaphore: &Semaphore) -> Option<Found> {
    with_current(semaphore, |granted| match granted.permit.take() {
        Some((permit, in_flight)) => Found::Permit(permit.counted_by(in_flight)),
        None => Found::Again(granted.again.clone().ask_again()),
    })
}

/// Makes a service that is asked to be ready on this thread not wait for a permit of the semaphore, because the call that
/// follows brings one. Ends when the returned guard is dropped.
#[inline]
pub(crate) fn expect(semaphore: Option<&Semaphore>) -> Expected {
    Expected {
        before: TO_COME.replace(semaphore.map_or(0, Semaphore::address)),
    }
}

/// Whether the current call is granted its permits of this semaphore, and so must not wait for one.
#[inline]
pub(crate) fn is_granted(semaphore: &Semaphore) -> bool {
    let is_to_come = TO_COME.get() == semaphore.address();
    is_to_come || (IS_ANY.get() && with_current(semaphore, |_| ()).is_some())
}

/// Returns how further attempts of the current call wait for their turn, and for permits of which semaphore.
pub(crate) fn current_again() -> Option<(Semaphore, Arc<dyn AskAgain>)> {
    let granted = CURRENT.take()?;
    let again = granted.again.clone();
    again.expect_attempts();
    let semaphore = granted.semaphore.clone();
    CURRENT.set(Some(granted));
    Some((semaphore, again))
}

fn with_current<T>(semaphore: &Semaphore, f: impl FnOnce(&mut GrantedPermit) -> T) -> Option<T> {
    let mut granted = CURRENT.take()?;
    let output = granted.semaphore.is_same(semaphore).then(|| f(&mut granted));
    CURRENT.set(Some(granted));
    output
}
