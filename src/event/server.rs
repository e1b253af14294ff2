//! [`Server`]: the host and the port that a call is for, without the user info of its URL.

use http::{Uri, uri::Authority};
use std::fmt;

/// The server that a call is for: see [`EventHandle::server`](super::EventHandle::server).
#[derive(Clone)]
pub struct Server {
    /// With user info, which must not be shown.
    authority: Authority,
    port: Option<u16>,
}

// === impl Server ===

impl Server {
    pub(super) fn of(url: &Uri) -> Option<Self> {
        let default_port = match url.scheme_str() {
            Some("http") => Some(80),
            Some("https") => Some(443),
            _ => None,
        };
        Some(Self {
            authority: url.authority()?.clone(),
            port: url.port_u16().or(default_port),
        })
    }

    /// Returns the host, as it is in the URL: a name, or an address, which has brackets if it is one of IPv6.
    #[must_use]
    pub fn host(&self) -> &str {
        self.authority.host()
    }

    /// Returns the port. `None` if the URL has none, and its scheme is neither `http` nor `https`.
    #[must_use]
    pub const fn port(&self) -> Option<u16> {
        self.port
    }
}

impl PartialEq for Server {
    fn eq(&self, other: &Self) -> bool {
        (self.host(), self.port) == (other.host(), other.port)
    }
}

impl Eq for Server {}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server")
            .field("host", &self.host())
            .field("port", &self.port)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_has_the_port_of_its_url_or_of_its_scheme_and_no_user_info() {
        for (url, host, port) in [
            ("https://user:pass@api.example/v1", "api.example", Some(443)),
            ("http://api.example", "api.example", Some(80)),
            ("http://[::1]:8080/", "[::1]", Some(8080)),
            ("grpc://api.example", "api.example", None),
        ] {
            let server = Server::of(&url.parse().unwrap()).unwrap();
            assert_eq!((server.host(), server.port()), (host, port), "{url}");
            assert!(!format!("{server:?}").contains("pass"));
        }
        assert_eq!(Server::of(&Uri::from_static("/v1")), None);
    }
}
