//! The certificates of `--ca`: authorities that are trusted beside those of the system, or the certificate of the server
//! itself.
//!
//! A certificate that was made for one server with the defaults of OpenSSL is that of an authority, too. The
//! verifier of rustls does not accept such a certificate from a server, even if it is the one that is trusted. Here it is
//! accepted, as by curl, if it is byte for byte one of the file, and valid for the name of the server.

use anyhow::{Context, ensure};
use rustls::{
    ClientConfig, DigitallySignedStruct, Error, SignatureScheme,
    client::{
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_name,
    },
    crypto::CryptoProvider,
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject},
    server::ParsedCertificate,
};
use rustls_platform_verifier::Verifier;
use std::{fs, path::Path, sync::Arc};

#[derive(Debug)]
struct WithOwn {
    inner: Verifier,
    own: Vec<CertificateDer<'static>>,
}

/// Makes the settings of TLS that trust the certificates of a file in PEM beside those of the system.
pub(super) fn config(path: &Path, crypto: &Arc<CryptoProvider>, only_http2: bool) -> anyhow::Result<ClientConfig> {
    let shown = path.display();
    let cannot = || format!("--ca: cannot read certificates from {shown}");
    let pem = fs::read(path).with_context(cannot)?;
    let own: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    let own = own.map_err(|error| anyhow::anyhow!("{error}")).with_context(cannot)?;
    ensure!(!own.is_empty(), "--ca: {shown} holds no certificate in PEM");
    let inner = Verifier::new_with_extra_roots(own.clone(), crypto.clone()).with_context(cannot)?;
    let mut config = ClientConfig::builder_with_provider(crypto.clone())
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(WithOwn { inner, own }))
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    if !only_http2 {
        config.alpn_protocols.push(b"http/1.1".to_vec());
    }
    Ok(config)
}

impl ServerCertVerifier for WithOwn {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if self.own.contains(end_entity) {
            verify_server_name(&ParsedCertificate::try_from(end_entity)?, server_name)?;
            return Ok(ServerCertVerified::assertion());
        }
        self.inner
            .verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}
