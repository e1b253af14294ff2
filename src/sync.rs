//! Locks and atomics: those of `std`, or those of [loom] where interleavings are tried out.
//!
//! [loom]: https://docs.rs/loom

#[cfg(tower_outbound_loom)]
pub(crate) use loom::sync::{Mutex, MutexGuard, atomic};
#[cfg(not(tower_outbound_loom))]
pub(crate) use std::sync::{Mutex, MutexGuard, atomic};

/// Runs `interleaved` in every order its threads can take with so few preemptions, or as many as
/// `LOOM_MAX_PREEMPTIONS` says, and tells how many orders there were.
#[cfg(all(test, tower_outbound_loom))]
pub(crate) fn model(preemptions: usize, interleaved: impl Fn() + Send + Sync + 'static) {
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
        interleaved();
    });
    let test = std::thread::current().name().unwrap_or_default().to_owned();
    eprintln!("{test}: {} orders", orders.load(Ordering::Relaxed));
}
