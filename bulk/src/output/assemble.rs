//! Streamed answers: the events of a stream, assembled into what the API would have answered without streaming.

use serde_json::{Map, Value, json, value::RawValue};

/// Assembles a stream of OpenAI (chat, completions, responses), Anthropic or Gemini. `None` if it is another one, or is not
/// complete: the events are then kept as text.
pub(super) fn assemble(text: &str) -> Option<Box<RawValue>> {
    let datas = datas(text);
    // The last event of OpenAI's responses holds the whole response.
    let response = datas.iter().rev().find_map(|data| whole_response(data));
    if response.is_some() {
        return response;
    }
    let is_done = datas.iter().any(|data| data == "[DONE]");
    let events: Vec<Value> = datas
        .iter()
        .filter(|data| *data != "[DONE]")
        .map(|data| serde_json::from_str(data))
        .collect::<Result<_, _>>()
        .ok()?;
    let first = events.first()?;
    let assembled = if first["type"] == "message_start" {
        message(events)?
    } else if first["choices"].is_array() {
        completion(&events, is_done)?
    } else if first["candidates"].is_array() {
        generated(&events)?
    } else {
        return None;
    };
    if !is_exact(&assembled) {
        return None;
    }
    serde_json::value::to_raw_value(&assembled).ok()
}

/// Returns whether no number has lost digits: an integer above 64 bits is read as the nearest floating-point number.
fn is_exact(value: &Value) -> bool {
    const MAX_EXACT: f64 = 9_007_199_254_740_992.0;
    match value {
        Value::Number(number) => !number.is_f64() || number.as_f64().is_some_and(|number| number.abs() < MAX_EXACT),
        Value::Array(values) => values.iter().all(is_exact),
        Value::Object(fields) => fields.values().all(is_exact),
        _ => true,
    }
}

/// Returns whether a later part says nothing about a field: some APIs repeat all fields, with `null` or an empty text.
fn is_blank(value: &Value) -> bool {
    value.is_null() || value == ""
}

/// The data of each event. Comments and other fields are left out.
fn datas(text: &str) -> Vec<String> {
    let mut datas = Vec::new();
    let mut data: Option<String> = None;
    let lines = text.trim_start_matches('\u{feff}').lines();
    for line in lines.chain([""]) {
        if let Some(more) = line.strip_prefix("data:") {
            let more = more.strip_prefix(' ').unwrap_or(more);
            match &mut data {
                Some(data) => {
                    data.push('\n');
                    data.push_str(more);
                }
                None => data = Some(more.to_owned()),
            }
        } else if line.is_empty() {
            datas.extend(data.take());
        }
    }
    datas
}

fn whole_response(data: &str) -> Option<Box<RawValue>> {
    #[derive(serde::Deserialize)]
    struct Event {
        #[serde(rename = "type")]
        kind: String,
        response: Box<RawValue>,
    }
    let event: Event = serde_json::from_str(data).ok()?;
    let is_last = ["response.completed", "response.incomplete", "response.failed"].contains(&&*event.kind);
    is_last.then(|| super::answer::in_one_line(&event.response))
}

/// OpenAI's chat completions and completions.
fn completion(events: &[Value], is_done: bool) -> Option<Value> {
    let mut whole = Map::new();
    let mut choices: Vec<Value> = Vec::new();
    for event in events {
        for (name, value) in event.as_object()? {
            match name.as_str() {
                "choices" => {
                    for part in value.as_array()? {
                        add_choice(&mut choices, part)?;
                    }
                }
                "object" if !is_blank(value) => {
                    let object = value.as_str().unwrap_or_default().replace(".chunk", "");
                    whole.insert(name.clone(), object.into());
                }
                // Padding against the guessing of lengths.
                "obfuscation" => {}
                _ if value.is_null() || (whole.contains_key(name) && is_blank(value)) => {}
                _ => {
                    whole.insert(name.clone(), value.clone());
                }
            }
        }
    }
    let is_finished = !choices.is_empty() && choices.iter().all(|choice| choice["finish_reason"].is_string());
    if !(is_done || is_finished) {
        return None;
    }
    for choice in &mut choices {
        if let Some(calls) = choice.pointer_mut("/message/tool_calls").and_then(Value::as_array_mut) {
            for call in calls {
                call.as_object_mut()?.remove("index");
            }
        }
    }
    // The parts of several answers arrive in any order, and readers take the first choice for number 0.
    choices.sort_by_key(|choice| choice["index"].as_u64());
    whole.insert("choices".into(), choices.into());
    Some(whole.into())
}

