//! Compares the script that the server runs with its model in Rust, `virtual_schedule.rs`: both must
//! give equal replies to equal requests.

use super::{
    amounts::Amounts,
    quota_config::QuotaConfig,
    script::SCRIPT,
    store,
    virtual_schedule::VirtualSchedule,
    wire::{StoreReply, StoreRequest},
};
use crate::rate::{
    budget::Budget,
    cost::Cost,
    limits::{Limits, Rate},
    pause::Pauses,
};
use ::redis::{Script, Value};
use std::{sync::Arc, time::Duration};

#[path = "../../../tests/support/redis.rs"]
mod server;

/// Runs the script on a real server, with a clock that the test sets.
struct ScriptUnderTest {
    connection: ::redis::Connection,
    script: Script,
}

impl ScriptUnderTest {
    fn new(server: &server::Server) -> Self {
        let clock = "local time = redis.call('TIME')\nlocal now = time[1] * 1000000 + time[2]\n";
        assert!(SCRIPT.contains(clock));
        Self {
            connection: ::redis::Client::open(server.url()).unwrap().get_connection().unwrap(),
            script: Script::new(&SCRIPT.replace(clock, "local now = tonumber(table.remove(ARGV))\n")),
        }
    }

    fn handle(&mut self, request: &StoreRequest, now: i64) -> StoreReply {
        let mut reply = Value::Nil;
        for with_limits in [false, true] {
            if !with_limits && !request.can_omit_limits() {
                continue;
            }
            let mut call = store::invocation(&self.script, request, with_limits, ["{q}", "{q}:first"], "{q}:pauses");
            reply = call.arg(now).invoke(&mut self.connection).unwrap();
            if !store::needs_limits(&reply) {
                break;
            }
        }
        store::read(reply, request).unwrap()
    }
}

fn configs() -> Vec<Arc<QuotaConfig>> {
    let limits = [
        Limits::new()
            .requests(Rate::per_second(500).burst(100))
            .tokens(Rate::per_minute(600_000).burst(20_000)),
        Limits::new()
            .requests(Rate::per_second(250).burst(7).max_debt(3))
            .tokens(Rate::per_minute(30_001)),
        Limits::new()
            .tokens(Rate::new(7, Duration::from_micros(11)).burst(31).initial(3))
            .requests(Rate::per_second(0.3).burst(2))
            .requests(Rate::per_day(40_000)),
        Limits::new().tokens(Rate::per_second(1_000_003).burst(1_500).max_debt(100)),
        Limits::new(),
        Limits::new()
            .input_tokens(Rate::per_minute(600_000).burst(15_000))
            .output_tokens(Rate::per_minute(100_000))
            .requests(Rate::per_second(500).burst(100)),
        Limits::new()
            .budget("images", Rate::per_second(30))
            .tokens(Rate::per_minute(600_000).burst(20_000))
            .output_tokens(Rate::per_second(5_000))
            .requests(Rate::per_second(500).burst(100))
            .output_tokens(Rate::per_day(3_000_000))
            .input_tokens(Rate::per_minute(600_000).burst(15_000)),
        Limits::new()
            .requests(Rate::per_second(400).burst(90))
            .input_tokens(Rate::per_second(9_000))
            .budget("seconds", Rate::per_second(60).max_debt(50))
            .budget("images", Rate::per_second(30)),
        Limits::new()
            .requests(Rate::per_second(300).burst(40).refuse())
            .requests(Rate::utc_day(30_000))
            .tokens(Rate::per_second(30_000).burst(900).strict()),
        Limits::new()
            .requests(Rate::per_second(500).burst(2).strict())
            .budget("images", Rate::utc_day(5_000).refuse())
            .tokens(Rate::per_minute(600_000).burst(20_000)),
        Limits::new()
            .requests(Rate::per_second(400).burst(90).strict())
            .tokens(Rate::utc_month(3_000_000).starting_at(HOUR * 8).refuse())
            .input_tokens(Rate::per_hour(20_000_000).burst(9_000).refuse().strict())
            .budget("seconds", Rate::utc_day(100_000.5).initial(700).starting_at(HOUR * 7))
            .budget("images", Rate::utc_month(20_000).max_debt(40)),
        Limits::new()
            .output_tokens(Rate::utc_day(90_000).refuse())
            .input_tokens(Rate::per_day(3_000_000).refuse())
            .requests(Rate::per_second(500).burst(100)),
    ];
    limits
        .map(|limits| Arc::new(QuotaConfig::new(limits).unwrap()))
        .to_vec()
}

