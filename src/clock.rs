//! Tokio's clock, and readings that are shared.
//!
//! To read the clock costs more than most of what is done with the reading. What a call goes through at one go (it is
//! taken from the queue, gets its permit, is admitted, goes to the wire) happens at one moment, so one reading serves
//! for all of it. [`shared`] opens such a moment, [`now`] reads the clock once in it.
//!
//! A reading is never used after code of others has run: [`apart`] is around the client, [`around`] around whatever else
//! a layer calls.

use std::cell::Cell;
use tokio::time::Instant;

#[derive(Clone, Copy, PartialEq)]
enum Moment {
    /// Every reading is for one alone.
    Unshared,
    /// The next reading is for all that follow.
    Unread,
    Read(Instant),
}

thread_local! {
    static MOMENT: Cell<Moment> = const { Cell::new(Moment::Unshared) };
}

/// Now; within a [`shared`] moment, what the first one read.
pub(crate) fn now() -> Instant {
    match MOMENT.get() {
        Moment::Unshared => Instant::now(),
        Moment::Unread => {
            let now = Instant::now();
            MOMENT.set(Moment::Read(now));
            now
        }
        Moment::Read(now) => now,
    }
}

/// All that is done in `f` happens at one moment, or at the outer one that is shared already.
pub(crate) fn shared<T>(f: impl FnOnce() -> T) -> T {
    if MOMENT.get() != Moment::Unshared {
        return f();
    }
    let _end = End(Moment::Unshared);
    MOMENT.set(Moment::Unread);
    f()
}

/// `f` belongs to this moment, but may take its time: no reading from before is used after it.
pub(crate) fn around<T>(f: impl FnOnce() -> T) -> T {
    let before = MOMENT.get();
    let result = f();
    if before != Moment::Unshared && MOMENT.get() == before {
        MOMENT.set(Moment::Unread);
    }
    result
}

/// `f` is none of ours: it does not see this moment, and nothing that follows it belongs to the same.
pub(crate) fn apart<T>(f: impl FnOnce() -> T) -> T {
    let _end = End(match MOMENT.replace(Moment::Unshared) {
        Moment::Unshared => Moment::Unshared,
        Moment::Unread | Moment::Read(_) => Moment::Unread,
    });
    f()
}

/// Also when `f` panics.
struct End(Moment);

impl Drop for End {
    fn drop(&mut self) {
        MOMENT.set(self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{thread::sleep, time::Duration};

    fn later() -> Instant {
        sleep(Duration::from_micros(10));
        now()
    }

    #[test]
    fn a_shared_moment_has_one_reading_until_others_have_run() {
        let (first, second, client, third, fourth) = shared(|| {
            let (first, second) = (later(), shared(later));
            let client = apart(|| (later(), later()));
            let third = later();
            (first, second, client, third, around(later))
        });
        assert_eq!(first, second);
        assert!(second < client.0 && client.0 < client.1 && client.1 < third);
        assert_eq!(third, fourth);
        assert!(shared(|| (later(), around(|| ()), later())).0 < later());
    }

    #[test]
    fn a_reading_from_before_is_not_used_after() {
        let (before, after) = shared(|| {
            let before = later();
            around(|| ());
            (before, later())
        });
        assert!(before < after);
    }

    #[test]
    fn outside_nothing_is_shared() {
        assert!(later() < later());
        assert!(around(later) < apart(later));
    }
}