fn add_choice(choices: &mut Vec<Value>, part: &Value) -> Option<()> {
    let index = part["index"].as_u64().unwrap_or(0);
    let at = choices.iter().position(|choice| choice["index"] == index);
    let at = at.unwrap_or_else(|| {
        choices.push(json!({"index": index, "finish_reason": null}));
        choices.len() - 1
    });
    let choice = choices[at].as_object_mut()?;
    for (name, value) in part.as_object()? {
        match name.as_str() {
            "delta" => {
                let message = choice
                    .entry("message")
                    .or_insert_with(|| json!({"role": "assistant", "content": null}));
                add_delta(message, value)?;
            }
            "index" => {}
            "text" | "logprobs" => join(choice.entry(name).or_insert(Value::Null), value)?,
            _ if is_blank(value) => {}
            _ => {
                choice.insert(name.clone(), value.clone());
            }
        }
    }
    Some(())
}

fn add_delta(message: &mut Value, delta: &Value) -> Option<()> {
    let message = message.as_object_mut()?;
    for (name, value) in delta.as_object().into_iter().flatten() {
        if value.is_null() && message.contains_key(name) {
            continue;
        }
        if name == "tool_calls" && !value.is_null() {
            let calls = message.entry(name).or_insert_with(|| json!([])).as_array_mut()?;
            for part in value.as_array().into_iter().flatten() {
                add_call(calls, part)?;
            }
        } else if name != "role" {
            join(message.entry(name).or_insert(Value::Null), value)?;
        } else if !is_blank(value) {
            message.insert(name.clone(), value.clone());
        }
    }
    Some(())
}

fn add_call(calls: &mut Vec<Value>, part: &Value) -> Option<()> {
    let index = part["index"].as_u64().unwrap_or(calls.len() as u64);
    let at = calls.iter().position(|call| call["index"] == index);
    let at = at.unwrap_or_else(|| {
        calls.push(json!({"index": index}));
        calls.len() - 1
    });
    let call = calls[at].as_object_mut()?;
    for (name, value) in part.as_object()? {
        match (name.as_str(), value) {
            ("index", _) => {}
            _ if is_blank(value) => {}
            ("function", Value::Object(fields)) => {
                let function = call.entry(name).or_insert_with(|| json!({})).as_object_mut()?;
                for (name, value) in fields {
                    join(function.entry(name).or_insert(Value::Null), value)?;
                }
            }
            _ => {
                call.insert(name.clone(), value.clone());
            }
        }
    }
    Some(())
}

/// Appends a part of a value: to text and to lists; fields of objects one by one. Another value replaces. `None` if what
/// was received before would be lost: the part is of another type.
fn join(whole: &mut Value, part: &Value) -> Option<()> {
    let is_empty = match &*whole {
        Value::String(whole) => whole.is_empty(),
        Value::Array(whole) => whole.is_empty(),
        Value::Object(whole) => whole.is_empty(),
        _ => true,
    };
    match (whole, part) {
        (_, Value::Null) => {}
        (_, Value::String(part)) if part.is_empty() && !is_empty => {}
        (Value::String(whole), Value::String(part)) => whole.push_str(part),
        (Value::Array(whole), Value::Array(part)) => whole.extend(part.iter().cloned()),
        (Value::Object(whole), Value::Object(part)) => {
            for (name, value) in part {
                join(whole.entry(name).or_insert(Value::Null), value)?;
            }
        }
        (whole, part) if is_empty => *whole = part.clone(),
        _ => return None,
    }
    Some(())
}

/// Anthropic's messages.
fn message(events: Vec<Value>) -> Option<Value> {
    let mut message = Value::Null;
    let mut blocks: Vec<(u64, Value, String)> = Vec::new();
    let mut is_complete = false;
    for mut event in events {
        let index = event["index"].as_u64().unwrap_or(0);
        match event["type"].as_str()? {
            "message_start" => message = event["message"].take(),
            "content_block_start" => blocks.push((index, event["content_block"].take(), String::new())),
            "content_block_delta" => {
                let (_, block, input) = blocks.iter_mut().find(|(number, ..)| *number == index)?;
                let delta = &event["delta"];
                match delta["type"].as_str()? {
                    "input_json_delta" => input.push_str(delta["partial_json"].as_str()?),
                    "citations_delta" => join(&mut block["citations"], &json!([delta["citation"]]))?,
                    _ => {
                        for (name, value) in delta.as_object()?.iter().filter(|(name, _)| *name != "type") {
                            join(&mut block[name], value)?;
                        }
                    }
                }
            }
            "message_delta" => {
                for (name, value) in event["delta"].as_object()? {
                    message[name] = value.clone();
                }
                // Its numbers are totals and not differences.
                for (name, value) in event["usage"].as_object().into_iter().flatten() {
                    message["usage"][name] = value.clone();
                }
            }
            "message_stop" => is_complete = true,
            "error" => return None,
            _ => {}
        }
    }
    let mut content = Vec::new();
    for (_, mut block, input) in blocks {
        if !input.is_empty() {
            block["input"] = serde_json::from_str(&input).ok()?;
        }
        content.push(block);
    }
    message.as_object_mut()?.insert("content".into(), content.into());
    is_complete.then_some(message)
}

