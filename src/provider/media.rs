//! [`Medium`]: what an image, a recording or another file in a prompt costs, whatever its size in bytes.
//!
//! | medium | counts as | tokens | source |
//! |---|---|---|---|
//! | image in OpenAI's format | 1024 x 1024 pixels: 85, and 170 for each of 4 tiles | 765 | [OpenAI](https://platform.openai.com/docs/guides/images-vision#calculating-costs) |
//! | the same with `detail: low` | any size | 85 | the same |
//! | image in Anthropic's format | the largest that is not scaled down, about 1.15 megapixels: width x height / 750 | 1,600 | [Anthropic](https://docs.anthropic.com/en/docs/build-with-claude/vision#calculate-image-costs) |
//! | image in Gemini's format | 1024 x 1024 pixels: 258 for each of 4 tiles | 1,032 | [Gemini](https://ai.google.dev/gemini-api/docs/tokens) |
//! | audio in OpenAI's format | one minute, at 10 tokens a second | 600 | [OpenAI](https://platform.openai.com/docs/guides/realtime-costs) |
//! | audio in Gemini's format | one minute, at 32 tokens a second | 1,920 | [Gemini](https://ai.google.dev/gemini-api/docs/tokens) |
//! | any other file | one page of text: 1,500 to 3,000 | 1,500 | [Anthropic](https://docs.anthropic.com/en/docs/build-with-claude/pdf-support#estimate-your-costs) |

/// A medium in the format of an API.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Medium {
    OpenAiImage,
    LowDetailImage,
    AnthropicImage,
    GeminiImage,
    OpenAiAudio,
    GeminiAudio,
    File,
}

/// The kind of a medium.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Kind {
    Image,
    Audio,
    Other,
}

/// A text of at least this many bytes counts as a file if it looks like base64.
const MIN_BASE64: usize = 1_024;

// === impl Medium ===

impl Medium {
    pub(super) const fn tokens(self) -> u64 {
        match self {
            Self::OpenAiImage => 765,
            Self::LowDetailImage => 85,
            Self::AnthropicImage => 1_600,
            Self::GeminiImage => 1_032,
            Self::OpenAiAudio => 600,
            Self::GeminiAudio => 1_920,
            Self::File => 1_500,
        }
    }
}

// === impl Kind ===

impl Kind {
    /// Returns the kind of a part of a message by its `type`, such as `input_image`.
    pub(super) fn of_name(name: &str) -> Option<Self> {
        name.contains("image").then_some(Self::Image)
    }

    /// Returns the kind that a MIME type tells.
    pub(super) fn of_mime(mime: &str) -> Self {
        match mime.split('/').next() {
            Some("image") => Self::Image,
            Some("audio") => Self::Audio,
            _ => Self::Other,
        }
    }

    /// Returns the kind that a URL tells which has the data itself: `data:image/png;base64,…`.
    pub(super) fn of_address(url: &str) -> Option<Self> {
        // Before the data are a MIME type and its parameters, which are short.
        let head = url
            .strip_prefix("data:")?
            .split(',')
            .next()
            .filter(|head| head.len() <= 128)?;
        head.strip_suffix(";base64").map(Self::of_mime)
    }

    pub(super) const fn in_openai(self, has_low_detail: bool) -> Medium {
        match self {
            Self::Image if has_low_detail => Medium::LowDetailImage,
            Self::Image => Medium::OpenAiImage,
            Self::Audio => Medium::OpenAiAudio,
            Self::Other => Medium::File,
        }
    }

    pub(super) const fn in_anthropic(self) -> Medium {
        match self {
            Self::Image => Medium::AnthropicImage,
            Self::Audio | Self::Other => Medium::File,
        }
    }

    pub(super) const fn in_gemini(self) -> Medium {
        match self {
            Self::Image => Medium::GeminiImage,
            Self::Audio => Medium::GeminiAudio,
            Self::Other => Medium::File,
        }
    }
}

/// Returns whether a text is a file in base64, rather than words: long, without a space or any other character that
/// base64 does not have, and with capitals, small letters and digits.
pub(super) fn is_base64(text: &str) -> bool {
    let bytes = text.as_bytes();
    bytes.len() >= MIN_BASE64
        && bytes
            .iter()
            .all(|byte| byte.is_ascii_alphanumeric() || b"+/=-_\r\n".contains(byte))
        && bytes.iter().any(u8::is_ascii_uppercase)
        && bytes.iter().any(u8::is_ascii_lowercase)
        && bytes.iter().any(u8::is_ascii_digit)
}
