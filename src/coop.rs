//! Cooperative scheduling: a wait for a limit counts as work, even if it need not wait.
//!
//! A task that never has to wait never returns to the scheduler: the other tasks of its thread do not run, and not even
//! a timeout around its own work can end it. Tokio's primitives count what a task does without waiting, and make it
//! yield after 128 units. A call counts as one unit for each limit that it passes.

use std::task::{Context, Poll, ready};
use tokio::task::coop;

/// Consumes one unit of the current task's budget. Pending if the budget is used up: the task is then polled again, with
/// a new budget, after other tasks have run. Outside a Tokio task, the budget is unlimited.
#[inline]
pub(crate) fn poll_unit(cx: &mut Context<'_>) -> Poll<()> {
    coop::poll_proceed(cx).map(|unit| unit.made_progress())
}

/// Polls `wait`, which consumes one unit when it is ready. If the budget is used up, `wait` is not polled.
#[inline]
pub(crate) fn poll_counted<T>(cx: &mut Context<'_>, wait: impl FnOnce(&mut Context<'_>) -> Poll<T>) -> Poll<T> {
    let unit = ready!(coop::poll_proceed(cx));
    let output = wait(cx);
    if output.is_ready() {
        unit.made_progress();
    }
    output
}
