//! [`ScheduledCall`]: a call, or a further attempt of one, on its way through a schedule.

use super::{fair::Units, flow::FlowKey, shared::Shared, tree::Started};
use crate::{
    error::AcquireError,
    panic::{self, catch_unwind},
    rate::{Cost, OnSettled},
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
};
use std::{
    fmt,
    sync::{Arc, PoisonError},
    task::{Context, Poll, Waker},
};

/// What a schedule has to know about a call, from its arrival until it is settled.
///
/// It is allocated once: the queue, the call's charge and its further attempts share it. If it is dropped while the call
/// has begun and is not settled, the call was not made, and what it was charged in the tree is given back.
pub(crate) struct ScheduledCall {
    shared: Arc<Shared>,
    /// One key for each level.
    pub(super) path: Arc<[FlowKey]>,
    pub(super) class: u8,
    pub(super) cost: Cost,
    /// What the cost counts in the fair order.
    pub(super) units: Units,
    /// When the call has arrived, plus the slack of its class.
    pub(super) due: u64,
    progress: Mutex<Progress>,
    /// Whether a further attempt was made or may be made. Before, none can be refused.
    has_attempts: AtomicBool,
}

/// How far a call has got.
#[derive(Default)]
struct Progress {
    /// The number of the call in the order of arrival. 0 until it was chosen.
    seq: u64,
    /// What it was charged in the tree. `None` until it was chosen, and after it was settled.
    started: Option<Started>,
    /// Why a further attempt of it was refused that has no layer which can fail with that.
    refusal: Option<AcquireError>,
    /// Woken when there is a refusal.
    waker: Option<Waker>,
}

impl ScheduledCall {
    #[inline]
    pub(super) fn new(
        shared: &Arc<Shared>,
        path: Arc<[FlowKey]>,
        class: u8,
        cost: &Cost,
        units: Units,
        due: u64,
    ) -> Arc<Self> {
        Arc::new(Self {
            shared: shared.clone(),
            path,
            class,
            cost: *cost,
            units,
            due,
            progress: Mutex::default(),
            has_attempts: AtomicBool::new(false),
        })
    }

    /// Returns a further attempt of this call, which waits with the number and the arrival that this call had.
    pub(super) fn again(&self) -> Arc<Self> {
        Arc::new(Self {
            shared: self.shared.clone(),
            path: self.path.clone(),
            progress: Mutex::new(Progress {
                seq: self.seq(),
                ..Progress::default()
            }),
            has_attempts: AtomicBool::new(false),
            ..*self
        })
    }

    pub(crate) const fn path(&self) -> &Arc<[FlowKey]> {
        &self.path
    }

    pub(super) const fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Returns the number of a call that has begun before.
    pub(super) fn seq(&self) -> u64 {
        self.progress().seq
    }

    /// Notes what the call was charged in the tree when it was chosen.
    pub(super) fn begin(&self, started: Started) {
        let mut progress = self.progress();
        progress.seq = started.seq;
        progress.started = Some(started);
    }

    /// Settles the call as having used what it was charged, unless it is settled.
    pub(super) fn settle_as_charged(&self) {
        self.settle(|| (self.cost, self.units));
    }

    /// Settles a call that was not made, unless it is settled.
    pub(super) fn give_back(&self) {
        self.settle(|| (Cost::none(), 0));
    }

    /// Called before a further attempt is made, which may be refused.
    pub(super) fn expect_attempts(&self) {
        self.has_attempts.store(true, Ordering::Release);
    }

    /// Lets the call fail with `error`, because a further attempt of it was refused.
    pub(super) fn refuse(&self, error: AcquireError) {
        let waker = {
            let mut progress = self.progress();
            progress.refusal.get_or_insert(error);
            progress.waker.take()
        };
        waker.into_iter().for_each(panic::wake);
    }

    /// Ready with the error if the call has to fail with it.
    pub(super) fn poll_refused(&self, cx: &mut Context<'_>) -> Poll<AcquireError> {
        if !self.has_attempts.load(Ordering::Acquire) {
            return Poll::Pending;
        }
        let mut progress = self.progress();
        if let Some(error) = progress.refusal.take() {
            return Poll::Ready(error);
        }
        let replaced = progress.waker.replace(cx.waker().clone());
        drop(progress);
        drop(replaced);
        Poll::Pending
    }

    fn settle(&self, used: impl FnOnce() -> (Cost, Units)) {
        let started = self.progress().started.take();
        if let Some(started) = started {
            let (cost, units) = used();
            self.shared.settle(started, cost, units);
        }
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl OnSettled for ScheduledCall {
    fn settled(&self, used: &Cost) {
        self.settle(|| {
            // The price may be a function of the user. If it panics, the call counts what it was charged.
            let units = if *used == self.cost {
                self.units
            } else {
                catch_unwind(|| self.shared.units(used)).unwrap_or(self.units)
            };
            (*used, units)
        });
    }
}

impl Drop for ScheduledCall {
    fn drop(&mut self) {
        self.give_back();
    }
}

impl fmt::Debug for ScheduledCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ScheduledCall")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}
