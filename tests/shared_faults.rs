//! Tests of faults of the Redis store that keeps shared limits: the limits hold, no call waits beyond its deadline, and
//! the members (processes that share the limits) recover by themselves.
//!
//! Each test lets two members admit as many calls as they can on a server that no other test uses, and breaks the
//! server or the network. Then the test replays the admissions, by the wall clock, through an exact bucket. Timers are
//! a millisecond coarse and the machine may be busy, so the members may admit what the rate allows in 5 ms on top of
//! the limits. A burst that was admitted twice would exceed the limits by a hundred times that amount.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};
use support::{
    ms,
    proxy::{Network, Proxy},
    redis::Server,
};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tower_outbound::{
    Cost, Limits, Rate, RateLimiter,
    rate::redis::{self, Builder, OnStoreLoss, StoreStatus},
};

mod support;

const RATE: f64 = 1_000.0;
const BURST: f64 = 500.0;
/// The time after which the caller of a call stops waiting for its admission.
const DEADLINE: Duration = ms(400);

fn limits() -> Limits {
    Limits::new()
        .requests(Rate::per_second(1_000).burst(500))
        .tokens(Rate::per_second(100_000).burst(50_000))
}

/// Members of one quota that admit as many calls as they can.
struct Load {
    members: Vec<RateLimiter>,
    /// The time of each admission, counted from `start`.
    admitted: Arc<Mutex<Vec<Duration>>>,
    longest_wait: Arc<Mutex<Duration>>,
    start: Instant,
    tasks: JoinSet<()>,
}

impl Load {
    fn new(urls: &[String], on_loss: OnStoreLoss) -> Self {
        let start = Instant::now();
        let (admitted, longest_wait) = <(Arc<Mutex<Vec<_>>>, Arc<Mutex<Duration>>)>::default();
        let mut tasks = JoinSet::new();
        let members: Vec<_> = urls
            .iter()
            .map(|url| {
                let builder = Builder::new(limits()).on_store_loss(on_loss).members(urls.len() as u64);
                builder.connect(url, "faults").unwrap()
            })
            .collect();
        for member in &members {
            for _ in 0..100 {
                let (member, admitted, longest_wait) = (member.clone(), admitted.clone(), longest_wait.clone());
                tasks.spawn(async move {
                    loop {
                        let begun = Instant::now();
                        if let Ok(result) = timeout(DEADLINE, member.acquire(Cost::tokens(100))).await {
                            result.unwrap();
                            admitted.lock().unwrap().push(start.elapsed());
                        }
                        let mut longest_wait = longest_wait.lock().unwrap();
                        *longest_wait = longest_wait.max(begun.elapsed());
                    }
                });
            }
        }
        Self {
            members,
            admitted,
            longest_wait,
            start,
            tasks,
        }
    }

    fn count(&self) -> usize {
        self.admitted.lock().unwrap().len()
    }

    /// Returns how many calls all members together admit during the next `span`.
    async fn during(&self, span: Duration) -> usize {
        let before = self.count();
        sleep(span).await;
        self.count() - before
    }

    fn status(&self) -> StoreStatus {
        self.members[0].store_status().unwrap()
    }

    /// Waits until all members can reach the store, and calls are admitted at 90 % of the full rate again. Panics if
    /// this takes longer than `within`.
    async fn recovers(&self, within: Duration) {
        let begun = Instant::now();
        while !self.members.iter().all(|member| member.store_status().unwrap().is_up) {
            assert!(begun.elapsed() < within, "the store is not found: {:?}", self.status());
            sleep(ms(10)).await;
        }
        while self.during(ms(250)).await < (RATE * 0.25 * 0.9) as usize {
            assert!(begun.elapsed() < within, "no recovery: {:?}", self.status());
        }
    }

    /// Returns by how many requests the admissions exceed what an exact bucket with the same rate and burst would
    /// admit.
    fn excess(&self) -> f64 {
        let (mut level, mut last, mut worst) = (0.0_f64, 0.0, 0.0_f64);
        let mut admitted = self.admitted.lock().unwrap().clone();
        admitted.sort_unstable();
        for at in admitted {
            let at = at.as_secs_f64();
            level = (level - (at - last) * RATE).max(0.0) + 1.0;
            last = at;
            worst = worst.max(level - BURST);
        }
        worst
    }

