//! The script and `frontier.rs` give equal answers.

use super::{
    quota_config::QuotaConfig,
    store::{self, SCRIPT},
    virtual_schedule::VirtualSchedule,
    wire::{StoreReply, StoreRequest},
};
use crate::rate::limits::{Cost, Limits, Rate};
use ::redis::{Script, Value};
use std::{sync::Arc, time::Duration};

#[path = "../../../tests/support/redis.rs"]
mod server;

/// The script, told the time.
struct Told {
    connection: ::redis::Connection,
    script: Script,
}

impl Told {
    fn new(server: &server::Server) -> Self {
        let clock = "local time = redis.call('TIME')\nlocal now = time[1] * 1000000 + time[2]\n";
        assert!(SCRIPT.contains(clock));
        Self {
            connection: ::redis::Client::open(server.url()).unwrap().get_connection().unwrap(),
            script: Script::new(&SCRIPT.replace(clock, "local now = tonumber(table.remove(ARGV))\n")),
        }
    }

    fn call(&mut self, ask: &StoreRequest, now: i64) -> StoreReply {
        let mut answer = Value::Nil;
        for is_brief in [true, false] {
            if is_brief && !ask.is_brief() {
                continue;
            }
            let mut call = store::invocation(&self.script, ask, is_brief, "{q}", "{q}:pauses");
            answer = call.arg(now).invoke(&mut self.connection).unwrap();
            if !store::wants_more(&answer) {
                break;
            }
        }
        store::read(answer).unwrap()
    }
}

fn configs() -> Vec<Arc<QuotaConfig>> {
    let limits = [
        Limits::new()
            .requests(Rate::per_second(500).burst(100))
            .tokens(Rate::per_minute(600_000).burst(20_000)),
        Limits::new()
            .requests(Rate::per_second(250).burst(7))
            .tokens(Rate::per_minute(30_001)),
        Limits::new()
            .tokens(Rate::new(7, Duration::from_micros(11)).burst(31).initial(3))
            .requests(Rate::per_second(0.3).burst(2))
            .requests(Rate::per_day(40_000)),
        Limits::new().tokens(Rate::per_second(1_000_003).burst(1_500)),
        Limits::new(),
    ];
    limits
        .map(|limits| Arc::new(QuotaConfig::new(limits).unwrap()))
        .to_vec()
}

struct RandomInput(fastrand::Rng);

impl RandomInput {
    fn one_in(&mut self, many: u32) -> bool {
        self.0.u32(0..many) == 0
    }

    fn amounts(&mut self, most: u64) -> [u64; 2] {
        [self.0.u64(0..=most / 100), self.0.u64(0..=most)]
    }
}

/// What a member knows, or believes to know.
#[derive(Clone, Copy)]
struct Knows {
    birth: i64,
    seq: i64,
    stamp: i64,
    config: usize,
    estimated: [u64; 2],
}

fn ask(rng: &mut RandomInput, member: usize, knows: Knows, configs: &[Arc<QuotaConfig>]) -> StoreRequest {
    let now_and_then = |rng: &mut RandomInput, most: i64| if rng.one_in(20) { rng.0.i64(0..most) } else { 0 };
    let credit = if rng.one_in(3) { rng.amounts(3_000) } else { [0, 0] };
    let rates = configs[knows.config].sizes().len();
    StoreRequest {
        member: [member as u8; 16],
        leaves: rng.one_in(200),
        probes: rng.one_in(20),
        ahead: [0, 50_000, 2_000_000][rng.0.usize(0..3)],
        birth: knows.birth,
        seq: knows.seq,
        horizon: now_and_then(rng, 3_000_000),
        config: configs[knows.config].clone(),
        base: configs[usize::from(member == 3)].text().to_owned(),
        stamp: knows.stamp,
        changes: rng.one_in(100),
        batch: rng.0.i64(0..3),
        spent: if rng.one_in(10) { rng.amounts(3_000) } else { [0, 0] },
        alone: if rng.one_in(10) { rng.0.i64(1..30_000) } else { 0 },
        shares: rng.0.i64(1..5),
        credit,
        debit: if rng.one_in(4) { rng.amounts(2_000) } else { [0, 0] },
        estimated: [
            knows.estimated[0].saturating_sub(credit[0]),
            knows.estimated[1].saturating_sub(credit[1]),
        ],
        pause: now_and_then(rng, 400_000),
        lower: (0..rates)
            .map(|at| (at, rng.0.u64(0..30_000)))
            .filter(|(_, left)| *left < 1_000)
            .collect(),
        costs: (0..rng.0.usize(0..6))
            .map(|_| Cost {
                requests: rng.0.u64(0..3),
                tokens: if rng.one_in(50) {
                    rng.0.u64(0..30_000)
                } else {
                    rng.0.u64(0..900)
                },
            })
            .collect(),
    }
}

