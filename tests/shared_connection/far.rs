//! A server that is far away is found and used like one that is near.

use super::*;
use support::proxy::{Network, Proxy};
use tokio::time::sleep;

#[tokio::test]
#[ignore = "needs redis-server"]
async fn a_far_server_is_found_and_not_lost_again() {
    for round_trip in [150, 250, 400] {
        let server = Server::start();
        let proxy = Proxy::start(server.port()).await;
        proxy.set(Network::Delays(ms(round_trip / 2)));
        let limiter = closed().connect(&proxy.url(), "far").unwrap();
        let found = admitted(&limiter, ms(6 * round_trip + 1_500)).await;
        let losses = limiter.store_status().unwrap().losses;
        let before = limiter.store_status().unwrap().failures;
        for _ in 0..5 {
            admitted(&limiter, ms(2 * round_trip)).await;
        }
        let status = limiter.store_status().unwrap();
        println!("{round_trip} ms: found after {found:?}, {status:?}");
        assert!(
            losses <= 1 && status.losses == losses && status.failures == before,
            "{status:?}"
        );
    }
}

#[tokio::test]
#[ignore = "needs redis-server"]
async fn a_server_that_is_farther_than_the_timeout_is_used_all_the_same() {
    let server = Server::start();
    let proxy = Proxy::start(server.port()).await;
    proxy.set(Network::Delays(ms(400)));
    let limiter = closed().connect(&proxy.url(), "farther").unwrap();
    admitted(&limiter, ms(8_000)).await;
    let losses = limiter.store_status().unwrap().losses;
    for _ in 0..5 {
        admitted(&limiter, ms(1_700)).await;
    }
    assert_eq!(limiter.store_status().unwrap().losses, losses);
}

#[tokio::test]
#[ignore = "needs redis-server"]
async fn a_server_whose_distance_grows_is_found_again() {
    let server = Server::start();
    let proxy = Proxy::start(server.port()).await;
    let limiter = closed().connect(&proxy.url(), "moved").unwrap();
    admitted(&limiter, ms(1_000)).await;
    proxy.set(Network::Delays(ms(350)));
    sleep(ms(6_000)).await;
    let before = limiter.store_status().unwrap().losses;
    for _ in 0..5 {
        admitted(&limiter, ms(3_000)).await;
    }
    assert_eq!(limiter.store_status().unwrap().losses, before);
    assert!(before <= 1);
}