/// Gemini's generated content. Every event has the form of a whole answer.
fn generated(events: &[Value]) -> Option<Value> {
    let mut whole = Map::new();
    let mut candidates: Vec<Value> = Vec::new();
    for event in events {
        for (name, value) in event.as_object()?.iter().filter(|(name, _)| *name != "candidates") {
            whole.insert(name.clone(), value.clone());
        }
        for part in event["candidates"].as_array().into_iter().flatten() {
            let index = part["index"].as_u64().unwrap_or(0);
            let at = candidates
                .iter()
                .position(|one| one["index"].as_u64().unwrap_or(0) == index);
            match at {
                Some(at) => add_candidate(&mut candidates[at], part)?,
                None => candidates.push(part.clone()),
            }
        }
    }
    let is_complete = candidates.iter().all(|candidate| candidate["finishReason"].is_string());
    whole.insert("candidates".into(), candidates.into());
    is_complete.then(|| whole.into())
}

fn add_candidate(candidate: &mut Value, part: &Value) -> Option<()> {
    for (name, value) in part.as_object()? {
        if name != "content" {
            candidate[name] = value.clone();
            continue;
        }
        let content = candidate.as_object_mut()?.entry(name).or_insert_with(|| json!({}));
        for (name, value) in value.as_object()?.iter().filter(|(name, _)| *name != "parts") {
            content[name] = value.clone();
        }
        let parts = content
            .as_object_mut()?
            .entry("parts")
            .or_insert_with(|| json!([]))
            .as_array_mut()?;
        for part in value["parts"].as_array().into_iter().flatten() {
            add_part(parts, part);
        }
    }
    Some(())
}

