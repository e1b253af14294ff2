//! Keys of the environment, and the hosts that they belong to.

use http::{HeaderName, HeaderValue, Uri};
use std::{env, net::IpAddr};
use tower_outbound::provider::Provider;

/// A key of the environment, as the header that holds it.
pub(super) struct Key {
    pub(super) variable: &'static str,
    pub(super) header: (HeaderName, HeaderValue),
}

/// The value of a variable of the environment, without white space around it; `None` if it is empty or not set.
pub(super) fn from_environment(variable: &str) -> Option<String> {
    // Some names make `var_os` panic on some systems.
    if variable.is_empty() || variable.contains(['=', '\0']) {
        return None;
    }
    let key = env::var(variable).ok()?.trim().to_owned();
    (!key.is_empty()).then_some(key)
}

/// The provider whose API is at this host.
pub(super) fn provider_of(host: &str) -> Option<Provider> {
    let host = host.to_ascii_lowercase();
    let at = |domain: &str| {
        host.strip_suffix(domain)
            .is_some_and(|before| before.is_empty() || before.ends_with('.'))
    };
    [
        ("openai.com", Provider::OpenAi),
        ("openai.azure.com", Provider::AzureOpenAi),
        ("anthropic.com", Provider::Anthropic),
        ("generativelanguage.googleapis.com", Provider::Gemini),
        ("groq.com", Provider::Groq),
        ("mistral.ai", Provider::Mistral),
        ("cerebras.ai", Provider::Cerebras),
        ("api.github.com", Provider::GitHub),
    ]
    .into_iter()
    .find_map(|(domain, provider)| at(domain).then_some(provider))
}

/// Returns whether the provider's key of the environment may be sent to a URL unasked: only to https URLs of the provider
/// itself, or of any other host if the user names the provider, and never to a server of this machine.
pub(super) fn may_reach(url: &Uri, provider: Provider, is_named: bool) -> bool {
    let host = url.host().unwrap_or_default();
    let is_own = provider_of(host) == Some(provider);
    url.scheme_str() == Some("https") && !is_loopback(host) && (is_own || is_named)
}

fn is_loopback(host: &str) -> bool {
    let address = host.trim_matches(['[', ']']).parse::<IpAddr>();
    host.eq_ignore_ascii_case("localhost") || address.is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_belongs_to_one_provider() {
        assert_eq!(provider_of("api.OpenAI.com"), Some(Provider::OpenAi));
        assert_eq!(provider_of("my.openai.azure.com"), Some(Provider::AzureOpenAi));
        assert_eq!(provider_of("notopenai.com"), None);
        assert_eq!(provider_of("openai.com.evil.org"), None);
    }

    #[test]
    fn the_key_of_the_environment_reaches_only_its_provider_unasked() {
        let may_reach = |url: &'static str, is_named| may_reach(&Uri::from_static(url), Provider::OpenAi, is_named);
        assert!(may_reach("https://api.openai.com/v1", false));
        assert!(may_reach("https://proxy.example.com/v1", true));
        for (url, is_named) in [
            ("https://proxy.example.com/v1", false),
            ("https://api.groq.com/openai/v1", false),
            ("http://api.openai.com/v1", true),
            ("https://127.0.0.1/v1", true),
        ] {
            assert!(!may_reach(url, is_named), "{url}");
        }
    }

    #[test]
    fn loopback_is_known_by_name_and_by_address() {
        for host in ["127.0.0.1", "127.1.2.3", "localhost", "[::1]"] {
            assert!(is_loopback(host), "{host}");
        }
        assert!(!is_loopback("api.openai.com"));
    }
}
