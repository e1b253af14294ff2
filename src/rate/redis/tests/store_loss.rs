//! Tests what members do while the store is lost, when it returns, and when it has lost its state.

use super::*;

#[tokio::test(start_paused = true)]
async fn a_closed_member_waits_for_the_store_and_admits_no_call_meanwhile() {
    let server = Server::new();
    let builder = Builder::new(ten_a_second()).on_store_loss(OnStoreLoss::Closed);
    let limiter = server.member_with(builder);
    let start = Instant::now();
    limiter.acquire(Cost::request()).await.unwrap();
    server.set(Network::Refuses);
    let waiting = tokio::spawn({
        let limiter = limiter.clone();
        async move { at(&limiter, Cost::request(), start).await }
    });
    sleep(Duration::from_secs(5)).await;
    let status = limiter.store_status();
    assert!(!status.is_up && status.losses == 1 && !waiting.is_finished());
    server.set(Network::Works);
    // The waits between two probes have grown to a second at most, so the member notices within a second that the store
    // is back.
    let admitted = waiting.await.unwrap();
    assert!((5_000..6_010).contains(&admitted), "{admitted}");
    assert!(limiter.store_status().is_up);
    assert_eq!(limiter.store_status().admitted_without_store, 0);
}

#[tokio::test(start_paused = true)]
async fn a_call_of_a_closed_member_fails_with_a_reason_when_its_patience_ends() {
    let server = Server::new();
    server.set(Network::Refuses);
    let builder = Builder::new(ten_a_second()).on_store_loss(OnStoreLoss::Closed);
    let limiter = server.member_with(builder.patience(ms(300)));
    let begun = Instant::now();
    let error = limiter.acquire(Cost::request()).await.unwrap_err();
    assert_eq!(begun.elapsed(), ms(300));
    assert_eq!(
        error.to_string(),
        "the store of the shared limits is unavailable (connection refused); the call waited 300ms for it"
    );
}

#[tokio::test(start_paused = true)]
async fn an_open_member_admits_every_call_and_charges_it_afterwards() {
    let server = Server::new();
    let builder = Builder::new(ten_a_second()).on_store_loss(OnStoreLoss::Open);
    let limiter = server.member_with(builder);
    limiter.acquire(Cost::request()).await.unwrap();
    server.set(Network::Refuses);
    let begun = Instant::now();
    for _ in 0..50 {
        limiter.acquire(Cost::request()).await.unwrap();
    }
    // The first call waits for the third failed request, after which the store counts as lost.
    assert!(begun.elapsed() < ms(100), "{:?}", begun.elapsed());
    assert_eq!(limiter.store_status().admitted_without_store, 50);
    server.set(Network::Works);
    sleep(Duration::from_secs(1)).await;
    let begun = Instant::now();
    limiter.acquire(Cost::request()).await.unwrap();
    // The 50 calls were charged to the shared bucket. At ten a second it takes 5 s to pay this debt off, less the
    // second that has passed since the store is back.
    assert!(
        (3_500..5_100).contains(&begun.elapsed().as_millis()),
        "{:?}",
        begun.elapsed()
    );
}

#[tokio::test(start_paused = true)]
async fn a_pause_also_holds_calls_that_are_admitted_without_the_store() {
    let server = Server::new();
    server.set(Network::Refuses);
    let limiter = server.member_with(Builder::new(ten_a_second()).on_store_loss(OnStoreLoss::Open));
    limiter.acquire(Cost::request()).await.unwrap();
    let begun = Instant::now();
    limiter.pause_for(ms(700));
    limiter.acquire(Cost::request()).await.unwrap();
    assert!(
        (700..=701).contains(&begun.elapsed().as_millis()),
        "{:?}",
        begun.elapsed()
    );
}

