"""A server for the supervisor's tests: `python stand_in.py MODEL PORT`.

It generates nothing, after as many `seconds` as it is asked to take. Files in the directory MODEL
make it misbehave: `refuses` (it ends at once), `never` (it does not become healthy), `stubborn` (it
ignores SIGTERM). A worker, another process, lives beside it.
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
        if "answer" in body:
            return web.json_response(body["answer"], status=body["status"])
        meta = {"weight_version": "default", "weight_versions": ["x"], "read": str(model)}
        response = {"output_ids": [5, 1], "meta_info": meta}
        return web.json_response([response] * body["n"] if body["n"] > 1 else response)

    async def die(request):
        os._exit(7)

    app = web.Application()
    app.add_routes(
        [
            web.get("/health", health),
            web.get("/health_generate", health),
            web.get("/get_model_info", info),
            web.get("/get_server_info", info),
            web.post("/generate", generate),
            web.post("/tokenize", die),
        ]
    )
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(pathlib.Path(sys.argv[1]), int(sys.argv[2])))
