//! Four processes share one quota in Redis. The calls that they admit together are replayed through an exact bucket, to
//! check that they stay within the quota.
//!
//! The test starts its own executable four times as a worker. Each worker logs every admitted call with two times: the
//! reserved time by the clock of the Redis server, and the actual time by the monotonic clock of the machine.
//!
//! A machine that is busy stops a process for a while now and then. The reservations that the process can then not use in
//! time are given back, and may be lost to the quota. So each worker also logs how many it gave back. A stop between a call's
//! admission and its entry in the log makes the call look late. So the excess by the wall clock, and the use of the quota,
//! have to be right in one of three rounds, and the excess by the server's clock in each.
#![cfg(unix)]

use std::{
    process::{Child, Command, Stdio},
    time::Duration,
};
use support::{
    admissions::{Admitted, Log, excess, now},
    redis::Server,
};
use tokio::{task::JoinSet, time::Instant};
use tower_outbound::{Cost, Limits, Rate, rate::redis};

mod support {
    pub mod admissions;
    pub mod redis;
}

const PROCESSES: u64 = 4;
/// How often a quota is tried until the processes use it up.
const ROUNDS: u64 = 3;
/// Which part of what was used may be given back, at most, without counting as unused. On an idle machine it is 0.3 %.
const GIVEN_BACK: f64 = 0.01;

/// A quota that the processes share, and the number of tasks in each process that make calls.
#[derive(Clone, Copy)]
struct Quota {
    name: &'static str,
    /// The requests per second, and their burst.
    requests: (i64, i64),
    tokens: Option<(i64, i64)>,
    tasks: u64,
}

const QUOTAS: [Quota; 3] = [
    Quota {
        name: "requests and tokens",
        requests: (500, 100),
        tokens: Some((600_000, 200_000)),
        tasks: 400,
    },
    Quota {
        name: "small burst",
        requests: (2_000, 10),
        tokens: None,
        tasks: 64,
    },
    Quota {
        name: "fast",
        requests: (20_000, 200),
        tokens: None,
        tasks: 400,
    },
];

impl Quota {
    fn limits(&self) -> Limits {
        let rate = |(amount, burst): (i64, i64)| Rate::per_second(amount).burst(burst);
        let limits = Limits::new().requests(rate(self.requests));
        match self.tokens {
            Some(tokens) => limits.tokens(rate(tokens)),
            None => limits,
        }
    }

    fn cost(&self, rng: &mut fastrand::Rng) -> Cost {
        match self.tokens {
            Some(_) => Cost::tokens(rng.u64(200..=5_200)),
            None => Cost::request(),
        }
    }
}

// === the worker

#[test]
#[ignore = "is started by the other tests"]
fn worker() {
    let Ok(url) = std::env::var("FLEET_URL") else { return };
    let quota = QUOTAS[number("FLEET_QUOTA") as usize];
    let millis = number("FLEET_MILLIS");
    let seed = number("FLEET_SEED");
    let path = std::env::var("FLEET_LOG").unwrap();
    let log = Log::default();
    tracing::subscriber::set_global_default(log.clone()).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let expired = runtime.block_on(async {
        let limiter = redis::connect(&url, quota.name, quota.limits()).unwrap();
        // All worker processes begin to make calls at the same time.
        let start = Duration::from_nanos(number("FLEET_START"));
        tokio::time::sleep(start.saturating_sub(Duration::from_nanos(now() as u64))).await;
        let until = Instant::now() + Duration::from_millis(millis);
        let mut tasks = JoinSet::new();
        for task in 0..quota.tasks {
            let (limiter, mut rng) = (limiter.clone(), fastrand::Rng::with_seed(seed * 1_000 + task));
            tasks.spawn(async move {
                while Instant::now() < until {
                    limiter.acquire(quota.cost(&mut rng)).await.unwrap();
                }
            });
        }
        tokio::time::sleep_until(until).await;
        tasks.abort_all();
        while tasks.join_next().await.is_some() {}
        let status = limiter.store_status().unwrap();
        eprintln!("{status:?}");
        status.expired_reservations
    });
    let lines: String = log
        .take()
        .into_iter()
        .map(|admitted| {
            let Admitted {
                at_store,
                at,
                requests,
                tokens,
            } = admitted;
            format!("{at_store} {at} {requests} {tokens}\n")
        })
        .collect();
    std::fs::write(path, format!("{expired}\n{lines}")).unwrap();
}

fn number(name: &str) -> u64 {
    std::env::var(name).unwrap().parse().unwrap()
}

// === the fleet

struct Worker {
    child: Child,
    log: std::path::PathBuf,
}

/// What a worker has logged.
struct WorkerLog {
    admitted: Vec<Admitted>,
    /// The number of reservations that the worker gave back because it was too late to use them.
    expired: i64,
}

fn start(server: &Server, quota: usize, seed: u64, millis: u64, begins: i64) -> Worker {
    let log = std::env::temp_dir().join(format!("tower-outbound-fleet-{}-{quota}-{seed}", std::process::id()));
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["worker", "--exact", "--ignored", "--nocapture", "--test-threads=1"])
        .env("FLEET_URL", server.url())
        .env("FLEET_QUOTA", quota.to_string())
        .env("FLEET_SEED", seed.to_string())
        .env("FLEET_MILLIS", millis.to_string())
        .env("FLEET_START", begins.to_string())
        .env("FLEET_LOG", &log)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    Worker { child, log }
}

