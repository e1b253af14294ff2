//! How a program authenticates at a [`Provider`]: the header that carries its key, and the environment variable that
//! holds the key by convention.

use super::Provider;
use http::{HeaderName, HeaderValue, header::AUTHORIZATION};
use std::fmt;

/// The error of a key that no header can carry: it is empty, or has whitespace, control characters or non-ASCII
/// characters in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvalidKeyError(());

impl Provider {
    /// Returns the header with which a request authenticates by `key`. Its value is marked as
    /// [sensitive](HeaderValue::set_sensitive), so that `Debug` does not show it. Whitespace around the key, such as the
    /// line end of a file, is dropped.
    ///
    /// | provider | header |
    /// |---|---|
    /// | OpenAI ([API reference](https://platform.openai.com/docs/api-reference/authentication)), Groq, Mistral, Cerebras, GitHub, IETF | `authorization: Bearer KEY` |
    /// | Azure OpenAI ([API reference](https://learn.microsoft.com/en-us/azure/ai-foundry/openai/reference#authentication)) | `api-key: KEY` |
    /// | Anthropic ([API overview](https://docs.anthropic.com/en/api/overview#authentication)) | `x-api-key: KEY` |
    /// | Gemini ([API reference](https://ai.google.dev/api#authentication)) | `x-goog-api-key: KEY` |
    ///
    /// Anthropic requires the header `anthropic-version` as well. GitHub Models takes a Bearer token, as OpenAI does.
    ///
    /// ```
    /// use tower_outbound::provider::Provider;
    ///
    /// let (name, value) = Provider::Anthropic.key_header("sk-ant-1\n")?;
    /// assert_eq!((name.as_str(), value.to_str()?), ("x-api-key", "sk-ant-1"));
    /// assert_eq!(format!("{value:?}"), "Sensitive");
    /// # Ok::<_, Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidKeyError`] if the key is empty, or has whitespace, control characters or non-ASCII characters in it.
    pub fn key_header(self, key: &str) -> Result<(HeaderName, HeaderValue), InvalidKeyError> {
        let key = key.trim();
        if key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(InvalidKeyError(()));
        }
        let (name, value) = match self {
            Self::AzureOpenAi => (HeaderName::from_static("api-key"), HeaderValue::from_str(key)),
            Self::Anthropic => (HeaderName::from_static("x-api-key"), HeaderValue::from_str(key)),
            Self::Gemini => (HeaderName::from_static("x-goog-api-key"), HeaderValue::from_str(key)),
            Self::OpenAi | Self::Groq | Self::Mistral | Self::Cerebras | Self::GitHub | Self::Ietf => {
                (AUTHORIZATION, HeaderValue::from_str(&format!("Bearer {key}")))
            }
        };
        let mut value = value.map_err(|_| InvalidKeyError(()))?;
        value.set_sensitive(true);
        Ok((name, value))
    }

    /// Returns the name of the environment variable in which the provider's own libraries and examples expect its key,
    /// such as `OPENAI_API_KEY`. `None` for [`Ietf`](Self::Ietf), which is not one provider.
    ///
    /// | provider | variable |
    /// |---|---|
    /// | OpenAI ([quickstart](https://platform.openai.com/docs/quickstart)) | `OPENAI_API_KEY` |
    /// | Azure OpenAI ([quickstart](https://learn.microsoft.com/en-us/azure/ai-foundry/openai/chatgpt-quickstart)) | `AZURE_OPENAI_API_KEY` |
    /// | Anthropic ([SDKs](https://docs.anthropic.com/en/api/client-sdks)) | `ANTHROPIC_API_KEY` |
    /// | Gemini ([API keys](https://ai.google.dev/gemini-api/docs/api-key)) | `GEMINI_API_KEY` |
    /// | Groq ([quickstart](https://console.groq.com/docs/quickstart)) | `GROQ_API_KEY` |
    /// | Mistral ([quickstart](https://docs.mistral.ai/getting-started/quickstart/)) | `MISTRAL_API_KEY` |
    /// | Cerebras ([quickstart](https://inference-docs.cerebras.ai/quickstart)) | `CEREBRAS_API_KEY` |
    /// | GitHub ([CLI](https://cli.github.com/manual/gh_help_environment)) | `GITHUB_TOKEN` |
    #[must_use]
    pub const fn key_variable(self) -> Option<&'static str> {
        match self {
            Self::OpenAi => Some("OPENAI_API_KEY"),
            Self::AzureOpenAi => Some("AZURE_OPENAI_API_KEY"),
            Self::Anthropic => Some("ANTHROPIC_API_KEY"),
            Self::Gemini => Some("GEMINI_API_KEY"),
            Self::Groq => Some("GROQ_API_KEY"),
            Self::Mistral => Some("MISTRAL_API_KEY"),
            Self::Cerebras => Some("CEREBRAS_API_KEY"),
            Self::GitHub => Some("GITHUB_TOKEN"),
            Self::Ietf => None,
        }
    }
}

// === impl InvalidKeyError ===

impl fmt::Display for InvalidKeyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the key is empty, or has a space, a line end or another character that is no printable ASCII")
    }
}

impl std::error::Error for InvalidKeyError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_provider_gets_its_key_in_its_own_header_which_debug_does_not_show() {
        for provider in Provider::ALL {
            let (name, value) = provider.key_header(" s3cr3t\n").unwrap();
            let expected = match provider {
                Provider::AzureOpenAi => ("api-key", "s3cr3t"),
                Provider::Anthropic => ("x-api-key", "s3cr3t"),
                Provider::Gemini => ("x-goog-api-key", "s3cr3t"),
                _ => ("authorization", "Bearer s3cr3t"),
            };
            assert_eq!((name.as_str(), value.to_str().unwrap()), expected, "{provider}");
            assert!(!format!("{value:?}").contains("s3cr3t"));
            let variable = provider.key_variable();
            assert_eq!(variable.is_none(), provider == Provider::Ietf);
        }
    }

    #[test]
    fn a_key_that_no_header_can_carry_is_refused_without_being_shown() {
        for key in ["", " \n", "s3cr3t s3cr3t", "s3cr3t\r\nx: y", "s3cr3t\0", "schlüssel"] {
            let error = Provider::OpenAi.key_header(key).unwrap_err();
            assert!(!format!("{error} {error:?}").contains("s3cr3t"));
        }
    }
}
