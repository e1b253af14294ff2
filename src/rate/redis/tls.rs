//! [`TlsSettings`]: whom to trust and who to be on a TLS connection to the store; and the provider of cryptography that
//! rustls needs for it.

use crate::error::InvalidConfig;
use ::redis::{Client, ClientTlsConfig, ConnectionInfo, RedisResult, TlsCertificates};
use rustls::{
    RootCertStore,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    sign::CertifiedKey,
};
use std::{fmt, sync::Arc};

/// Certificates in the PEM format. `Debug` shows none of them.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct TlsSettings {
    pub(super) root_certificates: Option<Vec<u8>>,
    /// The certificate of this client, and its private key.
    pub(super) client_certificate: Option<(Vec<u8>, Vec<u8>)>,
}

impl TlsSettings {
    pub(super) const fn new() -> Self {
        Self {
            root_certificates: None,
            client_certificate: None,
        }
    }

    pub(super) const fn is_default(&self) -> bool {
        self.root_certificates.is_none() && self.client_certificate.is_none()
    }

    /// Checks that the certificates can be read, and that the client's key belongs to its certificate. Otherwise every
    /// connection would fail, and only when it is made.
    pub(super) fn check(&self) -> Result<(), InvalidConfig> {
        if let Some(pem) = &self.root_certificates {
            const FIELD: &str = "tls_root_certificates";
            let mut roots = RootCertStore::empty();
            for certificate in certificates(pem, FIELD)? {
                roots
                    .add(certificate)
                    .map_err(|_| InvalidConfig::new(FIELD, "has a certificate that cannot be a root"))?;
            }
        }
        if let Some((certificate, key)) = &self.client_certificate {
            const FIELD: &str = "tls_client_certificate";
            let chain = certificates(certificate, FIELD)?;
            let key = PrivateKeyDer::from_pem_slice(key)
                .map_err(|_| InvalidConfig::new(FIELD, "has no private key in the PEM format"))?;
            CertifiedKey::from_der(chain, key, &provider()).map_err(|_| {
                InvalidConfig::new(FIELD, "has a private key of an unknown kind, or of another certificate")
            })?;
        }
        Ok(())
    }

    /// Builds a client for the server in `info`, which has to be one of a `rediss://` URL.
    pub(super) fn client(&self, info: ConnectionInfo) -> RedisResult<Client> {
        let client_tls = self.client_certificate.clone();
        let certificates = TlsCertificates {
            client_tls: client_tls.map(|(client_cert, client_key)| ClientTlsConfig {
                client_cert,
                client_key,
            }),
            root_cert: self.root_certificates.clone(),
        };
        Client::build_with_tls(info, certificates)
    }
}

impl fmt::Debug for TlsSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsSettings")
            .field("has_root_certificates", &self.root_certificates.is_some())
            .field("has_client_certificate", &self.client_certificate.is_some())
            .finish()
    }
}

fn certificates(pem: &[u8], field: &'static str) -> Result<Vec<CertificateDer<'static>>, InvalidConfig> {
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .unwrap_or_default();
    if certificates.is_empty() {
        return Err(InvalidConfig::new(field, "has no certificate in the PEM format"));
    }
    Ok(certificates)
}

fn provider() -> Arc<CryptoProvider> {
    CryptoProvider::get_default()
        .cloned()
        .unwrap_or_else(|| Arc::new(ring::default_provider()))
}

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
