//! Tokio's clock, and readings that are shared.
//!
//! To read the clock costs more than most of what is done with the reading. What a call goes through at one go (it is
//! taken from the queue, gets its permit, is admitted, goes to the wire) happens at one moment, so one reading serves
//! for all of it: [`shared`] opens such a moment, and [`now`] reads the clock once in it.
//!
//! Only our own code runs in a moment, and the functions that tell what a request is and costs. Before a layer of ours
//! calls or polls something that may be another's, it steps out with [`apart`]; what follows is another moment.

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
#[inline]
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

/// Until it is dropped, all happens at one moment; in an outer one that is shared already, at that.
#[must_use = "the moment ends when this is dropped"]
pub(crate) struct Shared {
    opened: bool,
}

#[inline]
pub(crate) fn shared() -> Shared {
    let opened = MOMENT.get() == Moment::Unshared;
    if opened {
        MOMENT.set(Moment::Unread);
    }
    Shared { opened }
}

impl Drop for Shared {
    #[inline]
    fn drop(&mut self) {
        if self.opened {
            MOMENT.set(Moment::Unshared);
        }
    }
}

/// Until it is dropped, others' code runs. It sees no moment, and what follows is a new one.
#[must_use = "this is for what is done before it is dropped"]
pub(crate) struct Apart {
    is_shared: bool,
}

#[inline]
pub(crate) fn apart() -> Apart {
    Apart {
        is_shared: MOMENT.replace(Moment::Unshared) != Moment::Unshared,
    }
}

impl Drop for Apart {
    #[inline]
    fn drop(&mut self) {
        if self.is_shared {
            MOMENT.set(Moment::Unread);
        }
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
        let moment = shared();
        let first = later();
        {
            let _inner = shared();
            assert_eq!(later(), first);
        }
        let client = {
            let _apart = apart();
            let client = later();
            assert!(first < client && client < later());
            client
        };
        let second = later();
        assert!(client < second);
        assert_eq!(later(), second);
        drop(moment);
        assert!(second < later());
    }

    #[test]
    fn outside_nothing_is_shared() {
        let _apart = apart();
        assert!(later() < later());
    }
}