    /// Ends the load, prints a summary, and checks that the limits and the deadlines held.
    fn end(mut self, what: &str) -> StoreStatus {
        self.tasks.abort_all();
        let (excess, longest_wait) = (self.excess(), *self.longest_wait.lock().unwrap());
        let status = self.status();
        println!(
            "{what}: {} calls in {:.1} s, {excess:.2} over the limits, longest wait {longest_wait:?}, {status:?}",
            self.count(),
            self.start.elapsed().as_secs_f64()
        );
        assert!(excess <= RATE * 0.005, "{what}: {excess} over the limits");
        // The deadline is a timer of this test, which may fire late, so the bound adds 200 ms. A call that hung would
        // take longer than that.
        assert!(longest_wait < DEADLINE + ms(200), "{what}: {longest_wait:?}");
        status
    }
}

/// Starts the load of two members that use the same server.
fn two(server: &Server, on_loss: OnStoreLoss) -> Load {
    Load::new(&[server.url(), server.url()], on_loss)
}

#[tokio::test]
#[ignore = "needs redis-server"]
async fn a_closed_member_admits_no_call_until_a_server_that_was_down_at_the_start_is_up() {
    let mut server = Server::start();
    server.kill();
    let load = two(&server, OnStoreLoss::Closed);
    assert_eq!(load.during(ms(1_500)).await, 0);
    server.restart();
    load.recovers(ms(3_000)).await;
    assert!(load.end("down at the start, closed").losses == 1);
}

#[tokio::test]
#[ignore = "needs redis-server"]
async fn local_shares_admit_the_whole_rate_together_while_a_server_is_down_at_the_start() {
    let mut server = Server::start();
    server.kill();
    let load = two(&server, OnStoreLoss::LocalShare);
    sleep(ms(500)).await;
    let by_shares = load.during(ms(2_000)).await;
    // Each of the two members admits calls at half of the rate while the store is down, so both together admit the
    // whole rate.
    assert!((1_800..=2_010).contains(&by_shares), "{by_shares}");
    server.restart();
    load.recovers(ms(5_000)).await;
    assert!(load.end("down at the start, local shares").is_up);
}

#[tokio::test]
#[ignore = "needs redis-server"]
async fn a_killed_server_that_returns_empty_admits_no_second_burst_to_closed_members() {
    let mut server = Server::start();
    let load = two(&server, OnStoreLoss::Closed);
    sleep(ms(2_000)).await;
    server.kill();
    // Calls that have reservations from the time before the kill are admitted within two seconds. After that the closed
    // limiters admit none.
    sleep(ms(2_500)).await;
    assert_eq!(load.during(ms(500)).await, 0);
    server.restart();
    load.recovers(ms(5_000)).await;
    sleep(ms(1_000)).await;
    let status = load.end("killed and back empty, closed");
    assert_eq!((status.losses, status.admitted_without_store), (1, 0));
}

#[tokio::test]
#[ignore = "needs redis-server"]
async fn a_killed_server_that_returns_empty_admits_no_second_burst_on_top_of_local_shares() {
    let mut server = Server::start();
    let load = two(&server, OnStoreLoss::LocalShare);
    sleep(ms(2_000)).await;
    server.kill();
    sleep(ms(3_000)).await;
    let by_shares = load.during(ms(1_500)).await;
    assert!((1_300..=1_510).contains(&by_shares), "{by_shares}");
    server.restart();
    load.recovers(ms(6_000)).await;
    sleep(ms(1_000)).await;
    assert!(load.end("killed and back empty, local shares").admitted_without_store > 500);
}

#[tokio::test]
#[ignore = "needs redis-server"]
async fn a_server_that_is_restarted_at_once_and_empty_admits_no_second_burst() {
    let mut server = Server::start();
    let load = two(&server, OnStoreLoss::Closed);
    sleep(ms(2_000)).await;
    server.restart();
    load.recovers(ms(5_000)).await;
    sleep(ms(1_000)).await;
    assert_eq!(load.end("restarted at once, empty").state_losses, 1);
}

#[tokio::test]
#[ignore = "needs redis-server"]
async fn a_frozen_server_counts_as_lost_once_and_breaks_no_limit_when_it_resumes() {
    for on_loss in [OnStoreLoss::Closed, OnStoreLoss::LocalShare] {
        let server = Server::start();
        let load = two(&server, on_loss);
        sleep(ms(1_500)).await;
        server.signal("STOP");
        sleep(ms(4_000)).await;
        server.signal("CONT");
        load.recovers(ms(6_000)).await;
        sleep(ms(1_000)).await;
        let status = load.end(&format!("frozen for 4 s, {on_loss:?}"));
        assert_eq!(status.losses, 1);
        assert_eq!(status.admitted_without_store > 0, on_loss == OnStoreLoss::LocalShare);
    }
}

