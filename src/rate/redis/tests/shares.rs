//! Tests who gets what of a quota and when: by demand, whatever the distance to the server, and at the time by its clock.

use super::*;

/// Lets `callers` tasks of each member admit as many calls as they can, for `span`. Returns the times of the admissions of
/// each member.
async fn admissions(members: &[SharedLimiter], callers: usize, span: Duration) -> Vec<Vec<Instant>> {
    let times: Vec<_> = members.iter().map(|_| Arc::new(Mutex::new(Vec::new()))).collect();
    let mut tasks = JoinSet::new();
    for (member, times) in members.iter().zip(&times) {
        for _ in 0..callers {
            let (member, times) = (member.clone(), times.clone());
            tasks.spawn(async move {
                loop {
                    member.acquire(Cost::request()).await.unwrap();
                    times.lock().unwrap().push(Instant::now());
                }
            });
        }
    }
    sleep(span).await;
    tasks.shutdown().await;
    times.iter().map(|times| times.lock().unwrap().clone()).collect()
}

fn hundred_a_second() -> Limits {
    Limits::new().requests(Rate::per_second(100).burst(10))
}

#[tokio::test(start_paused = true)]
async fn members_at_any_distance_get_equal_shares() {
    let server = Server::new();
    let delays = [0, 1, 40, 100];
    let members = delays.map(|delay| server.at_a_distance(ms(delay)).member(hundred_a_second()));
    let counts: Vec<_> = admissions(&members, 100, ms(40_000)).await;
    let counts: Vec<_> = counts.iter().map(Vec::len).collect();
    let sum: usize = counts.iter().sum();
    assert!((3_960..=4_011).contains(&sum), "{counts:?}");
    assert!(counts.iter().all(|count| (900..=1_100).contains(count)), "{counts:?}");
}

#[tokio::test(start_paused = true)]
async fn idle_and_dead_members_take_nothing_from_a_member_that_works() {
    let server = Server::new().at_a_distance(ms(10));
    let idle: Vec<_> = (0..200).map(|_| server.member(hundred_a_second())).collect();
    for member in &idle {
        // A call of no cost makes the member known to the server.
        member.acquire(Cost::none()).await.unwrap();
    }
    let busy = server.member(hundred_a_second());
    let count = admissions(std::slice::from_ref(&busy), 100, ms(10_000)).await[0].len();
    assert!((995..=1_011).contains(&count), "{count}");
    // The idle members have got demand, and are then dead.
    let waiting: Vec<_> = idle
        .iter()
        .map(|member| {
            let member = member.clone();
            tokio::spawn(async move { member.acquire(Cost::request()).await })
        })
        .collect();
    sleep(ms(30)).await;
    waiting.iter().for_each(tokio::task::JoinHandle::abort);
    sleep(ms(2_000)).await;
    let count = admissions(&[busy], 100, ms(10_000)).await[0].len();
    assert!((995..=1_011).contains(&count), "{count}");
}

#[tokio::test(start_paused = true)]
async fn members_near_and_far_stay_within_the_burst_by_the_wall_clock() {
    let server = Server::new();
    let limits = || Limits::new().requests(Rate::per_second(1_000).burst(10));
    let members = [0, 50].map(|delay| server.at_a_distance(ms(delay)).member(limits()));
    let mut times = admissions(&members, 50, ms(5_000)).await.concat();
    times.sort_unstable();
    assert!(times.len() > 4_900, "{}", times.len());
    // An exact bucket that leaks a call each millisecond, counted in microseconds of its rate.
    let (mut level, mut last) = (0_u128, times[0]);
    for at in times {
        level = level.saturating_sub((at - last).as_micros()) + 1_000;
        last = at;
        // What the rate brings in the 5 ms in which a reservation may be used comes on top.
        assert!(level <= 15_000, "{level}");
    }
}

#[tokio::test(start_paused = true)]
async fn limits_that_are_raised_act_at_once_on_calls_that_wait() {
    let server = Server::new();
    let limits = Limits::new().requests(Rate::per_minute(2).burst(1));
    let (one, other) = (server.member(limits.clone()), server.member(limits));
    one.acquire(Cost::request()).await.unwrap();
    let waiting = [&one, &one, &other].map(|member| {
        let member = member.clone();
        tokio::spawn(async move {
            member.acquire(Cost::request()).await.unwrap();
            Instant::now()
        })
    });
    sleep(ms(2_000)).await;
    let start = Instant::now();
    one.set_limits(Limits::new().requests(Rate::per_second(100).burst(1)))
        .unwrap();
    // The simulated server announces nothing, so the other member learns of it with its next request.
    for (waiting, most) in waiting.into_iter().zip([30, 1_100, 1_100]) {
        let waited = waiting.await.unwrap() - start;
        assert!(waited <= ms(most), "{waited:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_heavy_call_that_gives_up_leaves_no_hole() {
    let server = Server::new();
    let limits = || Limits::new().tokens(Rate::per_second(10).burst(200));
    let (one, other) = (server.member(limits()), server.member(limits()));
    one.acquire(Cost::tokens(200)).await.unwrap();
    let heavy = tokio::spawn({
        let one = one.clone();
        async move { one.acquire(Cost::tokens(200)).await }
    });
    sleep(ms(1_000)).await;
    let start = Instant::now();
    let light = tokio::spawn(async move { at(&other, Cost::tokens(5), start).await });
    // The light call came later, and does not overtake the heavy one.
    sleep(ms(1_500)).await;
    assert!(!light.is_finished());
    heavy.abort();
    let waited = light.await.unwrap();
    assert!(waited <= 2_600, "{waited}");
}

#[tokio::test(start_paused = true)]
async fn a_heavy_call_is_not_starved_by_the_light_calls_of_others() {
    let server = Server::new();
    let limits = || Limits::new().tokens(Rate::per_second(100).burst(500));
    let (one, other) = (server.member(limits()), server.member(limits()));
    let lights: Vec<_> = (0..20)
        .map(|_| {
            let other = other.clone();
            tokio::spawn(async move {
                loop {
                    other.acquire(Cost::tokens(5)).await.unwrap();
                }
            })
        })
        .collect();
    sleep(ms(10_000)).await;
    let waited = at(&one, Cost::tokens(500), Instant::now()).await;
    // The bucket needs 5 s to fill.
    assert!((4_900..6_500).contains(&waited), "{waited}");
    lights.iter().for_each(tokio::task::JoinHandle::abort);
}

#[tokio::test(start_paused = true)]
async fn a_debt_or_pause_of_a_state_that_is_lost_holds_no_call_for_longer_than_a_second() {
    for is_pause in [false, true] {
        let server = Server::new();
        let limiter = server.member(Limits::new().tokens(Rate::per_second(10)));
        let estimate = limiter.acquire_estimate(Cost::tokens(1)).await.unwrap();
        if is_pause {
            limiter.pause_for(Duration::from_secs(400 * 24 * 60 * 60));
        } else {
            estimate.settle(Cost::tokens(1_000_000_000_000));
        }
        sleep(ms(100)).await;
        let waiting = tokio::spawn({
            let limiter = limiter.clone();
            async move { limiter.acquire(Cost::tokens(1)).await }
        });
        sleep(ms(3_000)).await;
        assert!(!waiting.is_finished());
        server.lose_state();
        // The member asks again within a second; after a loss, nothing is reserved for `max_ahead`, another second.
        timeout(ms(2_200), waiting).await.unwrap().unwrap().unwrap();
    }
}
