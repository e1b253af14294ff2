//! The limiters of a process share one connection to each server.

use super::*;
use support::threaded_runtime;
use tokio::time::sleep;

#[tokio::test]
#[ignore = "needs redis-server"]
async fn a_thousand_limiters_hold_one_connection_and_close_it_with_the_last() {
    let server = Server::start();
    let connect = |at: usize| closed().connect(&server.url(), &format!("quota {at}")).unwrap();
    let mut limiters: Vec<_> = (0..1_000).map(connect).collect();
    for limiter in &limiters {
        admitted(limiter, ms(5_000)).await;
    }
    assert_eq!(clients(&server), 1);
    let one = limiters.pop();
    drop(limiters);
    // The server no longer announces the pauses of the quotas that have ended.
    let channels = || {
        server
            .command(&["PUBSUB", "CHANNELS"])
            .matches("tower-outbound")
            .count()
    };
    eventually(|| channels() == 1).await;
    assert_eq!(clients(&server), 1);
    drop(one);
    eventually(|| clients(&server) == 0).await;
}

/// Waits until `is_so` returns `true`, for at most ten seconds.
async fn eventually(is_so: impl Fn() -> bool) {
    for _ in 0..100 {
        if is_so() {
            return;
        }
        sleep(ms(100)).await;
    }
    panic!("it did not become so within ten seconds");
}

#[tokio::test]
#[ignore = "needs redis-server"]
async fn limiters_of_other_databases_and_users_have_connections_of_their_own() {
    let server = Server::start();
    let urls = ["", "1", "1"].map(|database| format!("{}{database}", server.url()));
    let limiters = urls.map(|url| closed().connect(&url, "quota").unwrap());
    for limiter in &limiters {
        admitted(limiter, ms(2_000)).await;
    }
    assert_eq!(clients(&server), 2);
}

#[tokio::test]
#[ignore = "needs redis-server"]
async fn a_pause_reaches_the_limiters_of_its_quota_and_no_others() {
    let server = Server::start();
    let connect = |quota: &str| closed().connect(&server.url(), quota).unwrap();
    let limiters = [connect("paused"), connect("paused"), connect("other")];
    for limiter in &limiters {
        admitted(limiter, ms(2_000)).await;
    }
    // Another connection takes the place of this one: the announcements arrive there, too.
    server.command(&["CLIENT", "KILL", "TYPE", "pubsub"]);
    sleep(ms(50)).await;
    for limiter in &limiters {
        admitted(limiter, ms(2_000)).await;
    }
    limiters[0].pause_for(ms(10_000));
    sleep(ms(300)).await;
    assert_eq!(
        limiters.each_ref().map(|limiter| limiter.paused().is_some()),
        [true, true, false]
    );
    limiters[1].resume();
    sleep(ms(300)).await;
    assert_eq!(
        limiters.each_ref().map(|limiter| limiter.paused().is_some()),
        [false, false, false]
    );
    // A quota that is used again after its limiters were dropped is heard of again.
    let [first, second, other] = limiters;
    drop((first, second));
    let again = [connect("paused"), connect("paused")];
    for limiter in &again {
        admitted(limiter, ms(2_000)).await;
    }
    sleep(ms(200)).await;
    again[0].pause_for(ms(10_000));
    sleep(ms(300)).await;
    assert!(again[1].paused().is_some() && other.paused().is_none());
}

#[test]
#[ignore = "needs redis-server"]
fn a_limiter_outlives_the_runtime_of_its_connection() {
    let server = Server::start();
    let limiter = closed().connect(&server.url(), "runtimes").unwrap();
    for _ in 0..3 {
        let runtime = threaded_runtime();
        runtime.block_on(admitted(&limiter, ms(3_000)));
        // The connection belongs to this runtime alone.
        assert_eq!(clients(&server), 1);
        drop(runtime);
    }
    let other = threaded_runtime();
    let both = [threaded_runtime(), threaded_runtime()];
    for runtime in &both {
        let limiter = closed().connect(&server.url(), "runtimes").unwrap();
        runtime.block_on(admitted(&limiter, ms(3_000)));
        std::mem::forget(limiter);
    }
    assert_eq!(clients(&server), 2);
    drop(both);
    other.block_on(admitted(&limiter, ms(5_000)));
    assert_eq!(clients(&server), 1);
}