#[tokio::test]
#[ignore = "needs redis-server"]
async fn a_server_that_is_rolled_back_to_an_old_snapshot_admits_no_second_burst() {
    let mut server = Server::start();
    let load = two(&server, OnStoreLoss::Closed);
    sleep(ms(500)).await;
    server.command(&["SAVE"]);
    sleep(ms(3_000)).await;
    server.restart();
    load.recovers(ms(5_000)).await;
    sleep(ms(1_000)).await;
    assert_eq!(load.end("rolled back by 3 s").state_losses, 1);
}

#[tokio::test]
#[ignore = "needs redis-server"]
async fn a_server_that_is_read_only_after_a_failover_counts_as_lost_until_it_accepts_writes() {
    let server = Server::start();
    let load = two(&server, OnStoreLoss::Closed);
    sleep(ms(1_000)).await;
    // A replica whose primary does not exist keeps its data and rejects writes.
    server.command(&["REPLICAOF", "127.0.0.1", "1"]);
    sleep(ms(3_000)).await;
    assert_eq!(load.during(ms(300)).await, 0);
    server.command(&["REPLICAOF", "NO", "ONE"]);
    load.recovers(ms(5_000)).await;
    assert_eq!(load.end("read-only for 3.3 s").losses, 1);
}

#[tokio::test]
#[ignore = "needs redis-server"]
async fn a_server_without_memory_counts_as_lost_until_it_has_memory_again() {
    let server = Server::start();
    let load = two(&server, OnStoreLoss::LocalShare);
    sleep(ms(1_000)).await;
    server.command(&["CONFIG", "SET", "maxmemory", "1"]);
    sleep(ms(3_500)).await;
    server.command(&["CONFIG", "SET", "maxmemory", "0"]);
    load.recovers(ms(6_000)).await;
    let status = load.end("out of memory for 3.5 s");
    assert!(status.losses == 1 && status.admitted_without_store > 0);
}

#[tokio::test]
#[ignore = "needs redis-server"]
async fn a_flushed_script_and_killed_connections_cause_no_loss() {
    let server = Server::start();
    let load = two(&server, OnStoreLoss::Closed);
    sleep(ms(1_000)).await;
    for _ in 0..5 {
        server.command(&["SCRIPT", "FLUSH"]);
        sleep(ms(150)).await;
        server.command(&["CLIENT", "KILL", "TYPE", "normal"]);
        server.command(&["CLIENT", "KILL", "TYPE", "pubsub"]);
        sleep(ms(150)).await;
    }
    load.recovers(ms(2_000)).await;
    let status = load.end("script flushed and connections killed, five times");
    assert_eq!((status.losses, status.state_losses), (0, 0));
}

#[tokio::test]
#[ignore = "needs redis-server"]
async fn a_deleted_key_begins_again_with_empty_buckets() {
    let server = Server::start();
    let load = two(&server, OnStoreLoss::Closed);
    sleep(ms(1_500)).await;
    server.command(&["FLUSHALL"]);
    load.recovers(ms(5_000)).await;
    sleep(ms(1_000)).await;
    server.command(&["DEL", "{tower-outbound:faults}:state"]);
    load.recovers(ms(5_000)).await;
    sleep(ms(1_000)).await;
    assert_eq!(load.end("key deleted, twice").state_losses, 2);
}

#[tokio::test]
#[ignore = "needs redis-server"]
async fn a_slow_silent_or_reset_network_breaks_no_limit_and_no_deadline() {
    for (network, losses) in [
        (Network::Delays(ms(30)), 0),
        (Network::BlackHole, 1),
        (Network::HalfOpen, 1),
        (Network::Resets, 1),
    ] {
        let server = Server::start();
        let proxy = Proxy::start(server.port()).await;
        let load = Load::new(&[proxy.url(), proxy.url()], OnStoreLoss::Closed);
        sleep(ms(1_000)).await;
        proxy.set(network);
        sleep(ms(3_000)).await;
        if losses == 0 {
            // The delay of 30 ms in the network does not lower the rate at which calls are admitted.
            load.recovers(ms(1_000)).await;
        }
        proxy.set(Network::Passes);
        load.recovers(ms(5_000)).await;
        let status = load.end(&format!("{network:?} for 3 s"));
        assert_eq!(status.losses, losses, "{network:?}");
    }
}

#[tokio::test]
#[ignore = "needs redis-server"]
async fn a_cut_off_member_admits_at_most_its_local_share_on_top_of_the_other_member() {
    let server = Server::start();
    let proxy = Proxy::start(server.port()).await;
    let load = Load::new(&[proxy.url(), server.url()], OnStoreLoss::LocalShare);
    sleep(ms(2_000)).await;
    proxy.set(Network::Resets);
    sleep(ms(4_000)).await;
    let both = load.during(ms(2_000)).await;
    // The member that is cut off from the store may admit half of the rate on top of the full rate that the other
    // member admits.
    assert!((1_900..=3_050).contains(&both), "{both}");
    let excess = load.excess();
    assert!(excess <= RATE * 0.5 * 8.0, "{excess}");
    proxy.set(Network::Passes);
    load.recovers(ms(10_000)).await;
    assert!(load.members[0].store_status().unwrap().is_up);
}

