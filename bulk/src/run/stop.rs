//! Why and how a run stops before the end of its input.
//!
//! A stop has two steps. In the first, no further request is sent: queued and waiting ones are left for `--resume`, and
//! those on the wire are finished, because their answers are paid for. In the second, those on the wire are cancelled,
//! too: after a second signal, at the end of the time that `--drain` allows after the first one, or if results cannot be
//! written any more.

use std::{fmt, future::Future};
use tokio::sync::watch;

/// Why a run stops before the end of its input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum StopReason {
    Signal(Signal),
    /// `--max-cost` is reached. The text says what was spent.
    MaxCost(String),
    /// Results cannot be written, so that further answers would be paid for and lost.
    OutputFailed,
    /// Every further request would fail as the earlier ones did. The text says why, and what to do.
    Hopeless(String),
}

/// A signal that stops a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Signal {
    Hangup,
    Interrupt,
    Terminate,
}

/// Stops a run, from any thread. Clones stop the same run.
#[derive(Clone)]
pub(crate) struct Stopper(watch::Sender<State>);

#[derive(Clone, Default)]
struct State {
    reason: Option<StopReason>,
    is_signalled: bool,
    /// Whether the calls on the wire are cancelled, too.
    now: bool,
}

// === impl Signal ===

impl Signal {
    /// The exit code of a program that the signal has ended: 128 and the number of the signal.
    pub(crate) const fn exit_code(self) -> u8 {
        match self {
            Self::Hangup => 129,
            Self::Interrupt => 130,
            Self::Terminate => 143,
        }
    }
}

impl fmt::Display for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Hangup => "SIGHUP",
            Self::Interrupt => "Ctrl-C",
            Self::Terminate => "SIGTERM",
        })
    }
}

// === impl Stopper ===

impl Stopper {
    pub(crate) fn new() -> Self {
        Self(watch::Sender::default())
    }

    /// Stops the run. The first reason stays the reason of the run. Returns whether this was the first one.
    pub(crate) fn stop(&self, reason: StopReason) -> bool {
        let mut is_first = false;
        self.0.send_modify(|state| {
            is_first = state.reason.is_none();
            state.now |= reason == StopReason::OutputFailed;
            state.is_signalled |= matches!(reason, StopReason::Signal(_));
            state.reason.get_or_insert(reason);
        });
        is_first
    }

    /// Cancels the calls on the wire, too. Without effect on a run that is not being stopped.
    pub(crate) fn stop_now(&self) {
        self.0.send_modify(|state| state.now = true);
    }

    pub(crate) fn reason(&self) -> Option<StopReason> {
        self.0.borrow().reason.clone()
    }

    /// Waits until the run is to stop.
    pub(crate) fn stopped(&self) -> impl Future<Output = ()> + Send + 'static {
        self.wait_for(|state| state.reason.is_some())
    }

    /// Waits until a signal stops the run, also one that is stopped for another reason already.
    pub(crate) fn signalled(&self) -> impl Future<Output = ()> + Send + 'static {
        self.wait_for(|state| state.is_signalled)
    }

    /// Waits until the calls on the wire are to be cancelled.
    pub(crate) fn stopped_now(&self) -> impl Future<Output = ()> + Send + 'static {
        self.wait_for(|state| state.now)
    }

    fn wait_for(&self, is_met: fn(&State) -> bool) -> impl Future<Output = ()> + Send + 'static {
        let sender = self.0.clone();
        async move {
            // `wait_for` fails only when all senders are dropped, and `sender` is one.
            let _ = sender.subscribe().wait_for(is_met).await;
        }
    }
}

/// Calls `on_signal` for each signal that stops a run. The future never completes.
///
/// A hangup is ignored if it was ignored when the program was started, as `nohup` does.
#[cfg(unix)]
pub(super) async fn on_signals(mut on_signal: impl FnMut(Signal)) -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let hangup_is_ignored = hangup_is_ignored();
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = (!hangup_is_ignored).then(|| signal(SignalKind::hangup())).transpose()?;
    loop {
        let hung_up = async {
            match &mut hangup {
                Some(hangup) => hangup.recv().await,
                None => std::future::pending().await,
            }
        };
        on_signal(tokio::select! {
            _ = interrupt.recv() => Signal::Interrupt,
            _ = terminate.recv() => Signal::Terminate,
            _ = hung_up => Signal::Hangup,
        });
    }
}

#[cfg(not(unix))]
pub(super) async fn on_signals(mut on_signal: impl FnMut(Signal)) -> std::io::Result<()> {
    loop {
        tokio::signal::ctrl_c().await?;
        on_signal(Signal::Interrupt);
    }
}

/// Returns whether the program was started with SIGHUP ignored. Where the system does not tell, it was not.
#[cfg(unix)]
fn hangup_is_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    // The lowest bit is signal number 1, SIGHUP.
    mask.is_some_and(|mask| mask & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_first_reason_stays_the_reason_of_the_stop() {
        let stopper = Stopper::new();
        assert_eq!(stopper.reason(), None);
        assert!(stopper.stop(StopReason::Signal(Signal::Terminate)));
        assert!(!stopper.stop(StopReason::Hopeless("401".into())));
        assert_eq!(stopper.reason(), Some(StopReason::Signal(Signal::Terminate)));
        stopper.stopped().await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_failed_output_cancels_what_is_on_the_wire() {
        let stopper = Stopper::new();
        stopper.stop(StopReason::Signal(Signal::Interrupt));
        let second = std::time::Duration::from_secs(1);
        assert!(tokio::time::timeout(second, stopper.stopped_now()).await.is_err());
        stopper.stop(StopReason::OutputFailed);
        stopper.stopped_now().await;
    }
}
