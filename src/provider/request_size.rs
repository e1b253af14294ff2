//! [`RequestSize`]: how many tokens a request costs, by the length of its JSON body and the answers that it allows.
//!
//! The body is read in one pass. Texts are counted where they stand, and what is not counted is skipped, so that a body
//! with megabytes of images costs little more than finding its end.

use super::{
    media::{Kind, Medium, is_base64},
    model::model_in_path,
};
use crate::rate::CallKind;
use http::Uri;
use serde::de::{Deserialize, DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use std::fmt;

/// What a request is estimated to cost, as described in the [module docs](super#estimates).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct RequestSize {
    prompt: Size,
    /// The longest answer that the request allows, in tokens. `None` if the request sets no bound.
    max_answer: Option<u64>,
    /// How many answers the request asks for, for each prompt. Zero if it does not tell.
    choices: u64,
    /// How many prompts the request has that each get answers of their own. Zero if it does not tell.
    prompts: u64,
    /// Whether the answers are embeddings, which cost no tokens.
    is_embedding: bool,
    /// The model that the request is for, if it tells.
    model: Option<CallKind>,
}

/// The size of a part of a prompt.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Size {
    characters: u64,
    /// The tokens of what is not text: numbers, which are token ids or count as one token, images, audio and files.
    tokens: u64,
    /// How many texts and lists of token ids there are.
    texts: u64,
    /// Whether the value is a list of texts, of token ids, or of lists of token ids.
    is_list_of_texts: bool,
    has_objects: bool,
}

/// A JSON value whose texts are counted at any depth.
struct Texts;

/// A list, each of whose elements is an image, or one image.
struct Images;

/// The name of a field.
struct Name(String);

/// An object in a prompt: a message, or a part of one.
#[derive(Default)]
struct Part {
    size: Size,
    /// What the field `type` names.
    kind: Option<Kind>,
    /// Media whose kind only the field `type` tells, and what each of them is if it is an image.
    untold: Vec<Medium>,
}

/// What a prompt has in the place of a medium: its address, its data, or an object with one of them.
#[derive(Clone, Copy, Debug, Default)]
struct Source {
    /// The kind that its MIME type tells.
    kind: Option<Kind>,
    has_low_detail: bool,
    /// Whether it is a text after all, as the sources of Anthropic's documents can be.
    is_text: bool,
    text: Size,
}

/// A JSON value that is read as a [`Source`].
struct SourceValue;

// === impl RequestSize ===

impl RequestSize {
    /// Reads a body. `uri` is where it is sent: a path with `embed` in it is one of embeddings. A body that is not JSON
    /// counts as text.
    pub(super) fn read(uri: &Uri, body: &[u8]) -> Self {
        let mut size = serde_json::from_slice(body).unwrap_or_else(|_| Self {
            prompt: Size::of_characters(body.len()),
            ..Self::default()
        });
        size.is_embedding |= uri.path().contains("embed");
        // Where the path names a model, a provider does not read it in the body.
        size.model = model_in_path(uri.path()).map(CallKind::of).or(size.model);
        size
    }

    /// Returns the tokens of the prompt: one for every four characters, and those of what is not text.
    pub(super) fn prompt(&self) -> u64 {
        self.prompt.characters.div_ceil(4).saturating_add(self.prompt.tokens)
    }

    pub(super) const fn model(&self) -> Option<CallKind> {
        self.model
    }

    /// Returns how many answers the request asks for that cost tokens.
    pub(super) fn answers(&self) -> u64 {
        if self.is_embedding {
            return 0;
        }
        self.choices.max(1).saturating_mul(self.prompts.max(1))
    }

    /// Returns the tokens of the longest answers that the request allows, all together. `None` if it sets no bound.
    pub(super) fn max_answers(&self) -> Option<u64> {
        match self.answers() {
            0 => Some(0),
            answers => self.max_answer.map(|max| max.saturating_mul(answers)),
        }
    }

    fn add_max_answer(&mut self, number: &Value) {
        self.max_answer = self.max_answer.max(number.as_u64());
    }

    fn add_choices(&mut self, number: &Value) {
        self.choices = self.choices.max(number.as_u64().unwrap_or(0));
    }

    /// Adds a schema, of which the model reads the names as well as the texts.
    fn add_json(&mut self, json: &Value) {
        self.prompt.add(Size::of_characters(json.to_string().chars().count()));
    }