#[tokio::test(start_paused = true)]
async fn a_client_that_panics_counts_as_a_lost_store() {
    struct Panics;
    impl Backend for Panics {
        fn call<'a>(&'a self, _: &'a StoreRequest) -> ReplyFuture<'a> {
            panic!("there is no reactor running")
        }
    }
    let builder = Builder::new(ten_a_second());
    let limiter = builder
        .build_with(Box::new(|| Arc::new(Panics)), Arc::default())
        .unwrap();
    let begun = Instant::now();
    for _ in 0..3 {
        limiter.acquire(Cost::request()).await.unwrap();
    }
    assert!(begun.elapsed() < ms(2_000), "{:?}", begun.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_local_share_is_the_rate_divided_by_the_members_and_has_no_burst() {
    let server = Server::new();
    let limits = Limits::new().requests(Rate::per_second(100).burst(50));
    let members = [0; 4].map(|_| server.member(limits.clone()));
    for member in &members {
        member.acquire(Cost::request()).await.unwrap();
    }
    sleep(Duration::from_secs(6)).await;
    assert!(members.iter().all(|member| member.store_status().members == 4));
    server.set(Network::Frozen);
    let begun = Instant::now();
    let mut times = Vec::new();
    for _ in 0..50 {
        members[0].acquire(Cost::request()).await.unwrap();
        times.push(begun.elapsed().as_millis());
    }
    // The store counts as lost after three timeouts of 500 ms, with two waits of 20 to 40 ms
    // between them. From then on one call is admitted every 40 ms: a quarter
    // of the rate.
    assert!((1_575..1_625).contains(&times[0]), "{times:?}");
    assert!(
        times.windows(2).all(|pair| (39..=41).contains(&(pair[1] - pair[0]))),
        "{times:?}"
    );
    assert_eq!(members[0].store_status().admitted_without_store, 50);
    // The local share saves nothing up while the member has no calls.
    sleep(Duration::from_secs(10)).await;
    let begun = Instant::now();
    for _ in 0..5 {
        members[0].acquire(Cost::request()).await.unwrap();
    }
    assert!(
        (199..=205).contains(&begun.elapsed().as_millis()),
        "{:?}",
        begun.elapsed()
    );
}

#[tokio::test(start_paused = true)]
async fn local_shares_stay_within_the_limits_if_all_members_have_lost_the_store() {
    let server = Server::new();
    let limits = Limits::new()
        .requests(Rate::per_second(100).burst(20))
        .tokens(Rate::per_second(10_000).burst(2_000));
    let members = [0; 3].map(|_| server.member(limits.clone()));
    let start = Instant::now();
    let admitted: Arc<Mutex<Vec<(Duration, u64)>>> = Arc::default();
    let mut tasks = JoinSet::new();
    for member in &members {
        for index in 0..40_u64 {
            let (member, admitted) = (member.clone(), admitted.clone());
            tasks.spawn(async move {
                for round in 0.. {
                    let tokens = 20 + (index * 37 + round * 61) % 300;
                    member.acquire(Cost::tokens(tokens)).await.unwrap();
                    admitted.lock().unwrap().push((start.elapsed(), tokens));
                }
            });
        }
    }
    sleep(Duration::from_secs(5)).await;
    server.set(Network::Refuses);
    sleep(Duration::from_secs(5)).await;
    server.set(Network::Works);
    sleep(Duration::from_secs(5)).await;
    server.set(Network::LosesReplies);
    sleep(Duration::from_secs(5)).await;
    server.set(Network::Works);
    sleep(Duration::from_secs(5)).await;
    tasks.abort_all();
    let admitted = admitted.lock().unwrap().clone();
    let admitted_without_store: u64 = members
        .iter()
        .map(|member| member.store_status().admitted_without_store)
        .sum();
    assert!(admitted_without_store > 100, "{admitted_without_store}");
    // A small excess is allowed, because timers have a resolution of a millisecond and the network takes one.
    let over = max_excess(&admitted, 10_000.0, 2_000.0, |tokens| tokens as f64);
    assert!(over <= 30.0, "{over} tokens over");
    let over = max_excess(&admitted, 100.0, 20.0, |_| 1.0);
    assert!(over <= 0.3, "{over} requests over");
    let sum: u64 = admitted.iter().map(|(_, tokens)| tokens).sum();
    // Some of the rate is wasted: in the time until a loss is noticed, and by reservations whose replies were lost.
    assert!(sum > 25 * 10_000 * 70 / 100, "{sum}");
}

/// Returns by how much the admitted calls exceed an exact bucket of this rate and burst.
fn max_excess(admitted: &[(Duration, u64)], rate: f64, burst: f64, weight: impl Fn(u64) -> f64) -> f64 {
    let (mut level, mut last, mut worst) = (0.0_f64, Duration::ZERO, 0.0_f64);
    for (at, tokens) in admitted {
        level = (level - (*at - last).as_secs_f64() * rate).max(0.0) + weight(*tokens);
        last = *at;
        worst = worst.max(level - burst);
    }
    worst
}

#[tokio::test(start_paused = true)]
async fn a_store_that_has_lost_its_state_begins_empty() {
    let server = Server::new();
    let limits = Limits::new().requests(Rate::per_second(100).burst(100));
    let limiter = server.member(limits);
    limiter.acquire(Cost::request()).await.unwrap();
    server.lose_state();
    let begun = Instant::now();
    limiter.acquire(Cost::request()).await.unwrap();
    // The store reserves nothing for a second, in which other members may use reservations of the lost state. After it,
    // the empty bucket needs 10 ms to refill for one request, and the request to the store takes 1 ms.
    assert_eq!(begun.elapsed().as_millis(), 1_011);
    assert_eq!(limiter.store_status().state_losses, 1);
    let begun = Instant::now();
    for _ in 0..50 {
        limiter.acquire(Cost::request()).await.unwrap();
    }
    assert!(
        (499..=503).contains(&begun.elapsed().as_millis()),
        "{:?}",
        begun.elapsed()
    );
}

#[tokio::test(start_paused = true)]
async fn a_store_that_is_down_at_the_start_is_found_later() {
    let server = Server::new();
    server.set(Network::Refuses);
    let limiter = server.member_with(Builder::new(ten_a_second()).members(2));
    let begun = Instant::now();
    for _ in 0..5 {
        limiter.acquire(Cost::request()).await.unwrap();
    }
    // The member assumes that there are two members, so it admits calls at half of the rate: one call every 200 ms.
    assert!(
        (1_000..1_300).contains(&begun.elapsed().as_millis()),
        "{:?}",
        begun.elapsed()
    );
    assert_eq!(limiter.store_status().admitted_without_store, 5);
    server.set(Network::Works);
    sleep(Duration::from_secs(2)).await;
    assert!(limiter.store_status().is_up);
    limiter.acquire(Cost::request()).await.unwrap();
    assert_eq!(limiter.store_status().admitted_without_store, 5);
}

#[tokio::test(start_paused = true)]
async fn no_call_waits_longer_than_its_deadline() {
    let server = Server::new();
    let limiter = server.member_with(Builder::new(ten_a_second()).on_store_loss(OnStoreLoss::Closed));
    limiter.acquire(Cost::request()).await.unwrap();
    for network in [Network::Refuses, Network::Frozen, Network::LosesReplies] {
        server.set(network);
        let begun = Instant::now();
        assert!(timeout(ms(700), limiter.acquire(Cost::request())).await.is_err());
        assert_eq!(begun.elapsed(), ms(700));
        server.set(Network::Works);
        timeout(Duration::from_secs(5), limiter.acquire(Cost::request()))
            .await
            .unwrap()
            .unwrap();
    }
}

/// Collects the lines that are logged on the current thread.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test(start_paused = true)]
async fn a_loss_is_logged_at_once_and_every_half_minute_with_its_cause_and_duration() {
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .finish();
    let _guard = tracing::subscriber::set_default(subscriber);
    let server = Server::new();
    let limiter = server.member(ten_a_second());
    limiter.acquire(Cost::request()).await.unwrap();
    server.set(Network::Refuses);
    sleep(Duration::from_secs(100)).await;
    for _ in 0..5 {
        limiter.acquire(Cost::request()).await.unwrap();
    }
    assert_eq!(limiter.store_status().problem, Some(StoreProblem::Refused));
    server.set(Network::Works);
    sleep(Duration::from_secs(2)).await;
    assert_eq!(limiter.store_status().problem, None);
    let logged = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
    let warnings: Vec<_> = logged.lines().filter(|line| line.contains("WARN")).collect();
    assert_eq!(warnings.len(), 4, "{logged}");
    assert!(
        warnings.iter().all(|line| line.contains("problem=connection refused")),
        "{logged}"
    );
    assert!(warnings[3].contains("lost_for=9"), "{logged}");
    let back = logged.lines().last().unwrap();
    // The store is probed again within a second, so the end of the loss is not known to the second.
    let is_told = ["lost_for=99.", "lost_for=100.", "lost_for=101."]
        .iter()
        .any(|time| back.contains(time));
    assert!(back.contains("is back") && is_told, "{logged}");
}
