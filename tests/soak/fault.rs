//! The calls of the soak test: what goes wrong with each, and the request that all of them send.

use super::MS;
use fastrand::Rng;
use http::{
    Request,
    header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, USER_AGENT},
};
use std::time::Duration;

/// A header that each request has. Every event shows it.
pub(crate) const HEADER: &str = "soak-client/1.0";
/// The header of a request that an executor with a schedule sends.
pub(crate) const SCHEDULED: &str = "x-scheduled";
/// A part of each secret that a request or a response has. No event shows it.
pub(crate) const SECRET: &str = "sk-soak-3141592653589793";

/// The number of input and output tokens that a call uses.
pub(crate) const USAGE: (u64, u64) = (40, 30);
/// The same for a call whose response is streamed.
pub(crate) const STREAM_USAGE: (u64, u64) = (50, 40);

/// What goes wrong with a call. Most calls have the fault `None`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fault {
    None,
    Slow,
    /// The server does not respond, and the caller cancels the call.
    Stuck,
    Status,
    Reset,
    Half,
    Malformed,
    HangsUp,
    PanicInCall,
    PanicInFuture,
    PanicInDrop,
    /// The server streams the body.
    Stream,
    /// The server streams the body, and the caller drops it after this many frames.
    DropsBody(u8),
    /// The caller polls the handle of the call this many times, and then cancels the call.
    Polled(u8),
    /// The caller cancels the call after this many milliseconds.
    Dropped(u8),
    /// The caller drops the handle of the call at once.
    Detached,
    /// The caller keeps the handle of the call without polling it, and drops it after this many milliseconds.
    Kept(u8),
    /// The caller drops the handle of the call at once. The server does not respond, and a deadline after this many
    /// milliseconds ends the call.
    DetachedUntil(u8),
    /// The caller keeps the handle of the call and never polls it. A deadline after this many milliseconds ends the
    /// call. If the number is even, the server does not respond; if it is odd, the response stays in the handle.
    KeptUntil(u8),
}

impl Fault {
    pub(crate) fn draw(rng: &mut Rng) -> Self {
        match rng.u8(..100) {
            0..2 => Self::Slow,
            2..4 => Self::Stuck,
            4..6 => Self::Status,
            6..9 => Self::Reset,
            9..12 => Self::Half,
            12..15 => Self::Malformed,
            15..17 => Self::HangsUp,
            17..18 => Self::PanicInCall,
            18..20 => Self::PanicInFuture,
            20..22 => Self::PanicInDrop,
            22..28 => Self::Polled(rng.u8(..6)),
            28..34 => Self::Dropped(rng.u8(..40)),
            34..37 => Self::Detached,
            37..42 => Self::Stream,
            42..47 => Self::DropsBody(rng.u8(..4)),
            47..50 => Self::Kept(rng.u8(..40)),
            50..51 => Self::DetachedUntil(rng.u8(20..120)),
            51..52 => Self::KeptUntil(rng.u8(20..120)),
            _ => Self::None,
        }
    }

    pub(crate) fn path(self) -> &'static str {
        match self {
            Self::Slow => "/slow",
            Self::Stuck | Self::DetachedUntil(_) => "/stuck",
            Self::KeptUntil(deadline) if deadline % 2 == 0 => "/stuck",
            Self::Status => "/status",
            Self::Reset => "/reset",
            Self::Half => "/half",
            Self::Malformed => "/malformed",
            Self::HangsUp => "/hangs-up",
            Self::Stream | Self::DropsBody(_) => "/stream",
            _ => "/",
        }
    }

    /// The number of input and output tokens that the response to such a call reports, if it reports any.
    pub(crate) fn usage(self) -> (u64, u64) {
        match self {
            Self::Stream | Self::DropsBody(_) => STREAM_USAGE,
            _ => USAGE,
        }
    }

    /// How long the call may take.
    pub(crate) fn timeout(self) -> Option<Duration> {
        match self {
            Self::DetachedUntil(after) | Self::KeptUntil(after) => Some(u32::from(after) * MS),
            _ => None,
        }
    }

    /// Returns the name of the row that counts the call in the printed table.
    pub(crate) fn name(self) -> String {
        format!("{self:?}").split('(').next().unwrap_or_default().to_owned()
    }
}

/// A request with the head that the client of a chat API sends. The fault takes the place of the body.
pub(crate) fn chat_request(fault: Fault) -> Request<Fault> {
    Request::post("https://localhost/v1/messages")
        .header(AUTHORIZATION, format!("Bearer {SECRET}"))
        .header(CONTENT_TYPE, "application/json")
        .header(ACCEPT, "application/json")
        .header(USER_AGENT, HEADER)
        .header("idempotency-key", "stainless-retry-6f0c0c5a")
        .header("anthropic-version", "2023-06-01")
        .body(fault)
        .unwrap()
}
