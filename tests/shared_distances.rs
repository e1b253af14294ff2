//! Members of a quota that are at unequal distances from a real Redis server: by the wall clock they stay within the
//! limits together, and those that are far get as much as those that are near.
//!
//! Each member has a thread and a runtime of its own, and a proxy that delays what it sends and receives. Every call is
//! logged with the time that the server reserved for it and with the time of the machine's monotonic clock, which all
//! members have in common.
#![cfg(unix)]

use std::{sync::Barrier, thread, time::Duration};
use support::{
    admissions::{Admitted, Log, excess, now},
    ms,
    proxy::{Network, Proxy},
    redis::Server,
    threaded_runtime,
};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, sleep_until},
};
use tower_outbound::{Cost, Limits, Rate, rate::redis};

mod support;

/// The requests per second, and their burst.
const RATE: (i64, i64) = (1_000, 10);
/// How many callers each member has: more than can hold a reservation at a time. While round trips take 400 ms, members
/// reserve up to a second ahead. A member all of whose callers hold a reservation asks for no more, and gets less.
const CALLERS: usize = 1_000;
/// The time in which all members find the server. Shares and the use of the quota are counted after it, the excess from
/// the start.
const WARM_UP: Duration = ms(3_000);
const MEASURED: Duration = ms(8_000);

/// How long a round trip of a member takes, in milliseconds.
#[derive(Clone, Copy, Debug)]
enum Distance {
    Fixed(u64),
    /// As `usual`, except that what is sent within 50 ms of each second takes so much longer that a round trip takes
    /// `spike`.
    Spikes {
        usual: u64,
        spike: u64,
    },
}

/// What one member has done.
struct Member {
    log: Vec<Admitted>,
    /// The number of reservations that it gave back while it was measured, because it was too late to use them.
    expired: u64,
}

/// Lets a member at each distance admit as many calls as it can. Returns what each member has done, and when the members
/// begin to be measured.
fn admissions(server: &Server, distances: &[Distance]) -> (Vec<Member>, i64) {
    let network = threaded_runtime();
    let proxies: Vec<_> = distances
        .iter()
        .map(|distance| network.block_on(start(server, *distance)))
        .collect();
    let begin = Barrier::new(proxies.len());
    let measured_from = now() + WARM_UP.as_nanos() as i64;
    let members = thread::scope(|scope| {
        let members: Vec<_> = proxies
            .iter()
            .map(|proxy| scope.spawn(|| member(&proxy.url(), &begin)))
            .collect();
        members.into_iter().map(|member| member.join().unwrap()).collect()
    });
    network.shutdown_background();
    (members, measured_from)
}

async fn start(server: &Server, distance: Distance) -> Proxy {
    let proxy = Proxy::start(server.port()).await;
    let one_way = |round_trip: u64| Network::Delays(Duration::from_micros(round_trip * 500));
    match distance {
        Distance::Fixed(round_trip) => proxy.set(one_way(round_trip)),
        Distance::Spikes { usual, spike } => {
            proxy.set(one_way(usual));
            let network = proxy.network();
            tokio::spawn(async move {
                loop {
                    sleep(ms(950)).await;
                    network.send_replace(one_way(spike));
                    sleep(ms(50)).await;
                    network.send_replace(one_way(usual));
                }
            });
        }
    }
    proxy
}

fn member(url: &str, begin: &Barrier) -> Member {
    let log = Log::default();
    let _logging = tracing::subscriber::set_default(log.clone());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let limits = Limits::new().requests(Rate::per_second(RATE.0 as u64).burst(RATE.1 as u64));
    begin.wait();
    let expired = runtime.block_on(async {
        let measured_from = Instant::now() + WARM_UP;
        let limiter = redis::connect(url, "distances", limits).unwrap();
        let mut tasks = JoinSet::new();
        for _ in 0..CALLERS {
            let limiter = limiter.clone();
            tasks.spawn(async move {
                loop {
                    limiter.acquire(Cost::request()).await.unwrap();
                }
            });
        }
        let expired = || limiter.store_status().unwrap().expired_reservations;
        sleep_until(measured_from).await;
        let before = expired();
        sleep_until(measured_from + MEASURED).await;
        tasks.shutdown().await;
        println!("{:?}", limiter.store_status().unwrap());
        expired() - before
    });
    Member {
        log: log.take(),
        expired,
    }
}

