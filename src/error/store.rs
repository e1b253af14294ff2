//! [`StoreProblem`]: why the store of shared limits cannot be used.

use std::fmt;

/// Why the Redis or Valkey server that holds shared limits could not be used.
///
/// It names neither the server nor a user, and contains no text of the server except the code of its error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum StoreProblem {
    /// No request was sent to the server yet.
    NotConnected,
    /// The name of the server could not be resolved (DNS).
    Resolve,
    /// The server refused the connection: nothing listens at its address.
    Refused,
    /// There is no route to the server.
    Unreachable,
    /// No connection was made in time.
    ConnectTimeout,
    /// The connection was made, and the server did not reply in time.
    Timeout,
    /// The connection was lost.
    ConnectionLost,
    /// The process or the system has no file descriptor left for a connection.
    FileDescriptors,
    /// The TLS handshake failed for the given reason.
    Tls(TlsProblem),
    /// The server rejected the user or the password, or asks for them.
    Authentication,
    /// The server's access control denies a command, a key or a channel.
    Permission,
    /// The database number of the URL does not exist on the server.
    Database,
    /// The key of the quota holds something else.
    KeyType,
    /// Processes of another release keep the state of the quota, in this version of it. Processes of both releases cannot
    /// share a quota: run one release, or give them different quotas.
    OtherVersion {
        /// The version in the store.
        stored: i64,
        /// The version of this release.
        ours: i64,
    },
    /// The server is a replica, or accepts no writes for another reason.
    ReadOnly,
    /// The server is out of memory.
    OutOfMemory,
    /// The server has reached its largest number of clients.
    TooManyClients,
    /// The server does not know a command that shared limits need. It is too old, or it is a proxy.
    Unsupported,
    /// No sentinel could be reached.
    NoSentinel,
    /// The sentinels do not know a primary of the name in the URL.
    UnknownPrimary,
    /// The server replied an error with this code.
    Server(&'static str),
    /// The server's reply is not one of the script's.
    InvalidReply,
    /// The client library failed, or panicked: for example in a runtime without its I/O enabled.
    Client,
}

/// Why a TLS handshake failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum TlsProblem {
    /// The certificate of the server is signed by an authority that is not trusted.
    UnknownAuthority,
    /// The certificate of the server has expired, or is not valid yet.
    Expired,
    /// The certificate of the server is for another name.
    WrongName,
    /// The server rejected the certificate of the client, or asks for one.
    ClientCertificate,
    /// The server does not speak TLS.
    NotTls,
    /// Another reason.
    Other,
}

impl fmt::Display for StoreProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            Self::NotConnected => "no request was sent yet",
            Self::Resolve => "the name of the server cannot be resolved",
            Self::Refused => "connection refused",
            Self::Unreachable => "no route to the server",
            Self::ConnectTimeout => "no connection within the timeout",
            Self::Timeout => "no reply within the timeout",
            Self::ConnectionLost => "connection lost",
            Self::FileDescriptors => "no file descriptor is left for a connection: raise the limit of open files",
            Self::Tls(problem) => return write!(f, "the TLS handshake failed: {problem}"),
            Self::Authentication => "the server rejects the user or the password",
            Self::Permission => "the server's access control denies a command, a key or a channel (NOPERM)",
            Self::Database => "the server has no database of the number in the URL",
            Self::KeyType => "the key of the quota holds something else: choose another prefix or quota",
            Self::OtherVersion { stored, ours } => {
                return write!(
                    f,
                    "the state of the quota has version {stored}, and this release has version {ours}: run releases \
                     with the same version in all members, or give them different quotas"
                );
            }
            Self::ReadOnly => "the server accepts no writes (READONLY): it is a replica",
            Self::OutOfMemory => "the server is out of memory (OOM)",
            Self::TooManyClients => "the server has reached its largest number of clients",
            Self::Unsupported => "the server does not know a command: Redis 6.2 or newer with RESP3 is needed",
            Self::NoSentinel => "no sentinel can be reached",
            Self::UnknownPrimary => "the sentinels know no primary of the name in the URL",
            Self::Server(code) => return write!(f, "the server replied {code}"),
            Self::InvalidReply => "the reply is not valid",
            Self::Client => "the client failed",
        };
        f.write_str(text)
    }
}

impl fmt::Display for TlsProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::UnknownAuthority => "the certificate of the server is signed by an authority that is not trusted",
            Self::Expired => "the certificate of the server has expired or is not valid yet",
            Self::WrongName => "the certificate of the server is for another name",
            Self::ClientCertificate => "the server asks for another certificate of the client",
            Self::NotTls => "the server does not speak TLS",
            Self::Other => "see the log of the server",
        })
    }
}
