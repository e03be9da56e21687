"""Requests before a run, sent and not counted: servers compile and allocate as shapes first come."""

import asyncio
from collections.abc import Sequence

import aiohttp

from replay.client import CompletionsClient
from replay.clock import now_ns
from replay.engines.attach import bearer
from replay.engines.base import Served
from replay.plan import Plan
from replay.prompts import completion_body, prompt_json
from replay.stream import Record
from replay.workload import through_proxies
from tracegen.errors import ReplayError

_OUTPUT_TOKENS = 16  # enough to decode as one batch
_SALT = 1  # other ids than the run's own: a prefix cache must not know them


async def warm_up(plan: Plan, served: Sequence[Served], salt: int) -> None:
    """Send each server `plan.warmups` requests at once, of input lengths spread over the trace's.

    Raises `ReplayError` when one is not answered: neither would the run be.
    """
    sizes = plan.survey.input_quantiles([(i + 1) / plan.warmups for i in range(plan.warmups)])
    await asyncio.gather(*(_warm_one(plan, server, sizes, salt) for server in served))


async def _warm_one(plan: Plan, server: Served, sizes: Sequence[int], salt: int) -> None:
    limit = server.max_model_len or max(sizes) + _OUTPUT_TOKENS
    proxies = through_proxies(server.base_url)
    async with aiohttp.ClientSession(headers=bearer(server.api_key), trust_env=proxies) as session:
        client = CompletionsClient(session, server.base_url, plan.options.request_timeout_s)
        records = []
        async with asyncio.TaskGroup() as group:
            for i, size in enumerate(sizes):
                size_fit = max(1, min(size, limit - _OUTPUT_TOKENS))
                output = min(_OUTPUT_TOKENS, limit - size_fit)
                ids = prompt_json(salt ^ _SALT, i, size_fit)
                body = completion_body(server.model, ids, output, exact=plan.options.exact)
                record = Record(i, 0, now_ns(), output)
                records.append(record)
                group.create_task(client.send(record, body, name=f"warmup-{i}"))
    failed = next((r for r in records if r.status not in {"ok", "length_mismatch"}), None)
    if failed is not None:
        what = f"{failed.status}{'' if failed.http_status is None else f' {failed.http_status}'}"
        raise ReplayError(f"{server.base_url} does not answer a first request ({what}: {failed.error})")
