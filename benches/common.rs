//! Helpers that several benches use: the median, and the used processor time.

#![allow(dead_code)]

use std::time::Duration;

/// The median of the values. For an even number of values, it is the mean of the two values in the middle.
///
/// # Panics
///
/// Panics if there are no values.
pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<_> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 {
        values[middle]
    } else {
        f64::midpoint(values[middle - 1], values[middle])
    }
}

/// The processor time that this process has used; zero where the system does not report it.
pub(crate) fn process_cpu_time() -> Duration {
    #[cfg(unix)]
    {
        read(rustix::time::ClockId::ProcessCPUTime)
    }
    #[cfg(not(unix))]
    {
        Duration::ZERO
    }
}

/// The processor time that the current thread has used; zero where the system does not report it.
pub(crate) fn thread_cpu_time() -> Duration {
    #[cfg(unix)]
    {
        read(rustix::time::ClockId::ThreadCPUTime)
    }
    #[cfg(not(unix))]
    {
        Duration::ZERO
    }
}

#[cfg(unix)]
fn read(clock: rustix::time::ClockId) -> Duration {
    let time = rustix::time::clock_gettime(clock);
    let seconds = u64::try_from(time.tv_sec).expect("processor time is not negative");
    Duration::new(
        seconds,
        u32::try_from(time.tv_nsec).expect("nanoseconds are below a second"),
    )
}
