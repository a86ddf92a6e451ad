"""A checkpoint of another number of hosts: who takes over which prompts."""

from collections.abc import Sequence
from typing import Any


def take_over(saved: Sequence[dict[str, Any]], *, host: int, hosts: int) -> dict[str, Any]:
    """The share with which one of `hosts` hosts goes on from the shares of another number.

    Host h of H drew the prompts h, H + h, 2 H + h, ... of one stream. It goes on at the first round
    of the new hosts that begins at or before the place which the fastest host had reached; prompts
    before that place which were not trained on yet, because they were in a buffer, outstanding, or
    because a slower host had not come to them, are sampled again, dealt out in turn. So every
    prompt is sampled, and up to hosts - 1 a second time.

    Args:
      saved: shares by host, as Supply.state has them.
      host, hosts: which host asks, of how many.
    """
    streams = [share["worker"]["prompts"] for share in saved]
    places = [stream["stream"]["stream_index"] for stream in streams]
    reached = max(places)
    start = reached // hosts * hosts
    again = set()
    for old_host, (share, stream, place) in enumerate(zip(saved, streams, places, strict=True)):
        again |= {prompt[1] for prompt in share["buffer"]["prompts"]}
        again |= {*share["worker"]["again"], *stream["chosen"]}
        again |= set(range(place + old_host, reached, len(saved)))
    mine = sorted(draw for draw in again if draw < start)[host::hosts]
    prompts = {**streams[places.index(reached)], "chosen": []}
    same = saved[min(host, len(saved) - 1)]
    return {
        "worker": {"prompts": prompts, "again": mine, "totals": {}},
        "teacher": same["teacher"],
        "ledger": same["ledger"] if host < len(saved) else 0,
        "recorded": saved[0]["recorded"],
        "unpaid": max(share["unpaid"] for share in saved),
        "shards": same["shards"],
    }
