//! No error outlives its cause.

use super::*;

/// The longest wait between two attempts to reach a lost store is a second.
const RECOVERY: Duration = ms(1_500);

const RIGHTS: &[&str] = &["on", ">s3cr3t", "~*", "&*", "+@all"];

fn set_user(server: &Server) {
    server.command(&[&["ACL", "SETUSER", "app"], RIGHTS].concat());
}

#[tokio::test]
#[ignore = "needs redis-server"]
async fn a_user_that_is_deleted_and_made_again_is_admitted_again() {
    let server = Server::start();
    set_user(&server);
    let url = format!("redis://app:s3cr3t@127.0.0.1:{}/", server.port());
    let limiter = closed().connect(&url, "user").unwrap();
    for _ in 0..2 {
        admitted(&limiter, RECOVERY).await;
        server.command(&["ACL", "DELUSER", "app"]);
        fails_by(&limiter, StoreProblem::Authentication).await;
        set_user(&server);
    }
    admitted(&limiter, RECOVERY).await;
}

#[tokio::test]
#[ignore = "needs redis-server"]
async fn a_password_that_is_set_and_removed_again_is_no_lasting_error() {
    let server = Server::start();
    let limiter = closed().connect(&server.url(), "password").unwrap();
    admitted(&limiter, RECOVERY).await;
    server.command(&["CONFIG", "SET", "requirepass", "s3cr3t"]);
    // A client that is connected stays authenticated, so this connection is killed, too.
    server.commands(&[
        &["AUTH", "s3cr3t"],
        &["CLIENT", "KILL", "TYPE", "pubsub"],
        &["CLIENT", "KILL", "TYPE", "normal"],
    ]);
    fails_by(&limiter, StoreProblem::Authentication).await;
    server.commands(&[&["AUTH", "s3cr3t"], &["CONFIG", "SET", "requirepass", ""]]);
    admitted(&limiter, RECOVERY).await;
}

#[tokio::test]
#[ignore = "needs redis-server"]
async fn a_wrong_password_works_when_the_server_has_it() {
    let server = Server::start_with(&["--requirepass", "old"]);
    let url = format!("redis://:new@127.0.0.1:{}/", server.port());
    let limiter = closed().connect(&url, "password").unwrap();
    fails_by(&limiter, StoreProblem::Authentication).await;
    server.commands(&[&["AUTH", "old"], &["CONFIG", "SET", "requirepass", "new"]]);
    admitted(&limiter, RECOVERY).await;
}

#[tokio::test]
#[ignore = "needs redis-server"]
async fn a_permission_that_is_taken_and_given_back_is_no_lasting_error() {
    let server = Server::start();
    set_user(&server);
    let url = format!("redis://app:s3cr3t@127.0.0.1:{}/", server.port());
    let limiter = closed().connect(&url, "rights").unwrap();
    admitted(&limiter, RECOVERY).await;
    server.command(&["ACL", "SETUSER", "app", "-evalsha"]);
    fails_by(&limiter, StoreProblem::Permission).await;
    server.command(&["ACL", "SETUSER", "app", "+evalsha"]);
    admitted(&limiter, RECOVERY).await;
}

#[tokio::test]
#[ignore = "needs redis-server"]
async fn a_server_that_is_away_is_found_when_it_is_back() {
    let mut server = Server::start();
    server.kill();
    let limiter = closed().connect(&server.url(), "away").unwrap();
    for _ in 0..2 {
        fails_by(&limiter, StoreProblem::Refused).await;
        server.restart();
        // A store that was lost admits nothing for a second after the last reservation.
        admitted(&limiter, RECOVERY + ms(1_000)).await;
        server.kill();
    }
}
