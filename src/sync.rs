//! Locks and atomics of `std`, or those of [loom] when the crate is built with `--cfg tower_outbound_loom`.
//!
//! The `interleavings` tests of the queue, the wait queue and the events run under loom, which repeats a test for each
//! order in which the atomic operations of its threads can be executed.
//!
//! [loom]: https://docs.rs/loom

#[cfg(tower_outbound_loom)]
pub(crate) use loom::sync::{Mutex, MutexGuard, atomic};
#[cfg(not(tower_outbound_loom))]
pub(crate) use std::sync::{Mutex, MutexGuard, atomic};

/// Runs `test` under loom in every order of its threads with at most `preemptions` preemptions, and prints how many
/// orders there were. The environment variable `LOOM_MAX_PREEMPTIONS` overrides `preemptions`.
#[cfg(all(test, tower_outbound_loom))]
pub(crate) fn model(preemptions: usize, test: impl Fn() + Send + Sync + 'static) {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound.get_or_insert(preemptions);
    let orders = Arc::new(AtomicUsize::new(0));
    let counted = orders.clone();
    builder.check(move || {
        counted.fetch_add(1, Ordering::Relaxed);
        test();
    });
    let name = std::thread::current().name().unwrap_or_default().to_owned();
    eprintln!("{name}: {} orders", orders.load(Ordering::Relaxed));
}
