"""An app with the limiter of the package slowapi, which sends X-RateLimit headers. Started by .ci/servers.py.

  uvicorn limiter_app:app     LIMIT: such as 600/minute
"""

import os

from fastapi import FastAPI, Request, Response
from slowapi import Limiter, _rate_limit_exceeded_handler
from slowapi.errors import RateLimitExceeded
from slowapi.util import get_remote_address

limiter = Limiter(key_func=get_remote_address, headers_enabled=True)
app = FastAPI()
app.state.limiter = limiter
app.add_exception_handler(RateLimitExceeded, _rate_limit_exceeded_handler)


@app.post("/v1/chat/completions")
@limiter.limit(os.environ["LIMIT"])
async def chat(request: Request, response: Response):
    body = await request.json()
    print("accepted", body["messages"][0]["content"], flush=True)
    return {"object": "chat.completion", "choices": [{"index": 0, "message": {"role": "assistant", "content": "done"}}],
            "request": body}
