//! Each provider's limits as they really are: 500 calls through an executor against a model of the provider that
//! enforces them exactly. The page `docs/limits.md` shows users the same limits, and is compared with this table.

#[path = "support/provider.rs"]
mod provider;
mod support;

use http::Request;
use provider::{Dialect, Limit, Provider, Shape, Truth};
use std::time::{Duration, SystemTime};
use support::ms;
use tower::Layer;
use tower_outbound::{
    Call, Executor, Limits, Rate, RateLimiter, Shutdown,
    body::CollectLayer,
    error::Exhausted,
    provider::{CharacterEstimate, FeedbackLayer, Provider as Headers, UsageLayer},
    rate::{ByUsage, RequestCost},
};

const CALLS: u64 = 500;
const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// One provider: how a user writes its limits, and what it really enforces.
struct Row {
    name: &'static str,
    limits: Limits,
    /// The source of `limits`, as the page shows it.
    code: &'static str,
    headers: Option<Headers>,
    dialect: Dialect,
    enforced: Vec<Limit>,
    /// The mean tokens of a call: of its prompt, and of its answer.
    mean: [u64; 2],
    /// The budget that the calls have the least of.
    binding: &'static str,
    /// The budgets whose buckets are, for the user and the provider, the same in size, and how much less the user's may
    /// hold when all calls have ended: what the headers are rounded by. Settled calls leave no difference.
    same: &'static [(&'static str, i128)],
}

macro_rules! limits {
    ($limits:expr) => {
        ($limits, stringify!($limits))
    };
}

fn limit(budget: &'static str, amount: u64, period: Duration, shape: Shape) -> Limit {
    Limit {
        budget,
        amount,
        period,
        shape,
    }
}

fn rows() -> Vec<Row> {
    use Shape::{Bucket, Fixed, Sliding};
    let row = |name, dialect, headers, (limits, code): (Limits, &'static str)| Row {
        name,
        limits,
        code,
        headers,
        dialect,
        enforced: Vec::new(),
        mean: [300, 200],
        binding: "tokens",
        same: &[],
    };
    let openai = limits!(
        Limits::new()
            .requests(Rate::per_minute(500).burst(8))
            .tokens(Rate::per_minute(30_000))
    );
    let anthropic = limits!(
        Limits::new()
            .requests(Rate::per_minute(50))
            .input_tokens(Rate::per_minute(30_000))
            .output_tokens(Rate::per_minute(8_000))
    );
    let gemini = limits!(
        Limits::new()
            .requests(Rate::per_minute(10).burst(1))
            .tokens(Rate::per_minute(225_000).burst(25_000))
            .requests(Rate::utc_day(250).starting_at(Duration::from_secs(8 * 60 * 60)))
    );
    let groq = limits!(
        Limits::new()
            .requests(Rate::per_minute(30))
            .requests(Rate::per_day(14_400))
            .tokens(Rate::per_minute(6_000))
            .tokens(Rate::per_day(500_000))
    );
    let mistral = limits!(
        Limits::new()
            .requests(Rate::per_second(1))
            .tokens(Rate::per_minute(450_000).burst(50_000))
    );
    let bedrock = limits!(
        Limits::new()
            .requests(Rate::per_minute(200))
            .tokens(Rate::per_minute(200_000))
    );
    vec![
        Row {
            enforced: vec![
                limit("requests", 500, MINUTE, Bucket),
                limit("tokens", 30_000, MINUTE, Bucket),
            ],
            same: &[("tokens", 1)],
            ..row("OpenAI", Dialect::OpenAi, Some(Headers::OpenAi), openai)
        },
        Row {
            enforced: vec![
                limit("requests", 50, MINUTE, Bucket),
                limit("input_tokens", 30_000, MINUTE, Bucket),
                limit("output_tokens", 8_000, MINUTE, Bucket),
            ],
            binding: "output_tokens",
            same: &[("requests", 1), ("input_tokens", 501), ("output_tokens", 501)],
            ..row("Anthropic", Dialect::Anthropic, Some(Headers::Anthropic), anthropic)
        },
        Row {
            enforced: vec![
                limit("requests", 10, MINUTE, Fixed),
                limit("tokens", 250_000, MINUTE, Sliding),
                limit("requests", 250, DAY, Fixed),
            ],
            binding: "requests",
            ..row("Gemini", Dialect::Gemini, Some(Headers::Gemini), gemini)
        },
        Row {
            enforced: vec![
                limit("requests", 30, MINUTE, Bucket),
                limit("requests", 14_400, DAY, Bucket),
                limit("tokens", 6_000, MINUTE, Bucket),
                limit("tokens", 500_000, DAY, Bucket),
            ],
            same: &[("requests", 1), ("tokens", 1)],
            ..row("Groq", Dialect::Groq, Some(Headers::Groq), groq)
        },
        Row {
            enforced: vec![
                limit("requests", 1, SECOND, Sliding),
                limit("tokens", 500_000, MINUTE, Sliding),
            ],
            binding: "requests",
            ..row("Mistral", Dialect::Mistral, Some(Headers::Mistral), mistral)
        },
        Row {
            enforced: vec![
                limit("requests", 200, MINUTE, Bucket),
                limit("tokens", 200_000, MINUTE, Bucket),
            ],
            mean: [2_000, 200],
            same: &[("requests", 1), ("tokens", 1)],
            ..row("Amazon Bedrock", Dialect::Bedrock, None, bedrock)
        },
    ]
}

