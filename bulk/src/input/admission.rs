//! How much of the input is in memory at once.

use super::{Malformed, Request};
use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError},
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The number of requests that may be open at once with `--ordered`. A result waits in memory for those of all earlier
/// lines, so one slow request holds back at most this number of results.
const WINDOW: usize = 1_000;

/// Bounds the bytes of all requests in memory, and keeps which lines are open. Clones are the same bound.
#[derive(Clone)]
pub(crate) struct Admission {
    kib: Arc<Semaphore>,
    /// The whole budget, in KiB.
    total: u32,
    window: Arc<Semaphore>,
    open: Arc<Mutex<BTreeSet<u64>>>,
}

/// The place of a request in memory. It is free again when this is dropped, which is after its result is written.
#[derive(Debug)]
pub(crate) struct Admitted {
    line: u64,
    open: Arc<Mutex<BTreeSet<u64>>>,
    kib: OwnedSemaphorePermit,
    _window: OwnedSemaphorePermit,
}

impl Admission {
    /// Allows requests of `bytes` in memory. With `is_ordered` the number of requests is bounded, too.
    pub(crate) fn new(bytes: u64, is_ordered: bool) -> Self {
        let total = u32::try_from(bytes.div_ceil(1024))
            .unwrap_or(u32::MAX)
            .clamp(1, u32::MAX >> 3);
        let window = if is_ordered { WINDOW } else { Semaphore::MAX_PERMITS };
        Self {
            kib: Arc::new(Semaphore::new(total as usize)),
            total,
            window: Arc::new(Semaphore::new(window)),
            open: Arc::default(),
        }
    }

    /// Waits until there is room for the request, and gives it its place. A request that is larger than the whole
    /// budget waits until it is the only one. Cancel safe: a request that has waited in vain holds nothing.
    pub(crate) async fn admit(&self, request: &mut Request) {
        request.admitted = self.place(request.line, request.bytes()).await;
    }

    /// Waits as [`admit`](Self::admit) does, for a line that is no request: its result may have to wait, too.
    pub(crate) async fn admit_malformed(&self, malformed: &mut Malformed) {
        malformed.admitted = self.place(malformed.line, malformed.bytes()).await;
    }

    async fn place(&self, line: u64, bytes: u64) -> Option<Admitted> {
        let kib = bytes.div_ceil(1024).min(u64::from(self.total)) as u32;
        // The semaphores are never closed.
        let window = self.window.clone().acquire_owned().await.ok()?;
        let kib = self.kib.clone().acquire_many_owned(kib).await.ok()?;
        self.lock_open().insert(line);
        Some(Admitted {
            line,
            open: self.open.clone(),
            kib,
            _window: window,
        })
    }

    /// Returns whether a line before `line` is open.
    pub(crate) fn is_open_before(&self, line: u64) -> bool {
        self.lock_open().first().is_some_and(|first| *first < line)
    }

    fn lock_open(&self) -> std::sync::MutexGuard<'_, BTreeSet<u64>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Admitted {
    /// Takes what is left of the budget, up to `bytes`, for the response, which is in memory until its result is
    /// written. Never waits: what a result waits for, a slow reader of the output or the results of earlier lines, needs
    /// no more of the budget.
    pub(crate) fn hold(&mut self, bytes: usize) {
        let budget = self.kib.semaphore().clone();
        let kib = bytes.div_ceil(1024).min(budget.available_permits());
        let kib = u32::try_from(kib).unwrap_or(u32::MAX);
        // Another response may have taken it in the meantime. This one is then in memory beside the budget.
        if let Ok(more) = budget.try_acquire_many_owned(kib) {
            self.kib.merge(more);
        }
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.remove(&self.line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    fn now_or_never<T>(future: impl Future<Output = T>) -> Option<T> {
        future.now_or_never()
    }

    fn request(line: u64, bytes: usize) -> Request {
        let mut request = Request::example(line);
        request.body = vec![b'x'; bytes].into();
        request
    }

    #[test]
    fn requests_wait_until_there_is_room_for_their_bytes() {
        let admission = Admission::new(10 << 20, false);
        let (mut one, mut two) = (request(1, 6 << 20), request(2, 6 << 20));
        assert!(now_or_never(admission.admit(&mut one)).is_some());
        assert!(now_or_never(admission.admit(&mut two)).is_none());
        drop(one);
        assert!(now_or_never(admission.admit(&mut two)).is_some());
    }

    #[test]
    fn a_request_above_the_whole_budget_goes_alone() {
        let admission = Admission::new(1 << 20, false);
        let (mut large, mut small) = (request(1, 5 << 20), request(2, 1));
        assert!(now_or_never(admission.admit(&mut large)).is_some());
        assert!(now_or_never(admission.admit(&mut small)).is_none());
        drop(large);
        assert!(now_or_never(admission.admit(&mut small)).is_some());
    }

    #[test]
    fn with_an_order_malformed_lines_wait_as_requests_do() {
        let admission = Admission::new(10 << 20, true);
        let mut first = request(1, 1);
        now_or_never(admission.admit(&mut first)).unwrap();
        let mut lines: Vec<_> = (2..=WINDOW as u64 + 1).map(Malformed::example).collect();
        let (last, others) = lines.split_last_mut().unwrap();
        for line in others {
            assert!(now_or_never(admission.admit_malformed(line)).is_some());
        }
        assert!(now_or_never(admission.admit_malformed(last)).is_none());
        drop(first);
        assert!(now_or_never(admission.admit_malformed(last)).is_some());
    }

    #[test]
    fn requests_wait_while_responses_that_are_not_written_fill_the_room() {
        let admission = Admission::new(1 << 20, false);
        let (mut answered, mut next) = (request(1, 1), request(2, 1));
        assert!(now_or_never(admission.admit(&mut answered)).is_some());
        answered.admitted.as_mut().unwrap().hold(5 << 20);
        assert!(now_or_never(admission.admit(&mut next)).is_none());
        drop(answered);
        assert!(now_or_never(admission.admit(&mut next)).is_some());
    }

    #[test]
    fn a_line_is_open_until_its_request_is_dropped() {
        let admission = Admission::new(1 << 20, true);
        let (mut one, mut three) = (request(1, 1), request(3, 1));
        now_or_never(admission.admit(&mut one)).unwrap();
        now_or_never(admission.admit(&mut three)).unwrap();
        assert!(!admission.is_open_before(1) && admission.is_open_before(3));
        drop(one);
        assert!(!admission.is_open_before(3) && admission.is_open_before(4));
    }
}
