//! Each cause has a name, in the error, in the status and in the check of the store.

use super::*;
use tower_outbound::error::{AcquireError, StoreUnavailable};

async fn problem_of(url: &str) -> StoreProblem {
    let limiter = closed().connect(url, "cause").unwrap();
    let error: StoreUnavailable = limiter.check_store().await.unwrap_err();
    assert!(!error.to_string().contains("s3cr3t"), "{error}");
    error.problem()
}

#[tokio::test]
#[ignore = "needs redis-server"]
async fn the_check_names_what_is_wrong() {
    let mut server = Server::start_with(&["--databases", "2"]);
    let port = server.port();
    let url = |user: &str, database: u8| format!("redis://{user}127.0.0.1:{port}/{database}");
    let limiter = closed().connect(&url("", 1), "cause").unwrap();
    assert_eq!(limiter.check_store().await, Ok(()));

    assert_eq!(problem_of(&url("", 7)).await, StoreProblem::Database);
    assert_eq!(
        problem_of(&url("nobody:s3cr3t@", 0)).await,
        StoreProblem::Authentication
    );
    server.command(&[
        "ACL",
        "SETUSER",
        "blind",
        "on",
        ">s3cr3t",
        "~*",
        "&*",
        "+@all",
        "-subscribe",
    ]);
    assert_eq!(problem_of(&url("blind:s3cr3t@", 0)).await, StoreProblem::Permission);
    server.command(&[
        "ACL", "SETUSER", "lost", "on", ">s3cr3t", "~*", "&*", "+@all", "-select",
    ]);
    assert_eq!(problem_of(&url("lost:s3cr3t@", 1)).await, StoreProblem::Permission);
    server.command(&["ACL", "SETUSER", "away", "on", ">s3cr3t", "~other", "&*", "+@all"]);
    assert_eq!(problem_of(&url("away:s3cr3t@", 0)).await, StoreProblem::Permission);

    assert_eq!(problem_of("redis://no-such-host.invalid/").await, StoreProblem::Resolve);
    server.command(&["CONFIG", "SET", "maxmemory", "1"]);
    assert_eq!(problem_of(&url("", 0)).await, StoreProblem::OutOfMemory);
    server.command(&["CONFIG", "SET", "maxmemory", "0"]);
    // Redis 6.2 runs scripts that write all the same.
    if !server.command(&["INFO", "server"]).contains("redis_version:6") {
        server.command(&["CONFIG", "SET", "min-replicas-to-write", "1"]);
        assert_eq!(problem_of(&url("", 0)).await, StoreProblem::Server("NOREPLICAS"));
        server.command(&["CONFIG", "SET", "min-replicas-to-write", "0"]);
    }
    server.command(&["REPLICAOF", "127.0.0.1", "1"]);
    assert_eq!(problem_of(&url("", 0)).await, StoreProblem::ReadOnly);
    server.kill();
    assert_eq!(problem_of(&url("", 0)).await, StoreProblem::Refused);
}

#[tokio::test]
#[ignore = "needs redis-server"]
async fn a_user_needs_the_documented_rights_and_no_others() {
    let server = Server::start();
    let rights = "on >s3cr3t ~{tower-outbound:* resetchannels &{tower-outbound:* +evalsha +script|load +get +set +time \
                  +publish +subscribe +unsubscribe +select";
    let mut command = vec!["ACL", "SETUSER", "app"];
    command.extend(rights.split_whitespace());
    assert!(server.command(&command).starts_with("+OK"));
    let url = format!("redis://app:s3cr3t@127.0.0.1:{}/1", server.port());
    let limiter = closed().connect(&url, "rights").unwrap();
    assert_eq!(limiter.check_store().await, Ok(()));
    admitted(&limiter, ms(1_000)).await;
    limiter.pause_for(ms(100));
    admitted(&limiter, ms(1_000)).await;
    assert_eq!(limiter.store_status().unwrap().failures, 0);
}

#[cfg(unix)]
#[test]
#[ignore = "needs redis-server"]
fn a_process_without_file_descriptors_says_so() {
    let server = Server::start();
    // The limit holds for a whole process, so the test runs in one of its own.
    let status = std::process::Command::new("sh")
        .args(["-c", "ulimit -n 64 && exec \"$0\" \"$@\""])
        .arg(std::env::current_exe().unwrap())
        .args(["causes::without_descriptors", "--exact", "--ignored"])
        .env("STORE_URL", server.url())
        .status();
    assert!(status.unwrap().success());
}

#[cfg(unix)]
#[tokio::test]
#[ignore = "is started by another test"]
async fn without_descriptors() {
    let Ok(url) = std::env::var("STORE_URL") else { return };
    let held: Vec<_> = std::iter::from_fn(|| std::fs::File::open("/dev/null").ok()).collect();
    let problem = problem_of(&url).await;
    drop(held);
    assert_eq!(problem, StoreProblem::FileDescriptors);
    assert_eq!(closed().connect(&url, "cause").unwrap().check_store().await, Ok(()));
}

#[tokio::test]
#[ignore = "needs redis-server"]
async fn a_key_that_holds_something_else_is_named() {
    let server = Server::start();
    let key = quota_key(&server, "key").await;
    for commands in [["LPUSH", &key, "x"], ["SET", &key, "x"]] {
        server.command(&["DEL", &key]);
        server.command(&commands);
        let limiter = closed().connect(&server.url(), "key").unwrap();
        let error = limiter.check_store().await.unwrap_err();
        assert_eq!(error.problem(), StoreProblem::KeyType, "{commands:?}");
    }
}

/// Returns the key of a quota, as the server shows it.
async fn quota_key(server: &Server, quota: &str) -> String {
    admitted(&closed().connect(&server.url(), quota).unwrap(), ms(2_000)).await;
    let keys = server.command(&["KEYS", "*"]);
    keys.lines()
        .find(|line| line.contains("tower-outbound"))
        .unwrap()
        .to_owned()
}

#[tokio::test]
#[ignore = "needs redis-server"]
async fn the_check_reserves_nothing_and_adds_no_member() {
    let server = Server::start();
    let limiter = closed().connect(&server.url(), "check").unwrap();
    for _ in 0..20 {
        limiter.check_store().await.unwrap();
    }
    admitted(&limiter, ms(1_000)).await;
    let status = limiter.store_status().unwrap();
    assert_eq!((status.members, status.problem), (1, None));
    assert_eq!(limiter.available().requests, Some(499));
}

#[tokio::test]
#[ignore = "needs redis-server"]
async fn a_call_that_loses_its_patience_is_told_the_cause() {
    let server = Server::start_with(&["--requirepass", "s3cr3t"]);
    let limiter = closed().patience(ms(400)).connect(&server.url(), "patience").unwrap();
    let error = limiter.acquire(Cost::request()).await.unwrap_err();
    let AcquireError::StoreUnavailable(error) = error else {
        panic!("{error}")
    };
    assert_eq!(error.problem(), StoreProblem::Authentication);
    assert!(
        error.to_string().contains("rejects the user or the password"),
        "{error}"
    );
}

#[tokio::test]
async fn a_limiter_of_one_process_has_no_store_to_check() {
    let limiter = RateLimiter::new(Limits::new()).unwrap();
    assert_eq!(limiter.check_store().await, Ok(()));
}
