//! What several sections measure with: processor time, page faults, memory, and a runtime with one thread.

use crate::common::thread_cpu_time;
use allocation_counter::AllocationInfo;
use std::{fs, time::Duration};
use tokio::runtime::{self, Runtime};

/// A stopwatch for the processor time of the current thread.
pub(crate) struct ThreadTime(Duration);

impl ThreadTime {
    pub(crate) fn now() -> Self {
        Self(thread_cpu_time())
    }

    pub(crate) fn elapsed(&self) -> Duration {
        thread_cpu_time() - self.0
    }
}

/// The number of page faults of the current thread so far; zero where the system does not report them.
pub(crate) fn page_faults() -> u64 {
    let stat = fs::read_to_string("/proc/thread-self/stat").unwrap_or_default();
    // The name of the thread is in parentheses and may contain spaces, so the fields are counted after its end.
    let fields = stat.rsplit(')').next().unwrap_or_default();
    fields
        .split_whitespace()
        .nth(7)
        .and_then(|count| count.parse().ok())
        .unwrap_or(0)
}

pub(crate) fn current_thread() -> Runtime {
    runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime can be built")
}

/// The memory that something takes.
pub(crate) struct Memory {
    pub(crate) bytes: f64,
    pub(crate) allocations: f64,
}

impl Memory {
    /// The memory that is in use afterwards, divided by `n`.
    pub(crate) fn per_item(counted: &AllocationInfo, n: usize) -> Self {
        Self {
            bytes: counted.bytes_current as f64 / n as f64,
            allocations: counted.count_current as f64 / n as f64,
        }
    }
}
