//! TLS, with an authority of the server's own, and with certificates of clients. The certificates are made by `openssl`.

use super::*;
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};
use support::{
    proxy::{Network, Proxy},
    redis::free_port,
};
use tower_outbound::error::TlsProblem;

/// An authority, a certificate for 127.0.0.1 and one for a client, in files that are deleted with it.
struct Certificates {
    directory: PathBuf,
}

impl Certificates {
    fn new() -> Self {
        let name = format!("tower-outbound-tls-{}-{}", std::process::id(), free_port());
        let certificates = Self {
            directory: std::env::temp_dir().join(name),
        };
        let directory = &certificates.directory;
        fs::create_dir_all(directory).unwrap();
        let key = [
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-days",
            "2",
        ];
        let ca = [
            "req",
            "-x509",
            "-keyout",
            "ca.key",
            "-out",
            "ca.crt",
            "-subj",
            "/CN=authority",
            "-addext",
            "keyUsage=critical,keyCertSign",
        ];
        run(directory, &[&ca[..], &key].concat());
        for (name, extension) in [
            ("server", "subjectAltName=IP:127.0.0.1"),
            ("client", "subjectAltName=DNS:client"),
        ] {
            let (keys, request, signed) = (format!("{name}.key"), format!("{name}.csr"), format!("{name}.crt"));
            let subject = format!("/CN={name}");
            let ask = [
                "req", "-new", "-keyout", &keys, "-out", &request, "-subj", &subject, "-addext", extension,
            ];
            run(directory, &[&ask[..], &key[..5]].concat());
            run(
                directory,
                &[
                    "x509",
                    "-req",
                    "-in",
                    &request,
                    "-out",
                    &signed,
                    "-CA",
                    "ca.crt",
                    "-CAkey",
                    "ca.key",
                    "-CAcreateserial",
                    "-days",
                    "2",
                    "-copy_extensions",
                    "copy",
                ],
            );
        }
        certificates
    }

    fn pem(&self, file: &str) -> Vec<u8> {
        fs::read(self.directory.join(file)).unwrap()
    }

    /// Starts a server with a port for TLS, and returns that port.
    fn server(&self, clients: &str) -> (Server, u16) {
        let port = free_port();
        let path = |file: &str| self.directory.join(file).to_str().unwrap().to_owned();
        let server = Server::start_with(&[
            "--tls-port",
            &port.to_string(),
            "--tls-cert-file",
            &path("server.crt"),
            "--tls-key-file",
            &path("server.key"),
            "--tls-ca-cert-file",
            &path("ca.crt"),
            "--tls-auth-clients",
            clients,
        ]);
        (server, port)
    }
}

impl Drop for Certificates {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
    }
}

fn run(directory: &Path, arguments: &[&str]) {
    let output = Command::new("openssl").args(arguments).current_dir(directory).output();
    let output = output.expect("cannot run openssl: install it");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

async fn check(builder: Builder, port: u16) -> Result<(), StoreProblem> {
    let limiter = builder.connect(&format!("rediss://127.0.0.1:{port}/"), "tls").unwrap();
    let checked = limiter.check_store().await.map_err(|error| error.problem());
    if checked.is_ok() {
        admitted(&limiter, ms(2_000)).await;
    }
    checked
}

#[tokio::test]
#[ignore = "needs redis-server and openssl"]
async fn a_server_with_an_authority_of_its_own_is_trusted_by_that_authority_alone() {
    let certificates = Certificates::new();
    let (_server, port) = certificates.server("no");
    let trusting = || closed().tls_root_certificates(certificates.pem("ca.crt"));
    assert_eq!(check(trusting(), port).await, Ok(()));
    let unknown = StoreProblem::Tls(TlsProblem::UnknownAuthority);
    assert_eq!(check(closed(), port).await, Err(unknown));
    let other = Certificates::new();
    assert_eq!(
        check(closed().tls_root_certificates(other.pem("ca.crt")), port).await,
        Err(unknown)
    );
    let limiter = trusting()
        .connect(&format!("rediss://localhost:{port}/"), "tls")
        .unwrap();
    let error = limiter.check_store().await.unwrap_err();
    assert_eq!(error.problem(), StoreProblem::Tls(TlsProblem::WrongName));
}

#[tokio::test]
#[ignore = "needs redis-server and openssl"]
async fn a_server_that_asks_for_a_certificate_gets_the_one_of_the_client() {
    let certificates = Certificates::new();
    let (_server, port) = certificates.server("yes");
    let trusting = || closed().tls_root_certificates(certificates.pem("ca.crt"));
    let known = trusting().tls_client_certificate(certificates.pem("client.crt"), certificates.pem("client.key"));
    assert_eq!(check(known, port).await, Ok(()));
    let refused = Err(StoreProblem::Tls(TlsProblem::ClientCertificate));
    assert_eq!(check(trusting(), port).await, refused);
    let other = Certificates::new();
    let unknown = trusting().tls_client_certificate(other.pem("client.crt"), other.pem("client.key"));
    assert_eq!(check(unknown, port).await, refused);
}

#[tokio::test]
#[ignore = "needs redis-server and openssl"]
async fn certificates_that_cannot_work_are_refused_at_once_and_never_shown() {
    let certificates = Certificates::new();
    let connect = |builder: Builder| builder.connect("rediss://localhost/", "tls").unwrap_err();
    let other = Certificates::new();
    let (certificate, key) = (certificates.pem("client.crt"), certificates.pem("client.key"));
    for (builder, field) in [
        (
            closed().tls_root_certificates("no certificate"),
            "tls_root_certificates",
        ),
        (
            closed().tls_client_certificate("none", key.clone()),
            "tls_client_certificate",
        ),
        (
            closed().tls_client_certificate(certificate.clone(), "none"),
            "tls_client_certificate",
        ),
        (
            closed().tls_client_certificate(certificate.clone(), other.pem("client.key")),
            "tls_client_certificate",
        ),
    ] {
        assert_eq!(connect(builder).field(), field);
    }
    let builder = closed().tls_client_certificate(certificate, key);
    let shown = format!("{builder:?}");
    assert!(!shown.contains("PRIVATE") && !shown.contains("45, 45"), "{shown}");
    assert_eq!(builder.connect("redis://localhost/", "tls").unwrap_err().field(), "url");
}

#[tokio::test]
#[ignore = "needs redis-server and openssl"]
async fn a_far_server_is_found_over_tls() {
    let certificates = Certificates::new();
    let (_server, port) = certificates.server("no");
    for round_trip in [150, 400] {
        let proxy = Proxy::start(port).await;
        proxy.set(Network::Delays(ms(round_trip / 2)));
        let builder = closed().tls_root_certificates(certificates.pem("ca.crt"));
        let url = format!("rediss://127.0.0.1:{}/", proxy.port());
        let limiter = builder.connect(&url, "far").unwrap();
        let found = admitted(&limiter, ms(10 * round_trip + 1_500)).await;
        let losses = limiter.store_status().unwrap().losses;
        for _ in 0..5 {
            // A reservation that comes too late for its time is made again, with the next round trip.
            admitted(&limiter, ms(3 * round_trip)).await;
        }
        println!("{round_trip} ms: found after {found:?}");
        assert_eq!(limiter.store_status().unwrap().losses, losses);
    }
}
