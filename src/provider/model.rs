//! Which model a request is for, where its path tells.

/// Returns the name of the model in a path: what follows `models` (Gemini, Vertex AI), `model` (Bedrock) or `deployments`
/// (Azure OpenAI, whose deployments are named by the user).
pub(super) fn model_in_path(path: &str) -> Option<&str> {
    let mut segments = path.split('/');
    let place = segments.find(|segment| matches!(*segment, "models" | "model" | "deployments"))?;
    let name = segments.next().filter(|name| !name.is_empty())?;
    // A method follows the name of a model of Gemini, such as `:generateContent`. In Bedrock's names, a colon stands before
    // their version.
    Some(match name.rsplit_once(':') {
        Some((name, _)) if place == "models" => name,
        _ => name,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_model_is_found_in_the_paths_of_providers_that_have_it_there() {
        for (path, expected) in [
            (
                "/v1beta/models/gemini-2.0-flash:generateContent",
                Some("gemini-2.0-flash"),
            ),
            (
                "/v1/projects/p/locations/l/publishers/anthropic/models/claude-3@2024:rawPredict",
                Some("claude-3@2024"),
            ),
            ("/model/anthropic.claude-v2:1/converse", Some("anthropic.claude-v2:1")),
            ("/openai/deployments/mine/chat/completions", Some("mine")),
            ("/v1/chat/completions", None),
            ("/v1/models", None),
            ("/v1/models/", None),
        ] {
            assert_eq!(model_in_path(path), expected, "{path}");
        }
    }
}
