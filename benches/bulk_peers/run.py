"""Compares `bulk` with other programs for the same job: 500 requests within 1,500 requests and 240,000 tokens a minute.

    python3 benches/bulk_peers/run.py --bulk target/release/bulk [--curator PYTHON] [--cookbook SCRIPT --python PYTHON]

Each program sends bulk/data/requests.jsonl to a local provider of its own (`bulk --serve`), which enforces these limits
and answers 2 % of the requests with 503. nginx stands between, and its log counts the responses. README.md beside this
file says where the other programs come from.
"""

import argparse
import collections
import contextlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
REQUESTS = HERE.parent.parent / "bulk/data/requests.jsonl"
LIMITS = {"rpm": 1500, "tpm": 240_000}
# The cookbook's script takes minutes.
LONGEST_RUN = 1200


def load_servers():
    """The servers of .ci/servers.py."""
    specification = importlib.util.spec_from_file_location("servers", HERE.parent.parent / ".ci/servers.py")
    servers = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(servers)
    return servers


def completed_by_bulk(folder):
    results = (json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines())
    return {result["custom_id"] for result in results if result["status"] == "COMPLETED"}


def completed_by_cookbook(folder):
    results = (json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines())
    return {result[0]["custom_id"] for result in results if isinstance(result[1], dict) and "choices" in result[1]}


def completed_by_curator(folder):
    results = (json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines())
    return {result["custom_id"] for result in results if result["answer"]}


def run_peer(servers, bulk, folder, name, command, completed, environment):
    """Runs one program, and prints its row."""
    folder = folder / name.replace(" ", "-")
    folder.mkdir()
    port = servers.free_port()
    limits = ["--rpm", str(LIMITS["rpm"]), "--tpm", str(LIMITS["tpm"])]
    nginx = servers.Nginx(folder, "between", f"proxy_pass http://127.0.0.1:{port}; proxy_read_timeout 60s;")
    with (
        servers.running([bulk, "--serve", f"127.0.0.1:{port}", *limits], port, folder / "provider.log"),
        nginx.running(),
        open(folder / "output", "w") as output,
    ):
        started = time.monotonic()
        program = subprocess.Popen(command(f"http://127.0.0.1:{nginx.port}/v1", folder), stdin=subprocess.DEVNULL,
                                   stdout=output, stderr=output, env=os.environ | environment | {"HOME": str(folder)})
        # wait4 reports the memory of this child alone.
        while (ended := os.wait4(program.pid, os.WNOHANG))[0] == 0 and time.monotonic() - started < LONGEST_RUN:
            time.sleep(0.05)
        seconds = time.monotonic() - started
        if ended[0] == 0:
            program.kill()
            ended = os.wait4(program.pid, 0)
        program.returncode = os.waitstatus_to_exitcode(ended[1])
    statuses = collections.Counter(int(line.split()[0]) for line in (nginx.folder / "access.log").read_text().splitlines())
    done = set()
    with contextlib.suppress(FileNotFoundError):
        done = completed(folder)
    other = ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items()) if status not in (200, 429))
    print(ROW.format(name, f"{seconds:.1f}", statuses[429], f"{ended[2].ru_maxrss / 1024:.1f}", len(done), 500 - len(done),
                     statuses[200], other).rstrip(), flush=True)
    if not done:
        print((folder / "output").read_text()[-2000:], file=sys.stderr)


ROW = "{:<34} {:>8} {:>5} {:>8} {:>8} {:>5} {:>6}  {}"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--bulk", required=True)
    parser.add_argument("--curator", help="a Python with bespokelabs-curator")
    parser.add_argument("--cookbook", help="the script api_request_parallel_processor.py")
    parser.add_argument("--python", help="a Python with aiohttp and tiktoken, for the cookbook's script")
    parser.add_argument("--tiktoken-cache", help="the folder with tiktoken's encodings, if they cannot be downloaded")
    arguments = parser.parse_args()
    servers = load_servers()
    environment = {"OPENAI_API_KEY": "sk-only-for-tests", "NO_PROXY": "127.0.0.1"}
    if arguments.tiktoken_cache:
        environment["TIKTOKEN_CACHE_DIR"] = str(pathlib.Path(arguments.tiktoken_cache).resolve())
        # curator brings LiteLLM, which has a variable of its own for the same folder.
        environment["CUSTOM_TIKTOKEN_CACHE_DIR"] = environment["TIKTOKEN_CACHE_DIR"]

    def bulk(url, folder):
        return [arguments.bulk, "--quiet", "--input", REQUESTS, "--output", folder / "out.jsonl", "--url",
                f"{url}/chat/completions", "--rpm", str(LIMITS["rpm"]), "--tpm", str(LIMITS["tpm"])]

    def curator(url, folder):
        return [arguments.curator, HERE / "curator_peer.py", REQUESTS, folder / "out.jsonl", url, str(LIMITS["rpm"]),
                str(LIMITS["tpm"])]

    def cookbook(url, folder):
        script = folder / "cookbook.py"
        # The script accepts https alone.
        script.write_text(pathlib.Path(arguments.cookbook).read_text().replace('"^https://', '"^https?://'))
        return [arguments.python, script, "--requests_filepath", REQUESTS, "--save_filepath", folder / "out.jsonl",
                "--request_url", f"{url}/chat/completions", "--max_requests_per_minute", str(LIMITS["rpm"]),
                "--max_tokens_per_minute", str(LIMITS["tpm"]), "--max_attempts", "5", "--logging_level", "30"]

    with tempfile.TemporaryDirectory(prefix="bulk-peers-") as folder:
        os.chmod(folder, 0o755)
        print(ROW.format("program", "seconds", "429", "MiB", "answers", "lost", "200", "other responses"), flush=True)
        for name, command, completed, wanted in [
            ("bulk", bulk, completed_by_bulk, True),
            ("curator", curator, completed_by_curator, arguments.curator),
            ("OpenAI cookbook's script", cookbook, completed_by_cookbook, arguments.cookbook),
        ]:
            if wanted:
                run_peer(servers, arguments.bulk, pathlib.Path(folder), name, command, completed, environment)


if __name__ == "__main__":
    main()
