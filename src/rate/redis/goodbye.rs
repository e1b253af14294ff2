//! Reports to the store that a member leaves when no runtime is left that could do it.
//!
//! A program often drops its limiter and its runtime at the same time, when it ends. Its member would then be counted for
//! another 15 s, with the estimates that it has not settled.

use super::driver::{self, SharedCoordinator};
use std::{
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};
use tokio::{runtime, time};

/// The longest time that dropping the limiter or its runtime waits for the store. The store removes a member that could
/// not leave in time after 15 s.
const LONGEST: Duration = Duration::from_millis(500);

/// Runs the driver of `shared` once more, in a runtime and a thread of its own, and waits until it has reported that its
/// member leaves, for at most half a second.
pub(super) fn leave_without_runtime(shared: Arc<SharedCoordinator>) {
    let (ended, has_ended) = mpsc::channel::<()>();
    let leave = move || {
        if let Ok(runtime) = runtime::Builder::new_current_thread().enable_all().build() {
            let _ = runtime.block_on(async { time::timeout(LONGEST, driver::run_again(shared)).await });
        }
        drop(ended);
    };
    let thread = thread::Builder::new()
        .name("tower-outbound-leave".to_owned())
        .spawn(leave);
    if thread.is_ok() {
        // The result does not matter: both the end of the thread and the time limit end the wait.
        let _ = has_ended.recv_timeout(LONGEST);
    }
}