#[test]
#[ignore = "needs redis-server"]
fn the_script_and_the_model_give_equal_answers() {
    let calls: u64 = std::env::var("EQUALITY_CALLS").map_or(60_000, |calls| calls.parse().unwrap());
    let server = server::Server::start();
    let mut script = Told::new(&server);
    let mut model = VirtualSchedule::default();
    let configs = configs();
    let mut rng = RandomInput(fastrand::Rng::with_seed(20_261_123));
    let fresh = Knows {
        birth: 0,
        seq: 0,
        stamp: 0,
        config: 0,
        estimated: [0, 0],
    };
    let mut members = [fresh; 5];
    let mut now = 1_760_000_000_000_000_i64;
    let mut saved: Option<VirtualSchedule> = None;
    let (mut granted, mut refused, mut lost, mut unknown, mut taken_over) = (0, 0, 0, 0, 0);
    for step in 0..calls {
        now += match rng.0.u32(0..40) {
            0 => -rng.0.i64(0..2_000_000),
            1 => rng.0.i64(0..3_000_000),
            2 if rng.one_in(20) => 20_000_000,
            _ => rng.0.i64(0..4_000),
        };
        if rng.one_in(2_000) {
            server.command(&["DEL", "{q}"]);
            model.lose_state();
        }
        if rng.one_in(500) {
            // Kept aside, to come back later as an old snapshot does.
            server.command(&["COPY", "{q}", "{q}:saved", "REPLACE"]);
            server.command(&["PERSIST", "{q}:saved"]);
            saved = Some(model.clone());
        }
        if rng.one_in(1_000) {
            if let Some(old) = saved.take() {
                server.command(&["RENAME", "{q}:saved", "{q}"]);
                model = old;
            }
        }
        let member = rng.0.usize(0..members.len());
        if rng.one_in(300) {
            members[member] = Knows {
                config: rng.0.usize(0..configs.len()),
                ..fresh
            };
        }
        if rng.one_in(300) {
            members[member].config = rng.0.usize(0..configs.len());
        }
        let knows = members[member];
        let ask = ask(&mut rng, member, knows, &configs);
        let (told, answer) = (script.call(&ask, now), model.call(&ask, now));
        assert_eq!(told, answer, "call {step}: {ask:?} at {now}");
        granted += answer.goes.len();
        refused += ask.costs.len() - answer.goes.len();
        lost += usize::from(knows.birth != 0 && knows.birth != answer.birth);
        unknown += usize::from(!answer.known);
        let config = answer.config.as_ref().map(|text| {
            taken_over += 1;
            configs.iter().position(|config| config.text() == text).unwrap()
        });
        let mut estimated = if answer.known { ask.estimated } else { [0, 0] };
        for cost in &ask.costs[..answer.goes.len()] {
            estimated = [estimated[0] + cost.requests, estimated[1] + cost.tokens];
        }
        members[member] = Knows {
            birth: answer.birth,
            seq: answer.seq,
            stamp: answer.stamp,
            config: config.unwrap_or(knows.config),
            // Most calls end sooner or later.
            estimated: if rng.one_in(3) { [0, 0] } else { estimated },
        };
    }
    println!(
        "{calls} calls, 0 differences: {granted} granted, {refused} refused, {lost} times lost, {unknown} times \
         unknown, {taken_over} times other limits"
    );
    assert!(granted > 10_000 || calls < 60_000);
}
