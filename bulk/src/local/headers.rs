//! The headers in which the local provider reports its limits, in the dialect of a real provider: the same limits, under
//! the same names, and no others.

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use std::time::{Duration, SystemTime};
use tower_outbound::{provider::Provider as Dialect, rate::Budget};

/// A limit of the provider, and what remains of it.
pub(super) struct Report {
    pub(super) budget: Budget,
    pub(super) period: Duration,
    pub(super) limit: u64,
    pub(super) remaining: u64,
    pub(super) until_full: Duration,
}

const MINUTE: u64 = 60;
const HOUR: u64 = 60 * MINUTE;
const DAY: u64 = 24 * HOUR;

impl Report {
    /// Adds the headers of this limit, if a provider of this dialect reports such a limit.
    pub(super) fn add_to(&self, headers: &mut HeaderMap, dialect: Dialect) {
        if dialect == Dialect::Ietf {
            return self.add_ietf_fields(headers);
        }
        let Some(names) = self.names(dialect) else { return };
        let reset = match dialect {
            Dialect::Anthropic => humantime::format_rfc3339_seconds(SystemTime::now() + self.until_full).to_string(),
            Dialect::AzureOpenAi => self.until_full.as_secs().to_string(),
            Dialect::GitHub => {
                let full_at = SystemTime::now() + self.until_full;
                let since = full_at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
                since.as_secs().to_string()
            }
            _ => format!("{}ms", self.until_full.as_millis()),
        };
        let values = [self.limit.to_string(), self.remaining.to_string(), reset];
        // Mistral does not report when a limit is full.
        let reported = if dialect == Dialect::Mistral { 2 } else { 3 };
        for (name, value) in names.iter().zip(values).take(reported) {
            if let (Ok(name), Ok(value)) = (name.parse::<HeaderName>(), HeaderValue::try_from(value)) {
                // A provider with one name for limits of several periods reports one of them.
                headers.entry(name).or_insert(value);
            }
        }
    }

    /// The names of the headers with the limit, what remains of it, and when it is full.
    fn names(&self, dialect: Dialect) -> Option<[String; 3]> {
        let (budget, period) = (self.budget.name(), self.period.as_secs());
        let parts = ["limit", "remaining", "reset"];
        let of_openai = |what: &str| parts.map(|part| format!("x-ratelimit-{part}-{what}"));
        let is_total = matches!(self.budget, Budget::Requests | Budget::Tokens);
        match dialect {
            // The period of the limit of requests is a minute or a day, and is not reported.
            Dialect::OpenAi if is_total && (period == MINUTE || (period == DAY && budget == "requests")) => {
                Some(of_openai(budget))
            }
            Dialect::AzureOpenAi if is_total && period == MINUTE => Some(of_openai(budget)),
            Dialect::Groq if (budget, period) == ("requests", DAY) || (budget, period) == ("tokens", MINUTE) => {
                Some(of_openai(budget))
            }
            Dialect::Anthropic if period == MINUTE && !matches!(self.budget, Budget::Named(_)) => {
                let budget = budget.replace('_', "-");
                Some(parts.map(|part| format!("anthropic-ratelimit-{budget}-{part}")))
            }
            Dialect::Mistral if is_total && period == MINUTE => {
                let budget = if budget == "requests" { "req" } else { budget };
                Some(of_openai(&format!("{budget}-minute")))
            }
            Dialect::Cerebras if is_total => {
                let period = match period {
                    MINUTE => "minute",
                    HOUR => "hour",
                    DAY => "day",
                    _ => return None,
                };
                Some(of_openai(&format!("{budget}-{period}")))
            }
            Dialect::GitHub if (budget, period) == ("requests", HOUR) => {
                Some(parts.map(|part| format!("x-ratelimit-{part}")))
            }
            _ => None,
        }
    }

