"""Sends a file of chat requests with curator: INPUT OUTPUT URL REQUESTS_PER_MINUTE TOKENS_PER_MINUTE."""

import json
import os
import sys

os.environ |= {"TELEMETRY_ENABLED": "0", "CURATOR_DISABLE_CACHE": "1", "CURATOR_DISABLE_RICH_DISPLAY": "1",
               "LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_OFFLINE": "1"}

from bespokelabs import curator


class Task(curator.LLM):
    def prompt(self, row):
        return row["messages"]

    def parse(self, row, answer):
        return {"custom_id": row["custom_id"], "answer": answer}


def main():
    source, target, url, requests, tokens = sys.argv[1:]
    rows = []
    for line in open(source):
        request = json.loads(line)
        parameters = {name: request[name] for name in ("max_tokens", "temperature") if name in request}
        rows.append({"custom_id": request["custom_id"], "messages": request["messages"],
                     "generation_params": json.dumps(parameters)})
    limits = {"base_url": url, "max_requests_per_minute": int(requests), "max_tokens_per_minute": int(tokens),
              "require_all_responses": False}
    answers = Task(model_name="gpt-4o-mini", backend="openai", backend_params=limits)(rows)
    with open(target, "w") as results:
        for answer in getattr(answers, "dataset", answers):
            results.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
