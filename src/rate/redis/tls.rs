//! The provider of cryptography that rustls needs for `rediss://` URLs.

use rustls::crypto::{CryptoProvider, ring};

/// Installs ring as the provider of this process, unless one is installed already. Without a provider, or with two that
/// are compiled in, rustls panics when a connection is made.
///
/// It is called when the first connection is made, so that a program that installs a provider when it starts, as is
/// usual, does so first.
pub(super) fn install_provider() {
    if CryptoProvider::get_default().is_none() {
        // This fails if another thread has installed a provider in the meantime. That one serves, too.
        let _ = ring::default_provider().install_default();
    }
}
