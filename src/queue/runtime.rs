//! [`Runtime`]: the Tokio runtime on which the calls of a queue run.

#[cfg(not(tower_outbound_loom))]
pub(super) use tokio_runtime::Runtime;

#[cfg(not(tower_outbound_loom))]
mod tokio_runtime {
    use std::future::Future;
    use tokio::{
        runtime::{EnterGuard, Handle},
        time::{Instant, Sleep, sleep_until},
    };

    /// The runtime in which the queue was made.
    pub(in super::super) struct Runtime(Handle);

    impl Runtime {
        /// Returns the current runtime.
        ///
        /// # Panics
        ///
        /// Panics outside a runtime.
        pub(in super::super) fn current() -> Self {
            Self(Handle::current())
        }

        /// Makes this runtime the current one, for code that runs on a thread of the caller.
        pub(in super::super) fn enter(&self) -> EnterGuard<'_> {
            self.0.enter()
        }

        pub(in super::super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
            drop(self.0.spawn(task));
        }

        pub(in super::super) fn sleep_until(&self, at: Instant) -> Sleep {
            let _entered = self.enter();
            sleep_until(at)
        }
    }
}

#[cfg(tower_outbound_loom)]
pub(super) use model::Runtime;

/// What stands for the runtime under loom, which cannot run Tokio's: each task is a thread of its own.
#[cfg(tower_outbound_loom)]
mod model {
    use loom::{future::block_on, thread};
    use std::{
        future::Future,
        sync::{Mutex, PoisonError},
    };

    #[derive(Default)]
    pub(in super::super) struct Runtime(Mutex<Vec<thread::JoinHandle<()>>>);

    impl Runtime {
        pub(in super::super) fn current() -> Self {
            Self::default()
        }

        pub(in super::super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
            let thread = thread::spawn(move || block_on(task));
            self.0.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
        }

        /// Waits until all tasks have ended.
        pub(in super::super) fn join(&self) {
            loop {
                let task = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
                let Some(task) = task else { return };
                task.join().unwrap();
            }
        }
    }
}