/// Joins text to the text before it, if it is of the same kind (an answer, or a thought).
fn add_part(parts: &mut Vec<Value>, part: &Value) {
    if let (Some(last), Some(text)) = (parts.last_mut(), part["text"].as_str())
        && last["thought"] == part["thought"]
        && let Value::String(whole) = &mut last["text"]
    {
        whole.push_str(text);
        for (name, value) in part
            .as_object()
            .into_iter()
            .flatten()
            .filter(|(name, _)| *name != "text")
        {
            last[name] = value.clone();
        }
        return;
    }
    parts.push(part.clone());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(events: &[&str]) -> String {
        events
            .iter()
            .map(|event| format!("event: x\ndata: {event}\n\n"))
            .collect()
    }

    fn assembled(events: &[&str]) -> Value {
        serde_json::from_str(assemble(&stream(events)).unwrap().get()).unwrap()
    }

    #[test]
    fn the_parts_of_a_chat_are_joined() {
        let whole = assembled(&[
            r#"{"id":"a","object":"chat.completion.chunk","model":"m","usage":null,"choices":[{"index":0,"delta":{"role":"assistant","content":"he"},"finish_reason":null}]}"#,
            r#"{"choices":[{"index":1,"delta":{"content":"other"}},{"index":0,"delta":{"content":"llo"}}]}"#,
            r#"{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}"#,
            r#"{"choices":[],"usage":{"total_tokens":12}}"#,
            "[DONE]",
        ]);
        assert_eq!(
            whole,
            json!({"id": "a", "object": "chat.completion", "model": "m", "usage": {"total_tokens": 12}, "choices": [
                {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "hello"}},
                {"index": 1, "finish_reason": null, "message": {"role": "assistant", "content": "other"}},
            ]})
        );
    }

    #[test]
    fn the_arguments_of_tools_are_joined() {
        let whole = assembled(&[
            r#"{"choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"id":"c","type":"function","function":{"name":"f","arguments":""}}]}}]}"#,
            r#"{"choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"function":{"arguments":"{\"a\""}}]}}]}"#,
            r#"{"choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"function":{"arguments":":1}"}},{"index":1,"id":"d"}]},"finish_reason":"tool_calls"}]}"#,
        ]);
        assert_eq!(
            whole["choices"][0]["message"]["tool_calls"],
            json!([{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{\"a\":1}"}}, {"id": "d"}])
        );
    }

    #[test]
    fn a_field_that_is_repeated_without_a_value_keeps_its_value() {
        let whole = assembled(&[
            r#"{"id":"a","object":"chat.completion.chunk","choices":[{"index":1,"delta":{"role":"assistant","content":"other"},"finish_reason":"stop"}]}"#,
            r#"{"id":"","object":"","choices":[{"index":0,"delta":{"role":"assistant","content":"he","tool_calls":[{"index":0,"id":"c","function":{"name":"f","arguments":"{"}}]}}]}"#,
            r#"{"choices":[{"index":0,"delta":{"role":null,"content":"llo","tool_calls":[{"index":0,"id":"","function":{"name":"","arguments":"}"}}]},"finish_reason":""}]}"#,
            r#"{"choices":[{"index":0,"delta":{"role":"","content":null,"tool_calls":null},"finish_reason":"stop"}]}"#,
        ]);
        assert_eq!(
            whole,
            json!({"id": "a", "object": "chat.completion", "choices": [
                {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "hello", "tool_calls": [
                    {"id": "c", "function": {"name": "f", "arguments": "{}"}},
                ]}},
                {"index": 1, "finish_reason": "stop", "message": {"role": "assistant", "content": "other"}},
            ]})
        );
    }

    #[test]
    fn what_would_lose_a_part_or_a_digit_is_not_assembled() {
        for events in [
            &[
                r#"{"choices":[{"index":0,"delta":{"content":[{"type":"thinking"}]}}]}"#,
                r#"{"choices":[{"index":0,"delta":{"content":"text"},"finish_reason":"stop"}]}"#,
            ][..],
            &[
                r#"{"candidates":[{"content":{"parts":[{"functionCall":{"args":{"n":123456789012345678901}}}]},"finishReason":"STOP"}]}"#,
            ],
        ] {
            assert!(assemble(&stream(events)).is_none(), "{events:?}");
        }
    }

    #[test]
    fn the_blocks_of_a_message_are_joined() {
        let whole = assembled(&[
            r#"{"type":"message_start","message":{"id":"m","content":[],"stop_reason":null,"usage":{"input_tokens":5,"output_tokens":1}}}"#,
            r#"{"type":"ping"}"#,
            r#"{"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}"#,
            r#"{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"he"}}"#,
            r#"{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"llo"}}"#,
            r#"{"type":"content_block_start","index":1,"content_block":{"type":"tool_use","name":"f","input":{}}}"#,
            r#"{"type":"content_block_delta","index":1,"delta":{"type":"input_json_delta","partial_json":"{\"a\":"}}"#,
            r#"{"type":"content_block_delta","index":1,"delta":{"type":"input_json_delta","partial_json":"1}"}}"#,
            r#"{"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":7}}"#,
            r#"{"type":"message_stop"}"#,
        ]);
        assert_eq!(
            whole,
            json!({"id": "m", "stop_reason": "end_turn", "usage": {"input_tokens": 5, "output_tokens": 7}, "content": [
                {"type": "text", "text": "hello"}, {"type": "tool_use", "name": "f", "input": {"a": 1}},
            ]})
        );
    }

    #[test]
    fn a_response_is_taken_from_its_last_event_as_it_came() {
        let text = stream(&[
            r#"{"type":"response.created","response":{"id":"r"}}"#,
            r#"{"type":"response.completed","response":{"z":1,"a":12345678901234567890123}}"#,
        ]);
        assert_eq!(assemble(&text).unwrap().get(), r#"{"z":1,"a":12345678901234567890123}"#);
    }

    #[test]
    fn the_text_of_candidates_is_joined() {
        let whole = assembled(&[
            r#"{"candidates":[{"index":0,"content":{"role":"model","parts":[{"text":"hm","thought":true}]}}],"modelVersion":"g"}"#,
            r#"{"candidates":[{"index":0,"content":{"role":"model","parts":[{"text":"he"}]}}]}"#,
            r#"{"candidates":[{"index":0,"content":{"parts":[{"text":"llo"},{"functionCall":{"name":"f"}}]},"finishReason":"STOP"}],"usageMetadata":{"totalTokenCount":9}}"#,
        ]);
        assert_eq!(
            whole,
            json!({"modelVersion": "g", "usageMetadata": {"totalTokenCount": 9}, "candidates": [{
                "index": 0, "finishReason": "STOP",
                "content": {"role": "model", "parts": [
                    {"text": "hm", "thought": true}, {"text": "hello"}, {"functionCall": {"name": "f"}},
                ]},
            }]})
        );
    }

    #[test]
    fn what_is_unknown_or_not_complete_is_not_assembled() {
        for events in [
            &[r#"{"other":1}"#][..],
            &["text"],
            &[r#"{"choices":[{"index":0,"delta":{"content":"he"}}]}"#],
            &[r#"{"choices":[],"prompt_filter_results":[]}"#],
            &[r#"{"type":"message_start","message":{"id":"m"}}"#],
            &[],
        ] {
            assert!(assemble(&stream(events)).is_none(), "{events:?}");
        }
    }
}