/// Lets a member at each distance admit as many calls as it can, and checks what they admitted together: nothing above the
/// limits by either clock; the whole rate, in about equal shares.
///
/// A busy machine stops threads now and then. The reservations that they can then not use in time are given back, and may
/// be lost to the quota, so they are counted with those that were used. A call whose thread was stopped between its
/// admission and its entry in the log is logged late, close to the calls after it. So only the excess by the server's clock,
/// which no stop changes, has to be right in each round; everything else in one of three.
fn check(distances: &[Distance]) {
    let is_used_equally = |_| {
        let server = Server::start();
        let (members, measured_from) = admissions(&server, distances);
        let late = lateness(members.iter().flat_map(|member| member.log.clone()).collect());
        let measured = |member: &Member| {
            let admitted = member.log.iter();
            admitted.filter(|admitted| admitted.at >= measured_from).count()
        };
        let shares: Vec<_> = members.iter().map(measured).collect();
        let uneven = *shares.iter().max().unwrap() as f64 / *shares.iter().min().unwrap() as f64 - 1.0;
        let of_rate = |calls: f64| calls / (RATE.0 as f64 * MEASURED.as_secs_f64());
        let used = of_rate(shares.iter().sum::<usize>() as f64);
        let expired = of_rate(members.iter().map(|member| member.expired).sum::<u64>() as f64);
        println!(
            "{distances:?}: {:.2} % of the rate, {:.2} % given back, shares {shares:?} ({:.1} % apart)",
            used * 100.0,
            expired * 100.0,
            uneven * 100.0,
        );
        // A call may be 5 ms late. The proxies count in milliseconds, so a member may read the server's clock wrongly by
        // half of one.
        late <= 6.0 && used >= 0.95 && used + expired >= 0.97 && uneven <= 0.15
    };
    assert!((0..3).any(is_used_equally));
}

/// Checks that the calls that all members admitted together stay within the limits by the server's clock. Returns how many
/// milliseconds of the rate they were above the limits by the wall clock, at most.
fn lateness(mut all: Vec<Admitted>) -> f64 {
    all.sort_by_key(|admitted| admitted.at_store);
    let at_store = all.iter().map(|admitted| (admitted.at_store, admitted.requests));
    let by_server = excess(at_store, RATE, 1_000_000);
    all.sort_by_key(|admitted| admitted.at);
    let at = all.iter().map(|admitted| (admitted.at, admitted.requests));
    let by_wall = excess(at, RATE, 1_000_000_000);
    let in_ms = by_wall * 1e3 / RATE.0 as f64;
    println!(
        "{} admissions, {by_server} over by the server's clock, {by_wall:.2} over by the wall clock ({in_ms:.2} ms of the \
         rate)",
        all.len(),
    );
    assert!(by_server <= 0.0, "{by_server} over by the server's clock");
    in_ms
}

#[test]
#[ignore = "needs redis-server"]
fn a_near_and_a_far_member_stay_within_the_limits_and_get_equal_shares() {
    check(&[0, 100].map(Distance::Fixed));
}

#[test]
#[ignore = "needs redis-server"]
fn members_at_four_distances_stay_within_the_limits_and_get_equal_shares() {
    check(&[0, 2, 80, 200].map(Distance::Fixed));
}

#[test]
#[ignore = "needs redis-server"]
fn members_whose_round_trips_sometimes_take_400_ms_stay_within_the_limits_and_get_equal_shares() {
    check(&[0, 100].map(|usual| Distance::Spikes { usual, spike: 400 }));
}
