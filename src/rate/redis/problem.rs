//! [`StoreError`]: why a round trip to the store failed, found from the errors of the client library, of the operating
//! system and of the server.

use super::script::VERSION;
use crate::error::StoreProblem;
use ::redis::{ErrorKind, RedisError};
use std::{error::Error as StdError, fmt, io, sync::Arc};

/// Why a round trip to the store failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StoreError {
    pub(super) problem: StoreProblem,
    /// Whether the connection is of no further use, so that the next request needs a new one.
    pub(super) reconnect: bool,
}

/// Marks the error of a name that could not be resolved. The operating system's error has no kind by which to tell.
#[derive(Debug)]
pub(super) struct ResolveFailed;

/// The codes that errors of Redis and Valkey begin with. A code that is not in this list is shown as `another error`,
/// because what a server replies may contain anything.
const CODES: &[&str] = &[
    "ASK",
    "BUSY",
    "CLUSTERDOWN",
    "CROSSSLOT",
    "DENIED",
    "ERR",
    "EXECABORT",
    "LOADING",
    "MASTERDOWN",
    "MISCONF",
    "MOVED",
    "NOREPLICAS",
    "NOSCRIPT",
    "TRYAGAIN",
    "UNKILLABLE",
];

/// What the texts of errors with the code `ERR` contain, and what they mean. Servers before Redis 7 report every error
/// inside a script with this code.
const TEXTS: &[(&str, StoreProblem)] = &[
    ("max number of clients", StoreProblem::TooManyClients),
    ("unknown command", StoreProblem::Unsupported),
    ("unknown subcommand", StoreProblem::Unsupported),
    ("no permissions", StoreProblem::Permission),
    ("NOPERM", StoreProblem::Permission),
    ("The user executing the script can't", StoreProblem::Permission),
    ("DB index is out of range", StoreProblem::Database),
    ("invalid DB index", StoreProblem::Database),
    ("refused to switch database", StoreProblem::Database),
    ("WRONGTYPE", StoreProblem::KeyType),
    // The script unpacks the state of the quota, and the value of the key is shorter.
    ("data string too short", StoreProblem::KeyType),
    ("READONLY", StoreProblem::ReadOnly),
    ("OOM ", StoreProblem::OutOfMemory),
    ("NOREPLICAS", StoreProblem::Server("NOREPLICAS")),
    ("MISCONF", StoreProblem::Server("MISCONF")),
];

impl StoreError {
    /// The key of the quota holds a state of the given version, or nothing that is a state if the version is 0.
    pub(super) fn other_version(version: i64) -> Self {
        Self::new(match version {
            0 => StoreProblem::KeyType,
            stored => StoreProblem::OtherVersion { stored, ours: VERSION },
        })
    }

    /// Whether the key of the quota holds the state of another release.
    pub(super) const fn is_other_version(&self) -> bool {
        matches!(self.problem, StoreProblem::OtherVersion { .. })
    }

    pub(super) fn new(problem: StoreProblem) -> Self {
        Self {
            problem,
            // After these errors the next request makes a new connection: the server has become a replica, no longer
            // accepts the credentials, or does not reply.
            reconnect: matches!(
                problem,
                StoreProblem::Authentication
                    | StoreProblem::ReadOnly
                    | StoreProblem::Timeout
                    | StoreProblem::ConnectionLost
                    | StoreProblem::Client
                    | StoreProblem::Server("MASTERDOWN" | "LOADING")
            ),
        }
    }
}

impl From<RedisError> for StoreError {
    fn from(error: RedisError) -> Self {
        Self::new(problem(&error))
    }
}