const HOUR: Duration = Duration::from_secs(60 * 60);
/// In microseconds.
const DAY: i64 = 24 * 60 * 60 * 1_000_000;

/// The budgets that the limits count, and how much smaller their amounts are than those of tokens.
const BUDGETS: [(&str, u64); 6] = [
    ("requests", 100),
    ("tokens", 1),
    ("input_tokens", 1),
    ("output_tokens", 6),
    ("images", 100),
    ("seconds", 50),
];

struct RandomInput(fastrand::Rng);

impl RandomInput {
    fn one_in(&mut self, many: u32) -> bool {
        self.0.u32(0..many) == 0
    }

    /// Returns an amount of each of these budgets.
    fn amounts(&mut self, most: u64, budgets: &[Budget]) -> Amounts {
        let mut amounts = Amounts::default();
        for (budget, part) in BUDGETS {
            *amounts.entry(budget.into()).unwrap() = self.0.u64(0..=most / part);
        }
        amounts.retain(budgets)
    }

    /// Returns 0, but with a probability of 1 in 20 a random number from 0 to below `end`.
    fn rarely(&mut self, end: i64) -> i64 {
        if self.one_in(20) { self.0.i64(0..end) } else { 0 }
    }
}

/// What a simulated member has learned from the store's replies, which may be out of date.
#[derive(Clone, Copy)]
struct MemberState {
    incarnation: i64,
    sequence: i64,
    config_version: i64,
    config: usize,
    estimated: Amounts,
}

fn request(rng: &mut RandomInput, member: usize, state: MemberState, configs: &[Arc<QuotaConfig>]) -> StoreRequest {
    let budgets = configs[state.config].budgets();
    let credit = if rng.one_in(3) {
        rng.amounts(3_000, budgets)
    } else {
        Amounts::default()
    };
    let rates = configs[state.config].specs().len();
    StoreRequest {
        member: [member as u8; 16],
        is_leaving: rng.one_in(200),
        is_probe: rng.one_in(20),
        max_ahead: [0, 50_000, 2_000_000][rng.0.usize(0..3)],
        ahead: [0, 30_000, 250_000][rng.0.usize(0..3)],
        lead: rng.rarely(100_000),
        is_backlogged: rng.one_in(10),
        incarnation: state.incarnation,
        sequence: state.sequence,
        last_reservation: rng.rarely(3_000_000),
        left: if rng.one_in(3) {
            let specs = configs[state.config].specs().iter();
            let allowances = specs.filter(|(_, spec)| spec.kind.is_allowance());
            allowances.map(|_| rng.0.u64(0..30_000)).collect()
        } else {
            Vec::new()
        },
        config: configs[state.config].clone(),
        configured_as: configs[usize::from(member == 3)].text().to_owned(),
        config_version: state.config_version,
        is_change: rng.one_in(100),
        batch: rng.0.i64(0..3),
        fallback_usage: if rng.one_in(10) {
            rng.amounts(3_000, budgets)
        } else {
            Amounts::default()
        },
        fallback_age: if rng.one_in(10) { rng.0.i64(1..30_000) } else { 0 },
        member_count: rng.0.i64(1..5),
        credit,
        debit: if rng.one_in(4) {
            rng.amounts(2_000, budgets)
        } else {
            Amounts::default()
        },
        estimated: state.estimated.saturating_sub(credit).retain(budgets),
        pauses: Pauses::new(rng.rarely(400_000) - 1, rng.rarely(400_000) - 1),
        is_forgiving: rng.one_in(50),
        lowered: (0..rates)
            .map(|at| (at, rng.0.u64(0..30_000)))
            .filter(|(_, remaining)| *remaining < 1_000)
            .collect(),
        costs: (0..rng.0.usize(0..6))
            .map(|_| {
                let most = if rng.one_in(50) { 30_000 } else { 900 };
                let budgets = BUDGETS.into_iter();
                budgets.fold(Cost::none(), |cost, (budget, part)| {
                    let most = if budget == "requests" { 2 } else { most / part };
                    cost.with(budget, rng.0.u64(0..=most))
                })
            })
            .collect(),
    }
}