#[tokio::test]
#[ignore = "needs redis-server"]
async fn an_open_member_admits_every_call_while_the_server_is_down_and_counts_them() {
    let mut server = Server::start();
    let limiter = Builder::new(limits())
        .on_store_loss(OnStoreLoss::Open)
        .connect(&server.url(), "faults")
        .unwrap();
    limiter.acquire(Cost::request()).await.unwrap();
    server.kill();
    for _ in 0..5_000 {
        timeout(ms(1_000), limiter.acquire(Cost::request()))
            .await
            .unwrap()
            .unwrap();
    }
    assert!(
        limiter.store_status().unwrap().admitted_without_store > 4_900,
        "{:?}",
        limiter.store_status()
    );
}

#[tokio::test]
#[ignore = "needs redis-server"]
async fn a_pause_reaches_calls_of_other_members_that_have_a_reservation() {
    let server = Server::start();
    let load = two(&server, OnStoreLoss::Closed);
    sleep(ms(1_500)).await;
    load.members[0].pause_for(ms(1_500));
    sleep(ms(30)).await;
    let paused = load.during(ms(1_300)).await;
    assert_eq!(paused, 0, "admitted in the pause");
    load.recovers(ms(2_000)).await;
    load.end("paused for 1.5 s");
}

#[tokio::test]
#[ignore = "needs redis-server"]
async fn a_cluster_keeps_a_quota_in_one_place() {
    let server = Server::start_with(&["--cluster-enabled", "yes"]);
    // Redis 6.2 takes no ranges.
    let slots: Vec<_> = (0..16_384).map(|slot| slot.to_string()).collect();
    let mut command = vec!["CLUSTER", "ADDSLOTS"];
    command.extend(slots.iter().map(String::as_str));
    server.command(&command);
    let begun = Instant::now();
    while !server.command(&["CLUSTER", "INFO"]).contains("cluster_state:ok") {
        assert!(begun.elapsed() < ms(10_000));
        sleep(ms(50)).await;
    }
    let load = two(&server, OnStoreLoss::Closed);
    load.recovers(ms(3_000)).await;
    assert_eq!(load.end("in a cluster").failures, 0);
}

#[tokio::test]
#[ignore = "needs redis-server"]
async fn a_limiter_can_use_an_existing_connection() {
    let server = Server::start();
    let client = ::redis::Client::open(server.url()).unwrap();
    let connection = client.get_connection_manager().await.unwrap();
    let builder = Builder::new(limits()).prefix("mine");
    let (one, other) = (
        builder.clone().connection(connection, "quota").unwrap(),
        builder.connect(&server.url(), "quota").unwrap(),
    );
    // Both limiters take their requests from the same burst: what is left is what the rate has brought meanwhile.
    let begun = Instant::now();
    for _ in 0..250 {
        one.acquire(Cost::tokens(100)).await.unwrap();
        other.acquire(Cost::tokens(100)).await.unwrap();
    }
    assert_eq!(
        (
            one.store_status().unwrap().members,
            other.store_status().unwrap().members
        ),
        (2, 2)
    );
    let brought = (begun.elapsed().as_secs_f64() * RATE) as u64;
    assert!(other.available().requests.unwrap() <= brought + 1, "{other:?}");
    assert!(server.command(&["KEYS", "*"]).contains("{mine:quota}:state"));
    assert!(one.store_status().unwrap().failures == 0 && other.store_status().unwrap().failures == 0);
}

#[tokio::test]
#[ignore = "needs redis-server"]
async fn a_hundred_rates_are_accepted_and_the_slowest_one_counts() {
    let server = Server::start();
    let many = (0..100).fold(Limits::new(), |limits, at| {
        limits.requests(Rate::per_second(1_000 + at).burst(10))
    });
    let limiter = redis::connect(&server.url(), "many", many).unwrap();
    for _ in 0..30 {
        timeout(ms(2_000), limiter.acquire(Cost::request()))
            .await
            .unwrap()
            .unwrap();
    }
    assert_eq!(limiter.store_status().unwrap().failures, 0);
    // The available amount is that of the slowest of the 100 rates, so it is below the burst of 10 after 30 calls.
    assert!(limiter.available().requests.unwrap() < 10);
}