impl Worker {
    fn log(mut self) -> WorkerLog {
        assert!(self.child.wait().unwrap().success());
        let text = std::fs::read_to_string(&self.log).unwrap();
        std::fs::remove_file(&self.log).unwrap();
        let (expired, lines) = text.split_once('\n').unwrap();
        let admitted = lines.lines().map(|line| {
            let mut numbers = line.split(' ').map(|number| number.parse().unwrap());
            let mut next = || numbers.next().unwrap();
            Admitted {
                at_store: next(),
                at: next(),
                requests: next(),
                tokens: next(),
            }
        });
        WorkerLog {
            admitted: admitted.collect(),
            expired: expired.parse().unwrap(),
        }
    }
}

/// Prints what the worker processes admitted together. Checks that they stayed within the quota by the server's clock, and
/// that their shares are about equal. Returns whether they stayed within it by the wall clock, too, and used it up.
fn check(quota: Quota, logs: &[WorkerLog], seconds: f64) -> bool {
    let mut all: Vec<_> = logs.iter().flat_map(|log| log.admitted.iter().copied()).collect();
    let expired: i64 = logs.iter().map(|log| log.expired).sum();
    let expired = expired as f64 / all.len() as f64;
    let mut budgets = vec![(
        quota.requests,
        (|admitted| admitted.requests) as fn(&Admitted) -> i64,
        "requests",
    )];
    if let Some(tokens) = quota.tokens {
        budgets.push((tokens, |admitted| admitted.tokens, "tokens"));
    }
    let (mut used, mut is_in_time) = (0.0_f64, true);
    for (rate, cost, name) in budgets {
        all.sort_by_key(|admitted| admitted.at_store);
        let on_server = excess(
            all.iter().map(|admitted| (admitted.at_store, cost(admitted))),
            rate,
            1_000_000,
        );
        let span = (all[all.len() - 1].at_store - all[0].at_store) as f64 / 1e6;
        let sum: i64 = all.iter().map(cost).sum();
        let allowed = rate.1 as f64 + rate.0 as f64 * span.min(seconds);
        used = used.max(sum as f64 / allowed);
        all.sort_by_key(|admitted| admitted.at);
        let on_wall = excess(
            all.iter().map(|admitted| (admitted.at, cost(admitted))),
            rate,
            1_000_000_000,
        );
        let shares: Vec<i64> = logs.iter().map(|log| log.admitted.iter().map(cost).sum()).collect();
        let uneven = *shares.iter().max().unwrap() as f64 / *shares.iter().min().unwrap() as f64 - 1.0;
        println!(
            "{:<20} {name:<9} {} admissions, {on_server} over by the server's clock, {on_wall:.2} over by the wall \
             clock ({:.2} ms of the rate), {:.2} % of the quota, {:.2} % given back, shares {:.1} % apart",
            quota.name,
            all.len(),
            on_wall * 1e3 / rate.0 as f64,
            100.0 * sum as f64 / allowed,
            100.0 * expired,
            100.0 * uneven,
        );
        assert!(on_server <= 0.0, "{on_server} {name} over");
        // A call may be 5 ms late.
        is_in_time &= on_wall <= rate.0 as f64 * 0.005;
        assert!(uneven <= 0.15, "{shares:?}");
    }
    is_in_time && used * (1.0 + expired.min(GIVEN_BACK)) >= 0.99
}

#[test]
#[ignore = "needs redis-server"]
fn four_processes_share_a_quota_and_never_exceed_it() {
    let millis = std::env::var("FLEET_SPAN").map_or(10_000, |millis| millis.parse().unwrap());
    for (index, quota) in QUOTAS.into_iter().enumerate() {
        let round = |_| {
            let server = Server::start();
            let begins = now() + 500_000_000;
            let workers: Vec<_> = (0..PROCESSES)
                .map(|seed| start(&server, index, seed, millis, begins))
                .collect();
            let logs: Vec<_> = workers.into_iter().map(Worker::log).collect();
            check(quota, &logs, millis as f64 / 1e3)
        };
        assert!((0..ROUNDS).any(round), "{}", quota.name);
    }
}

#[test]
#[ignore = "needs redis-server"]
fn a_killed_process_wastes_only_what_it_had_reserved() {
    let server = Server::start();
    let mut victim = start(&server, 1, 0, 60_000, 0);
    let others: Vec<_> = (1..PROCESSES).map(|seed| start(&server, 1, seed, 8_000, 0)).collect();
    // Real time: the workers are processes, which share no paused clock. The victim is killed in the middle of its run.
    std::thread::sleep(Duration::from_secs(2));
    victim.child.kill().unwrap();
    victim.child.wait().unwrap();
    let logs: Vec<_> = others.into_iter().map(Worker::log).collect();
    let expired: i64 = logs.iter().map(|log| log.expired).sum();
    // In the last four of the eight seconds, no reservations of the killed process are left, and the other three
    // processes have the whole rate of 2,000 requests per second.
    let all: Vec<_> = logs.iter().flat_map(|log| &log.admitted).collect();
    let last = all.iter().map(|admitted| admitted.at_store).max().unwrap();
    let late = all
        .iter()
        .filter(|admitted| admitted.at_store > last - 4_000_000)
        .count();
    println!("{late} of 8,000 in four seconds, {expired} given back in eight");
    assert!(
        late <= 8_010 && late as i64 + expired >= 7_920 && late >= 7_840,
        "{late} {expired}"
    );
}
