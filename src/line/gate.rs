//! [`Gate`]: what stands at the head of a line. It knows what is limited; the line knows about order.

use crate::clock::Reading;
use tokio::time::Instant;

/// What stands at the head of a line and lets one through after the other.
pub(crate) trait Gate: Send + 'static {
    /// What a waiter asks for.
    type Ask: Clone + Send + 'static;
    /// Why an ask can never be met.
    type Refusal: PartialEq;

    /// Whether `ask` can never be met.
    fn refuses(&self, ask: &Self::Ask) -> Option<Self::Refusal>;

    /// When `ask` can be met, if it is the next one.
    fn opens(&mut self, ask: &Self::Ask, clock: &mut Reading) -> Opens;

    /// Takes what was asked for, if it is still there. Only called when [`opens`](Gate::opens) just said `Now`; that
    /// can only have changed if the gate also lets others through while nobody is in line.
    fn pass(&mut self, ask: &Self::Ask, waited: bool, clock: &mut Reading) -> bool;

    /// Nobody was waiting until now.
    fn idle(&mut self, _clock: &mut Reading) {}

    /// Nobody is in line: takes what is asked for if it is there. The way of most, so a gate may know a shorter one.
    fn pass_at_once(&mut self, ask: &Self::Ask, clock: &mut Reading) -> Result<bool, Self::Refusal> {
        if let Some(refusal) = self.refuses(ask) {
            return Err(refusal);
        }
        self.idle(clock);
        Ok(self.opens(ask, clock) == Opens::Now && self.pass(ask, false, clock))
    }

    /// `ask` has joined the line.
    fn joined(&mut self, _ask: &Self::Ask) {}

    /// `ask` has left the line, whether it passed or not.
    fn left(&mut self, _ask: &Self::Ask) {}
}

/// When the gate lets somebody through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Opens {
    Now,
    At(Instant),
    /// When somebody gives something back.
    OnReturn,
}