    /// Reads Gemini's settings.
    fn add_generation_config(&mut self, config: &Value) {
        let field = |camel, snake| config.get(camel).or_else(|| config.get(snake));
        if let Some(max) = field("maxOutputTokens", "max_output_tokens") {
            self.add_max_answer(max);
        }
        if let Some(count) = field("candidateCount", "candidate_count") {
            self.add_choices(count);
        }
        for schema in [
            field("responseSchema", "response_schema"),
            field("responseJsonSchema", "response_json_schema"),
        ]
        .into_iter()
        .flatten()
        {
            self.add_json(schema);
        }
    }
}

impl<'de> Deserialize<'de> for RequestSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Self::default())
    }
}

impl<'de> Visitor<'de> for RequestSize {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Self, A::Error> {
        while let Some(Name(name)) = map.next_key()? {
            match name.as_str() {
                "messages" | "system" | "instructions" | "contents" | "systemInstruction" | "system_instruction"
                | "content" | "requests" | "inputs" | "texts" | "query" | "documents" => {
                    self.prompt.add(map.next_value_seed(Texts)?);
                }
                "input" => {
                    let input = map.next_value_seed(Texts)?;
                    // The items of the other lists that OpenAI calls `input` are objects.
                    self.is_embedding |= input.is_list_of_texts;
                    self.prompt.add(input);
                }
                "prompt" => {
                    let prompt = map.next_value_seed(Texts)?;
                    self.prompts = prompt.texts;
                    self.prompt.add(prompt);
                }
                "images" => self.prompt.add(map.next_value_seed(Images)?),
                "tools" | "functions" | "response_format" | "text" => self.add_json(&map.next_value()?),
                "generationConfig" | "generation_config" => self.add_generation_config(&map.next_value()?),
                "max_tokens" | "max_completion_tokens" | "max_output_tokens" | "max_tokens_to_sample" => {
                    self.add_max_answer(&map.next_value()?);
                }
                "n" | "best_of" => self.add_choices(&map.next_value()?),
                "model" => {
                    let model: Value = map.next_value()?;
                    self.is_embedding |= model.as_str().is_some_and(|model| model.contains("embed"));
                    self.model = model.as_str().map(CallKind::of);
                }
                "encoding_format" | "dimensions" => {
                    map.next_value::<IgnoredAny>()?;
                    self.is_embedding = true;
                }
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(self)
    }
}

// === impl Size ===

impl Size {
    fn of_characters(count: usize) -> Self {
        Self {
            characters: count as u64,
            texts: 1,
            ..Self::default()
        }
    }

    fn of_tokens(tokens: u64) -> Self {
        Self {
            tokens,
            ..Self::default()
        }
    }

    fn of_text(text: &str) -> Self {
        match Kind::of_address(text) {
            Some(kind) => Self::of_tokens(kind.in_openai(false).tokens()),
            None if is_base64(text) => Self::of_tokens(Medium::File.tokens()),
            None => Self::of_characters(text.chars().count()),
        }
    }