/// Returns a call, and what it will truly use. Its answer may have twice as many tokens as the answers have on average.
fn call(row: &Row, random: &mut fastrand::Rng) -> (Call<String>, Truth) {
    let [input, output] = row.mean.map(|mean| random.u64(mean / 2..=mean * 3 / 2));
    // The prompt turns out to be a little shorter than its estimate of a token for every four characters.
    let text = "word".repeat((input + input / 10) as usize);
    let body = serde_json::json!({
        "messages": [{ "role": "user", "content": text }],
        "max_tokens": row.mean[1] * 2,
    });
    let truth = Truth {
        input,
        output,
        takes: ms(random.u64(200..=2_000)),
    };
    let request = Request::post("http://localhost/v1/chat").extension(truth);
    (Call::from(request.body(body.to_string()).unwrap()), truth)
}

async fn run(row: Row) {
    let provider = Provider::new(row.dialect, row.enforced.clone());
    // The days of the model begin when it does, as those of Gemini begin at 8:00 UTC in winter.
    let limiter = RateLimiter::at(row.limits.clone(), SystemTime::UNIX_EPOCH + DAY * 20_000 + DAY / 3).unwrap();
    let headers = row.headers.unwrap_or(Headers::Ietf);
    let metered = UsageLayer::new().layer(provider.clone());
    let client = CollectLayer::new(1 << 20).layer(FeedbackLayer::new(limiter.clone(), headers).layer(metered));
    let times = if row.dialect == Dialect::Bedrock { 5 } else { 1 };
    let executor = Executor::builder()
        .queue_capacity(CALLS as usize)
        .concurrency_limit(200)
        .limiter(limiter.clone())
        .cost(CharacterEstimate::new())
        .settle(ByUsage::default().price(move |usage, settled| {
            let (input, output) = (usage.input.unwrap(), usage.output.unwrap());
            settled.with("tokens", input + times * output)
        }))
        .build(client)
        .unwrap();
    executor.start().unwrap();
    let mut random = fastrand::Rng::with_seed(7);
    let mut events = Vec::new();
    for _ in 0..CALLS {
        let (call, truth) = call(&row, &mut random);
        let handle = executor.submit(call).await.unwrap();
        events.push((handle.event().clone(), truth));
    }
    let report = executor.stop(Shutdown::Graceful).await;
    let name = row.name;
    assert_eq!(provider.rejections(), Vec::<String>::new(), "{name}");
    assert_eq!(executor.monitor().totals().completed, CALLS, "{name}: {report:?}");
    for (event, truth) in events {
        let used = event.finished().await.api_tokens_used;
        assert_eq!(used, Some(truth.input + truth.output), "{name}");
    }
    let parts = provider.used_parts();
    let most = parts.iter().max_by(|one, other| one.1.total_cmp(&other.1)).unwrap();
    assert!(
        most.1 >= 0.99 && most.1 <= 1.0 && most.0 == row.binding,
        "{name}: {parts:?}"
    );
    for (budget, within) in row.same {
        let available = limiter.available().of(*budget).unwrap();
        let difference = provider.left(budget) - i128::from(available);
        assert!((0..=*within).contains(&difference), "{name}: {difference} {budget}");
    }
}

#[tokio::test(start_paused = true)]
async fn five_hundred_calls_use_the_limits_of_each_provider_without_one_rejection_and_settle_to_the_token() {
    for row in rows() {
        run(row).await;
    }
}

/// What tokens cost, in millionths of a dollar.
fn price(input: u64, output: u64) -> u64 {
    3 * input + 15 * output
}