fn problem(error: &RedisError) -> StoreProblem {
    if let Some(io) = io_error(error) {
        return io_problem(io);
    }
    match (error.kind(), error.code()) {
        (ErrorKind::AuthenticationFailed, _) | (_, Some("WRONGPASS" | "NOAUTH")) => StoreProblem::Authentication,
        (ErrorKind::RESP3NotSupported, _) | (_, Some("NOPROTO")) => StoreProblem::Unsupported,
        (_, Some("NOPERM")) => StoreProblem::Permission,
        (_, Some("WRONGTYPE")) => StoreProblem::KeyType,
        (_, Some("READONLY")) => StoreProblem::ReadOnly,
        (_, Some("OOM")) => StoreProblem::OutOfMemory,
        (_, Some("ERR")) => {
            let text = error.to_string();
            let known = TEXTS.iter().find(|(part, _)| text.contains(part));
            known.map_or(StoreProblem::Server("ERR"), |(_, problem)| *problem)
        }
        (_, Some(code)) => {
            let known = CODES.iter().find(|known| **known == code);
            StoreProblem::Server(known.copied().unwrap_or("another error"))
        }
        // The other errors of this kind come from reading the certificates of the operating system.
        (ErrorKind::Io, None) if StdError::source(error).is_some() => tls::OTHER,
        (ErrorKind::Io, None) => StoreProblem::ConnectionLost,
        (ErrorKind::Parse | ErrorKind::UnexpectedReturnType, None) => StoreProblem::InvalidReply,
        _ => StoreProblem::Client,
    }
}

/// Returns the error of the operating system inside `error`. The client library keeps it behind an `Arc`.
fn io_error(error: &RedisError) -> Option<&io::Error> {
    let source = StdError::source(error)?;
    match source.downcast_ref::<Arc<dyn StdError + Send + Sync>>() {
        Some(shared) => shared.downcast_ref(),
        None => source.downcast_ref(),
    }
}

fn io_problem(error: &io::Error) -> StoreProblem {
    if let Some(problem) = tls::problem(error) {
        return problem;
    }
    if error.get_ref().is_some_and(|inner| inner.is::<ResolveFailed>()) {
        return StoreProblem::Resolve;
    }
    if is_out_of_descriptors(error) {
        return StoreProblem::FileDescriptors;
    }
    match error.kind() {
        // A Unix socket that does not exist.
        io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound => StoreProblem::Refused,
        io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable | io::ErrorKind::AddrNotAvailable => {
            StoreProblem::Unreachable
        }
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => StoreProblem::Timeout,
        io::ErrorKind::InvalidData => StoreProblem::InvalidReply,
        _ => StoreProblem::ConnectionLost,
    }
}

/// Whether the process or the system has reached its largest number of open files (`EMFILE`, `ENFILE`).
pub(super) fn is_out_of_descriptors(error: &io::Error) -> bool {
    cfg!(unix) && matches!(error.raw_os_error(), Some(23 | 24))
}

#[cfg(feature = "redis-tls")]
mod tls {
    use crate::error::{StoreProblem, TlsProblem};
    use rustls::{AlertDescription, CertificateError, Error};
    use std::io;

    pub(super) const OTHER: StoreProblem = StoreProblem::Tls(TlsProblem::Other);

    pub(super) fn problem(error: &io::Error) -> Option<StoreProblem> {
        let error = error.get_ref()?.downcast_ref::<Error>()?;
        Some(StoreProblem::Tls(match error {
            Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
                TlsProblem::UnknownAuthority
            }
            Error::InvalidCertificate(
                CertificateError::Expired
                | CertificateError::ExpiredContext { .. }
                | CertificateError::NotValidYet
                | CertificateError::NotValidYetContext { .. },
            ) => TlsProblem::Expired,
            Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            ) => TlsProblem::WrongName,
            Error::AlertReceived(
                AlertDescription::CertificateRequired
                | AlertDescription::BadCertificate
                | AlertDescription::UnknownCA
                | AlertDescription::HandshakeFailure
                | AlertDescription::CertificateUnknown
                | AlertDescription::CertificateExpired,
            ) => TlsProblem::ClientCertificate,
            Error::InvalidMessage(_) => TlsProblem::NotTls,
            _ => TlsProblem::Other,
        }))
    }
}

#[cfg(not(feature = "redis-tls"))]
mod tls {
    use crate::error::{StoreProblem, TlsProblem};
    use std::io;

    pub(super) const OTHER: StoreProblem = StoreProblem::Tls(TlsProblem::Other);

    pub(super) const fn problem(_: &io::Error) -> Option<StoreProblem> {
        None
    }
}

impl fmt::Display for ResolveFailed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the name cannot be resolved")
    }
}

impl StdError for ResolveFailed {}
