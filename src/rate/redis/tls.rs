//! The provider of cryptography that rustls needs for `rediss://` URLs.

use rustls::crypto::{CryptoProvider, ring};

/// Installs ring as the provider of this process, unless one is installed already. Without a provider, or with two that
/// are compiled in, rustls panics when a connection is made.
///
/// This function is called when the limiter first connects, and not when it is built. So a program that installs a
/// provider of cryptography of its own when it starts, as is usual, has already done so.
pub(super) fn install_provider() {
    if CryptoProvider::get_default().is_none() {
        // Installing fails if another thread has installed a provider since the check. The error is ignored, because
        // rustls then uses that provider.
        let _ = ring::default_provider().install_default();
    }
}