    /// Adds an item of this limit to the fields of the draft, which have a name for each limit and the unit that it
    /// counts, requests if none is told.
    fn add_ietf_fields(&self, headers: &mut HeaderMap) {
        let Self {
            budget,
            limit,
            remaining,
            ..
        } = self;
        let (period, reset) = (self.period.as_secs(), self.until_full.as_secs());
        let name = format!("\"{budget}-{period}\"");
        let unit = match budget {
            Budget::Requests => String::new(),
            budget => format!(";qu=\"{budget}\""),
        };
        let items = [
            ("ratelimit-policy", format!("{name};q={limit};w={period}{unit}")),
            ("ratelimit", format!("{name};r={remaining};t={reset}")),
        ];
        for (field, item) in items {
            let before = headers.get(field).and_then(|before| before.to_str().ok());
            let list = before.map_or_else(|| item.clone(), |before| format!("{before}, {item}"));
            if let Ok(list) = HeaderValue::try_from(list) {
                headers.insert(field, list);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tower_outbound::provider::Unit;

    /// What a limit counts, its period in seconds, its amount, and what remains of it.
    type Read = (Unit, Option<u64>, Option<u64>, Option<u64>);

    /// The limits that the library reads in the headers of a provider that has all of these limits.
    fn read(dialect: Dialect) -> Vec<Read> {
        let mut headers = HeaderMap::new();
        for (budget, period, limit) in [
            ("requests", MINUTE, 100),
            ("tokens", MINUTE, 1_000),
            ("input_tokens", MINUTE, 700),
            ("output_tokens", MINUTE, 300),
            ("requests", HOUR, 2_000),
            ("requests", DAY, 5_000),
            ("tokens", DAY, 90_000),
            ("images", MINUTE, 10),
        ] {
            let report = Report {
                budget: Budget::from(budget),
                period: Duration::from_secs(period),
                limit,
                remaining: limit - 5,
                until_full: Duration::from_secs(3),
            };
            report.add_to(&mut headers, dialect);
        }
        let info = dialect.rate_limit_info(&headers, SystemTime::now());
        let windows = info.windows.into_iter().map(|window| {
            assert_eq!(window.reset.is_some(), dialect != Dialect::Mistral, "{dialect}");
            let period = window.period.map(|period| period.as_secs());
            (window.unit, period, window.limit, window.remaining)
        });
        windows.collect()
    }

    #[test]
    fn each_limit_is_reported_as_the_provider_of_the_dialect_reports_it() {
        let window = |unit, period: u64, limit: u64| (unit, Some(period), Some(limit), Some(limit - 5));
        let requests = |period, limit| window(Unit::Requests, period, limit);
        let tokens = |period, limit| window(Unit::Tokens, period, limit);
        let of_openai = [(Unit::Requests, None, Some(100), Some(95)), tokens(MINUTE, 1_000)];
        assert_eq!(read(Dialect::OpenAi), of_openai);
        assert_eq!(read(Dialect::AzureOpenAi), of_openai);
        let anthropic = [
            requests(MINUTE, 100),
            tokens(MINUTE, 1_000),
            window(Unit::InputTokens, MINUTE, 700),
            window(Unit::OutputTokens, MINUTE, 300),
        ];
        assert_eq!(read(Dialect::Anthropic), anthropic);
        assert_eq!(read(Dialect::Gemini), []);
        assert_eq!(read(Dialect::Groq), [requests(DAY, 5_000), tokens(MINUTE, 1_000)]);
        assert_eq!(read(Dialect::Mistral), [requests(MINUTE, 100), tokens(MINUTE, 1_000)]);
        let cerebras = [
            requests(MINUTE, 100),
            requests(HOUR, 2_000),
            requests(DAY, 5_000),
            tokens(MINUTE, 1_000),
            tokens(DAY, 90_000),
        ];
        assert_eq!(read(Dialect::Cerebras), cerebras);
        assert_eq!(read(Dialect::GitHub), [requests(HOUR, 2_000)]);
        // The library reads the units that it knows, and skips input tokens, output tokens and images.
        let ietf = [
            requests(MINUTE, 100),
            tokens(MINUTE, 1_000),
            requests(HOUR, 2_000),
            requests(DAY, 5_000),
            tokens(DAY, 90_000),
        ];
        assert_eq!(read(Dialect::Ietf), ietf);
    }
}