    fn add(&mut self, other: Self) {
        self.characters = self.characters.saturating_add(other.characters);
        self.tokens = self.tokens.saturating_add(other.tokens);
        self.texts = self.texts.saturating_add(other.texts);
        self.has_objects |= other.has_objects;
    }
}

// === impl Texts ===

impl<'de> DeserializeSeed<'de> for Texts {
    type Value = Size;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Size, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Texts {
    type Value = Size;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Size, E> {
        Ok(Size::of_text(text))
    }

    fn visit_unit<E: Error>(self) -> Result<Size, E> {
        Ok(Size::default())
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<Size, E> {
        Ok(Size::default())
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<Size, E> {
        Ok(Size::of_tokens(1))
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<Size, E> {
        Ok(Size::of_tokens(1))
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<Size, E> {
        Ok(Size::of_tokens(1))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Size, A::Error> {
        let mut size = Size::default();
        while let Some(element) = seq.next_element_seed(Self)? {
            size.add(element);
        }
        if size.texts == 0 && size.tokens > 0 {
            // A list of token ids is one text.
            size.texts = 1;
        }
        size.is_list_of_texts = size.texts > 0 && !size.has_objects;
        Ok(size)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Size, A::Error> {
        let mut part = Part::default();
        while let Some(Name(name)) = map.next_key()? {
            part.read(&name, &mut map)?;
        }
        Ok(part.size())
    }
}

// === impl Part ===

impl Part {
    /// Reads the value of a field of this name.
    fn read<'de, A: MapAccess<'de>>(&mut self, name: &str, map: &mut A) -> Result<(), A::Error> {
        match name {
            "type" => {
                let kind: Value = map.next_value()?;
                self.kind = kind.as_str().and_then(Kind::of_name);
            }
            // Names and identifiers, and what is encrypted or signed in base64.
            "role" | "id" | "name" | "call_id" | "tool_call_id" | "tool_use_id" | "status" | "detail" | "filename"
            | "cache_control" | "signature" | "thoughtSignature" | "thought_signature" | "encrypted_content" => {
                map.next_value::<IgnoredAny>()?;
            }
            "image_url" | "image_file" | "image" => {
                let source = map.next_value_seed(SourceValue)?;
                self.add(Kind::Image.in_openai(source.has_low_detail));
            }
            "images" => self.size.add(map.next_value_seed(Images)?),
            "input_audio" => {
                map.next_value::<IgnoredAny>()?;
                self.add(Medium::OpenAiAudio);
            }
            "source" => {
                let source = map.next_value_seed(SourceValue)?;
                match source.kind {
                    _ if source.is_text => self.size.add(source.text),
                    Some(kind) => self.add(kind.in_anthropic()),
                    None => self.untold.push(Medium::AnthropicImage),
                }
            }
            "inlineData" | "inline_data" | "fileData" => {
                let source = map.next_value_seed(SourceValue)?;
                self.add(source.kind.unwrap_or(Kind::Other).in_gemini());
            }
            "file_data" => {
                // A field of Gemini and of OpenAI; only Gemini tells the kind.
                let source = map.next_value_seed(SourceValue)?;
                self.add(source.kind.map_or(Medium::File, Kind::in_gemini));
            }
            "file" | "document_url" => {
                map.next_value::<IgnoredAny>()?;
                self.add(Medium::File);
            }
            "file_id" | "file_url" => {
                map.next_value::<IgnoredAny>()?;
                self.untold.push(Medium::OpenAiImage);
            }
            _ => self.size.add(map.next_value_seed(Texts)?),
        }
        Ok(())
    }

    fn add(&mut self, medium: Medium) {
        self.size.add(Size::of_tokens(medium.tokens()));
    }

    fn size(mut self) -> Size {
        for image in std::mem::take(&mut self.untold) {
            self.add(if self.kind == Some(Kind::Image) {
                image
            } else {
                Medium::File
            });
        }
        self.size.has_objects = true;
        self.size
    }
}

// === impl Source ===

impl<'de> DeserializeSeed<'de> for SourceValue {
    type Value = Source;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Source, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for SourceValue {
    type Value = Source;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_str<E: Error>(self, address: &str) -> Result<Source, E> {
        Ok(Source {
            kind: Kind::of_address(address),
            ..Source::default()
        })
    }

    fn visit_unit<E: Error>(self) -> Result<Source, E> {
        Ok(Source::default())
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<Source, E> {
        Ok(Source::default())
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<Source, E> {
        Ok(Source::default())
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<Source, E> {
        Ok(Source::default())
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<Source, E> {
        Ok(Source::default())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Source, A::Error> {
        IgnoredAny.visit_seq(seq)?;
        Ok(Source::default())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Source, A::Error> {
        let mut source = Source::default();
        while let Some(Name(name)) = map.next_key()? {
            match name.as_str() {
                "media_type" | "mimeType" | "mime_type" => {
                    let mime: Value = map.next_value()?;
                    source.kind = mime.as_str().map(Kind::of_mime).or(source.kind);
                }
                "url" => {
                    let url = map.next_value_seed(Self)?;
                    source.kind = source.kind.or(url.kind);
                }
                "detail" => source.has_low_detail = map.next_value::<Value>()? == "low",
                "type" => {
                    let kind: Value = map.next_value()?;
                    source.is_text = kind == "text" || kind == "content";
                }
                "data" | "content" => source.text = map.next_value_seed(Texts)?,
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(source)
    }
}

// === impl Images ===

impl<'de> DeserializeSeed<'de> for Images {
    type Value = Size;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Size, D::Error> {
        let count: u64 = deserializer.deserialize_any(self)?;
        Ok(Size::of_tokens(Medium::OpenAiImage.tokens().saturating_mul(count)))
    }
}

/// Counts the images. A value of another type than expected must not fail: the whole body would then count as text.
impl<'de> Visitor<'de> for Images {
    type Value = u64;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_str<E: Error>(self, _: &str) -> Result<u64, E> {
        Ok(1)
    }

    fn visit_unit<E: Error>(self) -> Result<u64, E> {
        Ok(0)
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<u64, E> {
        Ok(0)
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<u64, E> {
        Ok(0)
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<u64, E> {
        Ok(0)
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<u64, E> {
        Ok(0)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<u64, A::Error> {
        let mut count = 0;
        while seq.next_element::<IgnoredAny>()?.is_some() {
            count += 1;
        }
        Ok(count)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<u64, A::Error> {
        IgnoredAny.visit_map(map)?;
        Ok(1)
    }
}

// === impl Name ===

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(Self)
    }
}
