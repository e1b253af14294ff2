//! Sentinels tell where the server is.

use super::*;
use std::{path::PathBuf, thread};

/// A sentinel needs a file that it may write to, so it gets one.
fn sentinel(of: &Server, at: usize) -> (Server, PathBuf) {
    let file = std::env::temp_dir().join(format!(
        "tower-outbound-sentinel-{}-{}-{at}",
        std::process::id(),
        of.port()
    ));
    let port = of.port();
    let settings = format!(
        "sentinel monitor mymaster 127.0.0.1 {port} 2\nsentinel down-after-milliseconds mymaster 500\n\
         sentinel failover-timeout mymaster 3000\n"
    );
    std::fs::write(&file, settings).unwrap();
    let server = Server::start_as(&[file.to_str().unwrap(), "--sentinel"], &[]);
    (server, file)
}

#[tokio::test]
#[ignore = "needs redis-server"]
async fn the_new_primary_is_found_after_a_failover() {
    let mut primary = Server::start();
    let of = primary.port().to_string();
    let replica = Server::start_with(&["--replicaof", "127.0.0.1", &of, "--repl-diskless-sync-delay", "0"]);
    let sentinels = [0, 1, 2].map(|at| sentinel(&primary, at));
    let knows_all = |(sentinel, _): &(Server, PathBuf)| {
        let known = sentinel.command(&["SENTINEL", "MASTER", "mymaster"]);
        known.contains("num-slaves\r\n$1\r\n1\r\n") && known.contains("num-other-sentinels\r\n$1\r\n2\r\n")
    };
    for sentinel in &sentinels {
        // Real time: the sentinels are processes, and find each other in about two seconds.
        let begun = Instant::now();
        while !knows_all(sentinel) {
            assert!(begun.elapsed() < ms(20_000));
            thread::sleep(ms(50));
        }
    }
    // The first of the URLs is of a sentinel that is down.
    let mut urls = vec!["redis://127.0.0.1:1/".to_owned()];
    urls.extend(sentinels.iter().map(|(sentinel, _)| sentinel.url()));
    let limiter = closed()
        .sentinels(urls.clone())
        .connect("redis://mymaster/", "failover")
        .unwrap();
    assert_eq!(limiter.check_store().await, Ok(()));
    admitted(&limiter, ms(1_000)).await;
    assert!(clients(&primary) > 0);

    primary.kill();
    let took = admitted(&limiter, ms(15_000)).await;
    println!(
        "admitted {took:?} after the primary was killed: {:?}",
        limiter.store_status()
    );
    assert!(replica.command(&["ROLE"]).contains("master"));

    let other = closed()
        .sentinels(urls)
        .connect("redis://another/", "failover")
        .unwrap();
    assert_eq!(
        other.check_store().await.unwrap_err().problem(),
        StoreProblem::UnknownPrimary
    );
    let other = closed()
        .sentinels(["redis://127.0.0.1:1/"])
        .connect("redis://mymaster/", "failover")
        .unwrap();
    assert_eq!(
        other.check_store().await.unwrap_err().problem(),
        StoreProblem::NoSentinel
    );
    for (sentinel, file) in sentinels {
        drop(sentinel);
        std::fs::remove_file(file).unwrap();
    }
}

#[test]
fn sentinels_need_a_name_and_urls() {
    let error = closed()
        .sentinels(["localhost"])
        .connect("redis://mymaster/", "q")
        .unwrap_err();
    assert_eq!(error.field(), "sentinels");
    let error = closed()
        .sentinels(["redis://localhost/"])
        .connect("unix:///tmp/redis.sock", "q")
        .unwrap_err();
    assert_eq!(error.field(), "url");
}
