//! Shows the types of the feature `redis` for the test of public types.

use super::Shown;
use crate::table::Secrets;
use std::time::Duration;
use tower_outbound::{
    Cost, Limits, Rate,
    error::{AcquireError, TlsProblem},
    rate::redis::{Builder, OnStoreLoss},
};

pub(super) async fn show(secrets: &Secrets, shown: &mut Shown) {
    let limits = Limits::new().requests(Rate::per_second(5));
    let password = secrets.of("what a closure has");
    // No server listens on port 1, so the limiter cannot connect.
    let url = format!("redis://someone:{}@127.0.0.1:1/", secrets.in_url("what a closure has"));
    let builder = Builder::new(limits)
        .on_store_loss(OnStoreLoss::Closed)
        .patience(Duration::from_millis(1));
    shown.debug(&builder);
    shown.debug(&OnStoreLoss::Closed);
    for invalid in [
        format!("http://{password}"),
        format!("redis://{password}:99999999/"),
        password.clone(),
    ] {
        let error = builder.clone().connect(&invalid, "quota").unwrap_err();
        assert_eq!(error.field(), "url");
        shown.display(&error);
    }
    let limiter = builder.connect(&url, "quota").unwrap();
    let error = limiter.acquire(Cost::request()).await.unwrap_err();
    shown.display(&error);
    let AcquireError::StoreUnavailable(error) = error else {
        panic!("{error}")
    };
    shown.display(&error);
    shown.debug(&error.problem());
    shown.debug(&limiter);
    shown.debug(&limiter.store_status().unwrap());
    shown.display(&limiter.check_store().await.unwrap_err());
    show_connection(secrets, shown).await;
}

/// Shows what is set for the connection: sentinels with passwords, and the key of a client.
async fn show_connection(secrets: &Secrets, shown: &mut Shown) {
    let password = secrets.in_url("what a closure has");
    let builder = Builder::new(Limits::new())
        .sentinels([format!("redis://someone:{password}@127.0.0.1:1/")])
        .tls_client_certificate(password.clone(), password.clone());
    shown.debug(&builder);
    let url = format!("rediss://someone:{password}@primary/");
    shown.display(&builder.connect(&url, "quota").unwrap_err());
    shown.debug(&TlsProblem::Other);
    let builder = Builder::new(Limits::new()).sentinels([format!("http://{password}")]);
    shown.display(&builder.connect(&url, "quota").unwrap_err());
    let builder = Builder::new(Limits::new()).sentinels([format!("redis://someone:{password}@127.0.0.1:1/")]);
    let limiter = builder.connect(&url, "quota").unwrap();
    shown.debug(&limiter);
    shown.display(&limiter.check_store().await.unwrap_err());
}
