//! Tests of what members of a quota agree on over a real Redis server: budgets, versions, times and shares.

use support::{ms, redis::Server};
use tokio::time::{sleep, timeout};
use tower_outbound::{Cost, Limits, Rate, rate::redis};

mod support;

fn limits() -> Limits {
    Limits::new()
        .requests(Rate::per_second(1_000).burst(500))
        .output_tokens(Rate::per_second(100_000).burst(50_000))
        .budget("images", Rate::per_second(1_000))
}

#[tokio::test]
#[ignore = "needs redis-server"]
async fn a_state_of_another_release_is_left_alone_and_calls_are_rejected_with_both_versions() {
    // The first number of a state is its version, a double: 3 in the release before, and 5 in a later one. The first
    // release had a key of its own.
    let of_version = |last: char| format!("\0\0\0\0\0\0{last}@{}", "\0".repeat(64));
    let (before, later) = (of_version('\x08'), of_version('\x14'));
    let states = [
        ("{tower-outbound:quota}:state", &*before, "has version 3"),
        ("{tower-outbound:quota}:state", &*later, "has version 5"),
        ("{tower-outbound:quota}:v2", "any", "has version 2"),
    ];
    for (key, state, problem) in states {
        let server = Server::start();
        server.command(&["SET", key, state]);
        let limiter = redis::connect(&server.url(), "quota", limits()).unwrap();
        for _ in 0..4 {
            let error = limiter.acquire(Cost::request()).await.unwrap_err();
            assert!(error.to_string().contains(problem), "{error}");
            assert!(error.to_string().contains("this release has version 4"), "{error}");
        }
        assert_eq!(
            server.command(&["GET", key]),
            format!("${}\r\n{state}\r\n", state.len())
        );
        // When the members of the other release have left, their state expires, and this one can share the quota.
        server.command(&["DEL", key]);
        sleep(ms(1_100)).await;
        timeout(ms(1_000), limiter.acquire(Cost::request()))
            .await
            .unwrap()
            .unwrap();
    }
}

#[test]
#[ignore = "needs redis-server"]
fn short_runs_leave_no_members_behind() {
    let server = Server::start();
    let runtime = || {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
    };
    for run in 0..20 {
        let runtime = runtime();
        let limiter = redis::connect(&server.url(), "quota", limits()).unwrap();
        runtime.block_on(limiter.acquire(Cost::request())).unwrap();
        // Either the limiter is dropped first, or the runtime.
        if run % 2 == 0 {
            drop(limiter);
            drop(runtime);
        } else {
            drop(runtime);
            drop(limiter);
        }
    }
    let limiter = redis::connect(&server.url(), "quota", limits()).unwrap();
    runtime().block_on(limiter.acquire(Cost::request())).unwrap();
    assert_eq!(limiter.store_status().unwrap().members, 1);
}
