//! What is public of limits that many processes share.

use super::Told;
use crate::table::Secrets;
use std::time::Duration;
use tower_outbound::{
    Cost, Limits, Rate,
    error::AcquireError,
    rate::{
        Limiter,
        redis::{OnStoreLoss, SharedRateLimiter},
    },
};

pub(super) async fn tell(secrets: &Secrets, told: &mut Told) {
    let limits = Limits::new().requests(Rate::per_second(5));
    let password = secrets.of("what a closure has");
    // Nobody is there.
    let url = format!("redis://someone:{}@127.0.0.1:1/", secrets.in_url("what a closure has"));
    let builder = SharedRateLimiter::builder(limits)
        .on_store_loss(OnStoreLoss::Closed)
        .patience(Duration::from_millis(1));
    told.debug(&builder);
    told.debug(&OnStoreLoss::Closed);
    for senseless in [
        format!("http://{password}"),
        format!("redis://{password}:99999999/"),
        password.clone(),
    ] {
        let error = builder.clone().connect(&senseless, "quota").unwrap_err();
        assert_eq!(error.field(), "url");
        told.display(&error);
    }
    let limiter = builder.connect(&url, "quota").unwrap();
    let error = limiter.acquire(Cost::request()).await.unwrap_err();
    told.display(&error);
    let AcquireError::StoreUnavailable(error) = error else {
        panic!("{error}")
    };
    told.display(&error);
    told.debug(&limiter);
    told.debug(&limiter.store());
    told.debug(&Limiter::from(limiter));
}