/// A cap that the user sets, and no provider: of what the calls of a day may cost.
#[tokio::test(start_paused = true)]
async fn money_per_day_is_used_up_and_never_exceeded_and_is_settled_to_the_millionth() {
    const CAP: u64 = 1_000_000;
    let limits = Limits::new()
        .requests(Rate::per_minute(500).burst(8))
        .budget("micro_usd", Rate::utc_day(CAP).refuse());
    let noon = SystemTime::UNIX_EPOCH + DAY * 20_000 + DAY / 2;
    let limiter = RateLimiter::at(limits, noon).unwrap();
    let provider = Provider::new(Dialect::OpenAi, vec![limit("requests", 500, MINUTE, Shape::Bucket)]);
    let client = CollectLayer::new(1 << 20).layer(UsageLayer::new().layer(provider));
    let executor = Executor::builder()
        .queue_capacity(CALLS as usize)
        // Once the cap is reached, all calls that wait are refused, and what those in flight give back is not used.
        .concurrency_limit(2)
        .limiter(limiter.clone())
        .cost(|request: &Request<String>| {
            let cost = CharacterEstimate::new().cost(request);
            cost.with("micro_usd", price(cost.input_tokens, cost.output_tokens))
        })
        .settle(ByUsage::default().price(|usage, charged| {
            let (input, output) = (usage.input.unwrap(), usage.output.unwrap());
            charged.with("micro_usd", price(input, output))
        }))
        .build(client)
        .unwrap();
    executor.start().unwrap();
    let row = &rows()[0];
    let mut random = fastrand::Rng::with_seed(7);
    let mut handles = Vec::new();
    for _ in 0..CALLS {
        let (call, truth) = call(row, &mut random);
        handles.push((executor.submit(call).await.unwrap(), truth));
    }
    let (mut spent, mut refused) = (0, 0);
    for (handle, truth) in handles {
        match handle.await {
            Ok(_) => spent += price(truth.input, truth.output),
            Err(error) => {
                let exhausted = error.find::<Exhausted>().expect("only the cap refuses calls");
                assert_eq!(exhausted.resets_at(), noon + DAY / 2);
                refused += 1;
            }
        }
    }
    assert!((CAP * 99 / 100..=CAP).contains(&spent), "{spent}");
    assert!((200..300).contains(&refused), "{refused}");
    assert_eq!(limiter.available().of("micro_usd"), Some(CAP - spent));
}

/// Source text without what does not matter to the compiler.
fn compact(code: &str) -> String {
    let code: String = code.chars().filter(|character| !character.is_whitespace()).collect();
    code.replace(",)", ")")
}

#[test]
fn the_page_of_limits_shows_the_limits_of_this_table() {
    let page = include_str!("../docs/limits.md");
    let names_of_table: Vec<_> = page
        .lines()
        .filter(|line| line.starts_with("| ["))
        .map(|line| &line[3..line.find(']').unwrap()])
        .collect();
    let sections: Vec<(&str, String)> = page
        .split("\n### ")
        .skip(1)
        .filter_map(|section| {
            let (name, rest) = section.split_once('\n')?;
            let (_, code) = rest.split_once("```rust\n")?;
            let (code, _) = code.split_once("```")?;
            Some((name, compact(code)))
        })
        .collect();
    let rows = rows();
    let expected: Vec<_> = rows.iter().map(|row| (row.name, compact(row.code))).collect();
    assert_eq!(names_of_table, rows.iter().map(|row| row.name).collect::<Vec<_>>());
    for (name, code) in expected {
        let shown = sections.iter().find(|(of, _)| *of == name);
        assert_eq!(shown.map(|(_, code)| code.as_str()), Some(code.as_str()), "{name}");
    }
}

#[test]
#[cfg(feature = "serde")]
fn the_configuration_on_the_page_of_limits_has_the_limits_of_anthropic() {
    let page = include_str!("../docs/limits.md");
    let (_, json) = page.split_once("```json\n").unwrap();
    let (json, _) = json.split_once("```").unwrap();
    let config: tower_outbound::executor::Config = serde_json::from_str(json).unwrap();
    let executor = config.into_builder().unwrap().build_for_closures::<()>().unwrap();
    let limits = executor.monitor().limiter().limits();
    let anthropic = rows().into_iter().find(|row| row.name == "Anthropic").unwrap().limits;
    let amounts = |limits: Limits| -> Vec<_> { limits.rates().map(|(budget, rate)| (budget, rate.amount())).collect() };
    assert_eq!(amounts(limits), amounts(anthropic));
}
