// An app with the limiter of the package express-rate-limit, which sends the IETF's RateLimit fields. Started by
// .ci/servers.py.
//
//   node limiter_app.cjs PORT LIMIT SECONDS DRAFT     LIMIT: requests in so many seconds; DRAFT: draft-6, draft-7 or draft-8
const express = require("express");
const { rateLimit } = require("express-rate-limit");

const [port, limit, seconds, draft] = process.argv.slice(2);
const app = express();
app.use(rateLimit({ windowMs: 1_000 * Number(seconds), limit: Number(limit), standardHeaders: draft, legacyHeaders: false }));
app.post("/v1/chat/completions", express.json(), (request, response) => {
  console.log("accepted", request.body.messages[0].content);
  const message = { role: "assistant", content: "done" };
  response.json({ object: "chat.completion", choices: [{ index: 0, message }], request: request.body });
});
app.listen(Number(port), "127.0.0.1");