#[test]
#[ignore = "needs redis-server"]
fn the_script_and_the_model_give_equal_replies() {
    let calls: u64 = std::env::var("EQUALITY_CALLS").map_or(60_000, |calls| calls.parse().unwrap());
    let server = server::Server::start();
    let mut script = ScriptUnderTest::new(&server);
    let mut model = VirtualSchedule::default();
    let configs = configs();
    let mut rng = RandomInput(fastrand::Rng::with_seed(20_261_123));
    let fresh = MemberState {
        incarnation: 0,
        sequence: 0,
        config_version: 0,
        config: 0,
        estimated: Amounts::default(),
    };
    let mut members = [fresh; 5];
    let mut now = 1_760_000_000_000_000_i64;
    let mut saved: Option<VirtualSchedule> = None;
    let (mut reserved, mut not_reserved, mut refused, mut lost, mut unknown, mut adopted) = (0, 0, 0, 0, 0, 0);
    for step in 0..calls {
        now += match rng.0.u32(0..40) {
            0 => -rng.0.i64(0..2_000_000),
            1 => rng.0.i64(0..3_000_000),
            2 if rng.one_in(20) => 20_000_000,
            // To a second before a day begins, or a day of another begin; or to a later month.
            3 if rng.one_in(6) => (DAY - now % DAY) + [0, 7, 8][rng.0.usize(0..3)] * DAY / 24 - rng.0.i64(0..1_000_000),
            4 if rng.one_in(30) => rng.0.i64(0..70) * DAY,
            5 if rng.one_in(30) => -rng.0.i64(0..3) * DAY,
            _ => rng.0.i64(0..4_000),
        };
        if rng.one_in(2_000) {
            server.command(&["DEL", "{q}"]);
            model.lose_state();
        }
        if rng.one_in(500) {
            // Takes a snapshot of the stored state, to which the server may be rolled back later.
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
            members[member] = MemberState {
                config: rng.0.usize(0..configs.len()),
                ..fresh
            };
        }
        if rng.one_in(300) {
            members[member].config = rng.0.usize(0..configs.len());
        }
        let before = members[member];
        let request = request(&mut rng, member, before, &configs);
        let (actual, reply) = (script.handle(&request, now), model.handle(&request, now));
        assert_eq!(actual, reply, "call {step}: {request:?} at {now}");
        reserved += reply.delays.len();
        refused += reply.refused.len();
        not_reserved += request.costs.len() - reply.delays.len() - reply.refused.len();
        lost += usize::from(before.incarnation != 0 && before.incarnation != reply.incarnation);
        unknown += usize::from(!reply.is_known);
        let config = reply.config.as_ref().map(|text| {
            adopted += 1;
            configs.iter().position(|config| config.text() == text).unwrap()
        });
        let estimated = if reply.is_known {
            request.estimated
        } else {
            Amounts::default()
        };
        let costs = request.costs.iter().enumerate();
        let costs = costs.filter(|(at, _)| reply.refused.iter().all(|refused| refused.position != *at));
        let costs = costs.map(|(_, cost)| cost).take(reply.delays.len());
        let estimated = costs.fold(estimated, |sum, cost| sum.saturating_add((*cost).into()));
        members[member] = MemberState {
            incarnation: reply.incarnation,
            sequence: reply.sequence,
            config_version: reply.config_version,
            config: config.unwrap_or(before.config),
            // With a probability of 1 in 3, all estimates of the member count as settled. Otherwise the sum of its
            // unsettled estimates (costs charged before the true cost is known) would only grow.
            estimated: if rng.one_in(3) { Amounts::default() } else { estimated },
        };
    }
    println!(
        "{calls} calls, 0 differences: {reserved} costs reserved, {not_reserved} not reserved, {refused} refused, {lost} \
         times lost, {unknown} times unknown, {adopted} times other limits"
    );
    assert!((reserved > 10_000 && refused > 1_000) || calls < 60_000);
}
