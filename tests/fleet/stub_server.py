"""Stub server for the restart proxy's tests: `python stub_server.py MODEL PORT`.

A request takes `seconds` and returns `content` with `status`, if they are given. Files in the
directory MODEL make it misbehave: `refuses` (ends at once), `never` (does not become healthy),
`stubborn` (ignores SIGTERM). It has a worker process; /tokenize kills it.
"""

import asyncio
import os
import pathlib
import signal
import subprocess
import sys

from aiohttp import web


async def main(model: pathlib.Path, port: int) -> None:
    if (model / "refuses").exists():
        sys.exit(3)
    if (model / "stubborn").exists():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    worker = subprocess.Popen(["sleep", "600"])

    async def health(request):
        return web.Response(status=503 if (model / "never").exists() else 200)

    async def info(request):
        return web.json_response({"model_path": str(model), "pids": [os.getpid(), worker.pid]})

    async def generate(request):
        body = await request.json()
        try:
            await asyncio.sleep(body.get("seconds", 0))
        except asyncio.CancelledError:
            (model / "hung_up").touch()
            raise
        if "content" in body:
            return web.json_response(body["content"], status=body["status"])
        meta = {"weight_version": "default", "weight_versions": ["x"], "read": str(model)}
        response = {"output_ids": [5, 1], "meta_info": meta}
        return web.json_response([response] * body["n"] if body["n"] > 1 else response)

    async def die(request):
        os._exit(7)

    app = web.Application()
    app.add_routes(web.get(path, health) for path in ("/health", "/health_generate"))
    app.add_routes(web.get(path, info) for path in ("/get_model_info", "/get_server_info"))
    app.add_routes([web.post("/generate", generate), web.post("/tokenize", die)])
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(pathlib.Path(sys.argv[1]), int(sys.argv[2])))
