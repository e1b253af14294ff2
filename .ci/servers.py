"""Runs `bulk` against nginx, llmock and LiteLLM's proxy, and checks every answer. Started by .ci/servers.

Each request holds a marker, a word of its own, which the servers return in the answer. For each marker the result that
`bulk` wrote is compared with what the server recorded:

  wrong     COMPLETED without the marker in the response, or though the server sent no complete answer for it
  lost      no result line, or FAILED though the server sent a complete answer
  doubled   two result lines, or sent again after a complete answer
"""

import argparse
import collections
import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

MARKER = re.compile(r"marker-\d{5}")
# No run takes longer, unless it hangs.
LONGEST_RUN = 200


# A server that is gone for some seconds, some time after the start.
Outage = collections.namedtuple("Outage", ["after", "seconds"])
# A signal in the middle of a run, and the exit code that it causes.
Interrupt = collections.namedtuple("Interrupt", ["signal", "after", "exit"])
# One request as a server saw it. `whole`: it sent a complete answer.
Attempt = collections.namedtuple("Attempt", ["marker", "status", "whole", "fault"], defaults=[None])


# --- Servers -----------------------------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def running(command, port, log, seconds=90, **environment):
    """Starts a server, waits until it accepts connections, and ends it."""
    with open(log, "w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | environment)
    try:
        until = time.monotonic() + seconds
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > until:
                    sys.exit(f"{command[0]} does not listen:\n{pathlib.Path(log).read_text()[-2000:]}")
                time.sleep(0.05)
        yield
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


class Nginx:
    """Answers with the body of the request in an answer of OpenAI's form. Its log holds the status and the marker."""

    ANSWER = (
        """'{"id":"answer","object":"chat.completion","choices":[{"index":0,"finish_reason":"stop","message":"""
        """{"role":"assistant","content":"done"}}],"usage":{"prompt_tokens":10,"completion_tokens":10,"""
        """"total_tokens":20},"request":$request_body}'"""
    )

    # When the server is gone for a while: `None` for never.
    outage = None

    def __init__(self, folder, name, location, http="", tls=False):
        self.folder, self.port = folder / f"nginx-{name}", free_port()
        self.folder.mkdir()
        listen = f"listen 127.0.0.1:{self.port}"
        if tls:
            self.make_certificates()
            listen += f" ssl http2; keepalive_requests 50; ssl_certificate {self.folder}/server.pem; ssl_certificate_key {self.folder}/server.key"
        temporary = "".join(
            f"{kind}_temp_path {self.folder}/{kind};" for kind in ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        )
        (self.folder / "nginx.conf").write_text(
            f"""
            load_module /usr/lib/nginx/modules/ngx_http_echo_module.so;
            daemon off; worker_processes 1; pid {self.folder}/pid; error_log {self.folder}/error.log;
            events {{}}
            http {{
              {temporary} client_body_buffer_size 64k; default_type application/json;
              log_format judge escape=none '$status $request_body'; access_log {self.folder}/access.log judge;
              {http}
              server {{ {listen}; server_name localhost; location / {{ {location} }} }}
            }}
            """
        )

    def make_certificates(self):
        def openssl(*arguments):
            subprocess.run(["openssl", *arguments], cwd=self.folder, check=True, capture_output=True)

        key = ["-newkey", "rsa:2048", "-nodes"]
        openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=Test CA")
        openssl("req", *key, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=localhost")
        (self.folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
        openssl("x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
                "-out", "server.pem", "-days", "2", "-extfile", "names")

    @contextlib.contextmanager
    def running(self):
        if self.outage is None:
            with self.started():
                yield
            return
        over = threading.Event()

        def interrupted():
            with self.started():
                over.wait(self.outage.after)
            over.wait(self.outage.seconds)
            with self.started():
                over.wait()

        thread = threading.Thread(target=interrupted)
        thread.start()
        try:
            # The client finds a server that listens.
            time.sleep(0.5)
            yield
        finally:
            over.set()
            thread.join()

    def started(self):
        command = ["/usr/sbin/nginx", "-e", f"{self.folder}/error.log", "-c", f"{self.folder}/nginx.conf"]
        return running(command, self.port, self.folder / "output")

    def attempts(self):
        """Attempts that nginx did not pass on have no marker: it had not read their body."""
        for line in (self.folder / "access.log").read_text().splitlines():
            status, _, body = line.partition(" ")
            marker = MARKER.search(body)
            yield Attempt(marker and marker.group(), int(status), int(status) == 200 and marker is not None)

    def verdict(self):
        return ""

    def errors(self):
        return []


class Llmock:
    """A mock of the providers' APIs. Records every attempt, and judges how its client meets faults."""

    def __init__(self, folder, tools, name, *options):
        self.port, self.log = free_port(), folder / f"llmock-{name}.log"
        common = ["--response-style", "echo", "--log-level", "warning", "--port", str(self.port)]
        self.command = [f"{tools}/llmock/bin/llmock", "serve", *common, *options]

    def running(self):
        return running(self.command, self.port, self.log)

    def ask(self, path):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/_llmock/{path}", timeout=20) as response:
            return json.load(response)

    def attempts(self):
        for record in self.ask("requests")["requests"]:
            marker = MARKER.search(json.dumps(record["body"]))
            # A malformed chunk is not the end of the stream: llmock records such a response as completed.
            whole = record["completed"] and not (record["fault"] or "").startswith("stream:malformed")
            yield Attempt(marker and marker.group(), record["status"], record["status"] == 200 and whole, record["fault"])

    def verdict(self):
        verdict = self.ask("verdict")
        codes = collections.Counter(finding["code"] for finding in verdict["findings"])
        found = ", ".join(f"{count} {code}" for code, count in sorted(codes.items()))
        return f"{verdict['faults_injected']} faults, {verdict['errors']} errors" + (f"; {found}" if found else "")

    def errors(self):
        return [finding["title"] for finding in self.ask("verdict")["findings"] if finding["severity"] == "error"]


class LimiterApp:
    """An app that uses a rate limiter of a registry. Prints the marker of each request that it accepts."""

    def __init__(self, folder, name, command, **environment):
        self.port, self.log, self.environment = free_port(), folder / f"app-{name}.log", environment
        self.command = [str(word).replace("PORT", str(self.port)) for word in command]

    def running(self):
        return running(self.command, self.port, self.log, **self.environment)

    def attempts(self):
        """What the limiter refuses does not reach the app, which prints no marker for it."""
        for marker in re.findall(r"accepted (marker-\d{5})", self.log.read_text()):
            yield Attempt(marker, 200, True)

    def verdict(self):
        return ""

    def errors(self):
        return []


class LiteLlm:
    """LiteLLM's proxy, in front of another server that records the requests which the proxy passes on."""

    KEY = "sk-only-for-tests-0123456789abcdef"

    def __init__(self, folder, tools, name, behind, model="", settings=""):
        self.behind, self.port, self.log = behind, free_port(), folder / f"litellm-{name}.log"
        config = folder / f"litellm-{name}.yaml"
        url = f"http://127.0.0.1:{behind.port}/v1"
        config.write_text(
            f"""
model_list: [{{model_name: mock, litellm_params: {{model: openai/mock, api_key: none, api_base: "{url}" {model}}}}}]
router_settings: {{num_retries: 0 {settings}}}
general_settings: {{master_key: {self.KEY}}}
"""
        )
        self.command = [f"{tools}/litellm/bin/litellm", "--config", str(config), "--host", "127.0.0.1",
                        "--port", str(self.port), "--telemetry", "False"]

    @contextlib.contextmanager
    def running(self):
        # With the list of prices that comes with the package: the proxy would look for a newer one on the network.
        local = {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        with self.behind.running(), running(self.command, self.port, self.log, **local):
            yield

    def attempts(self):
        """What the proxy passed on and was answered, and what it refused: its log holds the status alone."""
        yield from (attempt for attempt in self.behind.attempts() if attempt.whole)
        for status in re.findall(r'"POST \S+ HTTP/1.1" (\d+)', self.log.read_text()):
            if status != "200":
                yield Attempt(None, int(status), False)

    def verdict(self):
        return ""

    def errors(self):
        return []


# --- One run -----------------------------------------------------------------------------------------------------------


def chat(marker, **fields):
    return {"model": "mock", "max_tokens": 20, "messages": [{"role": "user", "content": marker}], **fields}


def responses(marker, **fields):
    return {"model": "mock", "max_output_tokens": 20, "input": marker, **fields}


def gemini(marker):
    return {"contents": [{"role": "user", "parts": [{"text": marker}]}], "generationConfig": {"maxOutputTokens": 20}}


def batch_line(marker, number):
    """A line of a batch file that mixes the urls."""
    urls = [("/v1/chat/completions", chat(marker)), ("/v1/responses", responses(marker)),
            ("/v1/embeddings", {"model": "mock", "input": marker})]
    url, body = urls[number % len(urls)]
    return {"custom_id": f"id-{number}", "method": "POST", "url": url, "body": body}


class Run:
    """Sends requests, and collects what became of them."""

    def __init__(self, bench, name, server, target, bodies, *options, expect=None, interrupt=None):
        self.name, self.server, self.problems = name, server, []
        folder = pathlib.Path(tempfile.mkdtemp(dir=bench.folder))
        lines = [json.dumps(body) for body in bodies]
        self.markers = [MARKER.search(line).group() for line in lines]
        (folder / "in.jsonl").write_text("\n".join(lines) + "\n")
        command = [bench.bulk, "--quiet", *target, "--input", folder / "in.jsonl", "--output", folder / "out.jsonl",
                   *([] if "--tpm" in options else ["--tpm", "off"]), *options]
        started = time.monotonic()
        if interrupt:
            self.execute(command, interrupt)
            self.check(self.exit == interrupt.exit, f"exit code {interrupt.exit} after the signal, and not {self.exit}")
            command.append("--resume")
        self.execute(command)
        self.seconds = time.monotonic() - started
        output = folder / "out.jsonl"
        self.results = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
        if interrupt:
            # A request that was cancelled has a second line, and that is its result.
            self.results = [result for result in self.results if result["status"] != "CANCELLED"]
        self.statuses = collections.Counter(result["status"] for result in self.results)
        self.attempts = list(server.attempts())
        self.refused = collections.Counter(attempt.status for attempt in self.attempts if attempt.status != 200)
        if expect is None:
            expect = 3 if self.statuses["FAILED"] else 0
        self.check(self.exit == expect, f"exit code {expect}, and not {self.exit}: {self.said[-1500:]}")

    def execute(self, command, interrupt=None):
        """Runs `bulk`, and sends it a signal in the middle if one is given."""
        program = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   text=True)
        try:
            if interrupt:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    program.wait(interrupt.after)
                program.send_signal(interrupt.signal)
            self.said, _ = program.communicate(timeout=LONGEST_RUN)
            self.exit = program.returncode
        except subprocess.TimeoutExpired:
            program.kill()
            self.said, _ = program.communicate()
            self.exit = "hangs"

    def marker_of(self, result):
        return self.markers[result["line"] - 1]

    def check_answers(self, silent=(), sent_twice=0):
        """Compares each result with what the server recorded.

        The answers to the markers in `silent` do not hold them. `sent_twice`: how many may be sent again after an answer.
        """
        whole = collections.Counter(attempt.marker for attempt in self.attempts if attempt.whole)
        written = collections.Counter(self.marker_of(result) for result in self.results)
        completed = {self.marker_of(result) for result in self.results if result["status"] == "COMPLETED"}
        self.wrong = {
            self.marker_of(result)
            for result in self.results
            if result["status"] == "COMPLETED"
            and self.marker_of(result) not in silent
            and self.marker_of(result) not in json.dumps(result["response"])
        }
        self.lost = {marker for marker in self.markers if not written[marker]}
        self.doubled = {marker for marker, count in written.items() if count > 1}
        self.wrong |= {marker for marker in completed if not whole[marker]}
        self.lost |= {marker for marker in self.markers if whole[marker] and marker not in completed}
        again = {marker for marker, count in whole.items() if count > 1}
        if len(again) > sent_twice:
            self.doubled |= again
        for kind in ["wrong", "lost", "doubled"]:
            if markers := getattr(self, kind):
                examples = "".join(f"\n      {self.example(marker)}" for marker in sorted(markers)[:5])
                self.problems.append(f"{kind}: {len(markers)}, e.g.{examples}")
        self.ask_judge()
        return self

    def ask_judge(self):
        """Takes over what the server itself found wrong with its client."""
        if errors := self.server.errors():
            self.problems.append(f"the server found {len(errors)} errors, e.g. {errors[0]}")

    def example(self, marker):
        """What the server and `bulk` say of one request."""
        at_server = [f"{attempt.status} {attempt.fault or ''}" for attempt in self.attempts if attempt.marker == marker]
        results = [
            {key: result.get(key) for key in ["line", "status", "http_status", "attempts", "error", "response"]}
            for result in self.results
            if self.marker_of(result) == marker
        ]
        return f"{marker}, at the server: {at_server}; result: {json.dumps(results)[:600]}"

    def check(self, holds, promise):
        if not holds:
            self.problems.append(f"not so: {promise}")
        return self

    def print(self):
        counts = [len(getattr(self, kind, ())) for kind in ["wrong", "lost", "doubled"]]
        refused = ", ".join(f"{count} x {status}" for status, count in sorted(self.refused.items()))
        columns = [self.name, len(self.markers), self.statuses["COMPLETED"], self.statuses["FAILED"], *counts,
                   self.refused[429], self.exit, f"{self.seconds:.1f}", "FAIL" if self.problems else "ok",
                   "; ".join(filter(None, [refused, self.server.verdict()]))]
        print(ROW.format(*columns).rstrip(), flush=True)
        return self


ROW = "{:<54} {:>6} {:>9} {:>6} {:>5} {:>4} {:>7} {:>4} {:>4} {:>7} {:>4}  {}"
HEADING = ["server", "lines", "COMPLETED", "FAILED", "wrong", "lost", "doubled", "429", "exit", "seconds", "", "refused; verdict"]


# --- The runs ----------------------------------------------------------------------------------------------------------


class Bench:
    def __init__(self, arguments, folder):
        self.bulk, self.tools, self.folder = arguments.bulk, arguments.tools, folder
        self.only, self.litellm = arguments.only, arguments.litellm
        self.markers = (f"marker-{number:05}" for number in range(100_000))
        self.runs = []

    def bodies(self, count, make=chat, **fields):
        return [make(next(self.markers), **fields) for _ in range(count)]

    def run(self, name, server, path, bodies, *options, scheme="http", option="--url", **more):
        """Starts the server, sends the requests, and yields what became of them for the checks of this run."""
        with server.running():
            target = [option, f"{scheme}://127.0.0.1:{server.port}{path}"]
            run = Run(self, name, server, target, bodies, *options, **more)
            self.runs.append(run)
            yield run
            run.print()

    def everything(self):
        for runs in [self.nginx, self.tls, self.llmock, self.limiter_apps, *([self.litellm_proxy] if self.litellm else [])]:
            if not self.only or self.only in runs.__name__:
                runs()

    def nginx(self):
        rate = {
            "http": "limit_req_zone $server_name zone=rate:1m rate=100r/s; limit_req_status 429;",
            "location": f"limit_req zone=rate burst=9 nodelay; echo_read_request_body; echo {Nginx.ANSWER};",
        }
        path = "/v1/chat/completions"
        server = Nginx(self.folder, "told", **rate)
        for run in self.run("nginx limit_req 100/s burst 9, told so", server, path, self.bodies(300),
                            "--rpm", "6000", "--rpm-burst", "5"):
            # A burst below the server's: requests that are held up on their way arrive closer together than they left.
            run.check_answers().check(run.refused[429] <= 3, "at most 1 % are refused within the limits")
        server = Nginx(self.folder, "twice", **rate)
        for run in self.run("nginx limit_req 100/s burst 9, told twice as much", server, path, self.bodies(1000),
                            "--rpm", "12000"):
            run.check_answers().check(run.statuses["COMPLETED"] == 1000, "all are done")
        server = Nginx(
            self.folder, "connections",
            http="limit_conn_zone $server_name zone=at_once:1m; limit_conn_status 429;",
            location=f"limit_conn at_once 8; echo_read_request_body; echo_sleep 0.2; echo {Nginx.ANSWER};",
        )
        for run in self.run("nginx limit_conn 8, 32 at once", server, path, self.bodies(100), "--rpm", "off"):
            run.check_answers()
        # A proxy that is in trouble: connections closed without a response, error pages, a login page with status 200.
        server = Nginx(
            self.folder, "trouble",
            http="split_clients $request_id $fate { 10% dropped; 10% page; 5% login; * fine; }",
            location=f"""
              if ($fate = dropped) {{ return 444; }}
              if ($fate = page) {{ return 502; }}
              if ($fate = login) {{ rewrite ^ /login last; }}
              echo_read_request_body; echo {Nginx.ANSWER};
              location /login {{ internal; default_type text/html; echo '<html><body>Please log in</body></html>'; }}
            """,
        )
        for run in self.run("nginx: dropped, 502 pages, login pages with 200", server, path, self.bodies(200),
                            "--rpm", "6000"):
            run.check_answers()

        server = Nginx(self.folder, "outage", f"echo_read_request_body; echo_sleep 0.2; echo {Nginx.ANSWER};")
        server.outage = Outage(after=1.5, seconds=4)
        for run in self.run("nginx: gone for 4 s in the middle", server, path, self.bodies(200), "--rpm", "3000"):
            # What was on the wire is sent again. Its log does not have the connections that it cut.
            run.check_answers(sent_twice=32).check(run.statuses["COMPLETED"] == 200, "all are done")

    def tls(self):
        location = f"gzip on; gzip_types *; gzip_min_length 1; echo_read_request_body; echo {Nginx.ANSWER};"
        server = Nginx(self.folder, "tls", location, tls=True)
        path = "/v1/chat/completions"
        for run in self.run("nginx with TLS, HTTP/2, gzip, 50 per connection, --ca", server, path, self.bodies(200), "--rpm", "off", "--ca",
                            server.folder / "ca.pem", scheme="https"):
            run.check_answers().check(run.statuses["COMPLETED"] == 200, "all are done")
        for run in self.run("nginx with TLS, certificate not trusted", server, path, self.bodies(200), "--rpm", "off",
                            scheme="https", expect=1):
            # The name of the certificate's problem, not only "error sending request".
            run.check("certificate" in run.said.lower(), "it names the certificate: " + run.said[-800:])
            run.check(len(run.results) < 100, "it stops early")

    def llmock(self):
        path = "/v1/chat/completions"
        server = Llmock(self.folder, self.tools, "adopted", "--rpm", "1200")
        for run in self.run("llmock, 1,200 a minute, told 6,000", server, path, self.bodies(200), "--rpm", "6000"):
            run.check_answers().check(run.statuses["COMPLETED"] == 200, "all are done")
        # Its buckets start full, and it reports what they hold: a job of a minute's amount takes a few seconds.
        server = Llmock(self.folder, self.tools, "full", "--rpm", "600", "--tpm", "60000")
        for run in self.run("llmock, 600 and 60,000 tokens a minute, told so", server, path, self.bodies(600),
                            "--rpm", "600", "--tpm", "60000"):
            run.check_answers().check(run.statuses["COMPLETED"] == 600, "all are done")
            run.check(run.seconds <= 30, f"it takes 30 s, and not {run.seconds:.1f}")
            run.check(run.refused[429] <= 6, "at most 1 % are refused")
        # Its bucket holds a minute's worth: the last 20 requests are refused, with the time to wait.
        server = Llmock(self.folder, self.tools, "kept", "--rpm", "120")
        for run in self.run("llmock, 120 a minute, told 6,000, --keep-limits", server, path, self.bodies(140),
                            "--rpm", "6000", "--keep-limits"):
            run.check_answers().check(run.statuses["COMPLETED"] == 140, "all are done")
            run.check(run.refused[429] > 0, "the server refuses some")
        rates = ["429=0.03", "500=0.05", "503=0.05", "400=0.05", "401=0.01", "404=0.01", "529=0.01"]
        server = Llmock(self.folder, self.tools, "chaos", *(word for rate in rates for word in ("--error-rate", rate)))
        for run in self.run("llmock, 400, 401, 404, 429, 500, 503, 529", server, path, self.bodies(300), "--rpm", "6000"):
            run.check_answers()
        faults = ["truncate=0.1", "disconnect=0.1", "malformed=0.1", "stall=0.02"]
        faults = [word for fault in faults for word in ("--stream-fault", fault)]
        streams = {
            "OpenAI's chat": ("/v1/chat/completions", self.bodies(100, stream=True)),
            "OpenAI's responses": ("/v1/responses", self.bodies(100, responses, stream=True)),
            "Anthropic": ("/anthropic/v1/messages", self.bodies(100, stream=True)),
            "Gemini": ("/gemini/v1beta/models/mock:streamGenerateContent?alt=sse", self.bodies(100, gemini)),
            "Cohere": ("/cohere/v2/chat", self.bodies(100, stream=True)),
        }
        for api, (path, bodies) in streams.items():
            server = Llmock(self.folder, self.tools, f"streams of {api}", "--stream-stall-seconds", "6", *faults)
            provider = ["--provider", api.lower()] if api in ["Anthropic", "Gemini"] else []
            for run in self.run(f"llmock, broken streams of {api}", server, path, bodies, "--rpm", "6000",
                                "--timeout", "3", *provider):
                run.check_answers()
        server = Llmock(self.folder, self.tools, "batch")
        lines = [batch_line(next(self.markers), number) for number in range(90)]
        embeddings = {MARKER.search(json.dumps(line)).group() for line in lines if "embeddings" in line["url"]}
        for run in self.run("llmock, a batch file for three urls", server, "/v1", lines, "--rpm", "6000",
                            option="--base-url"):
            run.check_answers(silent=embeddings).check(run.statuses["COMPLETED"] == 90, "all are done")
        for name, interrupt, sent_twice in [
            ("SIGTERM", Interrupt(signal.SIGTERM, 1.5, 128 + signal.SIGTERM), 0),
            # What is on the wire when the program dies is sent again: its answers are not in the file.
            ("kill -9", Interrupt(signal.SIGKILL, 1.5, -signal.SIGKILL), 32),
        ]:
            server = Llmock(self.folder, self.tools, name, "--latency-ms", "200")
            for run in self.run(f"llmock, {name} in the middle, then --resume", server, "/v1/chat/completions",
                                self.bodies(200), "--rpm", "3000", interrupt=interrupt):
                run.check_answers(sent_twice=sent_twice).check(run.statuses["COMPLETED"] == 200, "all are done")
        server = Llmock(self.folder, self.tools, "unauthorized", "--error-rate", "401=1.0")
        for run in self.run("llmock, 401 for all", server, "/v1/chat/completions", self.bodies(300), "--rpm", "6000",
                            expect=1):
            run.check("401" in run.said, "it names the status: " + run.said[-800:])
            run.check(len(run.attempts) < 150, f"it stops early, and not after {len(run.attempts)} attempts")
            run.ask_judge()

    def limiter_apps(self):
        """Limiters that count in windows, and report what is left in the present one."""
        path = "/v1/chat/completions"
        apps = {
            "slowapi, 600 a minute": LimiterApp(
                self.folder, "slowapi",
                [f"{self.tools}/slowapi/bin/uvicorn", "--app-dir", ".ci", "--port", "PORT", "limiter_app:app"],
                LIMIT="600/minute",
            )
        }
        for draft, limit, seconds in [("draft-6", 600, 60), ("draft-7", 600, 60), ("draft-8", 600, 60), ("draft-8", 100, 10)]:
            apps[f"express-rate-limit, {limit} in {seconds} s, {draft}"] = LimiterApp(
                self.folder, f"{draft}-{limit}", ["node", ".ci/limiter_app.cjs", "PORT", limit, seconds, draft],
                NODE_PATH=f"{self.tools}/express/node_modules",
            )
        for name, server in apps.items():
            for run in self.run(f"{name}, told so", server, path, self.bodies(150), "--rpm", "600", "--provider", "ietf"):
                run.check_answers().check(run.statuses["COMPLETED"] == 150, "all are done")
                refused = int(re.search(r"429s +(\d+)", run.said).group(1))
                run.refused[429] = refused
                run.check(refused <= 3, f"at most 3 are refused, and not {refused}")

    def litellm_proxy(self):
        path, header = "/v1/chat/completions", ["--header", f"authorization: Bearer {LiteLlm.KEY}"]
        # Its window is the minute of the clock, and it counts the requests that it refuses.
        behind = Llmock(self.folder, self.tools, "limited")
        server = LiteLlm(self.folder, self.tools, "limited", behind, ", rpm: 60",
                         ', optional_pre_call_checks: ["enforce_model_rate_limits"]')
        for run in self.run("LiteLLM's proxy, 60 a minute, told 600", server, path, self.bodies(70), "--rpm", "600",
                            *header):
            run.check_answers().check(run.statuses["COMPLETED"] == 70, "all are done")
        rates = ["429=0.05", "500=0.1", "503=0.05", "400=0.05"]
        behind = Llmock(self.folder, self.tools, "behind", *(word for rate in rates for word in ("--error-rate", rate)))
        server = LiteLlm(self.folder, self.tools, "chaos", behind)
        for run in self.run("LiteLLM's proxy in front of 400, 429, 500, 503", server, path, self.bodies(100),
                            "--rpm", "600", *header):
            run.check_answers()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--bulk", required=True)
    parser.add_argument("--tools", required=True)
    parser.add_argument("--litellm", action="store_true")
    parser.add_argument("--only", help="run only the groups whose name holds this word")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bulk-servers-") as folder:
        # nginx's worker has a user of its own.
        os.chmod(folder, 0o755)
        bench = Bench(arguments, pathlib.Path(folder))
        print(ROW.format(*HEADING), flush=True)
        bench.everything()
    failed = [run for run in bench.runs if run.problems]
    for run in failed:
        print(f"\n{run.name}:")
        for problem in run.problems:
            print(f"  - {problem}")
    print(f"\n{len(bench.runs) - len(failed)} passed, {len(failed)} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
